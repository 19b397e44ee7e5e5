//! `vmpager bench image`: how small images are, how fast they are made, and how
//! fast memory comes out of them, beside the raw file it was.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;
use vmpager::core::{ByteRange, PageSource};
use vmpager::{GuestRange, NeighbourPolicy, Pager};
use vmpager_store::RawFile;
use vmpager_store::image::{Codec, Image, MemoryInput, PackOptions};
use vmpager_sys::memory::Mapping;
use vmpager_vm::{Filling, SnapshotPaths, Vm, VmConfig};

use super::{median, round, to_f64};
use crate::image::CodecArg;
use crate::restore::{Cache, prepare_cache, warm_up_memory};
use crate::scratch::Scratch;
use crate::{output, size};

/// Options of `vmpager bench image`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    vmpager bench image --memory 256M\n  \
    vmpager bench image --memory-file vm.mem --frame-sizes 16K,64K,256K --json\n\n\
    From a warm page cache. Rounds are interleaved; each number is the median of its\n\
    rounds.")]
pub(crate) struct ImageArgs {
    /// Memory of the built-in guest, which is what is packed.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    memory: u64,
    /// Pack this memory file instead.
    #[arg(long, value_name = "FILE", conflicts_with = "memory")]
    memory_file: Option<PathBuf>,
    /// How to compress.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "none,lz4,zstd")]
    codecs: Vec<CodecArg>,
    /// Frames.
    #[arg(long, value_name = "SIZE", value_delimiter = ',', default_value = "64K", value_parser = size::parse)]
    frame_sizes: Vec<u64>,
    /// Pages to touch at random for the latency of a fault.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    touches: u32,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Where to put the images [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    memory_bytes: u64,
    /// Bytes that are no zero pages.
    data_bytes: u64,
    rounds: u32,
    rows: Vec<Row>,
}

/// One way to keep the memory. Rates are of bytes that are no zero pages, in
/// millions a second; a raw file is neither packed nor decoded.
#[derive(Debug, Serialize)]
struct Row {
    codec: &'static str,
    frame_bytes: Option<u64>,
    image_bytes: u64,
    /// Of the image to the bytes that are no zero pages.
    ratio: f64,
    pack_mb_s: Option<f64>,
    /// By one thread.
    decode_mb_s: Option<f64>,
    /// By the pager's fill: decoded and in place in the memory of a VM.
    fill_mb_s: f64,
    /// First touches of single pages at random, nothing prefetched.
    fault_p50_us: f64,
    fault_p99_us: f64,
}

/// What was measured in a round.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    image_bytes: u64,
    pack: Duration,
    decode: Duration,
    fill: Duration,
    p50_us: f64,
    p99_us: f64,
}

const LIMIT: Duration = Duration::from_secs(600);

pub(crate) fn run(args: &ImageArgs) -> anyhow::Result<()> {
    let scratch = Scratch::new(args.dir.as_deref(), 2 * args.memory)?;
    let memory = match &args.memory_file {
        Some(file) => file.clone(),
        None => make_memory(args.memory, scratch.path())?,
    };
    let input = MemoryInput::raw(&memory)?;
    warm_up_memory(input.memory_bytes())?;
    prepare_cache(&memory, Cache::Warm)?;
    let ways: Vec<Option<(Codec, u64)>> =
        std::iter::once(None)
            .chain(args.codecs.iter().flat_map(|codec| {
                args.frame_sizes.iter().map(|frame| Some(((*codec).into(), *frame)))
            }))
            .collect();
    let mut measured = vec![Vec::new(); ways.len()];
    let mut data_bytes = 0;
    for number in 0..args.rounds {
        for (way, measured) in ways.iter().zip(&mut measured) {
            measured.push(match way {
                None => Measured {
                    image_bytes: std::fs::metadata(&memory)?.len(),
                    ..restores(&RawFile::open(&memory)?, args, number)?
                },
                Some((codec, frame)) => {
                    let to = scratch.path().join("image");
                    let options = PackOptions::default().codec(*codec).frame_bytes(*frame);
                    packed(&input, &to, &options, args, number, &mut data_bytes)?
                }
            });
        }
    }
    let rows = ways.iter().zip(&measured);
    let rows = rows.map(|(way, measured)| row(*way, measured, data_bytes)).collect();
    let memory_bytes = input.memory_bytes();
    let report = Report { memory_bytes, data_bytes, rounds: args.rounds, rows };
    if args.json { output::json(&report) } else { show(&report) }
}

fn make_memory(bytes: u64, dir: &Path) -> anyhow::Result<PathBuf> {
    let filling = Filling::Generated { seed: 1, bytes: None };
    let config = VmConfig { memory_bytes: bytes, filling, ..VmConfig::default() };
    let mut vm = Vm::build(&config).with_context(|| format!("a guest of {}", size::show(bytes)))?;
    vm.prepare()?;
    let paths = SnapshotPaths::in_dir(dir);
    vm.snapshot(&paths)?;
    Ok(paths.memory)
}

fn packed(
    input: &MemoryInput,
    to: &Path,
    options: &PackOptions,
    args: &ImageArgs,
    number: u32,
    data_bytes: &mut u64,
) -> anyhow::Result<Measured> {
    let started = Instant::now();
    let options = options.clone().replace(true);
    let report = options.pack(input, to, &mut |_| ControlFlow::Continue(()))?;
    let pack = started.elapsed();
    *data_bytes = report.memory_bytes - report.zero_pages * 4096;
    prepare_cache(to, Cache::Warm)?;
    let image = Image::open(to)?;
    let decode = decode(&image)?;
    let restores = restores(&Image::open(to)?, args, number)?;
    Ok(Measured { image_bytes: report.image_bytes, pack, decode, ..restores })
}

