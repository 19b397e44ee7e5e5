//! `vmpager bench attach`: memory shared between processes. The faults of a
//! process that takes part against the pager's own, the cost of a look at the
//! page map, and the fault queue with more and more threads at both ends.

use std::hint::black_box;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use vmpager::attach::{FaultClient, FaultReader, QueueOwner};
use vmpager::{Attached, GuestRange, NeighbourPolicy, Pager, SharedRegion};
use vmpager_store::MemorySource;
use vmpager_sys::memory::Mapping;

use super::{median, round, to_f64};
use crate::output;
use crate::scratch::Scratch;

const PAGE: usize = 4096;
/// Pages each process touches in a round.
const PAGES: usize = 8192;
/// Faults each combination of threads brings through the queue.
const QUEUED: usize = 20_000;

/// Options of `vmpager bench attach`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager bench attach --json\n\n\
    Rounds are interleaved; each number of them is the median of its rounds.")]
pub(crate) struct AttachArgs {
    /// Rounds of faults.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Take part in the memory at this door, touch it, and say how that went.
    #[arg(long, value_name = "DOOR", hide = true)]
    join: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// How touching went.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Touched {
    p50_us: f64,
    p99_us: f64,
    kfaults_s: f64,
    present_check_ns: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    rounds: u32,
    /// A look at the page map, by another process.
    present_check_ns: f64,
    /// Faults of the pager's own process, one thread, warm source.
    own_p50_us: f64,
    own_kfaults_s: f64,
    /// Faults of another process, likewise.
    attached_p50_us: f64,
    attached_p99_us: f64,
    attached_kfaults_s: f64,
    ratio_attached_own: f64,
    /// The fault queue, nothing being brought.
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    producers: usize,
    readers: usize,
    kfaults_s: f64,
    p50_us: f64,
    p99_us: f64,
}

pub(crate) fn run(args: &AttachArgs) -> anyhow::Result<()> {
    if let Some(door) = &args.join {
        let attached = Attached::connect(door)?;
        let present = present_check(&attached);
        let Some(region) = attached.regions().first() else { bail!("no region") };
        return output::json(&Touched { present_check_ns: present, ..touch(&region.memory) });
    }
    let source = Arc::new(MemorySource::numbered(PAGES as u64));
    let (mut own, mut others) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        own.push(with_pager(&source, |memory, _| Ok(touch(memory)))?);
        others.push(with_pager(&source, |_, door| joined(door))?);
    }
    let of = |all: &[Touched], which: fn(&Touched) -> f64| round(median(all.iter().map(which)));
    let (own_p50, attached_p50) = (of(&own, |t| t.p50_us), of(&others, |t| t.p50_us));
    let threads = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 4), (2, 2), (4, 2), (8, 4)];
    let report = Report {
        rounds: args.rounds,
        present_check_ns: of(&others, |t| t.present_check_ns),
        own_p50_us: own_p50,
        own_kfaults_s: of(&own, |t| t.kfaults_s),
        attached_p50_us: attached_p50,
        attached_p99_us: of(&others, |t| t.p99_us),
        attached_kfaults_s: of(&others, |t| t.kfaults_s),
        ratio_attached_own: round(attached_p50 / own_p50),
        rows: threads.into_iter().map(|(p, r)| queue(p, r)).collect::<Result<_, _>>()?,
    };
    if args.json { output::json(&report) } else { show(&report) }
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!("a look at the page map: {} ns", report.present_check_ns))?;
    output::line(&format!(
        "a fault of the pager's own process: {} us; of another: {} us (x{})",
        report.own_p50_us, report.attached_p50_us, report.ratio_attached_own
    ))?;
    for row in &report.rows {
        output::line(&format!(
            "fault queue, {} producers, {} readers: {} k/s, p50 {} us, p99 {} us",
            row.producers, row.readers, row.kfaults_s, row.p50_us, row.p99_us
        ))?;
    }
    Ok(())
}

