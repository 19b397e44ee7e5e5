//! Makes images.
//!
//! ```text
//! blocks of pages -> threads: read, hash -> in order: each page once -> frames
//!    file <- in order: frames <- threads: compress, checksum <------------+
//! ```
//!
//! What threads do may end in any order; what decides the bytes of the image is
//! done in the order of the pages by one thread. The same memory and options make
//! the same image.
//!
//! Pages that shall come first are read and stored before all others. When their
//! turn comes in the order of the pages, they are found to be stored already.

mod packer;
mod worker;

use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Arc;

use crossbeam_channel::unbounded;

use crate::PAGE;

use super::codec::{Codec, Encoder};
use super::contents::Tools;
use super::error::ImageError;
use super::input::MemoryInput;
use super::layout;
use super::output::Output;
use super::{ContentId, Image, Progress};

use self::packer::Packer;
use self::worker::Worker;

/// Pages read and hashed at a time: 1 MiB.
const BLOCK_PAGES: u32 = 256;
/// How to make an image.
#[derive(Clone, Debug)]
pub struct PackOptions {
    codec: Codec,
    level: i32,
    frame_bytes: u64,
    threads: usize,
    replace: bool,
    first: Arc<[Range<u32>]>,
}

impl Default for PackOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            codec: Codec::Zstd,
            level: 1,
            frame_bytes: 64 << 10,
            threads,
            replace: false,
            first: Arc::default(),
        }
    }
}

impl PackOptions {
    /// Chooses the codec: zstd by default.
    #[must_use]
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// Chooses the level of zstd, 1 by default; other codecs have none.
    #[must_use]
    pub fn level(mut self, level: i32) -> Self {
        self.level = level;
        self
    }

    /// Chooses how many bytes of memory are compressed together, 64 KiB by
    /// default: a power of two from 4 KiB to 2 MiB.
    #[must_use]
    pub fn frame_bytes(mut self, bytes: u64) -> Self {
        self.frame_bytes = bytes;
        self
    }

    /// Chooses how many threads hash and compress: one for each CPU by default.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads.max(1);
        self
    }

    /// Stores these pages first, in this order, so that they lie in frames next to
    /// each other: what a profile says is needed first
    /// ([`Profile::replay_order`](crate::profile::Profile::replay_order)).
    #[must_use]
    pub fn first(mut self, pages: Vec<Range<u32>>) -> Self {
        self.first = pages.into();
        self
    }

    /// Lets the image replace a file of its name.
    #[must_use]
    pub fn replace(mut self, replace: bool) -> Self {
        self.replace = replace;
        self
    }

    /// Packs memory into a new image. `progress` is told now and then; if it says
    /// so, nothing is made.
    ///
    /// In memory are some 5 MiB for each thread, and what finds duplicates:
    /// 24 to 48 bytes a distinct page, 90 MB at most.
    ///
    /// # Errors
    ///
    /// See [`ImageError`]. Whatever it is, no part of an image is left behind.
    pub fn pack(
        &self,
        memory: &MemoryInput,
        to: &Path,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<PackReport, ImageError> {
        self.run(memory, None, to, progress)
    }

    /// Makes a layer: what `memory` has that `base` has not.
    ///
    /// # Errors
    ///
    /// As [`pack`](Self::pack), and [`ImageError::Sizes`].
    pub fn diff(
        &self,
        base: &Image,
        memory: &MemoryInput,
        to: &Path,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<PackReport, ImageError> {
        if base.memory_bytes() != memory.memory_bytes() {
            return Err(ImageError::Sizes {
                base_path: base.path().to_owned(),
                base: base.memory_bytes(),
                new_path: memory.path().to_owned(),
                new: memory.memory_bytes(),
            });
        }
        self.run(memory, Some(base), to, progress)
    }

    fn run(
        &self,
        memory: &MemoryInput,
        base: Option<&Image>,
        to: &Path,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<PackReport, ImageError> {
        self.check()?;
        let packer = Packer::new(self, memory, base, Output::create(to, self.replace)?)?;
        let (jobs, inbox) = unbounded();
        let (outbox, done) = unbounded();
        std::thread::scope(|scope| {
            for _ in 0..self.threads {
                let (inbox, outbox) = (inbox.clone(), outbox.clone());
                let encoder = Encoder::new(self.codec, self.level)
                    .map_err(ImageError::io("compress for", to))?;
                let (tools, below) = (Tools::new(), Vec::new());
                let worker = Worker { memory, base, encoder, tools, below };
                scope.spawn(move || worker.run(&inbox, &outbox));
            }
            // Dropped with the closure, which ends the threads.
            packer.run(jobs, &done, progress)
        })
    }

    fn check(&self) -> Result<(), ImageError> {
        let sizes = PAGE..=u64::from(layout::MAX_FRAME_PAGES) * PAGE;
        if !self.frame_bytes.is_power_of_two() || !sizes.contains(&self.frame_bytes) {
            return Err(ImageError::Option {
                option: "frame size",
                value: self.frame_bytes.to_string(),
                remedy: "use a power of two from 4K to 2M",
            });
        }
        if self.codec == Codec::Zstd && !zstd::compression_level_range().contains(&self.level) {
            return Err(ImageError::Option {
                option: "level",
                value: self.level.to_string(),
                remedy: "zstd has levels up to 22; 1 to 3 pack fast",
            });
        }
        Ok(())
    }

    fn frame_pages(&self) -> u32 {
        // Checked to be 2 MiB at most.
        u32::try_from(self.frame_bytes / PAGE).unwrap_or(layout::MAX_FRAME_PAGES)
    }
}

/// What came of packing.
#[derive(Clone, Copy, Debug)]
pub struct PackReport {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Pages that are zeroes.
    pub zero_pages: u64,
    /// Pages that are as in the layer below.
    pub parent_pages: u64,
    /// Pages that are like another one that is stored.
    pub duplicate_pages: u64,
    /// Pages that are stored.
    pub stored_pages: u64,
    /// Bytes of the image file.
    pub image_bytes: u64,
    /// What the contents are called.
    pub content: ContentId,
}

/// The pages of a memory, which were checked to be fewer than 32 bits count.
fn pages_of(memory: &MemoryInput) -> u32 {
    u32::try_from(memory.memory_bytes() / PAGE).unwrap_or(u32::MAX)
}

/// A range of pages in parts of at most [`BLOCK_PAGES`].
pub(crate) fn blocks_of(pages: Range<u32>) -> impl Iterator<Item = Range<u32>> {
    let mut at = pages.start;
    std::iter::from_fn(move || {
        let start = at;
        at = pages.end.min((start / BLOCK_PAGES + 1).saturating_mul(BLOCK_PAGES));
        (start < pages.end).then_some(start..at)
    })
}
