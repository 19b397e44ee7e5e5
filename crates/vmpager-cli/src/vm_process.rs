//! A VM in a process of its own: restores a snapshot, runs the guest, prints
//! what came of it as JSON. `demo` and `bench restore` start it afresh for
//! every run, so that no run profits from another's memory.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::ValueEnum;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use vmpager_vm::{
    Cpu, CpuKind, InProcess, LinuxVm, OnRefusal, Order, RestoreMemory, Snapshot, SnapshotPaths, Vm,
    Workload,
};

use crate::output;

/// Options of the hidden command `vmpager vm-process`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct VmProcessArgs {
    #[arg(long)]
    pub(crate) state: PathBuf,
    #[arg(long)]
    pub(crate) memory: PathBuf,
    #[arg(long, value_enum)]
    pub(crate) restore: RestoreBy,
    /// Where the pager listens, for `pager`.
    #[arg(long)]
    pub(crate) socket: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = GuestCpu::Auto)]
    pub(crate) cpu: GuestCpu,
    /// Pages to touch; all if absent.
    #[arg(long)]
    pub(crate) touches: Option<u64>,
    /// How long a Linux guest runs.
    #[arg(long, default_value_t = 0)]
    pub(crate) run_ms: u64,
    #[arg(long)]
    pub(crate) sequential: bool,
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Compare all memory from the host afterwards.
    #[arg(long)]
    pub(crate) verify: bool,
    /// CLOCK_MONOTONIC in nanoseconds when this process was started.
    #[arg(long)]
    pub(crate) started_ns: u64,
}

/// Where the VM's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RestoreBy {
    Eager,
    Mmap,
    Pager,
    /// By a pager in this process, with background fill.
    InProcess,
    /// The same, in huge pages.
    InProcessHuge,
}

/// What plays the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GuestCpu {
    /// KVM if there is one, else host threads.
    Auto,
    /// KVM.
    Kvm,
    /// Host threads.
    Threads,
}

impl From<GuestCpu> for Cpu {
    fn from(cpu: GuestCpu) -> Self {
        match cpu {
            GuestCpu::Auto => Self::Auto,
            GuestCpu::Kvm => Self::Kvm,
            GuestCpu::Threads => Self::Threads,
        }
    }
}

/// What the process prints.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct VmOutcome {
    /// From the start of the process to memory being mapped, and read or
    /// handed over if that is the way.
    pub(crate) restored_ms: f64,
    /// From the start of the process.
    pub(crate) first_instruction_ms: f64,
    /// From the start of the process.
    pub(crate) workload_ms: f64,
    pub(crate) pages: u64,
    pub(crate) mismatches: u64,
    pub(crate) first_mismatch: Option<u64>,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) max_us: f64,
    /// Page faults of this process while the guest ran.
    pub(crate) faults: u64,
    /// Bytes of files entered in this process's page tables while it ran.
    pub(crate) mapped_bytes: u64,
    pub(crate) host_pages: u64,
    pub(crate) host_mismatches: u64,
}

/// CLOCK_MONOTONIC, which processes share, in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds * 1_000_000_000 + nanos
}

/// The name of what plays the vCPUs, as in JSON.
pub(crate) fn cpu_name(cpu: CpuKind) -> &'static str {
    match cpu {
        CpuKind::Kvm => "kvm",
        CpuKind::Threads => "threads",
    }
}

