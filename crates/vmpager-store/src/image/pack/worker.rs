//! What is done by many threads: reading and hashing pages, compressing frames.

use std::ops::Range;

use crossbeam_channel::{Receiver, Sender};

use super::super::codec::Encoder;
use super::super::contents::{Tools, Wait};
use super::super::error::ImageError;
use super::super::identity::PageHash;
use super::super::input::MemoryInput;
use super::super::{Image, PAGE_BYTES};

/// What threads are given to do.
pub(super) enum Job {
    Block { number: usize, pages: Range<u32>, bytes: Vec<u8> },
    Frame { number: usize, raw: Vec<u8>, packed: Vec<u8> },
}

/// What came of it.
pub(super) enum Done {
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

pub(super) struct Block {
    pub(super) pages: Range<u32>,
    pub(super) kinds: Vec<PageKind>,
    pub(super) bytes: Vec<u8>,
}

pub(super) enum PageKind {
    Zero,
    Parent(PageHash),
    Data(PageHash),
}

pub(super) struct Frame {
    pub(super) raw: Vec<u8>,
    pub(super) packed: Vec<u8>,
    pub(super) crc: u32,
}

pub(super) struct Worker<'a> {
    pub(super) memory: &'a MemoryInput,
    pub(super) base: Option<&'a Image>,
    pub(super) encoder: Encoder,
    pub(super) tools: Tools,
    pub(super) below: Vec<u8>,
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
    pub(super) fn run(mut self, inbox: &Receiver<Job>, outbox: &Sender<Done>) {
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