/// Decodes everything by one thread.
fn decode(image: &Image) -> anyhow::Result<Duration> {
    const PIECE: u64 = 1 << 20;
    let mut bytes = vec![0; 1 << 20];
    let mut took = Duration::ZERO;
    for range in data_ranges(image) {
        for at in (range.start..range.end()).step_by(bytes.len()) {
            let len = PIECE.min(range.end() - at);
            let to = &mut bytes[..usize::try_from(len)?];
            let started = Instant::now();
            image.read(ByteRange::new(at, len), to)?;
            took += started.elapsed();
        }
    }
    Ok(took)
}

/// The fill of a VM's memory, and single faults of another.
fn restores<S: PageSource + 'static>(
    source: &Arc<S>,
    args: &ImageArgs,
    number: u32,
) -> anyhow::Result<Measured> {
    let len = usize::try_from(source.len())?;
    let memory = Arc::new(Mapping::anonymous(len)?);
    let started = Instant::now();
    let pager = Pager::builder(source.clone() as Arc<dyn PageSource>)
        .region(&GuestRange::of_mapping(&memory), 0)
        .background_fill(true)
        .start()?;
    if !pager.wait_filled(LIMIT) {
        bail!("{} was not filled within {LIMIT:?}", source.name());
    }
    let fill = started.elapsed();
    drop((pager, memory));

    let memory = Arc::new(Mapping::anonymous(len)?);
    let pager = Pager::builder(source.clone() as Arc<dyn PageSource>)
        .region(&GuestRange::of_mapping(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()?;
    let mut times = touch(&memory, &data_pages(&**source), args.touches, number.into());
    drop(pager);
    times.sort_by(f64::total_cmp);
    let nth = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or(0.0);
    Ok(Measured { fill, p50_us: nth(50), p99_us: nth(99), ..Measured::default() })
}

/// Ranges that are not known to be zero.
fn data_ranges(source: &dyn PageSource) -> Vec<ByteRange> {
    let (mut data, mut at) = (Vec::new(), 0);
    source.visit_zero_ranges(&mut |hole| {
        data.push(ByteRange::new(at, hole.start - at));
        at = hole.end();
    });
    data.push(ByteRange::new(at, source.len() - at));
    data.retain(|range| range.len > 0);
    data
}

fn data_pages(source: &dyn PageSource) -> Vec<u64> {
    let pages = |range: &ByteRange| range.start / 4096..range.end() / 4096;
    data_ranges(source).iter().flat_map(pages).collect()
}

/// Reads a word of pages at random; how long each took, in microseconds.
fn touch(memory: &Mapping, pages: &[u64], touches: u32, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut times = Vec::new();
    for _ in 0..touches {
        // xorshift64.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let Some(page) = pages.get(usize::try_from(state).unwrap_or(0) % pages.len().max(1)) else {
            break;
        };
        let at = usize::try_from(page * 4096).unwrap_or(0);
        let started = Instant::now();
        memory.read_u64(at);
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    times
}

fn row(way: Option<(Codec, u64)>, measured: &[Measured], data_bytes: u64) -> Row {
    let middle = |number: fn(&Measured) -> f64| median(measured.iter().map(number));
    let data = to_f64(data_bytes);
    let rate = |seconds: f64| round(data / 1e6 / seconds);
    let image_bytes = measured.first().map_or(0, |measured| measured.image_bytes);
    Row {
        codec: way.map_or("raw file", |(codec, _)| codec.name()),
        frame_bytes: way.map(|(_, frame)| frame),
        image_bytes,
        ratio: round(to_f64(if way.is_some() { image_bytes } else { data_bytes }) / data),
        pack_mb_s: way.map(|_| rate(middle(|m| m.pack.as_secs_f64()))),
        decode_mb_s: way.map(|_| rate(middle(|m| m.decode.as_secs_f64()))),
        fill_mb_s: rate(middle(|m| m.fill.as_secs_f64())),
        fault_p50_us: round(middle(|m| m.p50_us)),
        fault_p99_us: round(middle(|m| m.p99_us)),
    }
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{} of memory, {} not zero, {} rounds; MB/s of what is not zero\n\n\
         {:<9} {:>7} {:>11} {:>6} {:>7} {:>9} {:>10} {:>18}",
        size::show(report.memory_bytes),
        size::show(report.data_bytes),
        report.rounds,
        "",
        "frames",
        "size",
        "ratio",
        "pack",
        "decode",
        "fill a VM",
        "fault p50 / p99 us",
    ))?;
    let rate = |rate: Option<f64>| rate.map_or_else(|| "-".into(), |rate| format!("{rate:.0}"));
    for row in &report.rows {
        output::line(&format!(
            "{:<9} {:>7} {:>11} {:>6.2} {:>7} {:>9} {:>10.0} {:>18}",
            row.codec,
            row.frame_bytes.map_or_else(|| "-".into(), |bytes| format!("{}K", bytes / 1024)),
            size::show(row.image_bytes),
            row.ratio,
            rate(row.pack_mb_s),
            rate(row.decode_mb_s),
            row.fill_mb_s,
            format!("{:.1} / {:.0}", row.fault_p50_us, row.fault_p99_us),
        ))?;
    }
    Ok(())
}
