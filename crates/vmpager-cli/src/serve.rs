//! `vmpager serve`: the daemon.

pub(crate) mod limits;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};
use vmpager::clean::{self, CleanPages};
use vmpager::core::PageSource;
use vmpager::daemon::DaemonEvent;
use vmpager::metrics::Endpoint;
use vmpager::sandbox::{self, SandboxError};
use vmpager::{
    Access, Daemon, DaemonConfig, Keeper, KeeperConfig, KeeperEnd, KeeperLink, NeighbourPolicy,
    ServeOptions, SessionSummary,
};
use vmpager_store::RawFile;
use vmpager_store::image::{Image, MemoryInput};
use vmpager_store::profile::{Profile, Recorder};
use vmpager_sys::inherited::listen_fds;

use self::limits::Limits;
use crate::image::{Parents, open_over};
use crate::remote::{RemoteArgs, RemoteReport};
use crate::{output, size};

/// Options of `vmpager serve`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example, with Firecracker:\n  \
    vmpager serve --socket /run/vm/pager.sock --memory /snap/mem --background-fill &\n  \
    curl --unix-socket /run/fc.sock -X PUT http://localhost/snapshot/load -d '{\n    \
    \"snapshot_path\": \"/snap/vmstate\", \"resume_vm\": true,\n    \
    \"mem_backend\": {\"backend_type\": \"Uffd\", \"backend_path\": \"/run/vm/pager.sock\"}}'\n\n\
    vmpager serve --socket /run/vm/pager.sock --image /snap/mem.vmimg \\\n      \
    --profile /snap/mem.vmprof --record /snap/mem.vmprof\n\n\
    An image at a server, and what was fetched of it kept for the next time:\n  \
    vmpager serve --socket /run/vm/pager.sock --image http://images:8080/mem.vmimg \\\n      \
    --cache /var/cache/vmpager --cache-size 20G\n\n\
    Many VMs of one image, with one copy of the pages that they have not written to:\n  \
    vmpager serve --socket /run/vm/pager.sock --image /snap/mem.vmimg --share-clean &\n  \
    vmpager vm restore --state /snap/vmstate --memory /snap/mem \\\n    \
    --pager /run/vm/pager.sock --share-clean\n\n\
    With a device back-end that takes part in the memory (docs/sharing.md):\n  \
    vmpager serve --socket /run/vm/pager.sock --memory /snap/mem --attach /run/vm/doors &\n  \
    vmpager vm restore --state /snap/vmstate --memory /snap/mem \\\n    \
    --pager /run/vm/pager.sock --attach /run/vm/doors &\n  \
    my-back-end --memory /run/vm/doors/$!.sock\n\n\
    Watched by Prometheus, or any other scraper, and by `vmpager top`:\n  \
    vmpager serve --socket /run/vm/pager.sock --memory /snap/mem --metrics 127.0.0.1:9464 &\n  \
    curl http://127.0.0.1:9464/metrics\n  \
    vmpager top --metrics 127.0.0.1:9464\n\n\
    Hundreds of VMs may connect, and are served in turns; --max-sessions, --max-memory,\n\
    --max-reads and --bandwidth limit what each may take:\n  \
    vmpager serve --socket /run/vm/pager.sock --memory /snap/mem --background-fill \\\n      \
    --max-sessions 200 --bandwidth 256M/s\n\n\
    For VMMs that run as other users, each as its own (see docs/security.md):\n  \
    vmpager serve --socket /run/vm/pager.sock --memory /snap/mem --allow-gid 995\n\n\
    The memory file must not change meanwhile.\n\
    SIGTERM and SIGINT stop it: what is in flight is finished first, and each VM\n\
    that still misses memory is named.\n\n\
    It is two processes: a keeper, which holds descriptors and does nothing else, and\n\
    a worker, which serves. A worker that dies, of SIGKILL too, is replaced at once,\n\
    and the VMs go on (docs/daemon.md). So they do when the program is upgraded:\n  \
    vmpager serve --replace --socket /run/vm/pager.sock --memory /snap/mem")]
