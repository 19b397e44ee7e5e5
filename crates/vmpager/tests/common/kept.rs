//! A daemon that may be killed: its keeper a thread of this process, its workers
//! processes that kill themselves.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use vmpager::clean::CleanPages;
use vmpager::core::ByteRange;
use vmpager::{Daemon, DaemonConfig, Keeper, KeeperConfig, KeeperEnd, KeeperError, KeeperLink};
use vmpager_sys::peer::send_with_fds;

use super::{Random, child, faulty};

/// What workers do.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Pages of the source.
    pub(crate) pages: usize,
    /// Every read takes so long, and none is at hand.
    pub(crate) slow_us: Option<u64>,
    pub(crate) fill: bool,
    /// They live for so many milliseconds at most.
    pub(crate) kill_within_ms: Option<u64>,
    /// The place where they are killed, and when they come there for the how
    /// many-th time: the first worker after so many, the second after one less,
    /// and so on; then they live.
    pub(crate) point: Option<(String, u32)>,
    /// The last page never comes.
    pub(crate) hold_last: bool,
    /// They are of a program that reads page maps and records of another version.
    pub(crate) other_layout: bool,
    /// Other processes may take part.
    pub(crate) attach: bool,
    /// VMs may share the pages they have not written to.
    pub(crate) clean: bool,
}

/// A keeper that runs.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) socket: PathBuf,
    dir: TempDir,
    stopper: UnixStream,
    thread: Option<KeeperThread>,
}

const WORKER: &str = "kept ";
const DOORS: &str = "doors";

impl Kept {
    /// The test that calls this has to call [`run_if_worker`] first.
    pub(crate) fn start(test: &str, plan: &Plan) -> Self {
        super::log::everywhere();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("pager.sock");
        fs::create_dir(dir.path().join(DOORS)).unwrap();
        let (stopper, thread) = run_keeper(test, plan, dir.path(), false);
        let until = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < until, "no socket");
            std::thread::sleep(Duration::from_millis(1));
        }
        Self { socket, dir, stopper, thread: Some(thread) }
    }

    /// Has another keeper take over.
    pub(crate) fn replace(&mut self, test: &str, plan: &Plan) {
        let (stopper, thread) = run_keeper(test, plan, self.dir.path(), true);
        let old = self.thread.replace(thread).unwrap().join().unwrap().unwrap();
        assert_eq!(old, KeeperEnd::Replaced);
        self.stopper = stopper;
    }

    /// What is wrong with replacing it by a keeper whose workers do this.
    pub(crate) fn cannot_be_replaced(&self, test: &str, plan: &Plan) -> String {
        let (_, thread) = run_keeper(test, plan, self.dir.path(), true);
        thread.join().unwrap().unwrap_err().to_string()
    }

    /// Where other processes take part, if they may.
    pub(crate) fn doors(&self) -> PathBuf {
        self.dir.path().join(DOORS)
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// How many workers were killed, or are about to be.
    pub(crate) fn kills(&self) -> usize {
        self.count("kills")
    }

    /// How many were started, where they are killed at a point.
    #[cfg(feature = "kill-points")]
    pub(crate) fn starts(&self) -> usize {
        self.count("starts")
    }

    fn count(&self, what: &str) -> usize {
        fs::metadata(self.dir.path().join(what)).map_or(0, |m| m.len()).try_into().unwrap()
    }

    /// Stops it; the last worker must end well.
    pub(crate) fn stop(mut self) {
        fs::write(self.dir.path().join("calm"), []).unwrap();
        self.stopper.write_all(b"x").unwrap();
        match self.thread.take().unwrap().join().unwrap().unwrap() {
            KeeperEnd::Worker(status) => assert!(status.success(), "{status}"),
            other => panic!("{other:?}"),
        }
        assert!(!self.socket.exists(), "the socket is left behind");
    }
}

type KeeperThread = JoinHandle<Result<KeeperEnd, KeeperError>>;

