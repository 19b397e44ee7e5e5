//! The contents of an image and of the layers below it, as one memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmpager_core::{ByteRange, SourceError};

use super::PAGE_BYTES;
use crate::PAGE;
use crate::readahead;

use super::cache::{Decoded, FrameCache, Lookup};
use super::codec::Decoder;
use super::index::{Kind, PageIndex};
use super::layer::{FrameError, Layer};
use super::layout::ImageRecord;

/// What one reader needs to read frames, used again for each.
#[derive(Debug)]
pub(crate) struct Tools {
    decoder: Decoder,
    packed: Vec<u8>,
    free: Vec<u8>,
}

impl Tools {
    pub(crate) fn new() -> Self {
        Self { decoder: Decoder::new(), packed: Vec::new(), free: Vec::new() }
    }
}

/// Whether a reader may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// For storage, and decode as much as it takes.
    May,
    /// Not for storage, and decode no more than so many bytes.
    Never {
        /// Decoded bytes.
        budget: usize,
    },
}

/// A layer of the chain, and where its numbers begin among those of all.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) layer: Layer,
    pub(crate) first_stored: u32,
    pub(crate) first_frame: u32,
}

/// Layers that have been put together: the stored pages of all of them are
/// numbered through, the bottom layer's first.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) name: Arc<str>,
    /// The bottom one first.
    pub(crate) layers: Vec<Placed>,
    pub(crate) index: PageIndex,
    pub(crate) cache: FrameCache,
    /// Keep frames for other VMs too.
    pub(crate) for_many: bool,
    /// Bytes of frames decoded so far.
    pub(crate) decoded: AtomicU64,
}

/// Stored pages that lie in one frame.
#[derive(Clone, Copy, Debug)]
struct Part {
    layer: usize,
    /// Within its layer.
    frame: u32,
    first_page: u32,
    pages: u32,
}