/// Does something with memory that is shared and all missing.
fn with_pager(
    source: &Arc<MemorySource>,
    what: impl FnOnce(&Mapping, &Path) -> anyhow::Result<Touched>,
) -> anyhow::Result<Touched> {
    let scratch = Scratch::new(None, 0)?;
    let door = scratch.path().join("door");
    let memfd = Arc::new(vmpager_sys::memfd::sealed("vmpager-bench", (PAGES * PAGE) as u64)?);
    let memory = Arc::new(Mapping::file_shared(memfd.as_fd(), PAGES * PAGE)?);
    let pager = Pager::builder(source.clone())
        .region(&GuestRange::of_mapping(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()?;
    let _door = pager.share(&door, &[SharedRegion { gpa: 0, memfd, offset: 0 }])?;
    what(&memory, &door)
}

fn joined(door: &Path) -> anyhow::Result<Touched> {
    let output = Command::new(std::env::current_exe()?)
        .args(["bench", "attach", "--join"])
        .arg(door)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("starting the process that takes part")?;
    if !output.status.success() {
        bail!("the process that takes part: {}", output.status);
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Touches every page once, far from the one before.
fn touch(memory: &Mapping) -> Touched {
    let mut times = Vec::with_capacity(PAGES);
    let start = Instant::now();
    for i in 0..PAGES {
        let before = Instant::now();
        black_box(memory.read_u64(i * 421 % PAGES * PAGE));
        times.push(before.elapsed());
    }
    let all = start.elapsed();
    let (p50_us, p99_us) = quantiles(times);
    let kfaults_s = round(to_f64(PAGES as u64) / all.as_secs_f64() / 1e3);
    Touched { p50_us, p99_us, kfaults_s, present_check_ns: 0.0 }
}

fn present_check(attached: &Attached) -> f64 {
    const LOOKS: u64 = 20_000_000;
    let start = Instant::now();
    for i in 0..LOOKS {
        black_box(attached.pages().page(black_box(i * 421 % PAGES as u64 * PAGE as u64)));
    }
    round(start.elapsed().as_secs_f64() * 1e9 / to_f64(LOOKS))
}

fn quantiles(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or_default();
    (round(at(50).as_secs_f64() * 1e6), round(at(99).as_secs_f64() * 1e6))
}

/// So many threads that ask for pages and wait, so many that answer.
fn queue(producers: usize, readers: usize) -> anyhow::Result<Row> {
    let owner = QueueOwner::new()?;
    let present: Vec<AtomicBool> = (0..QUEUED).map(|_| AtomicBool::new(false)).collect();
    let done = AtomicBool::new(false);
    let each = QUEUED / producers;
    let clients: Vec<FaultClient> =
        (0..producers).map(|_| owner.client()).collect::<Result<_, _>>()?;
    let answering: Vec<FaultReader> =
        (0..readers as u64).map(|id| owner.reader(id)).collect::<Result<_, _>>()?;
    let start = Instant::now();
    let times = std::thread::scope(|scope| {
        for reader in &answering {
            scope.spawn(|| answer(reader, &present, &done));
        }
        let asking = clients.iter().zip(present.chunks(each)).enumerate();
        let asking: Vec<_> = asking
            .map(|(at, (client, pages))| scope.spawn(move || ask(client, pages, at * each)))
            .collect();
        let times = asking.into_iter().map(|thread| match thread.join() {
            Ok(times) => times,
            Err(_) => bail!("a thread panicked"),
        });
        let times: anyhow::Result<Vec<_>> = times.collect();
        done.store(true, Ordering::Release);
        times
    })?;
    let all = start.elapsed();
    let times: Vec<Duration> = times.into_iter().flatten().collect();
    let kfaults_s = round(to_f64(times.len() as u64) / all.as_secs_f64() / 1e3);
    let (p50_us, p99_us) = quantiles(times);
    Ok(Row { producers, readers, kfaults_s, p50_us, p99_us })
}

fn ask(client: &FaultClient, pages: &[AtomicBool], first: usize) -> anyhow::Result<Vec<Duration>> {
    let ask = |(at, page): (usize, &AtomicBool)| {
        let before = Instant::now();
        client.wait((first + at) as u64, None, || page.load(Ordering::Acquire))?;
        Ok(before.elapsed())
    };
    pages.iter().enumerate().map(ask).collect()
}

fn answer(reader: &FaultReader, present: &[AtomicBool], done: &AtomicBool) {
    // Long beside any fault: only the end is noticed by it.
    let limit = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    while !done.load(Ordering::Acquire) {
        while let Some(taken) = reader.take() {
            let page = usize::try_from(taken.gfn).ok().and_then(|gfn| present.get(gfn));
            if let Some(page) = page {
                page.store(true, Ordering::Release);
            }
            reader.commit(&taken);
        }
        let _ = poll(&mut [PollFd::new(reader, PollFlags::IN)], Some(&limit));
    }
}
