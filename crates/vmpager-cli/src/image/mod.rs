//! `vmpager image`: packed images.

mod inspect;
mod pack;
mod progress;
mod verify;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::{Subcommand, ValueEnum};
use vmpager_store::image::{Codec, Image, ImageOptions};
use vmpager_store::remote::RemoteOptions;

/// What to do with images.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Make an image of a raw memory file.
    Pack(pack::PackArgs),
    /// Write the contents of an image to a raw memory file.
    Unpack(pack::UnpackArgs),
    /// Show what an image is made of.
    Inspect(inspect::InspectArgs),
    /// Look at every bit of an image.
    Verify(verify::VerifyArgs),
    /// Make a layer over an image: what changed since.
    Diff(pack::DiffArgs),
    /// Make one image of a layer and all that is below.
    Flatten(pack::FlattenArgs),
}

pub(crate) fn run(command: &ImageCommand) -> anyhow::Result<()> {
    match command {
        ImageCommand::Pack(args) => pack::pack(args),
        ImageCommand::Unpack(args) => pack::unpack(args),
        ImageCommand::Inspect(args) => inspect::run(args),
        ImageCommand::Verify(args) => verify::run(args),
        ImageCommand::Diff(args) => pack::diff(args),
        ImageCommand::Flatten(args) => pack::flatten(args),
    }
}

/// Where the layers below an image are, and who is believed to have them.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Parents {
    /// An image that a layer may be over; may be given several times [default:
    /// the name it had when the layer was made, beside the layer].
    #[arg(long = "parent", value_name = "IMAGE")]
    parents: Vec<PathBuf>,
    /// Believe those `https://` servers for which an authority in this file of PEM
    /// certificates vouches [default: those that this machine trusts, or SSL_CERT_FILE
    /// names].
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

impl Parents {
    /// Where they are.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.parents.iter().map(PathBuf::as_path)
    }

    /// Opens an image over them.
    pub(crate) fn open(&self, image: &Path) -> anyhow::Result<Arc<Image>> {
        let remote = self.trusting(RemoteOptions::default());
        open_over(image, self.paths(), Image::options().remote(remote))
    }

    /// Has servers believed as was said.
    pub(crate) fn trusting(&self, options: RemoteOptions) -> RemoteOptions {
        #[cfg(feature = "tls")]
        if let Some(file) = &self.ca_file {
            return options.authorities(file);
        }
        options
    }
}

/// Opens an image over layers that may be below it, with these options.
pub(crate) fn open_over(
    image: &Path,
    parents: impl Iterator<Item = impl Into<PathBuf>>,
    options: ImageOptions,
) -> anyhow::Result<Arc<Image>> {
    let options = parents.fold(options, |options, parent| options.parent(parent));
    Ok(options.open(image)?)
}

/// How many threads work.
#[derive(Clone, Debug, clap::Args)]
struct Threads {
    /// Threads [default: one per CPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
}

impl Threads {
    fn count(&self) -> usize {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or(cpus, usize::from)
    }
}

/// A compression method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CodecArg {
    /// Store pages as they are.
    None,
    /// Fastest to restore.
    Lz4,
    /// Smallest.
    Zstd,
}

impl From<CodecArg> for Codec {
    fn from(arg: CodecArg) -> Self {
        match arg {
            CodecArg::None => Self::None,
            CodecArg::Lz4 => Self::Lz4,
            CodecArg::Zstd => Self::Zstd,
        }
    }
}

/// A path for people.
pub(crate) fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// `part` of `all`; 0 of nothing.
pub(crate) fn share(part: u64, all: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a share needs no more digits")]
    let share = part as f64 / all.max(1) as f64;
    share
}

pub(crate) fn write_file(path: &Path, text: &str) -> anyhow::Result<()> {
    crate::output::replace_file(path, text.as_bytes()).with_context(|| shown(path))
}