impl Contents {
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.index.pages()) * PAGE
    }

    /// The layer that was opened: the topmost.
    pub(crate) fn top(&self) -> &Layer {
        &self.layers[self.layers.len() - 1].layer
    }

    /// Reads pages into `to`, which has room for just them. `false` if that
    /// would wait and must not; then `to` holds anything.
    pub(crate) fn read(
        &self,
        pages: Range<u32>,
        wait: Wait,
        tools: &mut Tools,
        to: &mut [u8],
    ) -> Result<bool, SourceError> {
        if pages.end > self.index.pages() {
            let (name, len) = (Arc::clone(&self.name), self.bytes());
            let range = ByteRange::new(u64::from(pages.start) * PAGE, pages.len() as u64 * PAGE);
            return Err(SourceError::Truncated { name, range, len });
        }
        let (mut wait, mut at) = (wait, 0);
        for span in self.index.spans_of(pages) {
            let bytes = span.count as usize * PAGE_BYTES;
            let to = &mut to[at..at + bytes];
            at += bytes;
            let Kind::Stored(first) = span.kind else {
                // The bottom layer has no parent, so that these are zeroes.
                to.fill(0);
                continue;
            };
            let (mut done, mut offset) = (0, 0);
            while done < span.count {
                let part = self.part(first + done, span.count - done);
                let bytes = part.pages as usize * PAGE_BYTES;
                let result =
                    self.read_part(part, &mut wait, tools, &mut to[offset..offset + bytes]);
                match result {
                    Ok(true) => {}
                    Ok(false) => return Ok(false),
                    Err(error) => {
                        let from = u64::from(span.first + done) * PAGE;
                        let range = ByteRange::new(from, u64::from(part.pages) * PAGE);
                        return Err(self.failed(part.layer, range, error));
                    }
                }
                done += part.pages;
                offset += bytes;
            }
        }
        debug_assert_eq!(at, to.len(), "the index covers all pages");
        Ok(true)
    }

    /// Has the frames of these pages fetched into the page cache.
    pub(crate) fn will_need(&self, runs: impl Iterator<Item = Range<u32>>) {
        let mut frames: Vec<Vec<ByteRange>> = vec![Vec::new(); self.layers.len()];
        for span in runs.flat_map(|pages| self.index.spans_of(pages)) {
            let Kind::Stored(first) = span.kind else { continue };
            let mut done = 0;
            while done < span.count {
                let part = self.part(first + done, span.count - done);
                let number = self.layers[part.layer].first_frame + part.frame;
                let record = self.layers[part.layer].layer.frames[part.frame as usize];
                if !self.cache.has(number) {
                    frames[part.layer].push(ByteRange::new(record.offset, record.len.into()));
                }
                done += part.pages;
            }
        }
        for (placed, frames) in self.layers.iter().zip(frames) {
            readahead::fetch(placed.layer.file(), frames.into_iter());
        }
    }

    /// The layer that has a stored page.
    pub(crate) fn layer_of(&self, stored: u32) -> usize {
        self.layers.partition_point(|placed| placed.first_stored <= stored) - 1
    }

    /// The frame of a stored page, and how many of `pages` are in it.
    fn part(&self, stored: u32, pages: u32) -> Part {
        let layer = self.layer_of(stored);
        let placed = &self.layers[layer];
        let nth = stored - placed.first_stored;
        let ImageRecord { frame_pages, stored_pages, .. } = placed.layer.record;
        let first_page = nth % frame_pages;
        Part {
            layer,
            frame: nth / frame_pages,
            first_page,
            // A run may go on in the next layer.
            pages: pages.min(frame_pages - first_page).min(stored_pages - nth),
        }
    }

    fn read_part(
        &self,
        part: Part,
        wait: &mut Wait,
        tools: &mut Tools,
        to: &mut [u8],
    ) -> Result<bool, FrameError> {
        let Placed { layer, first_frame, .. } = &self.layers[part.layer];
        let number = first_frame + part.frame;
        let from = part.first_page as usize * PAGE_BYTES;
        let _turn = match self.cache.look(number, *wait == Wait::May) {
            Lookup::Here(decoded) => {
                to.copy_from_slice(&decoded[from..from + to.len()]);
                return Ok(true);
            }
            Lookup::Busy => return Ok(false),
            Lookup::Decode(turn) => turn,
        };
        let raw = layer.raw_bytes(part.frame);
        if let Wait::Never { budget } = wait {
            let Some(left) = budget.checked_sub(raw) else { return Ok(false) };
            *budget = left;
        }
        if !layer.load(part.frame, *wait == Wait::May, &mut tools.packed)? {
            return Ok(false);
        }
        self.decoded.fetch_add(raw as u64, Ordering::Relaxed);
        if to.len() == raw && !self.for_many {
            // Nothing of the frame is left for its neighbours.
            layer.decode(part.frame, &tools.packed, &mut tools.decoder, to)?;
            return Ok(true);
        }
        let mut bytes = std::mem::take(&mut tools.free);
        bytes.resize(raw, 0);
        layer.decode(part.frame, &tools.packed, &mut tools.decoder, &mut bytes)?;
        to.copy_from_slice(&bytes[from..from + to.len()]);
        let decoded: Decoded = Arc::new(bytes);
        let free = self.cache.put(number, &decoded);
        tools.free = free.or_else(|| Arc::try_unwrap(decoded).ok()).unwrap_or_default();
        Ok(true)
    }

    fn failed(&self, layer: usize, range: ByteRange, error: FrameError) -> SourceError {
        let layer = &self.layers[layer].layer;
        let name = Arc::from(layer.path.display().to_string());
        match error {
            FrameError::Io(error) => SourceError::Io { name, range, error: Arc::new(error) },
            FrameError::Truncated => {
                let len = layer.file().metadata().map_or(0, |metadata| metadata.len());
                SourceError::Damaged {
                    name,
                    range,
                    what: format!("its end: it has {len} bytes, and had {}", layer.file_bytes)
                        .into(),
                }
            }
            FrameError::Damaged(what) => SourceError::Damaged { name, range, what: what.into() },
        }
    }
}
