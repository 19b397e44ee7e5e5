//! Looks at every bit of an image.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;

use super::PAGE_BYTES;
use crate::PAGE;

use super::codec::Decoder;
use super::contents::{Placed, Tools, Wait};
use super::error::ImageError;
use super::identity::{ContentHasher, PageHash};
use super::index::{Kind, Span};
use super::layer::{FrameError, Layer};
use super::layout::{HEADER_BYTES, TRAILER_BYTES};
use super::pack::blocks_of;
use super::parallel;
use super::{Image, Progress};

/// A part of an image that is not what was written.
#[derive(Clone, Debug)]
pub struct Damage {
    /// The file: the image's, or that of a layer below.
    pub path: PathBuf,
    /// Where in the file.
    pub bytes: Range<u64>,
    /// What is wrong.
    pub what: String,
    /// Ranges of memory, in bytes, that cannot be had.
    pub memory: Vec<Range<u64>>,
}

/// What was found in an image.
#[derive(Clone, Debug)]
pub struct VerifyReport {
    /// Files: the image's and those of the layers below.
    pub files: u64,
    /// Frames of all of them.
    pub frames: u64,
    /// Bytes of all of them.
    pub file_bytes: u64,
    /// What is wrong, in the order of files and bytes.
    pub damage: Vec<Damage>,
}

impl Image {
    /// Looks at every byte of its file and of those below: checksums, that
    /// frames decode, and that the contents are those the image is called by.
    ///
    /// # Errors
    ///
    /// If the files cannot be read, or the caller stops it. What is wrong with
    /// their bytes is no error, but in the report.
    pub fn verify(
        &self,
        threads: usize,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<VerifyReport, ImageError> {
        let layers = &self.contents.layers;
        let frames: u64 = layers.iter().map(|placed| placed.layer.frames.len() as u64).sum();
        let mut bar = Bar { done_bytes: 0, total_bytes: self.verify_bytes(), progress };
        let mut damage = Vec::new();
        for placed in layers {
            damage.extend(placed.layer.check_sections()?);
            damage.extend(self.check_frames(placed, threads.max(1), &mut bar)?);
        }
        if damage.is_empty() && self.compute_content(threads.max(1), &mut bar)? != self.content().0
        {
            damage.push(Damage {
                path: self.path().to_owned(),
                bytes: 0..self.contents.top().file_bytes,
                what: "its contents are not those it is called by".into(),
                memory: std::iter::once(0..self.memory_bytes()).collect(),
            });
        }
        let file_bytes = layers.iter().map(|placed| placed.layer.file_bytes).sum();
        Ok(VerifyReport { files: layers.len() as u64, frames, file_bytes, damage })
    }

    fn verify_bytes(&self) -> u64 {
        let stored = |placed: &Placed| u64::from(placed.layer.record.stored_pages) * PAGE;
        self.contents.layers.iter().map(stored).sum::<u64>() + self.data_bytes()
    }

    /// Bytes of memory that are not zero.
    fn data_bytes(&self) -> u64 {
        self.data_spans().map(|span| u64::from(span.count) * PAGE).sum()
    }

    fn data_spans(&self) -> impl Iterator<Item = Span> {
        self.contents.index.spans().filter(|span| span.kind != Kind::Zero)
    }

    fn check_frames(
        &self,
        placed: &Placed,
        threads: usize,
        bar: &mut Bar<'_>,
    ) -> Result<Vec<Damage>, ImageError> {
        let layer = &placed.layer;
        let mut damage = BTreeMap::new();
        parallel::for_each(
            threads,
            layer.batches(),
            || (Decoder::new(), Vec::new(), Vec::new()),
            |(decoder, packed, raw), frames| {
                let lost = match layer.load_together(&frames, packed) {
                    Ok(()) => None,
                    Err(FrameError::Io(error)) => {
                        return Err(ImageError::io("read", &layer.path)(error));
                    }
                    Err(error) => Some(error.to_string()),
                };
                let check = |frame: u32| {
                    raw.resize(layer.raw_bytes(frame), 0);
                    let packed = &packed[layer.within(&frames, frame)];
                    let decoded = layer.decode(frame, packed, decoder, raw);
                    let what =
                        lost.clone().or_else(|| decoded.err().map(|error| error.to_string()));
                    (frame, raw.len() as u64, what)
                };
                Ok(frames.clone().map(check).collect::<Vec<_>>())
            },
            |checked| {
                for (frame, bytes, what) in checked {
                    damage.extend(what.map(|what| (frame, what)));
                    bar.done(bytes)?;
                }
                Ok(())
            },
        )?;
        let all = damage.into_iter().map(|(frame, what)| Damage {
            path: layer.path.clone(),
            bytes: layer.frames[frame as usize].offset..layer.frames[frame as usize].end(),
            what,
            memory: self.memory_of(placed, frame),
        });
        Ok(all.collect())
    }

    /// Ranges of memory whose bytes are in a frame.
    fn memory_of(&self, placed: &Placed, frame: u32) -> Vec<Range<u64>> {
        let pages = placed.layer.record.frame_pages;
        let first = placed.first_stored + frame * pages;
        let stored = u64::from(first)..u64::from(first) + u64::from(pages);
        let mut memory: Vec<Range<u64>> = Vec::new();
        for span in self.data_spans() {
            let Kind::Stored(from) = span.kind else { continue };
            let start = stored.start.max(from.into());
            let end = stored.end.min(u64::from(from) + u64::from(span.count));
            if start < end {
                let page = |stored: u64| (u64::from(span.first) + stored - u64::from(from)) * PAGE;
                memory.push(page(start)..page(end));
            }
        }
        memory
    }

    /// What the contents must be called by.
    fn compute_content(&self, threads: usize, bar: &mut Bar<'_>) -> Result<[u8; 32], ImageError> {
        let mut content = ContentHasher::new(self.memory_bytes());
        // Blocks that were hashed before their turn.
        let mut early: BTreeMap<u32, Vec<PageHash>> = BTreeMap::new();
        let mut turns = self.data_spans().flat_map(|span| blocks_of(span.pages()));
        let mut turn = turns.next();
        let mut next_page = 0;
        parallel::for_each(
            threads,
            self.data_spans().flat_map(|span| blocks_of(span.pages())),
            || (Tools::new(), Vec::new()),
            |(tools, bytes), pages| {
                bytes.resize(pages.len() * PAGE_BYTES, 0);
                self.contents.read(pages.clone(), Wait::May, tools, bytes)?;
                let hash = |page| *blake3::hash(page).as_bytes();
                Ok((pages, bytes.chunks_exact(PAGE_BYTES).map(hash).collect::<Vec<_>>()))
            },
            |(pages, hashes)| {
                let bytes = hashes.len() as u64 * PAGE;
                early.insert(pages.start, hashes);
                while let Some(pages) = turn.clone()
                    && let Some(hashes) = early.remove(&pages.start)
                {
                    content.zero_pages((pages.start - next_page).into());
                    hashes.iter().for_each(|hash| content.page(hash));
                    next_page = pages.end;
                    turn = turns.next();
                }
                bar.done(bytes)
            },
        )?;
        content.zero_pages((self.contents.index.pages() - next_page).into());
        Ok(*content.finish().as_bytes())
    }
}

/// Tells how far it has come.
struct Bar<'a> {
    done_bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
}

