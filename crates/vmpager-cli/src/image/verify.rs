//! `vmpager image verify`.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::bail;
use serde::Serialize;
use vmpager_store::image::Damage;

use super::progress::Bar;
use super::{Parents, Threads, shown};
use crate::{output, size};

/// Options of `vmpager image verify`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager image verify /snap/mem.vmimg\n\n\
    Reads all of the image and of the layers below it. Exit status: 0 if every bit is\n\
    as it was written, 1 otherwise.")]
pub(crate) struct VerifyArgs {
    /// The image.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    #[command(flatten)]
    parents: Parents,
    #[command(flatten)]
    threads: Threads,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Verified {
    content: String,
    files: u64,
    file_bytes: u64,
    frames: u64,
    damage: Vec<Found>,
}

/// A part that is not what was written. Ranges are `[first, end)` in bytes.
#[derive(Debug, Serialize)]
struct Found {
    file: String,
    what: String,
    file_bytes: [u64; 2],
    memory_bytes: Vec<[u64; 2]>,
}

impl From<Damage> for Found {
    fn from(damage: Damage) -> Self {
        let pair = |range: &Range<u64>| [range.start, range.end];
        Self {
            file: shown(&damage.path),
            file_bytes: pair(&damage.bytes),
            memory_bytes: damage.memory.iter().map(pair).collect(),
            what: damage.what,
        }
    }
}

/// Ranges of memory to name for a damaged frame.
const NAMED: usize = 4;

pub(super) fn run(args: &VerifyArgs) -> anyhow::Result<()> {
    let image = args.parents.open(&args.image)?;
    let mut bar = Bar::new("verifying", args.json)?;
    let report = image.verify(args.threads.count(), &mut |progress| bar.step(progress))?;
    bar.finish();
    let verified = Verified {
        content: image.content().to_string(),
        files: report.files,
        file_bytes: report.file_bytes,
        frames: report.frames,
        damage: report.damage.into_iter().map(Found::from).collect(),
    };
    if args.json {
        output::json(&verified)?;
    } else {
        tell(&verified)?;
    }
    match verified.damage.len() {
        0 => Ok(()),
        count => bail!("{}: {count} damaged parts", shown(&args.image)),
    }
}

fn tell(verified: &Verified) -> anyhow::Result<()> {
    for found in &verified.damage {
        let [from, to] = found.file_bytes;
        output::line(&format!("{}: bytes {from:#x}..{to:#x}: {}", found.file, found.what))?;
        for [from, to] in found.memory_bytes.iter().take(NAMED) {
            output::line(&format!("    memory {from:#x}..{to:#x} cannot be had"))?;
        }
        if let Some(more) = found.memory_bytes.len().checked_sub(NAMED).filter(|more| *more > 0) {
            output::line(&format!("    and {more} more ranges"))?;
        }
    }
    if verified.damage.is_empty() {
        output::line(&format!(
            "every bit is as it was written: {} in {} files, {} frames, contents {}",
            size::show(verified.file_bytes),
            verified.files,
            verified.frames,
            verified.content
        ))?;
    }
    Ok(())
}
