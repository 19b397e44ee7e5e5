//! The page cache, brought into a known state before a run.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, bail};
use clap::ValueEnum;
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
    let mut file = File::open(path).with_context(at)?;
    let len = file.metadata().with_context(at)?.len();
    let mut resident = 0.0;
    for _ in 0..TRIES {
        match cache {
            Cache::Warm => read_through(&mut file).with_context(at)?,
            Cache::Cold => drop_pages(&file).with_context(at)?,
        }
        resident = resident_share(&file, len).with_context(at)?;
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

fn read_through(file: &mut File) -> std::io::Result<()> {
    let mut bytes = vec![0; 2 << 20];
    file.rewind()?;
    while file.read(&mut bytes)? > 0 {}
    Ok(())
}

fn drop_pages(file: &File) -> std::io::Result<()> {
    // Dirty pages cannot be dropped.
    rustix::fs::fsync(file)?;
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// Which share of the file's pages the page cache holds.
fn resident_share(file: &File, len: u64) -> std::io::Result<f64> {
    let map = FileMap::new(file.as_fd(), len)?;
    let mut resident = 0;
    let mut start = 0;
    while start < len {
        let end = len.min(start + 64 * 4096);
        resident += u64::from(map.resident_pages(start..end)?.count_ones());
        start = end;
    }
    #[expect(clippy::cast_precision_loss, reason = "files have fewer than 2^53 pages")]
    let share = resident as f64 / (len / 4096) as f64;
    Ok(share)
}