impl Bar<'_> {
    fn done(&mut self, bytes: u64) -> Result<(), ImageError> {
        self.done_bytes += bytes;
        let Self { done_bytes, total_bytes, .. } = *self;
        match (self.progress)(Progress { done_bytes, total_bytes }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ImageError::Interrupted),
        }
    }
}

impl Layer {
    /// What is wrong with the file, frames' own bytes apart: checksums of
    /// sections nobody reads, and bytes that have no checksum at all.
    fn check_sections(&self) -> Result<Vec<Damage>, ImageError> {
        let damage = |bytes: Range<u64>, what: String| Damage {
            path: self.path.clone(),
            bytes,
            what,
            memory: Vec::new(),
        };
        let mut found = Vec::new();
        let mut parts = vec![0..HEADER_BYTES as u64, self.directory.clone()];
        parts.push(self.directory.end..self.directory.end + TRAILER_BYTES as u64);
        parts.extend(self.frames.iter().map(|frame| frame.offset..frame.end()));
        for section in &self.sections {
            let bytes = section.offset..section.offset + section.len;
            if self.checksum(bytes.clone())? != section.crc {
                let what = format!("the checksum of section {} is wrong", section.name());
                found.push(damage(bytes.clone(), what));
            }
            parts.push(bytes);
        }
        parts.sort_by_key(|part| (part.start, part.end));
        let mut at = 0;
        for part in parts {
            if part.start != at {
                let bytes = at.min(part.start)..at.max(part.start);
                found.push(damage(bytes, "no part of the image, or two".into()));
            }
            at = part.end;
        }
        Ok(found)
    }
}
