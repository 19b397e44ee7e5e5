//! The contents of an image and of the layers below it, as one memory.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmpager_core::{ByteRange, Priority, SourceError};

use super::PAGE_BYTES;
use crate::PAGE;
use crate::readahead;
use crate::remote::{FetchFailed, Fetcher, Frames, Problem};

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
    /// What has come from servers for the next read.
    pub(crate) fetched: Frames,
}

impl Tools {
    pub(crate) fn new() -> Self {
        let (packed, free) = (Vec::new(), Vec::new());
        Self { decoder: Decoder::new(), packed, free, fetched: Frames::new() }
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
    /// Gets the frames of layers that are at servers, if there are any.
    pub(crate) fetcher: Option<Fetcher>,
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

impl Part {
    /// Its frame's number among those of all layers.
    fn number(&self, contents: &Contents) -> u32 {
        contents.layers[self.layer].first_frame + self.frame
    }
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
        if wait == Wait::May {
            self.fetch(&pages, tools)?;
        }
        let result = self.read_spans(pages, wait, tools, to);
        tools.fetched.clear();
        result
    }

    fn read_spans(
        &self,
        pages: Range<u32>,
        mut wait: Wait,
        tools: &mut Tools,
        to: &mut [u8],
    ) -> Result<bool, SourceError> {
        let mut at = 0;
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

    /// The parts of frames that pages are in.
    fn parts(&self, pages: Range<u32>) -> impl Iterator<Item = Part> {
        self.index.spans_of(pages).flat_map(move |span| {
            let mut left = match span.kind {
                Kind::Stored(first) => first..first + span.count,
                _ => 0..0,
            };
            std::iter::from_fn(move || {
                let part =
                    (!left.is_empty()).then(|| self.part(left.start, left.end - left.start))?;
                left.start += part.pages;
                Some(part)
            })
        })
    }

    /// Has the frames of these pages fetched: from files into the page cache, from
    /// servers into memory.
    pub(crate) fn will_need(&self, runs: impl Iterator<Item = Range<u32>>) {
        let mut frames: Vec<Vec<ByteRange>> = vec![Vec::new(); self.layers.len()];
        let mut remote = Vec::new();
        for part in runs.flat_map(|pages| self.parts(pages)) {
            let number = part.number(self);
            if self.cache.has(number) {
                continue;
            }
            let record = self.layers[part.layer].layer.frames[part.frame as usize];
            match self.fetcher_of(number) {
                Some(_) => remote.push(number),
                None => frames[part.layer].push(ByteRange::new(record.offset, record.len.into())),
            }
        }
        for (placed, frames) in self.layers.iter().zip(frames) {
            if let Some(file) = placed.layer.storage.file() {
                readahead::fetch(file, frames.into_iter());
            }
        }
        if let Some(fetcher) = &self.fetcher {
            fetcher.will_need(remote.into_iter());
        }
    }

    /// What gets a frame from a server, if that is where it is.
    fn fetcher_of(&self, frame: u32) -> Option<&Fetcher> {
        self.fetcher.as_ref().filter(|fetcher| fetcher.has(frame))
    }

    /// The frames that must be fetched from servers before pages can be read; those
    /// that are at hand are put among the tools. Waits for the disk.
    pub(crate) fn missing(&self, pages: &Range<u32>, tools: &mut Tools) -> Vec<u32> {
        let mut missing = Vec::new();
        if self.fetcher.is_none() {
            return missing;
        }
        for part in self.parts(pages.clone()) {
            let number = part.number(self);
            let Some(fetcher) = self.fetcher_of(number) else { continue };
            if tools.fetched.contains_key(&number) || self.cache.has(number) {
                continue;
            }
            match fetcher.at_hand(number, true) {
                Some(packed) => {
                    tools.fetched.insert(number, packed);
                }
                None => missing.push(number),
            }
        }
        missing.sort_unstable();
        missing.dedup();
        missing
    }

    /// Fetches what pages need, and waits for it.
    fn fetch(&self, pages: &Range<u32>, tools: &mut Tools) -> Result<(), SourceError> {
        let missing = self.missing(pages, tools);
        let Some(fetcher) = self.fetcher.as_ref().filter(|_| !missing.is_empty()) else {
            return Ok(());
        };
        let frames = fetcher.fetch(&missing, Priority::Fill);
        tools.fetched.extend(frames.map_err(|failed| self.not_fetched(failed, pages))?);
        Ok(())
    }

    /// Somebody waits for pages that are being fetched.
    pub(crate) fn promote(&self, pages: Range<u32>, priority: Priority) {
        if let Some(fetcher) = &self.fetcher {
            let numbers = self.parts(pages).map(|part| part.number(self));
            fetcher.promote(numbers.filter(|number| fetcher.has(*number)), priority);
        }
    }

    /// Why pages cannot be had, a frame of which could not be fetched.
    pub(crate) fn not_fetched(&self, failed: FetchFailed, pages: &Range<u32>) -> SourceError {
        let below = self.layers.partition_point(|placed| placed.first_frame <= failed.frame);
        let range = ByteRange::new(u64::from(pages.start) * PAGE, pages.len() as u64 * PAGE);
        self.failed(below.saturating_sub(1), range, failed.into())
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
        let may_wait = *wait == Wait::May;
        let from = part.first_page as usize * PAGE_BYTES;
        let _turn = match self.cache.look(number, may_wait) {
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
        let loaded = match self.fetcher_of(number) {
            Some(fetcher) => take(fetcher, number, may_wait, tools)?,
            None => layer.load(part.frame, may_wait, &mut tools.packed)?,
        };
        if !loaded {
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
                let len = layer.storage.len().unwrap_or(0);
                SourceError::Damaged {
                    name,
                    range,
                    what: format!("its end: it has {len} bytes, and had {}", layer.file_bytes)
                        .into(),
                }
            }
            FrameError::Damaged(what) => SourceError::Damaged { name, range, what: what.into() },
            FrameError::Changed => SourceError::Changed { name },
            FrameError::GaveUp(why) => SourceError::GaveUp { name, range, why: why.into() },
        }
    }
}

/// Takes a frame of a server's that has come, or is at hand. It is fetched only if it
/// was thrown out of a cache since that was looked at. Whether it is there.
fn take(
    fetcher: &Fetcher,
    frame: u32,
    may_wait: bool,
    tools: &mut Tools,
) -> Result<bool, FrameError> {
    let mut packed = tools.fetched.remove(&frame).or_else(|| fetcher.at_hand(frame, may_wait));
    if packed.is_none() && may_wait {
        packed = fetcher.fetch(&[frame], Priority::Demand)?.remove(&frame);
    }
    let Some(packed) = packed else { return Ok(false) };
    tools.packed.clear();
    tools.packed.extend_from_slice(&packed);
    Ok(true)
}

impl From<FetchFailed> for FrameError {
    fn from(failed: FetchFailed) -> Self {
        match failed.error.problem {
            Problem::Changed { .. } => Self::Changed,
            damaged @ Problem::Damaged { .. } => Self::Damaged(damaged.to_string()),
            late @ Problem::Late { .. } => Self::GaveUp(late.to_string()),
            problem => Self::Io(io::Error::other(problem)),
        }
    }
}
