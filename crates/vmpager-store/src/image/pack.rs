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

use std::collections::{BTreeMap, HashMap};
use std::ops::{ControlFlow, Range};
use std::path::Path;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::PAGE_BYTES;
use crate::PAGE;

use super::codec::{Codec, Encoder};
use super::contents::{Tools, Wait};
use super::error::ImageError;
use super::identity::{ContentHasher, PageHash};
use super::index::{IndexBuilder, Kind};
use super::input::MemoryInput;
use super::layout::{self, FrameRecord, Header, ImageRecord, MAX_STORED, Section, Trailer};
use super::output::Output;
use super::{ContentId, Image, Progress};

/// Pages read and hashed at a time: 1 MiB.
const BLOCK_PAGES: u32 = 256;
/// Bytes of frames that wait to be compressed, for each thread.
const FRAME_BYTES_AHEAD: usize = 1 << 20;
/// Pages remembered in order to find their duplicates, about 90 MB of memory. Of
/// larger memories some duplicates are stored twice.
const REMEMBERED: usize = 3_600_000;

/// How to make an image.
#[derive(Clone, Debug)]
pub struct PackOptions {
    codec: Codec,
    level: i32,
    frame_bytes: u64,
    threads: usize,
    replace: bool,
}

impl Default for PackOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { codec: Codec::Zstd, level: 1, frame_bytes: 64 << 10, threads, replace: false }
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

/// What threads are given to do.
enum Job {
    Block { number: usize, pages: Range<u32>, bytes: Vec<u8> },
    Frame { number: usize, raw: Vec<u8>, packed: Vec<u8> },
}

/// What came of it.
enum Done {
    Block {
        number: usize,
        block: Block,
    },
    Frame {
        number: usize,
        frame: Frame,
    },
    Failed(ImageError),
    /// A thread panics; what it had to do will never be done.
    Panicking,
}

struct Block {
    pages: Range<u32>,
    kinds: Vec<PageKind>,
    bytes: Vec<u8>,
}

enum PageKind {
    Zero,
    Parent(PageHash),
    Data(PageHash),
}

struct Frame {
    raw: Vec<u8>,
    packed: Vec<u8>,
    crc: u32,
}

struct Worker<'a> {
    memory: &'a MemoryInput,
    base: Option<&'a Image>,
    encoder: Encoder,
    tools: Tools,
    below: Vec<u8>,
}

/// Tells that its thread panics, so that nobody waits for it.
struct TellPanic<'a>(&'a Sender<Done>);

impl Drop for TellPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.send(Done::Panicking);
        }
    }
}

impl Worker<'_> {
    fn run(mut self, inbox: &Receiver<Job>, outbox: &Sender<Done>) {
        let _guard = TellPanic(outbox);
        for job in inbox {
            let done = match job {
                Job::Block { number, pages, bytes } => match self.block(pages, bytes) {
                    Ok(block) => Done::Block { number, block },
                    Err(error) => Done::Failed(error),
                },
                Job::Frame { number, raw, mut packed } => {
                    self.encoder.encode(&raw, &mut packed);
                    let crc = crc32c::crc32c(&packed);
                    Done::Frame { number, frame: Frame { raw, packed, crc } }
                }
            };
            if outbox.send(done).is_err() {
                return;
            }
        }
    }

    /// Reads pages, and tells what each of them is.
    fn block(&mut self, pages: Range<u32>, mut bytes: Vec<u8>) -> Result<Block, ImageError> {
        bytes.resize(pages.len() * PAGE_BYTES, 0);
        self.memory.read(pages.clone(), &mut self.tools, &mut bytes)?;
        if let Some(base) = self.base {
            self.below.resize(bytes.len(), 0);
            base.contents.read(pages.clone(), Wait::May, &mut self.tools, &mut self.below)?;
        }
        let below = self.below.as_chunks::<PAGE_BYTES>().0;
        let kind = |(nth, page): (usize, &[u8; PAGE_BYTES])| {
            if *page == [0; PAGE_BYTES] {
                return PageKind::Zero;
            }
            let hash = *blake3::hash(page).as_bytes();
            if below.get(nth) == Some(page) { PageKind::Parent(hash) } else { PageKind::Data(hash) }
        };
        let kinds = bytes.as_chunks().0.iter().enumerate().map(kind).collect();
        Ok(Block { pages, kinds, bytes })
    }
}

/// Decides what goes into the image, in the order of the pages.
struct Packer<'a> {
    options: &'a PackOptions,
    memory: &'a MemoryInput,
    base: Option<&'a Image>,
    output: Output,
    index: IndexBuilder,
    content: ContentHasher,
    /// The first page that no block was taken of.
    next_page: u32,
    /// Stored pages by the first half of their hash, which two different pages
    /// share as seldom as any 128 bits.
    known: HashMap<[u8; 16], u32>,
    stored: u32,
    frame: Vec<u8>,
    frames: Vec<FrameRecord>,
    at: u64,
    counts: Counts,
    flight: Flight,
}

