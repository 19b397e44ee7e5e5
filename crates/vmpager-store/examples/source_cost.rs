//! What a raw memory file costs its reader, by path:
//! `cargo run --release -p vmpager-store --example source_cost [FILE]`.
//! Without a file, one of 512 MiB is written to the current directory and
//! removed again.

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use vmpager_core::{ByteRange, PageReader, PageSource, Priority, ReadId, ReadRequest};
use vmpager_store::{Backend, RawFile, RawFileOptions};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PAGE: u64 = 4096;

fn main() -> Result<()> {
    let given = std::env::args_os().nth(1).map(PathBuf::from);
    let path = given.clone().unwrap_or_else(|| PathBuf::from("source_cost.tmp"));
    if given.is_none() {
        let mut file = std::fs::File::create(&path)?;
        for chunk in 0..256_u32 {
            file.write_all(&[chunk.to_le_bytes()[0] | 1; 2 << 20])?;
        }
        file.sync_all()?;
    }
    let result = measure(&path);
    if given.is_none() {
        std::fs::remove_file(&path)?;
    }
    result
}

fn measure(path: &Path) -> Result<()> {
    warm_up(path)?;
    let options = RawFile::options();
    for (name, options) in [
        ("mapped, unlimited", options.clone()),
        ("mapped within 6 MiB", options.clone().max_mapped(6 << 20)),
        ("never mapped", options.clone().max_mapped(0)),
    ] {
        println!("{name}");
        try_reads(options, path)?;
    }
    for backend in [Backend::IoUring, Backend::Threads] {
        println!("{backend:?}");
        let source = options.clone().backend(backend).open(path)?;
        background(&source, 1, true)?;
        background(&source, 1, false)?;
        background(&source, 16, false)?;
        background(&source, 512, true)?;
        background(&source, 512, false)?;
    }
    Ok(())
}

/// Brings the file into the page cache.
fn warm_up(path: &Path) -> Result<()> {
    std::io::copy(&mut std::fs::File::open(path)?, &mut std::io::sink())?;
    Ok(())
}

fn try_reads(options: RawFileOptions, path: &Path) -> Result<()> {
    for (count, random) in [(1, false), (1, true), (16, false), (16, true), (512, false)] {
        let source = options.clone().open(path)?;
        let blocks = source.len() / PAGE / count;
        let mut reader = Arc::clone(&source).open_reader()?;
        let rounds = blocks.min(40_000);
        let mut at_hand = 0_u64;
        let started = Instant::now();
        for round in 0..rounds {
            let block = if random { round * 40_503 % blocks } else { round };
            let range = ByteRange::new(block * count * PAGE, count * PAGE);
            at_hand += u64::from(reader.try_read(range)?.is_some());
        }
        let each = started.elapsed().as_nanos() / u128::from(rounds);
        let order = if random { "random" } else { "in order" };
        println!(
            "  try_read {:>5} KiB {order:9} {each:>8} ns, {at_hand}/{rounds} at hand",
            count * 4
        );
    }
    Ok(())
}

fn background(source: &Arc<RawFile>, count: u64, warm: bool) -> Result<()> {
    let file = std::fs::File::open(&*source.name())?;
    if warm {
        warm_up(source.name().as_ref().as_ref())?;
    } else {
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    let mut reader = Arc::clone(source).open_reader()?;
    let blocks = source.len() / PAGE / count;
    let rounds = blocks.min(500);
    let (mut submitting, mut all) = (Duration::ZERO, Duration::ZERO);
    for round in 0..rounds {
        let block = round * 40_503 % blocks;
        let range = ByteRange::new(block * count * PAGE, count * PAGE);
        let started = Instant::now();
        reader.submit(ReadRequest {
            id: ReadId(round),
            range,
            priority: Priority::Demand,
            here_only: false,
        });
        submitting += started.elapsed();
        wait(&mut *reader)?;
        all += started.elapsed();
    }
    let each = |time: Duration| time.as_nanos() / u128::from(rounds);
    let state = if warm { "warm" } else { "cold" };
    println!(
        "  submit {:>5} KiB {state}: {:>8} ns to submit, {:>8} ns to complete",
        count * 4,
        each(submitting),
        each(all)
    );
    Ok(())
}

fn wait(reader: &mut dyn PageReader) -> Result<()> {
    let mut ended = false;
    while !ended {
        let Some(fd) = reader.ready_fd() else { break };
        rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], None)?;
        reader.complete(&mut |_, result| ended = result.is_ok());
    }
    Ok(())
}
