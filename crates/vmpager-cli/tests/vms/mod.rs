//! A daemon as its users start it, and VMs that check every byte it brings them.
#![allow(dead_code, reason = "each test binary uses a part")]

/// The name of the test that calls it, for its children.
macro_rules! this_test {
    () => {{
        fn here() {}
        let path = std::any::type_name_of_val(&here);
        path.strip_suffix("::here").unwrap().rsplit("::").next().unwrap()
    }};
}

#[path = "../../../vmpager/tests/common/child.rs"]
pub(crate) mod child;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

pub(crate) const VMPAGER: &str = env!("CARGO_BIN_EXE_vmpager");
pub(crate) const PAGE: usize = 4096;

/// Whether this machine has a userfaultfd for us; says so if not.
pub(crate) fn have_userfaultfd() -> bool {
    match Userfaultfd::open(Features::EVENT_REMOVE) {
        Ok(_) => true,
        Err(error) => {
            vmpager_testing::skipped(&error.to_string());
            false
        }
    }
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < until, "{what}: not after 30 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends this process if a test hangs: a thread that waits for a page cannot be ended
/// otherwise.
pub(crate) fn watchdog(what: &'static str) -> mpsc::Sender<()> {
    let (alive, ended) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(180)) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = writeln!(std::io::stderr(), "{what} hangs");
            std::process::abort();
        }
    });
    alive
}

/// The processes that a process has started.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// Kills processes that may have ended by now.
pub(crate) fn kill_all(pids: &[u32]) {
    for pid in pids {
        let _ = kill_process(Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap(), Signal::KILL);
    }
}

/// Descriptors that a process has.
pub(crate) fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Where a daemon works: its memory file, of which each word is its own offset plus
/// one, its socket, its log.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) dir: TempDir,
    pub(crate) pages: usize,
}

impl Place {
    pub(crate) fn new(pages: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..pages).flat_map(source_page).collect();
        fs::write(dir.path().join("memory"), bytes).unwrap();
        Self { dir, pages }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("pager.sock")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits for a line of the log that has all these words.
    pub(crate) fn expect_log(&self, words: &[&str]) -> String {
        let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
        let mut found = None;
        let until = Instant::now() + Duration::from_secs(30);
        while found.is_none() {
            assert!(Instant::now() < until, "no {words:?} in {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
            found = self.log().lines().find(has_all).map(str::to_owned);
        }
        found.unwrap()
    }

    /// The command that serves, its log appended to the place's.
    pub(crate) fn command(&self, program: &[&str], args: &[&str]) -> Command {
        let log = File::options().create(true).append(true).open(self.path("log")).unwrap();
        let (first, more) = program.split_first().unwrap();
        let mut command = Command::new(first);
        command.args(more).args(["serve", "--socket"]).arg(self.socket());
        command.arg("--memory").arg(self.path("memory")).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command
    }

    /// Serves, and waits until VMs may connect.
    pub(crate) fn serve(&self, args: &[&str]) -> Serving {
        self.serve_by(&[VMPAGER], args)
    }

    /// The same, started by another program.
    pub(crate) fn serve_by(&self, program: &[&str], args: &[&str]) -> Serving {
        let serving = Serving { child: self.command(program, args).spawn().unwrap() };
        eventually("the socket", || self.socket().exists());
        serving
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log:\n{}", self.log());
        }
    }
}

/// A daemon that runs; ended when dropped.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) child: Child,
}

impl Serving {
    pub(crate) fn keeper(&self) -> u32 {
        self.child.id()
    }

    /// The worker, once there is one.
    pub(crate) fn worker(&self) -> u32 {
        let mut worker = None;
        eventually("a worker", || {
            worker = children(self.keeper()).first().copied();
            worker.is_some()
        });
        worker.unwrap()
    }

    /// Tells it to end, which it must do well.
    pub(crate) fn stop(mut self) {
        signal(self.keeper(), Signal::TERM);
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let workers = children(self.keeper());
            let _ = self.child.kill();
            let _ = self.child.wait();
            kill_all(&workers);
        }
    }
}

fn source_page(page: usize) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    for (at, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = ((page * PAGE + at * 8) as u64 + 1).to_le_bytes();
    }
    bytes
}

