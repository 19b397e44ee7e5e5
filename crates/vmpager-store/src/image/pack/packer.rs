//! What one thread decides: which page is stored, where, and in which order.

use std::collections::{BTreeMap, HashMap};
use std::ops::{ControlFlow, Range};

use crossbeam_channel::{Receiver, Sender};

use crate::PAGE;

use super::super::error::ImageError;
use super::super::identity::{ContentHasher, PageHash};
use super::super::index::{IndexBuilder, Kind};
use super::super::input::MemoryInput;
use super::super::layout::{self, FrameRecord, Header, ImageRecord, MAX_STORED, Section, Trailer};
use super::super::output::Output;
use super::super::{Image, PAGE_BYTES, Progress};
use super::worker::{Block, Done, Frame, Job, PageKind};
use super::{PackOptions, PackReport, blocks_of, pages_of};

/// Bytes of frames that wait to be compressed, for each thread.
const FRAME_BYTES_AHEAD: usize = 1 << 20;
/// Pages remembered in order to find their duplicates, about 90 MB of memory. Of
/// larger memories some duplicates are stored twice.
const REMEMBERED: usize = 3_600_000;

/// Decides what goes into the image, in the order of the pages.
pub(super) struct Packer<'a> {
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
    data: u64,
}

/// What threads have been given, and what came back before its turn.
#[derive(Default)]
struct Flight {
    /// How many blocks are of pages that come first; they are the first.
    first_blocks: usize,
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
    pub(super) fn new(
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

    pub(super) fn run(
        mut self,
        jobs: Sender<Job>,
        done: &Receiver<Done>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<PackReport, ImageError> {
        let all = pages_of(self.memory);
        let within = |run: &Range<u32>| run.start.min(all)..run.end.min(all);
        let first: Vec<_> = self.options.first.iter().map(within).flat_map(blocks_of).collect();
        self.flight.first_blocks = first.len();
        let data = self.memory.data();
        let total_bytes = first.iter().chain(&data).map(|range| range.len() as u64 * PAGE).sum();
        let blocks = first.into_iter().chain(data.into_iter().flat_map(blocks_of));
        let mut blocks = blocks.peekable();
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
        self.zero_until(all);
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
            bytes += block.bytes.len() as u64;
            if self.flight.blocks_taken < self.flight.first_blocks {
                self.store_first(&block, jobs)?;
            } else {
                self.block(&block, jobs)?;
            }
            self.flight.blocks_taken += 1;
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

    /// Stores pages ahead of their turn.
    fn store_first(&mut self, block: &Block, jobs: &Sender<Job>) -> Result<(), ImageError> {
        for (kind, page) in block.kinds.iter().zip(block.bytes.chunks_exact(PAGE_BYTES)) {
            if let PageKind::Data(hash) = kind {
                self.store(hash, page, jobs)?;
            }
        }
        Ok(())
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
                    self.counts.data += 1;
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
            duplicate_pages: self.counts.data.saturating_sub(self.stored.into()),
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
