//! `vmpager image pack`, `unpack`, `diff` and `flatten`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use vmpager_store::image::{ImageError, MemoryInput, PackOptions, PackReport};
use vmpager_store::profile::Profile;

use super::progress::Bar;
use super::{CodecArg, Parents, Threads, share, shown};
use crate::{output, size};

/// How an image is made.
#[derive(Clone, Debug, clap::Args)]
struct Packing {
    /// How to compress.
    #[arg(long, value_enum, default_value_t = CodecArg::Zstd)]
    codec: CodecArg,
    /// Level of zstd: higher is smaller, and slower to make.
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    level: i32,
    /// Memory that is compressed together, 4K to 2M: more is smaller, and slower
    /// to get a single page of.
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = size::parse)]
    frame_size: u64,
    /// Store the pages of this profile first, next to each other, in the order in
    /// which they are needed.
    #[arg(long, value_name = "PROFILE")]
    profile: Option<PathBuf>,
    #[command(flatten)]
    threads: Threads,
    /// Replace the output if it exists.
    #[arg(long)]
    force: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

impl Packing {
    /// How to pack this memory.
    fn options(&self, memory: &MemoryInput) -> anyhow::Result<PackOptions> {
        let first = match &self.profile {
            Some(path) => Profile::open_for(path, memory)?.replay_order(),
            None => Vec::new(),
        };
        Ok(PackOptions::default()
            .first(first)
            .codec(self.codec.into())
            .level(self.level)
            .frame_bytes(self.frame_size)
            .threads(self.threads.count())
            .replace(self.force))
    }
}

/// Options of `vmpager image pack`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    vmpager image pack /snap/mem /snap/mem.vmimg\n  \
    vmpager image pack --codec lz4 /snap/mem /snap/mem.vmimg\n  \
    vmpager image pack --profile /snap/mem.vmprof /snap/mem /snap/mem.vmimg\n\n\
    Holes of the file cost nothing. The image is written beside and renamed when it\n\
    is complete.")]
pub(crate) struct PackArgs {
    /// The memory file, as the VMM wrote it.
    #[arg(value_name = "MEMORY")]
    memory: PathBuf,
    /// The image to make.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    #[command(flatten)]
    packing: Packing,
}

/// Options of `vmpager image diff`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager image diff /snap/base.vmimg /snap/now.mem /snap/now.vmimg\n\n\
    The layer names its base by the identity of its contents: it can be opened over\n\
    that image, however it is packed, and over no other.")]
pub(crate) struct DiffArgs {
    /// The image below.
    #[arg(value_name = "BASE")]
    base: PathBuf,
    /// The memory that is new: a raw file of the same size.
    #[arg(value_name = "NEW")]
    new: PathBuf,
    /// The layer to make.
    #[arg(value_name = "LAYER")]
    layer: PathBuf,
    /// NEW is an image, not a raw file.
    #[arg(long)]
    packed: bool,
    #[command(flatten)]
    parents: Parents,
    #[command(flatten)]
    packing: Packing,
}

/// Options of `vmpager image flatten`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager image flatten /snap/now.vmimg /snap/whole.vmimg\n\n\
    Also packs an image anew, by another codec or in other frames.")]
pub(crate) struct FlattenArgs {
    /// The topmost layer.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// The image to make.
    #[arg(value_name = "OUTPUT")]
    output: PathBuf,
    #[command(flatten)]
    parents: Parents,
    #[command(flatten)]
    packing: Packing,
}

/// Options of `vmpager image unpack`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager image unpack /snap/mem.vmimg /snap/mem\n\n\
    Pages of zeroes become holes.")]
