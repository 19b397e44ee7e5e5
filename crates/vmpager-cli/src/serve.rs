//! `vmpager serve`: the daemon.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tracing::{error, info};
use vmpager::core::PageSource;
use vmpager::daemon::DaemonEvent;
use vmpager::{Daemon, DaemonConfig, NeighbourPolicy, ServeOptions, SessionSummary};
use vmpager_store::RawFile;
use vmpager_store::image::MemoryInput;
use vmpager_store::profile::{Profile, Recorder};

use crate::image::Parents;
use crate::output;

/// Options of `vmpager serve`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example, with Firecracker:\n  \
    vmpager serve --socket /run/vm/pager.sock --memory /snap/mem --background-fill &\n  \
    curl --unix-socket /run/fc.sock -X PUT http://localhost/snapshot/load -d '{\n    \
    \"snapshot_path\": \"/snap/vmstate\", \"resume_vm\": true,\n    \
    \"mem_backend\": {\"backend_type\": \"Uffd\", \"backend_path\": \"/run/vm/pager.sock\"}}'\n\n\
    vmpager serve --socket /run/vm/pager.sock --image /snap/mem.vmimg \\\n      \
    --profile /snap/mem.vmprof --record /snap/mem.vmprof\n\n\
    With a device back-end that takes part in the memory (docs/sharing.md):\n  \
    vmpager serve --socket /run/vm/pager.sock --memory /snap/mem --attach /run/vm/doors &\n  \
    vmpager vm restore --state /snap/vmstate --memory /snap/mem \\\n    \
    --pager /run/vm/pager.sock --attach /run/vm/doors &\n  \
    my-back-end --memory /run/vm/doors/$!.sock\n\n\
    Any number of VMs may connect. The memory file must not change meanwhile.\n\
    SIGTERM and SIGINT stop it: what is in flight is finished first, and each VM\n\
    that still misses memory is named.")]
pub(crate) struct ServeArgs {
    /// Unix socket to listen on; it exists once VMMs may connect.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) socket: PathBuf,
    /// The memory file of the snapshot.
    #[arg(long, value_name = "FILE", required_unless_present = "image")]
    pub(crate) memory: Option<PathBuf>,
    /// A packed image of the memory instead (`vmpager image pack`).
    #[arg(long, value_name = "IMAGE", conflicts_with = "memory")]
    pub(crate) image: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) parents: Parents,
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
    #[arg(long, value_enum, default_value_t = Prefetch::Adaptive)]
    pub(crate) prefetch: Prefetch,
    /// Threads that serve [default: one per CPU, 4 at most].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) workers: Option<u16>,
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
    /// Stop when the first session has ended.
    #[arg(long)]
    pub(crate) once: bool,
    /// Print one JSON object with all sessions when it stops.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to bring in beside a page that was touched.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Prefetch {
    /// Nothing.
    Off,
    /// A window that doubles with each fault in the same 2 MiB.
    Adaptive,
}

impl From<Prefetch> for NeighbourPolicy {
    fn from(prefetch: Prefetch) -> Self {
        match prefetch {
            Prefetch::Off => Self::Off,
            Prefetch::Adaptive => Self::default(),
        }
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

pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let mut report = serve(args)?;
    if args.json {
        report.peak_rss_bytes = peak_rss();
        output::json(&report)?;
    }
    Ok(())
}

/// Serves until told to stop, or until the first session has ended.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<ServeReport> {
    let (source, memory) = open(args)?;
    let learning = Learning::open(args, &memory)?;
    let mut config = DaemonConfig::new(&args.socket, source);
    config.options = ServeOptions {
        background_fill: args.background_fill,
        huge_pages: args.collapse,
        neighbours: args.prefetch.into(),
        replay: learning.profile.as_ref().map(ServeOptions::order_of),
        record: learning.record.as_ref().map(|(_, recorder)| Arc::clone(recorder)),
    };
    config.workers = workers(args);
    config.partial = args.partial;
    config.once = args.once;
    config.attach.clone_from(&args.attach);
    config.handshake_timeout = Duration::from_secs(args.handshake_timeout);
    let (name, memory_bytes) = (config.source.name(), config.source.len());
    let workers = config.workers;

    let daemon = Daemon::bind(config)?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::low_level::pipe::register(signal, daemon.stopper()?)
            .context("catching signals")?;
    }
    info!(
        socket = %args.socket.display(),
        memory = %name,
        memory_bytes,
        workers,
        "listening"
    );
    let mut report = ServeReport::default();
    keep_metrics(args, &report)?;
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
        report.peak_rss_bytes = peak_rss();
        if let Err(error) = keep_metrics(args, &report) {
            error!("{error:#}");
        }
    })?;
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

fn open(args: &ServeArgs) -> anyhow::Result<(Arc<dyn PageSource>, MemoryInput)> {
    match (&args.image, &args.memory) {
        (Some(image), _) => {
            let image = args.parents.open(image)?;
            Ok((image.clone(), MemoryInput::image(image)))
        }
        (None, Some(_)) if args.parents.are_given() => {
            bail!("--parent names a layer below an --image; a raw memory file has none")
        }
        (None, Some(memory)) => {
            let buffered = MAX_BUFFERED / workers(args);
            let options = RawFile::options().max_mapped(MAX_MAPPED).max_buffered(buffered);
            Ok((options.open(memory)?, MemoryInput::raw(memory)?))
        }
        (None, None) => bail!("give the memory with --memory or --image"),
    }
}

fn keep_metrics(args: &ServeArgs, report: &ServeReport) -> anyhow::Result<()> {
    match &args.metrics_json {
        Some(path) => output::replace_file(path, &serde_json::to_vec_pretty(report)?),
        None => Ok(()),
    }
}
