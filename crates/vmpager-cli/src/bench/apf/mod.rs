//! `vmpager bench apf`: one task of a Linux guest computes, others walk memory that
//! is missing. With faults that stop the vCPU, with KVM's own asynchronous page
//! faults over a userfaultfd, and with vmpager's, on vCPU exits.

mod cpus;
mod guest;
mod tasks;

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use vmpager_vm::{AsyncFaults, Delivery, ExitMechanism};

use self::guest::{Run, Walk, WalkingGuest, Way};
use self::tasks::Tasks;
use super::{median, round, to_f64};
use crate::scratch::Scratch;
use crate::vm::AsyncPf;
use crate::{output, size};

/// Options of `vmpager bench apf`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager bench apf --kernel bzImage --initrd initramfs --json\n\n\
    Without a kernel the guest is a built-in one, whose kernel does nothing but change\n\
    tasks: it runs wherever KVM does. Linux's init makes 7 x --pages pages that begin with the word\n\
    0x9b1e64c85f07a3d1, and obeys its console: after `walk: ready` it is saved, and at\n\
    `walk MILLISECONDS WALKERS PAGES` it computes so long in one task, checks so many\n\
    of its pages in each of the others, and prints `walk: done ms=TIME wrong=PAGES`.\n\
    `cargo xtask lab` makes such an initrd. The guest computes as long as one\n\
    walker waits, as waiting goes on this machine (latency_took_ms). Its vCPU has the last\n\
    CPU for itself, and whoever brings pages the others.\n\
    Rounds are interleaved, and each number is the median of its rounds;\n\
    ratios are of times, above 1 vmpager is faster.")]