pub(crate) struct UnpackArgs {
    /// The image.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    /// The memory file to make.
    #[arg(value_name = "MEMORY")]
    memory: PathBuf,
    #[command(flatten)]
    parents: Parents,
    #[command(flatten)]
    threads: Threads,
    /// Replace the output if it exists.
    #[arg(long)]
    force: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// What `pack`, `diff` and `flatten` print with `--json`.
#[derive(Debug, Serialize)]
struct Packed {
    image: String,
    content: String,
    memory_bytes: u64,
    zero_pages: u64,
    parent_pages: u64,
    duplicate_pages: u64,
    stored_pages: u64,
    image_bytes: u64,
    /// Of the image to the bytes of memory that are not zero, if there are any.
    ratio: Option<f64>,
    /// Bytes of memory that were read: all but holes.
    read_bytes: u64,
    seconds: f64,
    mb_per_second: f64,
}

pub(super) fn pack(args: &PackArgs) -> anyhow::Result<()> {
    let memory = MemoryInput::raw(&args.memory)?;
    let options = args.packing.options(&memory)?;
    make(&args.image, &args.packing, "packing", |bar| {
        options.pack(&memory, &args.image, &mut |progress| bar.step(progress))
    })
}

pub(super) fn flatten(args: &FlattenArgs) -> anyhow::Result<()> {
    let memory = MemoryInput::image(args.parents.open(&args.image)?);
    let options = args.packing.options(&memory)?;
    make(&args.output, &args.packing, "flattening", |bar| {
        options.pack(&memory, &args.output, &mut |progress| bar.step(progress))
    })
}

pub(super) fn diff(args: &DiffArgs) -> anyhow::Result<()> {
    let base = args.parents.open(&args.base)?;
    let memory = if args.packed {
        MemoryInput::image(args.parents.open(&args.new)?)
    } else {
        MemoryInput::raw(&args.new)?
    };
    let options = args.packing.options(&memory)?;
    make(&args.layer, &args.packing, "comparing", |bar| {
        options.diff(&base, &memory, &args.layer, &mut |progress| bar.step(progress))
    })
}

fn make(
    image: &Path,
    packing: &Packing,
    what: &'static str,
    work: impl FnOnce(&mut Bar) -> Result<PackReport, ImageError>,
) -> anyhow::Result<()> {
    let mut bar = Bar::new(what, packing.json)?;
    let report = work(&mut bar)?;
    let (took, read_bytes) = bar.finish();
    let data = report.memory_bytes - report.zero_pages * 4096;
    let packed = Packed {
        image: shown(image),
        content: report.content.to_string(),
        memory_bytes: report.memory_bytes,
        zero_pages: report.zero_pages,
        parent_pages: report.parent_pages,
        duplicate_pages: report.duplicate_pages,
        stored_pages: report.stored_pages,
        image_bytes: report.image_bytes,
        ratio: (data > 0).then(|| share(report.image_bytes, data)),
        read_bytes,
        seconds: took.as_secs_f64(),
        mb_per_second: rate(read_bytes, took),
    };
    if packing.json {
        return output::json(&packed);
    }
    let below = match report.parent_pages {
        0 => String::new(),
        pages => format!("  {} as below\n", pages_shown(pages)),
    };
    let ratio =
        packed.ratio.map_or_else(String::new, |ratio| format!(", {ratio:.2} of what is not zero"));
    output::line(&format!(
        "{}: {} of memory in {}{ratio}\n  {} zero\n{below}  {} duplicate\n  \
         {} stored\n  contents {}\n  {:.1} s, {:.0} MB/s",
        shown(image),
        size::show(report.memory_bytes),
        size::show(report.image_bytes),
        pages_shown(report.zero_pages),
        pages_shown(report.duplicate_pages),
        pages_shown(report.stored_pages),
        packed.content,
        packed.seconds,
        packed.mb_per_second,
    ))
}

fn pages_shown(pages: u64) -> String {
    format!("{:>10}", size::show(pages * 4096))
}

/// Millions of bytes a second.
fn rate(bytes: u64, took: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate needs no more digits")]
    let bytes = bytes as f64;
    bytes / 1e6 / took.as_secs_f64().max(1e-9)
}

/// What `unpack --json` prints.
#[derive(Debug, Serialize)]
struct Unpacked {
    memory: String,
    memory_bytes: u64,
    /// Bytes that are no holes.
    written_bytes: u64,
    seconds: f64,
    mb_per_second: f64,
}

pub(super) fn unpack(args: &UnpackArgs) -> anyhow::Result<()> {
    let image = args.parents.open(&args.image)?;
    let mut bar = Bar::new("unpacking", args.json)?;
    image.unpack(&args.memory, args.force, args.threads.count(), &mut |p| bar.step(p))?;
    let (took, written_bytes) = bar.finish();
    let unpacked = Unpacked {
        memory: shown(&args.memory),
        memory_bytes: image.memory_bytes(),
        written_bytes,
        seconds: took.as_secs_f64(),
        mb_per_second: rate(written_bytes, took),
    };
    if args.json {
        return output::json(&unpacked);
    }
    output::line(&format!(
        "{}: {} of memory, {} that are no holes; {:.1} s, {:.0} MB/s",
        unpacked.memory,
        size::show(unpacked.memory_bytes),
        size::show(written_bytes),
        unpacked.seconds,
        unpacked.mb_per_second
    ))
}
