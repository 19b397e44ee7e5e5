//! One restore from start to end: a VM in a fresh process and, if its memory is
//! served, a pager in another.

mod cache;
pub(crate) mod naive;
pub(crate) mod process;
mod server;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;
use vmpager_vm::SnapshotPaths;

pub(crate) use self::cache::{Cache, prepare as prepare_cache, warm_up_memory};
use self::process::{Running, vmpager};
use self::server::FileServer;
use crate::serve::{Prefetch, ServeReport};
use crate::vm_process::{VmOutcome, monotonic_ns};

/// How a VM's memory is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// All of it read before the guest starts.
    Eager,
    /// A private mapping of the memory file.
    Mmap,
    /// Served by `vmpager serve`.
    OnDemand,
    /// Served by `vmpager serve --background-fill`.
    #[value(name = "on-demand+fill")]
    OnDemandFill,
    /// Served by `vmpager serve --profile`, which knows what will be touched.
    #[value(name = "on-demand+profile")]
    OnDemandProfile,
    /// The same, with the profile of a guest that touched other pages.
    #[value(name = "on-demand+wrong")]
    OnDemandWrong,
    /// Served by `vmpager serve --image`, from a packed image.
    Packed,
    /// Served by `vmpager serve --image --background-fill`.
    #[value(name = "packed+fill")]
    PackedFill,
    /// Served by `vmpager serve --image --profile`, from an image packed with that
    /// profile.
    #[value(name = "packed+profile")]
    PackedProfile,
    /// Served by `vmpager serve --image`, from a layer over another image, with an
    /// eighth of the pages.
    Layered,
    /// Served by `vmpager serve --image` from that image at an HTTP server, which
    /// answers after a latency.
    Remote,
    /// The same, with the image packed with a profile, and the profile.
    #[value(name = "remote+profile")]
    RemoteProfile,
    /// By a pager in the VM's process, with background fill.
    #[value(name = "in-process+fill")]
    InProcessFill,
    /// The same, brought by 2 MiB, in huge pages.
    #[value(name = "in-process+huge")]
    InProcessHuge,
    /// Served by a handler that answers each fault with one page: poll, read,
    /// UFFDIO_COPY.
    Naive,
}

impl Mode {
    /// Its name in tables and JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Mmap => "mmap",
            Self::OnDemand => "on-demand",
            Self::OnDemandFill => "on-demand+fill",
            Self::OnDemandProfile => "on-demand+profile",
            Self::OnDemandWrong => "on-demand+wrong",
            Self::Packed => "packed",
            Self::PackedFill => "packed+fill",
            Self::PackedProfile => "packed+profile",
            Self::Layered => "layered",
            Self::Remote => "remote",
            Self::RemoteProfile => "remote+profile",
            Self::InProcessFill => "in-process+fill",
            Self::InProcessHuge => "in-process+huge",
            Self::Naive => "naive",
        }
    }

    /// The image that memory comes from, if it is not the snapshot's file.
    pub(crate) fn image(self, snapshot: &SnapshotPaths) -> Option<PathBuf> {
        let name = match self {
            Self::Packed | Self::PackedFill | Self::Remote => "vmimg",
            Self::PackedProfile | Self::RemoteProfile => "hot.vmimg",
            Self::Layered => "layer.vmimg",
            _ => return None,
        };
        Some(snapshot.memory.with_extension(name))
    }

    /// The image below that one.
    pub(crate) fn base(self, snapshot: &SnapshotPaths) -> Option<PathBuf> {
        (self == Self::Layered).then(|| snapshot.memory.with_extension("base.vmimg"))
    }

    /// The profile that is replayed.
    pub(crate) fn profile(self, snapshot: &SnapshotPaths) -> Option<PathBuf> {
        let name = match self {
            Self::OnDemandProfile | Self::PackedProfile | Self::RemoteProfile => "vmprof",
            Self::OnDemandWrong => "wrong.vmprof",
            _ => return None,
        };
        Some(snapshot.memory.with_extension(name))
    }

    /// The files whose bytes become memory.
    pub(crate) fn files(self, snapshot: &SnapshotPaths) -> Vec<PathBuf> {
        let first = self.image(snapshot).unwrap_or_else(|| snapshot.memory.clone());
        std::iter::once(first).chain(self.base(snapshot)).collect()
    }

    fn is_remote(self) -> bool {
        matches!(self, Self::Remote | Self::RemoteProfile)
    }

    fn fills(self) -> bool {
        matches!(self, Self::OnDemandFill | Self::PackedFill)
    }
}

/// What the guest does once restored.
#[derive(Clone, Debug, Default)]
pub(crate) struct Work {
    /// Pages to touch; all if `None`.
    pub(crate) touches: Option<u64>,
    pub(crate) sequential: bool,
    pub(crate) seed: u64,
    /// Compare all memory from the host afterwards.
    pub(crate) verify: bool,
    /// How long a Linux guest runs.
    pub(crate) run_ms: Option<u64>,
    /// Host threads as vCPUs, even where there is KVM.
    pub(crate) threads: bool,
    /// What `vmpager serve` brings in beside what is touched, if not its default.
    pub(crate) prefetch: Option<Prefetch>,
    /// How long an HTTP server takes to begin an answer.
    pub(crate) latency: Duration,
}

/// What came of a restore.
#[derive(Clone, Debug)]
pub(crate) struct Restored {
    pub(crate) vm: VmOutcome,
    /// From the start of the VM's process until all memory was in place.
    pub(crate) full_ms: Option<f64>,
    pub(crate) faults: u64,
    pub(crate) bytes_read: u64,
    /// The most memory the pager was resident with.
    pub(crate) pager_rss_bytes: Option<u64>,
}