#[derive(Default)]
struct Counts {
    zero: u64,
    parent: u64,
    duplicate: u64,
}

/// What threads have been given, and what came back before its turn.
#[derive(Default)]
struct Flight {
    blocks: BTreeMap<usize, Block>,
    blocks_sent: usize,
    blocks_taken: usize,
    frames: BTreeMap<usize, Frame>,
    frames_sent: usize,
    /// Buffers to be used again.
    spare_blocks: Vec<Vec<u8>>,
    spare_frames: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<'a> Packer<'a> {
    fn new(
        options: &'a PackOptions,
        memory: &'a MemoryInput,
        base: Option<&'a Image>,
        mut output: Output,
    ) -> Result<Self, ImageError> {
        let header = Header::encode();
        output.append(&header)?;
        Ok(Self {
            options,
            memory,
            base,
            output,
            index: IndexBuilder::new(),
            content: ContentHasher::new(memory.memory_bytes()),
            next_page: 0,
            known: HashMap::new(),
            stored: 0,
            frame: Vec::new(),
            frames: Vec::new(),
            at: header.len() as u64,
            counts: Counts::default(),
            flight: Flight::default(),
        })
    }

    fn run(
        mut self,
        jobs: Sender<Job>,
        done: &Receiver<Done>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<PackReport, ImageError> {
        let data = self.memory.data();
        let total_bytes = data.iter().map(|range| range.len() as u64 * PAGE).sum();
        let mut blocks = data.into_iter().flat_map(blocks_of).peekable();
        let mut done_bytes = 0;
        while blocks.peek().is_some() || self.flight.blocks_taken < self.flight.blocks_sent {
            while self.may_send()
                && let Some(pages) = blocks.next()
            {
                let bytes = self.flight.spare_blocks.pop().unwrap_or_default();
                let number = self.flight.blocks_sent;
                self.flight.blocks_sent += 1;
                let _ = jobs.send(Job::Block { number, pages, bytes });
            }
            // Blocks, or the frames that they wait for.
            done_bytes += self.take(done, &jobs)?;
            if progress(Progress { done_bytes, total_bytes }).is_break() {
                return Err(ImageError::Interrupted);
            }
        }
        self.zero_until(pages_of(self.memory));
        self.send_frame(&jobs);
        while self.frames.len() < self.flight.frames_sent {
            self.take(done, &jobs)?;
        }
        self.memory.check_unchanged()?;
        self.finish()
    }

    fn may_send(&self) -> bool {
        let Flight { blocks_sent, blocks_taken, frames_sent, .. } = self.flight;
        let frames = frames_sent - self.frames.len();
        blocks_sent - blocks_taken < 2 * self.options.threads + 2
            && frames * self.options.frame_pages() as usize * PAGE_BYTES
                <= FRAME_BYTES_AHEAD * self.options.threads
    }

    /// Waits for something to be done, and does what is next in order. Returns
    /// how many bytes of memory that was.
    fn take(&mut self, done: &Receiver<Done>, jobs: &Sender<Job>) -> Result<u64, ImageError> {
        match done.recv() {
            Ok(Done::Block { number, block }) => {
                self.flight.blocks.insert(number, block);
            }
            Ok(Done::Frame { number, frame }) => {
                self.flight.frames.insert(number, frame);
            }
            Ok(Done::Failed(error)) => return Err(error),
            // The panic goes on when the threads are joined.
            Ok(Done::Panicking) | Err(_) => return Err(ImageError::Interrupted),
        }
        let mut bytes = 0;
        while let Some(block) = self.flight.blocks.remove(&self.flight.blocks_taken) {
            self.flight.blocks_taken += 1;
            bytes += block.bytes.len() as u64;
            self.block(&block, jobs)?;
            self.flight.spare_blocks.push(block.bytes);
        }
        while let Some(frame) = self.flight.frames.remove(&self.frames.len()) {
            // A frame has 2 MiB at most.
            let len = u32::try_from(frame.packed.len()).unwrap_or(u32::MAX);
            self.frames.push(FrameRecord { offset: self.at, len, crc: frame.crc });
            self.append(&frame.packed)?;
            self.flight.spare_frames.push((frame.raw, frame.packed));
        }
        Ok(bytes)
    }

    fn block(&mut self, block: &Block, jobs: &Sender<Job>) -> Result<(), ImageError> {
        self.zero_until(block.pages.start);
        self.next_page = block.pages.end;
        for (kind, page) in block.kinds.iter().zip(block.bytes.chunks_exact(PAGE_BYTES)) {
            match kind {
                PageKind::Zero => {
                    self.counts.zero += 1;
                    self.content.zero_pages(1);
                    self.index.add(1, Kind::Zero);
                }
                PageKind::Parent(hash) => {
                    self.counts.parent += 1;
                    self.content.page(hash);
                    self.index.add(1, Kind::Parent);
                }
                PageKind::Data(hash) => {
                    self.content.page(hash);
                    let stored = self.store(hash, page, jobs)?;
                    self.index.add(1, Kind::Stored(stored));
                }
            }
        }
        Ok(())
    }

    /// Stores a page, unless it is stored already. Returns its number.
    fn store(
        &mut self,
        hash: &PageHash,
        page: &[u8],
        jobs: &Sender<Job>,
    ) -> Result<u32, ImageError> {
        let mut key = [0; 16];
        key.copy_from_slice(&hash[..16]);
        if let Some(known) = self.known.get(&key) {
            self.counts.duplicate += 1;
            return Ok(*known);
        }
        let number = self.stored;
        if number == MAX_STORED {
            let (path, len) = (self.memory.path().to_owned(), self.memory.memory_bytes());
            return Err(ImageError::MemoryLength { path, len });
        }
        self.stored += 1;
        if self.known.len() < REMEMBERED {
            self.known.insert(key, number);
        }
        self.frame.extend_from_slice(page);
        if self.frame.len() as u64 == self.options.frame_bytes {
            self.send_frame(jobs);
        }
        Ok(number)
    }

    fn send_frame(&mut self, jobs: &Sender<Job>) {
        if self.frame.is_empty() {
            return;
        }
        let (mut next, packed) = self.flight.spare_frames.pop().unwrap_or_default();
        next.clear();
        let raw = std::mem::replace(&mut self.frame, next);
        let number = self.flight.frames_sent;
        self.flight.frames_sent += 1;
        let _ = jobs.send(Job::Frame { number, raw, packed });
    }

    fn zero_until(&mut self, page: u32) {
        let count = page - self.next_page;
        self.index.add(count, Kind::Zero);
        self.content.zero_pages(count.into());
        self.counts.zero += u64::from(count);
        self.next_page = page;
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.at += bytes.len() as u64;
        self.output.append(bytes)
    }

    /// Writes what comes after the frames.
    fn finish(mut self) -> Result<PackReport, ImageError> {
        let memory_bytes = self.memory.memory_bytes();
        let content = self.content.finish();
        let record = ImageRecord {
            memory_bytes,
            stored_pages: self.stored,
            frame_pages: self.options.frame_pages(),
            codec: self.options.codec,
            content: content.0,
        };
        let mut directory = Vec::new();
        self.section(layout::IMAGE, &record.encode(), &mut directory)?;
        if let Some(base) = self.base {
            let name = base.path().file_name().and_then(|name| name.to_str());
            let name = name.filter(|name| name.len() <= layout::MAX_NAME).unwrap_or_default();
            let parent = [base.content().as_bytes(), name.as_bytes()].concat();
            self.section(layout::PARENT_OF, &parent, &mut directory)?;
        }
        let frames: Vec<u8> = self.frames.iter().flat_map(FrameRecord::encode).collect();
        self.section(layout::FRAMES, &frames, &mut directory)?;
        let index = std::mem::take(&mut self.index).finish(pages_of(self.memory));
        let runs: Vec<u8> = index.runs().iter().flat_map(|run| run.encode()).collect();
        self.section(layout::PAGES, &runs, &mut directory)?;

        let bytes: Vec<u8> = directory.iter().flat_map(Section::encode).collect();
        let trailer = Trailer {
            file_bytes: self.at + (bytes.len() + layout::TRAILER_BYTES) as u64,
            directory: self.at,
            sections: u32::try_from(directory.len()).unwrap_or(u32::MAX),
            directory_crc: crc32c::crc32c(&bytes),
        };
        self.append(&bytes)?;
        self.append(&trailer.encode())?;
        self.output.finish()?;
        Ok(PackReport {
            memory_bytes,
            zero_pages: self.counts.zero,
            parent_pages: self.counts.parent,
            duplicate_pages: self.counts.duplicate,
            stored_pages: self.stored.into(),
            image_bytes: trailer.file_bytes,
            content,
        })
    }

    fn section(
        &mut self,
        kind: [u8; 4],
        bytes: &[u8],
        directory: &mut Vec<Section>,
    ) -> Result<(), ImageError> {
        let (offset, len, crc) = (self.at, bytes.len() as u64, crc32c::crc32c(bytes));
        directory.push(Section { kind, flags: layout::REQUIRED, offset, len, crc });
        self.append(bytes)
    }
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
