//! The page cache, brought into a known state before a run.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, bail};
use clap::ValueEnum;
use vmpager::core::PageSource;
use vmpager::store::RawFile;
use vmpager_sys::file_map::FileMap;
use vmpager_sys::memory::Mapping;

/// What the page cache holds of the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cache {
    /// All of it.
    Warm,
    /// Nothing.
    Cold,
}

impl Cache {
    /// Its name in tables and JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}

/// Touches as much memory as a VM will have and gives it back. On a host that is
/// a VM itself, memory is dear at its first use: without this the first mode
/// measured would pay for all.
pub(crate) fn warm_up_memory(bytes: u64) -> anyhow::Result<()> {
    let len = usize::try_from(bytes)?;
    let at = || format!("touching {bytes} bytes of memory");
    let memory = Mapping::anonymous(len).with_context(at)?;
    memory.populate(0..len).with_context(at)
}

/// How often it is tried: a host may reclaim page cache of its own accord.
const TRIES: u32 = 5;

/// Brings the page cache into that state, and checks it.
pub(crate) fn prepare(path: &Path, cache: Cache) -> anyhow::Result<()> {
    let at = || format!("preparing the page cache of {}", path.display());
    let file = File::open(path).with_context(at)?;
    let len = file.metadata().with_context(at)?.len();
    let data = data_ranges(path, len).with_context(at)?;
    if data.is_empty() {
        return Ok(());
    }
    let mut resident = 0.0;
    for _ in 0..TRIES {
        match cache {
            Cache::Warm => read_through(&file, &data).with_context(at)?,
            Cache::Cold => drop_pages(&file).with_context(at)?,
        }
        resident = resident_share(&file, len, &data).with_context(at)?;
        let done = match cache {
            Cache::Warm => resident > 0.99,
            Cache::Cold => resident < 0.01,
        };
        if done {
            return Ok(());
        }
    }
    bail!("{}: {:.1}% of it stays in the page cache", at(), resident * 100.0)
}

fn read_through(file: &File, data: &[Range<u64>]) -> std::io::Result<()> {
    const PIECE: usize = 2 << 20;
    let mut bytes = vec![0; PIECE];
    for range in data {
        for start in range.clone().step_by(PIECE) {
            let len = usize::try_from(range.end - start).map_or(PIECE, |left| left.min(PIECE));
            // The last page of an image may be a part of one.
            file.read_at(&mut bytes[..len], start)?;
        }
    }
    Ok(())
}

fn drop_pages(file: &File) -> std::io::Result<()> {
    // Dirty pages cannot be dropped.
    rustix::fs::fsync(file)?;
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// Where the file is no hole, in whole pages. Holes cost no read, and on tmpfs
/// reading them leaves nothing in the page cache.
fn data_ranges(path: &Path, len: u64) -> anyhow::Result<Vec<Range<u64>>> {
    if !len.is_multiple_of(4096) {
        // A packed image, which has no holes.
        return Ok(std::iter::once(0..len.next_multiple_of(4096)).collect());
    }
    let mut data = Vec::new();
    let mut at = 0;
    RawFile::open(path)?.visit_zero_ranges(&mut |hole| {
        data.push(at..hole.start);
        at = hole.end();
    });
    data.push(at..len);
    data.retain(|range| !range.is_empty());
    Ok(data)
}

/// Which share of the pages of these ranges the page cache holds.
fn resident_share(file: &File, len: u64, data: &[Range<u64>]) -> std::io::Result<f64> {
    let map = FileMap::new(file.as_fd(), len.next_multiple_of(4096))?;
    let (mut resident, mut all) = (0, 0);
    for range in data {
        for start in range.clone().step_by(64 * 4096) {
            let end = range.end.min(start + 64 * 4096);
            resident += u64::from(map.resident_pages(start..end)?.count_ones());
            all += (end - start) / 4096;
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "files have fewer than 2^53 pages")]
    let share = resident as f64 / all as f64;
    Ok(share)
}