fn run_keeper(test: &str, plan: &Plan, dir: &Path, replace: bool) -> (UnixStream, KeeperThread) {
    let task = format!("{WORKER}{}", serde_json::to_string(&(plan, dir)).unwrap());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    command.env(child::TASK, task).stdout(std::process::Stdio::null());
    let mut config = KeeperConfig::new(dir.join("pager.sock"), command);
    config.first_pause = Duration::from_millis(1);
    config.max_pause = Duration::from_millis(1);
    config.replace = replace;
    if plan.clean {
        config.hold_clean_pages().unwrap();
    }
    let keeper = Keeper::new(config).unwrap();
    let stopper = keeper.stopper().unwrap();
    (stopper, std::thread::spawn(|| keeper.run()))
}

/// Runs the worker this process was started as, if it was; then returns true.
pub(crate) fn run_if_worker() -> bool {
    let Some(task) = child::task() else { return false };
    let Some(task) = task.strip_prefix(WORKER) else { return false };
    let (plan, dir): (Plan, PathBuf) = serde_json::from_str(task).unwrap();
    super::log::everywhere();
    let channel = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    if plan.other_layout {
        // What a worker says when it is ready: that, its layout, what it serves.
        let words = [16, 99_u64 << 32 | 1, 0, 0].map(u64::to_le_bytes);
        send_with_fds(&channel, words.as_flattened(), &[]).unwrap();
        std::thread::sleep(Duration::from_secs(60));
        return true;
    }
    if let Some(most) = plan.kill_within_ms {
        let seed = u64::from(std::process::id());
        let dir = dir.clone();
        std::thread::spawn(move || {
            let mut random = Random::new(seed);
            // Who comes to a door has to find somebody who lives long enough to answer.
            let most = if plan.attach { most << random.below(6) } else { most };
            let lives = random.below(usize::try_from(most).unwrap() * 1000);
            std::thread::sleep(Duration::from_micros(lives as u64));
            if count(&dir) {
                rustix::process::kill_process(
                    rustix::process::getpid(),
                    rustix::process::Signal::KILL,
                )
                .unwrap();
            }
        });
    }
    #[cfg(feature = "kill-points")]
    if let Some((point, first)) = &plan.point {
        let before = u32::try_from(note(&dir, "starts")).unwrap();
        // To come to the places of a takeover, somebody has to be killed first.
        let takeover = matches!(point.as_str(), "left applied" | "taken over" | "welcomed");
        match before {
            0 if takeover => vmpager::kill::arm("planned", 5),
            _ if before < *first => vmpager::kill::arm(point, first - before),
            _ => {}
        }
    }
    let source = faulty(plan.pages);
    if let Some(us) = plan.slow_us {
        source.delay(ByteRange::new(0, 1 << 40), Duration::from_micros(us));
    }
    if plan.hold_last {
        source.hold(ByteRange::new(((plan.pages - 1) * 4096) as u64, 4096));
    }
    let mut link = KeeperLink::meet(channel).unwrap();
    let mut config = DaemonConfig::new("", source.clone() as Arc<_>);
    config.clean = plan
        .clean
        .then(|| Arc::new(CleanPages::open(link.clean_pages().unwrap(), &*source).unwrap()));
    config.options.background_fill = plan.fill;
    config.attach = plan.attach.then(|| dir.join(DOORS));
    config.workers = 2;
    config.partial = true;
    config.stop_timeout = Duration::from_millis(100);
    // As `vmpager serve` does.
    vmpager::sandbox::filter_calls().unwrap();
    let daemon = Daemon::kept(config, link).unwrap();
    daemon.run(&mut |_| {}).unwrap();
    true
}

/// Counts one more kill, unless there shall be none any more.
fn count(dir: &Path) -> bool {
    let calm = dir.join("calm").exists();
    if !calm {
        note(dir, "kills");
    }
    !calm
}

/// Counts one more of something. Returns how many there were.
fn note(dir: &Path, what: &str) -> u64 {
    let path = dir.join(what);
    let before = fs::metadata(&path).map_or(0, |m| m.len());
    let file = fs::OpenOptions::new().create(true).append(true).open(path);
    file.unwrap().write_all(b"x").unwrap();
    before
}