pub(crate) struct ApfArgs {
    /// The guest's kernel, with KVM_GUEST [default: a built-in guest].
    #[arg(long, value_name = "FILE", requires = "initrd")]
    kernel: Option<PathBuf>,
    /// An initrd whose init does what is said below.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// How long the source takes for a page; 0: it is at hand.
    #[arg(
        long,
        value_name = "MILLISECONDS",
        value_delimiter = ',',
        default_value = "0,0.1,1,5,20"
    )]
    latency: Vec<f64>,
    /// Tasks that walk: 1 to 7.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,4,7",
          value_parser = clap::value_parser!(u64).range(1..=7))]
    walkers: Vec<u64>,
    /// The most pages of each that are walked.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pages: u64,
    /// Memory of a Linux guest.
    #[arg(long, value_name = "SIZE", default_value = "96M", value_parser = size::parse)]
    memory: u64,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Where to put the snapshot [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Of that much waiting each walker's way is made, if it has the pages.
const WAITING_MS: f64 = 200.0;
/// A way has at least so many pages.
const FEWEST: f64 = 10.0;
/// What is computed while nothing has to be waited for.
const COMPUTED_MS: f64 = 20.0;
/// How often a latency is measured.
const SLEEPS: u32 = 9;

#[derive(Debug, Serialize)]
struct Report {
    /// `linux` or `builtin`.
    guest: &'static str,
    /// Of Linux.
    memory_bytes: Option<u64>,
    rounds: u32,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    latency_ms: f64,
    /// How long this machine sleeps who wants to sleep that long.
    latency_took_ms: f64,
    walkers: u64,
    /// Pages of each walker.
    pages: u64,
    /// What is computed, alone.
    compute_ms: u64,
    sync_s: f64,
    kernel_apf_s: f64,
    vmpager_s: f64,
    ratio_sync: f64,
    ratio_kernel: f64,
    /// Of the last round.
    vmpager: AsyncPf,
}

const SYNC: Way = Way { delivery: Delivery::Exit(ExitMechanism::View), async_faults: None };
const KERNEL: Way = Way { delivery: Delivery::Userfaultfd, async_faults: None };
const VMPAGER: Way = Way { async_faults: Some(AsyncFaults::Always), ..SYNC };

/// Who walks.
#[derive(Debug)]
enum Guest {
    Linux(Box<WalkingGuest>),
    Builtin(Tasks),
}

impl Guest {
    fn new(args: &ApfArgs, scratch: &Scratch) -> anyhow::Result<Self> {
        Ok(match (&args.kernel, &args.initrd) {
            (Some(kernel), Some(initrd)) => {
                let (kernel, initrd) = (kernel.clone(), initrd.clone());
                let dir = scratch.path();
                let guest = WalkingGuest::boot(kernel, initrd, args.memory, args.pages, dir)?;
                Self::Linux(Box::new(guest))
            }
            _ => Self::Builtin(Tasks::new(args.pages)?),
        })
    }

    fn run(&self, walk: &Walk, way: Way) -> anyhow::Result<Run> {
        match self {
            Self::Linux(guest) => guest.run(walk, way),
            Self::Builtin(tasks) => tasks.run(walk, way),
        }
    }
}

pub(crate) fn run(args: &ApfArgs) -> anyhow::Result<()> {
    let scratch = Scratch::new(args.dir.as_deref(), args.memory)?;
    let guest = Guest::new(args, &scratch)?;
    let mut rows = Vec::new();
    for latency_ms in &args.latency {
        for walkers in &args.walkers {
            rows.push(row(args, &guest, *latency_ms, *walkers)?);
        }
    }
    let (kind, memory_bytes) = match guest {
        Guest::Linux(_) => ("linux", Some(args.memory)),
        Guest::Builtin(_) => ("builtin", None),
    };
    let report = Report { guest: kind, memory_bytes, rounds: args.rounds, rows };
    if args.json { output::json(&report) } else { show(&report) }
}

fn row(args: &ApfArgs, guest: &Guest, latency: f64, walkers: u64) -> anyhow::Result<Row> {
    let most = to_f64(args.pages);
    let asked = Duration::try_from_secs_f64(latency / 1e3)?;
    let took = slept(asked);
    let pages = if latency > 0.0 { (WAITING_MS / latency).max(FEWEST).min(most) } else { most };
    let compute = if latency > 0.0 { pages.floor() * took } else { COMPUTED_MS };
    let whole = |number: f64| Duration::from_secs_f64(number.max(0.0)).as_secs();
    let walk =
        Walk { latency: asked, compute_ms: whole(compute.ceil()), walkers, pages: whole(pages) };
    let (mut sync, mut kernel, mut ours) = (Vec::new(), Vec::new(), Vec::new());
    let mut counters = None;
    for _ in 0..args.rounds {
        sync.push(guest.run(&walk, SYNC)?.seconds);
        kernel.push(guest.run(&walk, KERNEL)?.seconds);
        let Run { seconds, told } = guest.run(&walk, VMPAGER)?;
        ours.push(seconds);
        counters = told;
    }
    let (sync, kernel, ours) = (median(sync), median(kernel), median(ours));
    Ok(Row {
        latency_ms: latency,
        latency_took_ms: round(took),
        walkers,
        pages: walk.pages,
        compute_ms: walk.compute_ms,
        sync_s: round(sync),
        kernel_apf_s: round(kernel),
        vmpager_s: round(ours),
        ratio_sync: round(sync / ours),
        ratio_kernel: round(kernel / ours),
        vmpager: counters.unwrap_or_default(),
    })
}

/// How long it takes to sleep so long, in milliseconds.
fn slept(long: Duration) -> f64 {
    let once = |_| {
        let begin = Instant::now();
        thread::sleep(long);
        begin.elapsed().as_secs_f64() * 1e3
    };
    if long.is_zero() { 0.0 } else { median((0..SLEEPS).map(once)) }
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{:>10} {:>8} {:>12} {:>12} {:>12} {:>9} {:>9} {:>9}",
        "latency", "walkers", "stopped", "KVM's", "vmpager", "stopped/", "KVM's/", "told"
    ))?;
    for row in &report.rows {
        output::line(&format!(
            "{:>7} ms {:>8} {:>10.3} s {:>10.3} s {:>10.3} s {:>8.2}x {:>8.2}x {:>8.1}%",
            row.latency_ms,
            row.walkers,
            row.sync_s,
            row.kernel_apf_s,
            row.vmpager_s,
            row.ratio_sync,
            row.ratio_kernel,
            row.vmpager.injected_share * 100.0
        ))?;
    }
    Ok(())
}
