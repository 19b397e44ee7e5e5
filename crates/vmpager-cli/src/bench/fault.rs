//! `vmpager bench fault`: what the pager adds to the least a fault can cost.
//!
//! The floor is a bare loop in the same process: poll, read up to 64 messages,
//! `UFFDIO_COPY` each page from one warm 4 KiB buffer, on one thread (and, for
//! comparison, from the bytes the pager copies too). Ours is
//! an embedded [`Pager`] with prefetch off, so that both serve each page by a
//! fault of its own, from a file in the page cache (or, with `--source
//! memory`, from memory).

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::ValueEnum;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use vmpager::core::PageSource;
use vmpager::{GuestRange, NeighbourPolicy, Pager};
use vmpager_store::{MemorySource, RawFile};
use vmpager_sys::file_map::FileMap;
use vmpager_sys::memory::Mapping;
use vmpager_sys::uffd::{Features, Message, Messages, Stop, Userfaultfd};

use super::{median, round, to_f64};
use crate::restore::{Cache, prepare_cache};
use crate::scratch::Scratch;
use crate::{output, size};

/// Options of `vmpager bench fault`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager bench fault --rounds 9 --json\n\n\
    Rounds are interleaved; each number is the median of its rounds.")]
pub(crate) struct FaultArgs {
    /// Memory to touch in each round.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size::parse)]
    memory: u64,
    /// Memory to fill in each round.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    fill: u64,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Where the pager takes pages from.
    #[arg(long, value_enum, default_value_t = Source::File)]
    source: Source,
    /// Where to put the file [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Source {
    /// A file in the page cache.
    File,
    /// Memory of this process.
    Memory,
}

#[derive(Debug, Serialize)]
struct Report {
    source: Source,
    rounds: u32,
    threads: Vec<Row>,
    fill: Fill,
}

#[derive(Debug, Serialize)]
struct Row {
    n: usize,
    floor_p50_us: f64,
    vmpager_p50_us: f64,
    p50_ratio: f64,
    floor_kfaults_s: f64,
    vmpager_kfaults_s: f64,
    rate_ratio: f64,
    /// The floor again, copying the bytes that the pager copies too instead of
    /// one page that stays in the CPU's cache.
    same_bytes_p50_us: f64,
    same_bytes_kfaults_s: f64,
    same_bytes_rate_ratio: f64,
}

#[derive(Debug, Serialize)]
struct Fill {
    bytes: u64,
    /// `UFFDIO_COPY` of 2 MiB pieces and nothing else, of the same bytes.
    copy_2m_ms: f64,
    /// The pager's fill, while another thread touches the memory at random.
    vmpager_ms: f64,
    ratio: f64,
    /// As `copy_2m_ms`, but of one piece that stays in the CPU's cache.
    copy_2m_hot_ms: f64,
    /// Faults served meanwhile, median of the rounds.
    faults: f64,
    /// The longest touch of a round, median of the rounds.
    max_touch_us: f64,
    /// The longest touch of all rounds.
    worst_touch_us: f64,
    /// What a thread that only watches the clock loses at the most in as much
    /// time: the machine's own noise. Median of the rounds.
    noise_us: f64,
    /// The most it loses in any round: what `worst_touch_us` compares with.
    worst_noise_us: f64,
}

/// Touches of one round.
struct Touched {
    p50_us: f64,
    kfaults_s: f64,
}

pub(crate) fn run(args: &FaultArgs) -> anyhow::Result<()> {
    let largest = args.memory.max(args.fill).next_multiple_of(2 << 20);
    let scratch = Scratch::new(args.dir.as_deref(), largest)?;
    let input = make_input(args.source, largest, &scratch)?;
    let touch_bytes = usize::try_from(args.memory)?.next_multiple_of(2 << 20);
    let fill_bytes = usize::try_from(args.fill)?.next_multiple_of(2 << 20);

    let mut threads = Vec::new();
    for n in [1, 2, 4, 8] {
        let (mut floor, mut same, mut ours) = (Vec::new(), Vec::new(), Vec::new());
        for seed in 0..args.rounds {
            input.warm_up()?;
            floor.push(floor_round(None, touch_bytes, n, seed)?);
            same.push(floor_round(Some(input.addr), touch_bytes, n, seed)?);
            ours.push(pager_round(&input.source, touch_bytes, n, seed)?);
        }
        threads.push(row(n, &floor, &same, &ours));
    }
    let mut fills = Vec::new();
    for seed in 0..args.rounds {
        input.warm_up()?;
        fills.push(FillRound {
            floor: floor_fill(Some(input.addr), fill_bytes)?,
            hot: floor_fill(None, fill_bytes)?,
            filled: pager_fill(&input.source, fill_bytes, seed)?,
        });
    }
    let report = Report {
        source: args.source,
        rounds: args.rounds,
        threads,
        fill: fill_row(fill_bytes as u64, &fills),
    };
    if args.json { output::json(&report) } else { show(&report) }
}