pub(crate) fn run(args: &VmProcessArgs) -> anyhow::Result<()> {
    let age = Duration::from_nanos(monotonic_ns().saturating_sub(args.started_ns));
    let started = Instant::now().checked_sub(age).context("a start time before this boot")?;
    let paths = SnapshotPaths { state: args.state.clone(), memory: args.memory.clone() };
    let snapshot = Snapshot::open(&paths)?;
    let from = match args.restore {
        RestoreBy::Eager => RestoreMemory::Eager,
        RestoreBy::Mmap => RestoreMemory::Mmap,
        RestoreBy::InProcess | RestoreBy::InProcessHuge => RestoreMemory::InProcess(InProcess {
            background_fill: true,
            collapse: args.restore == RestoreBy::InProcessHuge,
            ..InProcess::default()
        }),
        RestoreBy::Pager => RestoreMemory::OnDemand {
            socket: args.socket.clone().context("--restore pager needs --socket")?,
            huge_pages: false,
            refused: OnRefusal::default(),
        },
    };
    if snapshot.is_linux() {
        return run_linux(args, &snapshot, from, started);
    }
    let mut vm = Vm::restore(&snapshot, from, args.cpu.into())?;
    let restored = started.elapsed();
    let faults = page_faults()?;
    let mapped = mapped_file_bytes()?;
    let workload = Workload {
        order: if args.sequential { Order::Sequential } else { Order::Random },
        touches: args.touches,
        seed: args.seed,
        write_every: 0,
    };
    let report = vm.run(&workload, started)?;
    let faults = page_faults()? - faults;
    let mapped_bytes = mapped_file_bytes()?.saturating_sub(mapped);
    let host = args.verify.then(|| vm.verify_from_host());
    output::json(&VmOutcome {
        restored_ms: millis(restored),
        first_instruction_ms: millis(report.first_instruction),
        workload_ms: millis(report.first_instruction + report.workload),
        pages: report.pages,
        mismatches: report.mismatches,
        first_mismatch: report.first_mismatch,
        p50_us: micros(report.stalls.p50()),
        p99_us: micros(report.stalls.p99()),
        max_us: micros(report.stalls.max()),
        faults,
        mapped_bytes,
        host_pages: host.map_or(0, |host| host.pages),
        host_mismatches: host.map_or(0, |host| host.mismatches),
    })
}

/// A Linux guest has no work that ends: it runs for a time.
fn run_linux(
    args: &VmProcessArgs,
    snapshot: &Snapshot,
    from: RestoreMemory,
    started: Instant,
) -> anyhow::Result<()> {
    let mut vm = LinuxVm::restore(snapshot, from, Box::new(std::io::sink()))?;
    let restored = started.elapsed();
    let faults = page_faults()?;
    let mapped = mapped_file_bytes()?;
    vm.resume()?;
    if let Some(end) = vm.wait(Duration::from_millis(args.run_ms))? {
        bail!("the restored guest ended within {} ms: {end:?}", args.run_ms);
    }
    let first = vm.entered().context("no vCPU entered the guest; allow it more --run-ms")?;
    let mapped_bytes = mapped_file_bytes()?.saturating_sub(mapped);
    output::json(&VmOutcome {
        restored_ms: millis(restored),
        first_instruction_ms: millis(first.saturating_duration_since(started)),
        workload_ms: millis(started.elapsed()),
        faults: page_faults()? - faults,
        mapped_bytes,
        ..VmOutcome::default()
    })
}

/// A duration in milliseconds.
pub(crate) fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[expect(clippy::cast_precision_loss, reason = "a stall of 2^53 ns is 104 days")]
fn micros(nanos: u64) -> f64 {
    (nanos as f64 / 10.0).round() / 100.0
}

/// Minor and major faults of this process (`/proc/self/stat`, fields 10, 12).
fn page_faults() -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat").context("reading /proc/self/stat")?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let field = |n: usize| -> Option<u64> { after_name.split_whitespace().nth(n)?.parse().ok() };
    field(7).zip(field(9)).map(|(minor, major)| minor + major).context("fields of /proc/self/stat")
}

fn mapped_file_bytes() -> anyhow::Result<u64> {
    let path = "/proc/self/status";
    let status = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    let field = status.lines().find_map(|line| line.strip_prefix("RssFile:"));
    let kib = field.and_then(|rest| rest.trim().strip_suffix(" kB"));
    let kib: u64 = kib.and_then(|kib| kib.trim().parse().ok()).context("RssFile in its status")?;
    Ok(kib * 1024)
}