pub(crate) struct ServeArgs {
    /// Unix socket to listen on; it exists once VMMs may connect.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) socket: PathBuf,
    #[command(flatten)]
    pub(crate) access: AccessArgs,
    /// The memory file of the snapshot.
    #[arg(long, value_name = "FILE", required_unless_present = "image")]
    pub(crate) memory: Option<PathBuf>,
    /// A packed image of the memory instead (`vmpager image pack`): a file, or an
    /// `http://` or `https://` URL at a server of ranges (docs/remote.md).
    #[arg(long, value_name = "IMAGE", conflicts_with = "memory")]
    pub(crate) image: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) parents: Parents,
    /// Keep so much of the image decoded, for all VMs together. With as much as the
    /// memory has contents, it is decoded once, however many VMs there are
    /// [default: 8 MiB, for neighbours of pages only].
    #[arg(long, value_name = "SIZE", requires = "image", value_parser = size::parse)]
    pub(crate) image_cache: Option<u64>,
    /// Have VMs that ask for it share the pages of the image that they have not written
    /// to: one copy for all (`vmpager vm restore --share-clean`; docs/clean-pages.md). What
    /// any of them touched stays in memory until the pager ends.
    #[arg(long, requires = "image", conflicts_with_all = ["attach", "collapse"])]
    pub(crate) share_clean: bool,
    #[command(flatten)]
    pub(crate) remote: RemoteArgs,
    /// Bring in what this profile says first, while the VM runs (`vmpager profile
    /// record`). One that proves wrong is given up.
    #[arg(long, value_name = "PROFILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Record which pages VMs waited for; with --profile, those it lacked or was late
    /// with. If the file is there, it is added to it, after each session.
    #[arg(long, value_name = "PROFILE")]
    pub(crate) record: Option<PathBuf>,
    /// Bring in all memory while the VM runs, then detach from it.
    #[arg(long)]
    pub(crate) background_fill: bool,
    /// Make huge pages of 2 MiB that are in place, in the VM's process: its guest
    /// then pays for 2 MiB once, not for every page. Takes the pager 0.5 ms
    /// each, and the right to trace the VMM and CAP_SYS_NICE.
    #[arg(long)]
    pub(crate) collapse: bool,
    /// What to bring in beside a page that was touched.
    #[arg(long, value_enum, default_value_t = Prefetch::Mixed)]
    pub(crate) prefetch: Prefetch,
    /// Threads that serve [default: one per CPU, 4 at most].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) workers: Option<u16>,
    #[command(flatten)]
    pub(crate) limits: Limits,
    /// Accept VMs whose regions cover only part of the file.
    #[arg(long)]
    pub(crate) partial: bool,
    /// Give each VM a socket PID.sock in this directory, by its VMM's process
    /// id, where other processes (device back-ends) may take part in its memory.
    #[arg(long, value_name = "DIR")]
    pub(crate) attach: Option<PathBuf>,
    /// Seconds a peer may take to send its handshake.
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) handshake_timeout: u64,
    /// Keep this file up to date with the sessions' numbers, as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) metrics_json: Option<PathBuf>,
    /// Show numbers here: OpenMetrics at /metrics, all sessions at /sessions.json
    /// (docs/metrics.md). ADDRESS:PORT or unix:PATH. Whoever gets there may read
    /// them.
    #[arg(long, value_name = "ENDPOINT")]
    pub(crate) metrics: Option<Endpoint>,
    /// Stop when the first session has ended.
    #[arg(long)]
    pub(crate) once: bool,
    /// Take over from the daemon that has the socket, with all its VMs: an upgrade. It
    /// must serve the same, and ends with status 0.
    #[arg(long)]
    pub(crate) replace: bool,
    /// Let the worker make any system call, for debugging. Otherwise it can make those
    /// that serving takes, and others fail with EPERM (docs/security.md).
    #[arg(long)]
    pub(crate) no_seccomp: bool,
    /// Be the process that serves, for the keeper at standard input.
    #[arg(long, hide = true)]
    pub(crate) kept: bool,
    /// Serve in this process, for benchmarks: nobody takes over from it.
    #[arg(long, hide = true, conflicts_with_all = ["kept", "replace"])]
    pub(crate) alone: bool,
    /// Print one JSON object with all sessions when it stops.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Who may connect.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct AccessArgs {
    /// Admit VMMs of this user, by number; may be repeated. Root and the user of the
    /// daemon are admitted, too, and others no longer. Without it, and without
    /// --allow-gid, whoever the socket's file lets in is.
    #[arg(long, value_name = "UID")]
    pub(crate) allow_uid: Vec<u32>,
    /// Admit VMMs that run with this group, by number; may be repeated.
    #[arg(long, value_name = "GID")]
    pub(crate) allow_gid: Vec<u32>,
    /// Permissions of the socket's file, in octal; to connect is to write. [default:
    /// by the umask; with --allow-uid or --allow-gid, 666]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub(crate) socket_mode: Option<u32>,
    /// The group of the socket's file, by number.
    #[arg(long, value_name = "GID")]
    pub(crate) socket_group: Option<u32>,
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("give three octal digits, as in 660".into()),
    }
}