/// Restores once.
pub(crate) fn restore(
    mode: Mode,
    snapshot: &SnapshotPaths,
    scratch: &Path,
    work: &Work,
) -> anyhow::Result<Restored> {
    let socket = scratch.join(format!("{}.sock", mode.name()));
    let server = match mode.image(snapshot).filter(|_| mode.is_remote()) {
        Some(image) => Some(FileServer::start(&image, work.latency)?),
        None => None,
    };
    let image = server.as_ref().map(|server| server.url().into()).or_else(|| mode.image(snapshot));
    let pager = start_pager(mode, snapshot, image, &socket, work)?;
    let vm = run_vm(mode, snapshot, &socket, work)?;
    outcome(mode, snapshot, vm, pager)
}

/// Restores once, and records which pages are touched.
pub(crate) fn record(
    snapshot: &SnapshotPaths,
    scratch: &Path,
    work: &Work,
    to: &Path,
) -> anyhow::Result<()> {
    let socket = scratch.join("record.sock");
    let mut args: Vec<PathBuf> = vec!["profile".into(), "record".into()];
    args.extend(["--socket".into(), socket.clone()]);
    args.extend(["--memory".into(), snapshot.memory.clone()]);
    args.extend(["--output".into(), to.into()]);
    let mut pager = vmpager(&args)?;
    pager.wait_for(&socket)?;
    run_vm(Mode::OnDemand, snapshot, &socket, work)?;
    pager.output().context("recording a profile")?;
    Ok(())
}

fn run_vm(
    mode: Mode,
    snapshot: &SnapshotPaths,
    socket: &Path,
    work: &Work,
) -> anyhow::Result<VmOutcome> {
    let by = match mode {
        Mode::Eager => "eager",
        Mode::Mmap => "mmap",
        Mode::InProcessFill => "in-process",
        Mode::InProcessHuge => "in-process-huge",
        _ => "pager",
    };
    let mut args: Vec<PathBuf> = vec!["vm-process".into(), "--restore".into(), by.into()];
    args.extend(["--state".into(), snapshot.state.clone()]);
    args.extend(["--memory".into(), snapshot.memory.clone()]);
    args.extend(["--socket".into(), socket.into()]);
    args.extend(["--seed".into(), work.seed.to_string().into()]);
    args.extend(work.touches.iter().flat_map(|n| ["--touches".into(), n.to_string().into()]));
    args.extend(work.run_ms.iter().flat_map(|n| ["--run-ms".into(), n.to_string().into()]));
    args.extend(work.sequential.then(|| "--sequential".into()));
    args.extend(work.verify.then(|| "--verify".into()));
    args.extend(work.threads.then(|| "--cpu=threads".into()));
    args.push(format!("--started-ns={}", monotonic_ns()).into());
    let vm = vmpager(&args)?.output().context("the VM's process")?;
    serde_json::from_str(&vm).context("what the VM's process printed")
}

fn start_pager(
    mode: Mode,
    snapshot: &SnapshotPaths,
    image: Option<PathBuf>,
    socket: &Path,
    work: &Work,
) -> anyhow::Result<Option<Running>> {
    let mut args: Vec<PathBuf> = match mode {
        Mode::Eager | Mode::Mmap | Mode::InProcessFill | Mode::InProcessHuge => return Ok(None),
        Mode::Naive => vec!["naive-handler".into()],
        _ => vec!["serve".into(), "--once".into(), "--json".into()],
    };
    args.extend(mode.fills().then(|| "--background-fill".into()));
    args.extend(["--socket".into(), socket.into()]);
    match image {
        Some(image) => args.extend(["--image".into(), image]),
        None => args.extend(["--memory".into(), snapshot.memory.clone()]),
    }
    args.extend(mode.profile(snapshot).into_iter().flat_map(|path| ["--profile".into(), path]));
    if mode != Mode::Naive
        && let Some(prefetch) = work.prefetch.and_then(|prefetch| prefetch.to_possible_value())
    {
        args.extend(["--prefetch".into(), prefetch.get_name().into()]);
    }
    let mut pager = vmpager(&args)?;
    pager.wait_for(socket)?;
    Ok(Some(pager))
}

fn outcome(
    mode: Mode,
    snapshot: &SnapshotPaths,
    vm: VmOutcome,
    pager: Option<Running>,
) -> anyhow::Result<Restored> {
    let restored = match pager {
        None => {
            let file_bytes = std::fs::metadata(&snapshot.memory)?.len();
            Restored {
                full_ms: (mode == Mode::Eager).then_some(vm.restored_ms),
                faults: vm.faults,
                bytes_read: if mode == Mode::Mmap { vm.mapped_bytes } else { file_bytes },
                pager_rss_bytes: None,
                vm,
            }
        }
        Some(pager) if mode == Mode::Naive => {
            let faults = pager.output().context("the naive handler")?;
            let faults: u64 = faults.trim().parse().context("the naive handler's count")?;
            Restored { full_ms: None, faults, bytes_read: faults * 4096, pager_rss_bytes: None, vm }
        }
        Some(pager) => {
            let report = pager.output().context("the pager")?;
            let report: ServeReport = serde_json::from_str(&report).context("its report")?;
            let Some(session) = report.sessions.front() else { bail!("it served no session") };
            Restored {
                full_ms: session.fill_ms.map(|fill| vm.restored_ms + fill),
                faults: session.faults,
                bytes_read: session.bytes_read,
                pager_rss_bytes: report.peak_rss_bytes,
                vm,
            }
        }
    };
    Ok(restored)
}