/// A VM's memory, and what each page of it must hold.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) memory: Arc<Mapping>,
    pub(crate) uffd: OwnedFd,
    given_back: Vec<bool>,
    seed: u64,
}

impl Vm {
    pub(crate) fn new(pages: usize) -> Self {
        Self::with(pages, Features::EVENT_REMOVE)
    }

    pub(crate) fn with(pages: usize, features: Features) -> Self {
        let memory = Arc::new(Mapping::for_pager(pages * PAGE).unwrap());
        let uffd = Userfaultfd::open(features).unwrap();
        uffd.register_missing(&GuestRange::of_mapping(&memory)).unwrap();
        let uffd = uffd.duplicate().unwrap();
        Self { memory, uffd, given_back: vec![false; pages], seed: 0x9e37_79b9_7f4a_7c15 }
    }

    /// What is sent to hand it over.
    pub(crate) fn handshake(&self) -> String {
        let (hva, size) = (self.memory.hva(), self.memory.len());
        json!([{"base_host_virt_addr": hva, "size": size, "offset": 0, "page_size": PAGE}])
            .to_string()
    }

    pub(crate) fn hand_over(&self, socket: &UnixStream) {
        send_with_fds(socket, self.handshake().as_bytes(), &[self.uffd.as_fd()]).unwrap();
    }

    /// Looks at every byte of a page.
    pub(crate) fn check(&self, page: usize) {
        let mut bytes = [0; PAGE];
        self.memory.read(page * PAGE, &mut bytes);
        let expected = if self.given_back[page] { [0; PAGE] } else { source_page(page) };
        assert!(bytes == expected, "page {page} holds other bytes");
    }

    pub(crate) fn check_all(&self) {
        (0..self.given_back.len()).for_each(|page| self.check(page));
    }

    /// Looks at some page, and now and then gives one back first.
    fn act(&mut self) {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let page = usize::try_from(self.seed >> 16).unwrap() % self.given_back.len();
        if self.seed.is_multiple_of(16) {
            self.memory.discard(page * PAGE..(page + 1) * PAGE).unwrap();
            self.given_back[page] = true;
        }
        self.check(page);
    }
}

const NEWCOMER: &str = "newcomer ";

/// A new VM, in a process of its own, connects and has all its memory. The test that
/// calls this has to call [`run_if_newcomer`] first.
pub(crate) fn newcomer_is_served(test: &str, socket: &Path, pages: usize) {
    let mut child = child::spawn(test, &format!("{NEWCOMER}{pages}@{}", socket.display()));
    assert_eq!(child.hear(), "every byte is right");
    assert!(child.wait().success());
}

/// Is that VM, if this process was started as one; then returns true.
pub(crate) fn run_if_newcomer() -> bool {
    let Some(task) = child::task() else { return false };
    let Some((pages, socket)) = task.strip_prefix(NEWCOMER).and_then(|task| task.split_once('@'))
    else {
        return false;
    };
    let vm = Vm::new(pages.parse().unwrap());
    vm.hand_over(&UnixStream::connect(socket).unwrap());
    vm.check_all();
    child::say("every byte is right");
    true
}

/// A VM that runs in a thread, and checks what it touches.
#[derive(Debug)]
pub(crate) struct Running {
    touched: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    _socket: UnixStream,
}

impl Running {
    pub(crate) fn start(socket: &Path, pages: usize) -> Self {
        let socket = UnixStream::connect(socket).unwrap();
        let mut vm = Vm::new(pages);
        vm.hand_over(&socket);
        let (touched, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (touched, stop) = (touched.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    vm.act();
                    touched.fetch_add(1, Ordering::Relaxed);
                    // So that it misses pages all the time the test takes.
                    std::thread::sleep(Duration::from_micros(500));
                }
                vm.check_all();
            }
        });
        let running = Self { touched, stop, thread, _socket: socket };
        running.goes_on();
        running
    }

    /// It is served.
    pub(crate) fn goes_on(&self) {
        let before = self.touched.load(Ordering::Relaxed);
        eventually("the VM goes on", || {
            assert!(!self.thread.is_finished(), "it has read another byte");
            self.touched.load(Ordering::Relaxed) > before + 20
        });
    }

    /// Ends it; all its bytes were right.
    pub(crate) fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("every byte is right");
    }
}