impl From<&AccessArgs> for Access {
    fn from(args: &AccessArgs) -> Self {
        Self {
            uids: args.allow_uid.clone(),
            gids: args.allow_gid.clone(),
            mode: args.socket_mode,
            group: args.socket_group,
        }
    }
}

/// What to bring in beside a page that was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Prefetch {
    /// Nothing.
    Off,
    /// A window that doubles with each fault in the same 2 MiB.
    Adaptive,
    /// What comes next where faults follow each other at equal steps.
    Stride,
    /// Where they do, as stride; elsewhere as adaptive.
    Mixed,
}

impl From<Prefetch> for NeighbourPolicy {
    fn from(prefetch: Prefetch) -> Self {
        match prefetch {
            Prefetch::Off => Self::Off,
            Prefetch::Adaptive => Self::Adaptive { first_window_shift: 0 },
            Prefetch::Stride => Self::Strides,
            Prefetch::Mixed => Self::Mixed,
        }
    }
}

impl ServeArgs {
    /// The files that are served: the memory, then layers that may be below it.
    fn source_paths(&self) -> impl Iterator<Item = &Path> {
        let first = self.image.iter().chain(&self.memory);
        first.map(PathBuf::as_path).chain(self.parents.paths())
    }
}

/// What `--json` prints and `--metrics-json` keeps.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct ServeReport {
    /// Sessions being served.
    pub(crate) active: u64,
    /// Sessions that have ended.
    pub(crate) ended: u64,
    /// The most memory this process was resident with so far, in bytes.
    pub(crate) peak_rss_bytes: Option<u64>,
    /// What was asked of servers, if the image is at one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remote: Option<RemoteReport>,
    /// Pages in memory that VMs share, with `--share-clean`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) clean_pages: Option<u64>,
    /// The latest sessions that have ended, oldest first.
    pub(crate) sessions: VecDeque<SessionSummary>,
}

/// Sessions kept in a report.
const MAX_SESSIONS: usize = 1000;

/// How much of the memory file the daemon may have in its page tables: the
/// pages are the page cache's, but count as its resident memory.
const MAX_MAPPED: u64 = 6 << 20;
/// Bytes of cold reads in flight, all workers together.
const MAX_BUFFERED: usize = 4 << 20;

pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    limits::allow_descriptors();
    let keeper = match (args.kept, args.alone) {
        (false, false) => return keep(args),
        (false, true) => None,
        (true, _) => {
            as_far_as_there_is(sandbox::give_up_rights(args.collapse))?;
            let channel = io::stdin().as_fd().try_clone_to_owned()?;
            Some(KeeperLink::meet(channel).context("--kept is for the keeper to give")?)
        }
    };
    let mut report = serve_for(args, keeper)?;
    if args.json {
        report.peak_rss_bytes = peak_rss();
        output::json(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The keeper.
fn keep(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let inherited = listen_fds().context("descriptors from the service manager")?;
    // This program once more, whatever has become of its name.
    let mut worker = Command::new("/proc/self/exe");
    worker.args(std::env::args_os().skip(1)).arg("--kept");
    // The keeper's alone.
    for variable in ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"] {
        worker.env_remove(variable);
    }
    let mut config = KeeperConfig::new(&args.socket, worker);
    // What cannot be opened, the worker complains about.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let open = |path: &Path| {
        let opened = rustix::fs::open(path, flags, Mode::empty()).ok()?;
        Some((path.to_owned(), opened))
    };
    config.sources = args.source_paths().map_while(open).collect();
    if args.share_clean {
        config.hold_clean_pages().context("memory for clean pages")?;
    }
    config.inherited = inherited;
    config.access = Access::from(&args.access);
    config.replace = args.replace;
    config.metrics.clone_from(&args.metrics);
    let keeper = Keeper::new(config)?;
    stop_by_signals(|| keeper.stopper())?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGUSR2, keeper.leaver()?)
        .context("catching signals")?;
    Ok(match keeper.run()? {
        KeeperEnd::Replaced | KeeperEnd::Left => ExitCode::SUCCESS,
        KeeperEnd::Worker(status) => match status.code().map(u8::try_from) {
            Some(Ok(code)) => ExitCode::from(code),
            _ => ExitCode::FAILURE,
        },
    })
}

/// A kernel that cannot confine anybody is no reason not to serve.
fn as_far_as_there_is(confined: Result<(), SandboxError>) -> Result<(), SandboxError> {
    match confined {
        Err(error @ SandboxError::Lacking(_)) => {
            warn!("{error}: this process is less confined than it should be");
            Ok(())
        }
        other => other,
    }
}

fn stop_by_signals(stopper: impl Fn() -> io::Result<UnixStream>) -> anyhow::Result<()> {
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, stopper()?).context("catching signals")?;
    }
    Ok(())
}

/// Serves until told to stop, or until the first session has ended: in this
/// process, which nobody takes over from.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<ServeReport> {
    serve_for(args, None)
}

fn serve_for(args: &ServeArgs, mut keeper: Option<KeeperLink>) -> anyhow::Result<ServeReport> {
    let clean = match (&mut keeper, args.share_clean) {
        (_, false) => None,
        (Some(keeper), true) => Some(keeper.clean_pages()?),
        (None, true) => Some(clean::files()?),
    };
    let held = keeper.as_mut().map(KeeperLink::sources).unwrap_or_default();
    let (source, memory) = open(args, &held)?;
    let clean = clean.map(|files| CleanPages::open(files, &*source)).transpose()?.map(Arc::new);
    let learning = Learning::open(args, &memory)?;
    let mut config = DaemonConfig::new(&args.socket, source);
    config.access = Access::from(&args.access);
    config.options = ServeOptions {
        background_fill: args.background_fill,
        huge_pages: args.collapse,
        neighbours: args.prefetch.into(),
        replay: learning.profile.as_ref().map(ServeOptions::order_of),
        record: learning.record.as_ref().map(|(_, recorder)| Arc::clone(recorder)),
        limits: args.limits.of_session(),
    };
    args.limits.apply(&mut config)?;
    config.workers = workers(args);
    config.partial = args.partial;
    config.once = args.once;
    config.attach.clone_from(&args.attach);
    config.clean.clone_from(&clean);
    config.handshake_timeout = Duration::from_secs(args.handshake_timeout);
    let (name, memory_bytes) = (config.source.name(), config.source.len());
    let workers = config.workers;

    let daemon = match keeper {
        Some(keeper) => {
            if !args.no_seccomp {
                as_far_as_there_is(sandbox::filter_calls())?;
            }
            Daemon::kept(config, keeper)?
        }
        None => Daemon::bind(config)?,
    };
    stop_by_signals(|| daemon.stopper())?;
    info!(
        socket = %args.socket.display(),
        memory = %name,
        memory_bytes,
        workers,
        "serving"
    );
    let mut report = ServeReport::default();
    let keep_metrics = |report: &mut ServeReport| {
        let Some(path) = &args.metrics_json else { return Ok(()) };
        report.peak_rss_bytes = peak_rss();
        report.remote = memory.remote_numbers().map(RemoteReport::from);
        report.clean_pages = clean.as_ref().map(|clean| clean.count());
        output::replace_file(path, &serde_json::to_vec_pretty(report)?)
    };
    keep_metrics(&mut report)?;
    daemon.run(&mut |event| {
        match event {
            DaemonEvent::SessionStarted { .. } => report.active += 1,
            DaemonEvent::SessionEnded(summary) => {
                report.add(summary);
                if let Err(error) = learning.save() {
                    error!("{error:#}");
                }
            }
        }
        if let Err(error) = keep_metrics(&mut report) {
            error!("{error:#}");
        }
    })?;
    report.remote = memory.remote_numbers().map(RemoteReport::from);
    report.clean_pages = clean.as_ref().map(|clean| clean.count());
    Ok(report)
}