/// The bytes to serve, and where they lie in this process for the bare fill.
struct Input {
    source: Arc<dyn PageSource>,
    addr: usize,
    _map: Option<FileMap>,
    file: Option<PathBuf>,
}

impl Input {
    /// Has the file in the page cache again, should the host have reclaimed
    /// some of it.
    fn warm_up(&self) -> anyhow::Result<()> {
        self.file.as_deref().map_or(Ok(()), |path| prepare_cache(path, Cache::Warm))
    }
}

fn make_input(source: Source, len: u64, scratch: &Scratch) -> anyhow::Result<Input> {
    let memory = Arc::new(MemorySource::numbered(len / 4096));
    if source == Source::Memory {
        let addr = memory.bytes().as_ptr() as usize;
        return Ok(Input { source: memory, addr, _map: None, file: None });
    }
    let path = scratch.path().join("memory");
    std::fs::write(&path, memory.bytes()).context("writing the memory file")?;
    let file = std::fs::File::open(&path)?;
    file.sync_all()?;
    let map = FileMap::new(file.as_fd(), len)?;
    map.populate(0..len)?;
    let (source, addr) = (RawFile::open(&path)?, map.addr_of(0));
    Ok(Input { source, addr, _map: Some(map), file: Some(path) })
}

/// Touches every page of `memory` once, in random order, from `n` threads.
fn touch_all(memory: &Arc<Mapping>, n: usize, seed: u32) -> Touched {
    let pages = memory.len() / 4096;
    let mut order: Vec<usize> = (0..pages).collect();
    let mut state = u64::from(seed) * 2 + 1;
    for i in (1..pages).rev() {
        order.swap(i, usize::try_from(next_random(&mut state)).unwrap_or(0) % (i + 1));
    }
    let started = Instant::now();
    let mut stalls: Vec<u64> = std::thread::scope(|scope| {
        let parts = order.chunks(pages.div_ceil(n));
        let threads: Vec<_> = parts
            .map(|part| {
                scope.spawn(move || {
                    let touch = |page: &usize| {
                        let before = Instant::now();
                        std::hint::black_box(memory.read_u64(page * 4096));
                        u64::try_from(before.elapsed().as_nanos()).unwrap_or(u64::MAX)
                    };
                    part.iter().map(touch).collect::<Vec<u64>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    });
    let took = started.elapsed();
    stalls.sort_unstable();
    Touched {
        p50_us: nanos_to_us(stalls[stalls.len() / 2]),
        kfaults_s: to_f64(pages as u64) / took.as_secs_f64() / 1e3,
    }
}

fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// The bare loop, from the page's own bytes at `src` or, without it, from one
/// warm page for all.
fn floor_round(src: Option<usize>, bytes: usize, n: usize, seed: u32) -> anyhow::Result<Touched> {
    let memory = Arc::new(Mapping::anonymous(bytes)?);
    let uffd = Userfaultfd::open(Features::NONE)?;
    uffd.register_missing(&GuestRange::of_mapping(&memory))?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| bare_loop(&uffd, src, &memory, &done));
        let touched = touch_all(&memory, n, seed);
        done.store(true, Ordering::Relaxed);
        match server.join() {
            Ok(result) => result.map(|()| touched),
            Err(_) => bail!("the bare loop panicked"),
        }
    })
}

/// The least a handler can do.
fn bare_loop(
    uffd: &Userfaultfd,
    src: Option<usize>,
    memory: &Mapping,
    done: &AtomicBool,
) -> anyhow::Result<()> {
    let buffer = Mapping::anonymous(4096)?;
    buffer.populate(0..4096)?;
    let warm = usize::try_from(buffer.hva())?;
    let mut messages = Messages::new();
    let tick = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    while !done.load(Ordering::Relaxed) {
        if poll(&mut [PollFd::new(uffd, PollFlags::IN)], Some(&tick))? == 0 {
            continue;
        }
        uffd.read(&mut messages)?;
        for message in messages.drain() {
            let Message::Fault { address, .. } = message else { continue };
            let page = address & !4095;
            let offset = usize::try_from(page - memory.hva())?;
            match uffd.copy(page, src.map_or(warm, |src| src + offset), 4096).stop {
                None | Some(Stop::Present) => {}
                Some(stop) => bail!("UFFDIO_COPY: {stop:?}"),
            }
        }
    }
    Ok(())
}

fn pager_round(
    source: &Arc<dyn PageSource>,
    bytes: usize,
    n: usize,
    seed: u32,
) -> anyhow::Result<Touched> {
    let memory = Arc::new(Mapping::anonymous(bytes)?);
    let pager = Pager::builder(source.clone())
        .region(&GuestRange::of_mapping(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()?;
    let touched = touch_all(&memory, n, seed);
    verify(&memory)?;
    drop(pager);
    Ok(touched)
}

/// Every word holds its offset plus one.
fn verify(memory: &Mapping) -> anyhow::Result<()> {
    for page in (0..memory.len()).step_by(4096) {
        for offset in [page, page + 2048, page + 4088] {
            if memory.read_u64(offset) != offset as u64 + 1 {
                bail!("wrong bytes at {offset:#x}");
            }
        }
    }
    Ok(())
}

/// The bare fill, from `bytes` bytes at `src` or, without it, from the same
/// 2 MiB over and over, which no fill of a VM can do.
fn floor_fill(src: Option<usize>, bytes: usize) -> anyhow::Result<Duration> {
    let memory = Arc::new(Mapping::anonymous(bytes)?);
    let hot = Mapping::anonymous(PIECE)?;
    hot.populate(0..PIECE)?;
    let hot = usize::try_from(hot.hva())?;
    let uffd = Userfaultfd::open(Features::NONE)?;
    uffd.register_missing(&GuestRange::of_mapping(&memory))?;
    let started = Instant::now();
    for offset in (0..bytes).step_by(PIECE) {
        let src = src.map_or(hot, |src| src + offset);
        if let Some(stop) = uffd.copy(memory.hva() + offset as u64, src, PIECE as u64).stop {
            bail!("UFFDIO_COPY: {stop:?}");
        }
    }
    Ok(started.elapsed())
}

/// The piece of the bare fill: 2 MiB.
const PIECE: usize = 2 << 20;

struct FillRound {
    floor: Duration,
    hot: Duration,
    filled: Filled,
}

struct Filled {
    took: Duration,
    faults: u64,
    max_touch: Duration,
    noise: Duration,
}

fn pager_fill(source: &Arc<dyn PageSource>, bytes: usize, seed: u32) -> anyhow::Result<Filled> {
    let memory = Arc::new(Mapping::anonymous(bytes)?);
    let done = AtomicBool::new(false);
    let (took, faults, max_touch) = std::thread::scope(|scope| {
        let started = Instant::now();
        let pager = Pager::builder(source.clone())
            .region(&GuestRange::of_mapping(&memory), 0)
            .background_fill(true)
            .start()?;
        let guest = scope.spawn(|| {
            take_last_cpu();
            let mut state = u64::from(seed) * 2 + 1;
            let mut longest = Duration::ZERO;
            let pages = memory.len() / 4096;
            loop {
                let page = usize::try_from(next_random(&mut state)).unwrap_or(0) % pages;
                let before = Instant::now();
                std::hint::black_box(memory.read_u64(page * 4096));
                longest = longest.max(before.elapsed());
                if done.load(Ordering::Relaxed) {
                    break;
                }
            }
            longest
        });
        let filled = pager.wait_filled(Duration::from_secs(60));
        let took = started.elapsed();
        done.store(true, Ordering::Relaxed);
        let max_touch = guest.join().unwrap_or_default();
        if !filled {
            bail!("the fill did not end: {:?}", pager.stats());
        }
        Ok((took, pager.stats().faults, max_touch))
    })?;
    verify(&memory)?;
    Ok(Filled { took, faults, max_touch, noise: watch_clock(took) })
}

/// Binds the calling thread to the last CPU, as operators bind vCPUs: else the
/// scheduler may let it share one with the pager and leave the other idle, and
/// slices of CPU time would be taken for stalls.
fn take_last_cpu() {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return };
    let last = (0..rustix::thread::CpuSet::MAX_CPU).rev().find(|cpu| allowed.is_set(*cpu));
    let mut one = rustix::thread::CpuSet::new();
    one.set(last.unwrap_or(0));
    // Where it is not allowed the figures are only noisier.
    let _ = rustix::thread::sched_setaffinity(None, &one);
}

/// The longest gap a thread sees that does nothing but look at the clock.
fn watch_clock(time: Duration) -> Duration {
    let started = Instant::now();
    let mut last = started;
    let mut longest = Duration::ZERO;
    while last - started < time {
        let now = Instant::now();
        longest = longest.max(now - last);
        last = now;
    }
    longest
}

fn row(n: usize, floor: &[Touched], same: &[Touched], ours: &[Touched]) -> Row {
    let p50 = |rounds: &[Touched]| median(rounds.iter().map(|t| t.p50_us));
    let rate = |rounds: &[Touched]| median(rounds.iter().map(|t| t.kfaults_s));
    Row {
        n,
        floor_p50_us: round(p50(floor)),
        vmpager_p50_us: round(p50(ours)),
        p50_ratio: round(p50(ours) / p50(floor)),
        floor_kfaults_s: round(rate(floor)),
        vmpager_kfaults_s: round(rate(ours)),
        rate_ratio: round(rate(ours) / rate(floor)),
        same_bytes_p50_us: round(p50(same)),
        same_bytes_kfaults_s: round(rate(same)),
        same_bytes_rate_ratio: round(rate(ours) / rate(same)),
    }
}

fn fill_row(bytes: u64, rounds: &[FillRound]) -> Fill {
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let floor = median(rounds.iter().map(|r| ms(r.floor)));
    let hot = median(rounds.iter().map(|r| ms(r.hot)));
    let ours = median(rounds.iter().map(|r| ms(r.filled.took)));
    let worst = rounds.iter().map(|r| r.filled.max_touch).max().unwrap_or_default();
    let worst_noise = rounds.iter().map(|r| r.filled.noise).max().unwrap_or_default();
    Fill {
        bytes,
        copy_2m_ms: round(floor),
        vmpager_ms: round(ours),
        ratio: round(ours / floor),
        copy_2m_hot_ms: round(hot),
        faults: median(rounds.iter().map(|r| to_f64(r.filled.faults))),
        max_touch_us: round(median(rounds.iter().map(|r| us(r.filled.max_touch)))),
        worst_touch_us: round(us(worst)),
        noise_us: round(median(rounds.iter().map(|r| us(r.filled.noise)))),
        worst_noise_us: round(us(worst_noise)),
    }
}

fn nanos_to_us(nanos: u64) -> f64 {
    to_f64(nanos) / 1e3
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{:>7} {:>12} {:>12} {:>6}   {:>14} {:>14} {:>6}   {:>14} {:>6}",
        "threads",
        "floor p50",
        "vmpager p50",
        "ratio",
        "floor faults/s",
        "vmpager",
        "ratio",
        "same bytes",
        "ratio"
    ))?;
    for row in &report.threads {
        output::line(&format!(
            "{:>7} {:>9.2} us {:>9.2} us {:>6.2}   {:>13.0}k {:>13.0}k {:>6.2}   {:>13.0}k {:>6.2}",
            row.n,
            row.floor_p50_us,
            row.vmpager_p50_us,
            row.p50_ratio,
            row.floor_kfaults_s,
            row.vmpager_kfaults_s,
            row.rate_ratio,
            row.same_bytes_kfaults_s,
            row.same_bytes_rate_ratio
        ))?;
    }
    let fill = &report.fill;
    output::line(&format!(
        "\nfill of {}: UFFDIO_COPY of 2 MiB pieces {:.1} ms, vmpager while touched {:.1} ms \
         ({:.2}x, {:.0} faults);\nlongest touch {:.0} us (worst {:.0}; machine noise {:.0}, worst {:.0})",
        size::show(fill.bytes),
        fill.copy_2m_ms,
        fill.vmpager_ms,
        fill.ratio,
        fill.faults,
        fill.max_touch_us,
        fill.worst_touch_us,
        fill.noise_us,
        fill.worst_noise_us
    ))
}