impl ServeReport {
    fn add(&mut self, ended: &SessionSummary) {
        self.active = self.active.saturating_sub(1);
        self.ended += 1;
        if self.sessions.len() == MAX_SESSIONS {
            self.sessions.pop_front();
        }
        self.sessions.push_back(ended.clone());
    }
}

/// The profile that is replayed, and the one that is recorded.
struct Learning {
    profile: Option<Profile>,
    record: Option<(PathBuf, Arc<Recorder>)>,
}

impl Learning {
    fn open(args: &ServeArgs, memory: &MemoryInput) -> anyhow::Result<Self> {
        let profile = args.profile.as_ref().map(|path| Profile::open_for(path, memory));
        let profile = profile.transpose()?;
        let record = match &args.record {
            None => None,
            Some(path) => {
                let so_far = if path.exists() {
                    Profile::open_for(path, memory)?
                } else {
                    Profile::new(memory.identity()?)
                };
                Some((path.clone(), Arc::new(Recorder::new(so_far))))
            }
        };
        Ok(Self { profile, record })
    }

    /// Writes what was recorded so far.
    fn save(&self) -> anyhow::Result<()> {
        match &self.record {
            Some((path, recorder)) => output::replace_file(path, &recorder.profile().encode()),
            None => Ok(()),
        }
    }
}

/// `VmHWM` of this process.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = field.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn workers(args: &ServeArgs) -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    args.workers.map_or(cpus, usize::from)
}

/// Opens what is served.
fn open(args: &ServeArgs, held: &[OwnedFd]) -> anyhow::Result<(Arc<dyn PageSource>, MemoryInput)> {
    let mut paths = args.source_paths().zip(0..).map(|(path, at)| as_held(path, held.get(at)));
    let first = paths.next().context("give the memory with --memory or --image")?;
    if args.image.is_some() {
        let mut options = Image::options().remote(args.parents.trusting(args.remote.options()));
        if let Some(bytes) = args.image_cache {
            options = options.cache_bytes(usize::try_from(bytes)?);
        }
        options = options.for_many(args.image_cache.is_some() || args.share_clean);
        let image = open_over(&first, paths, options)?;
        return Ok((image.clone(), MemoryInput::image(image)));
    }
    if paths.next().is_some() {
        bail!("--parent names a layer below an --image; a raw memory file has none")
    }
    let buffered = MAX_BUFFERED / workers(args);
    let options = RawFile::options().max_mapped(MAX_MAPPED).max_buffered(buffered);
    Ok((options.open(&first)?, MemoryInput::raw(&first)?))
}

/// Where to open a file that the keeper has opened before: under its own name,
/// unless that means another one by now.
fn as_held(path: &Path, held: Option<&OwnedFd>) -> PathBuf {
    let same = |held: &OwnedFd| {
        let (held, named) = (rustix::fs::fstat(held).ok()?, rustix::fs::stat(path).ok()?);
        Some((held.st_dev, held.st_ino) == (named.st_dev, named.st_ino))
    };
    match held.filter(|held| same(held) != Some(true)) {
        Some(held) => format!("/proc/self/fd/{}", held.as_raw_fd()).into(),
        None => path.to_owned(),
    }
}
