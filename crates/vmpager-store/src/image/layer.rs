//! One image file: its records, read once and checked, and its frames, read and
//! checked each time.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[cfg(test)]
use rustix::io::Errno;

use super::PAGE_BYTES;
use crate::PAGE;

use super::codec::Decoder;
use super::error::ImageError;
use super::identity::ContentId;
use super::index::PageIndex;
use super::layout::{
    self, FRAME_BYTES, FrameRecord, HEADER_BYTES, Header, ImageRecord, RUN_BYTES, Run,
    SECTION_BYTES, Section, TRAILER_BYTES, Trailer,
};
use super::storage::{Source, Storage};

/// Longest record of an image, with fields that may come later.
const MAX_RECORD: u64 = 4096;

/// What a layer says of the image below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParentRef {
    pub(crate) content: ContentId,
    /// The name of its file, when the layer was made.
    pub(crate) name: String,
}

/// One image file, open.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) path: PathBuf,
    pub(crate) storage: Storage,
    pub(crate) file_bytes: u64,
    pub(crate) record: ImageRecord,
    pub(crate) frames: Arc<[FrameRecord]>,
    pub(crate) parent: Option<ParentRef>,
    /// Sections, those nobody reads among them.
    pub(crate) sections: Vec<Section>,
    /// Where the directory of them is.
    pub(crate) directory: Range<u64>,
    /// How many of the next reads of frames fail.
    #[cfg(test)]
    pub(crate) fails: std::sync::atomic::AtomicU32,
}

/// Why a frame's pages cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error(transparent)]
    Io(io::Error),
    /// The file ends before the frame does.
    #[error("the file ends before")]
    Truncated,
    /// Its bytes are not those that were written.
    #[error("{0}")]
    Damaged(String),
    /// It is not the object that was opened any more.
    #[error("it is another one by now")]
    Changed,
    /// It was waited for long enough.
    #[error("{0}")]
    GaveUp(String),
}

impl Layer {
    /// Reads and checks all of a file but its frames.
    pub(crate) fn open(path: &Path, mut source: Source) -> Result<(Self, PageIndex), ImageError> {
        let file_bytes = source.len(path)?;
        let parts = Parts { path, source: &source, file_bytes };
        parts.check_header()?;
        let (sections, directory) = parts.directory()?;
        source.index_begins(index_begins(&sections, &directory))?;
        let parts = Parts { path, source: &source, file_bytes };
        let record = ImageRecord::parse(&parts.section(&sections, layout::IMAGE, MAX_RECORD)?)
            .map_err(|why| parts.damaged(why))?;
        let frames = parts.frames(&sections, &record, directory.start)?.into();
        let parent = parts.parent(&sections)?;
        let index = parts.index(&sections, &record, parent.is_some())?;
        let layer = Self {
            path: path.to_owned(),
            storage: source.into_storage(),
            file_bytes,
            record,
            frames,
            parent,
            sections,
            directory,
            #[cfg(test)]
            fails: 0.into(),
        };
        Ok((layer, index))
    }

    /// The checksum of some bytes of the file.
    pub(crate) fn checksum(&self, bytes: Range<u64>) -> Result<u32, ImageError> {
        let (mut crc, mut at) = (0, bytes.start);
        let mut piece = vec![0; self.storage.piece_bytes()];
        while at < bytes.end {
            let len = piece.len().min(to_usize(bytes.end - at));
            let part = &mut piece[..len];
            self.storage.read_exact_at(part, at).map_err(ImageError::io("read", &self.path))?;
            crc = crc32c::crc32c_append(crc, part);
            at += len as u64;
        }
        Ok(crc)
    }

    /// How many bytes a frame's pages have.
    pub(crate) fn raw_bytes(&self, frame: u32) -> usize {
        let pages = self.record.frame_pages;
        let left = self.record.stored_pages - frame * pages;
        left.min(pages) as usize * PAGE_BYTES
    }

    /// Reads a frame as it is stored. `false` if that could wait, and `wait` is
    /// not set.
    pub(crate) fn load(
        &self,
        frame: u32,
        wait: bool,
        packed: &mut Vec<u8>,
    ) -> Result<bool, FrameError> {
        let FrameRecord { offset, len, .. } = self.frames[frame as usize];
        packed.resize(len as usize, 0);
        #[cfg(test)]
        if self.fails.load(std::sync::atomic::Ordering::Relaxed) > 0 {
            self.fails.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
            return Err(FrameError::Io(Errno::IO.into()));
        }
        if !wait {
            return self.storage.try_read_at(packed, offset).map_err(FrameError::Io);
        }
        self.load_together(&(frame..frame + 1), packed).map(|()| true)
    }

    /// Reads frames as they are stored, and what lies between them.
    pub(crate) fn load_together(
        &self,
        frames: &Range<u32>,
        packed: &mut Vec<u8>,
    ) -> Result<(), FrameError> {
        let start = self.frames[frames.start as usize].offset;
        packed.resize(to_usize(self.frames[frames.end as usize - 1].end() - start), 0);
        match self.storage.read_exact_at(packed, start) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(FrameError::Truncated)
            }
            result => result.map_err(FrameError::Io),
        }
    }

    /// Where a frame is among the bytes of several that were loaded together.
    pub(crate) fn within(&self, frames: &Range<u32>, frame: u32) -> Range<usize> {
        let FrameRecord { offset, len, .. } = self.frames[frame as usize];
        let from = to_usize(offset - self.frames[frames.start as usize].offset);
        from..from + len as usize
    }

    /// All frames, as many together as make sense to read at a time.
    pub(crate) fn batches(&self) -> impl Iterator<Item = Range<u32>> {
        let (mut next, count) = (0, self.frames.len());
        // From a file each by itself: what is wrong is wrong with that one.
        let most = self.storage.object().map_or(0, |_| self.storage.piece_bytes() as u64);
        std::iter::from_fn(move || {
            let first = next;
            let start = self.frames.get(first)?.offset;
            next += 1;
            while next < count && self.frames[next].end() - start <= most {
                next += 1;
            }
            // An image has fewer frames than 32 bits count.
            Some(u32::try_from(first).ok()?..u32::try_from(next).ok()?)
        })
    }

    /// Checks a frame's bytes, then decodes them. `raw` has
    /// [`raw_bytes`](Self::raw_bytes).
    pub(crate) fn decode(
        &self,
        frame: u32,
        packed: &[u8],
        decoder: &mut Decoder,
        raw: &mut [u8],
    ) -> Result<(), FrameError> {
        let record = self.frames[frame as usize];
        let damaged = |why: String| {
            let (from, to) = (record.offset, record.end());
            FrameError::Damaged(format!("frame {frame} (bytes {from:#x}..{to:#x}): {why}"))
        };
        let crc = crc32c::crc32c(packed);
        if crc != record.crc {
            return Err(damaged(format!(
                "its checksum is {crc:#010x}, and should be {:#010x}",
                record.crc
            )));
        }
        decoder.decode(self.record.codec, packed, raw).map_err(damaged)
    }
}

/// The parts of a file, on their way to be a [`Layer`].
struct Parts<'a> {
    path: &'a Path,
    source: &'a Source,
    file_bytes: u64,
}

/// Where the sections begin that a reader needs.
fn index_begins(sections: &[Section], directory: &Range<u64>) -> u64 {
    let needed = sections.iter().filter(|section| layout::KNOWN.contains(&section.kind));
    needed.map(|section| section.offset).min().unwrap_or(directory.start)
}

impl Parts<'_> {
    fn damaged(&self, why: impl Into<String>) -> ImageError {
        ImageError::Damaged { path: self.path.to_owned(), why: why.into() }
    }

    fn length(&self, why: String) -> ImageError {
        ImageError::Length { path: self.path.to_owned(), why }
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.source.read(bytes, offset, self.path)
    }

    fn check_header(&self) -> Result<(), ImageError> {
        let path = self.path.to_owned();
        let mut header = [0; HEADER_BYTES];
        if self.file_bytes < HEADER_BYTES as u64 {
            return Err(ImageError::NotAnImage { path });
        }
        self.read(&mut header, 0)?;
        match Header::parse(&header) {
            Header::Image => Ok(()),
            Header::NotAnImage => Err(ImageError::NotAnImage { path }),
            Header::Version(version) => Err(ImageError::Version { path, version }),
            Header::Damaged => Err(self.damaged("the checksum of its first 12 bytes is wrong")),
        }
    }

    /// The directory's entries, and where it is.
    fn directory(&self) -> Result<(Vec<Section>, Range<u64>), ImageError> {
        let trailer_at = self
            .file_bytes
            .checked_sub(TRAILER_BYTES as u64)
            .filter(|at| *at >= HEADER_BYTES as u64)
            .ok_or_else(|| self.length(format!("it has {} bytes", self.file_bytes)))?;
        let mut trailer = [0; TRAILER_BYTES];
        self.read(&mut trailer, trailer_at)?;
        let trailer = Trailer::parse(&trailer)
            .ok_or_else(|| self.length("its last 40 bytes are no trailer".to_owned()))?;
        if trailer.file_bytes != self.file_bytes {
            let (should, has) = (trailer.file_bytes, self.file_bytes);
            return Err(self.length(format!("it has {has} bytes, and should have {should}")));
        }
        let len = u64::from(trailer.sections) * SECTION_BYTES as u64;
        if trailer.sections > layout::MAX_SECTIONS
            || trailer.directory < HEADER_BYTES as u64
            || trailer.directory.checked_add(len) != Some(trailer_at)
        {
            return Err(self.damaged("its directory is not where it should be"));
        }
        let mut bytes = vec![0; to_usize(len)];
        self.read(&mut bytes, trailer.directory)?;
        if crc32c::crc32c(&bytes) != trailer.directory_crc {
            return Err(self.damaged("the checksum of its directory is wrong"));
        }
        let entries = bytes.as_chunks::<SECTION_BYTES>().0;
        let sections: Vec<_> = entries.iter().map(Section::parse).collect();
        for section in &sections {
            self.check_section(section, trailer.directory)?;
        }
        Ok((sections, trailer.directory..trailer_at))
    }

    fn check_section(&self, section: &Section, end: u64) -> Result<(), ImageError> {
        let inside = section.offset >= HEADER_BYTES as u64
            && section.offset.checked_add(section.len).is_some_and(|to| to <= end);
        if !inside {
            return Err(self.damaged(format!(
                "its section {} points outside, to {:#x} bytes at {:#x}",
                section.name(),
                section.len,
                section.offset
            )));
        }
        if section.flags & layout::REQUIRED != 0 && !layout::KNOWN.contains(&section.kind) {
            return Err(ImageError::UnknownFeature {
                path: self.path.to_owned(),
                kind: section.name(),
            });
        }
        Ok(())
    }

    /// A section of at most so many bytes, if there is one.
    fn find(
        &self,
        sections: &[Section],
        kind: [u8; 4],
        most: u64,
    ) -> Result<Option<Vec<u8>>, ImageError> {
        let mut of_kind = sections.iter().filter(|section| section.kind == kind);
        let Some(section) = of_kind.next() else { return Ok(None) };
        if of_kind.next().is_some() {
            return Err(self.damaged(format!("it has two sections {}", section.name())));
        }
        if section.len > most {
            let (name, len) = (section.name(), section.len);
            return Err(self.damaged(format!("its section {name} has {len} bytes")));
        }
        let mut bytes = Vec::new();
        // A sparse file is quickly made that claims more than there is memory.
        bytes
            .try_reserve_exact(to_usize(section.len))
            .map_err(|_| ImageError::io("read", self.path)(io::ErrorKind::OutOfMemory.into()))?;
        bytes.resize(to_usize(section.len), 0);
        self.read(&mut bytes, section.offset)?;
        if crc32c::crc32c(&bytes) != section.crc {
            return Err(self.damaged(format!(
                "the checksum of its section {} (bytes {:#x}..{:#x}) is wrong",
                section.name(),
                section.offset,
                section.offset + section.len
            )));
        }
        Ok(Some(bytes))
    }

    fn section(
        &self,
        sections: &[Section],
        kind: [u8; 4],
        most: u64,
    ) -> Result<Vec<u8>, ImageError> {
        let name = kind.escape_ascii();
        self.find(sections, kind, most)?
            .ok_or_else(|| self.damaged(format!("it has no section {name}")))
    }

    fn frames(
        &self,
        sections: &[Section],
        record: &ImageRecord,
        end: u64,
    ) -> Result<Vec<FrameRecord>, ImageError> {
        let expected = record.stored_pages.div_ceil(record.frame_pages);
        let most = u64::from(expected) * FRAME_BYTES as u64;
        let bytes = self.section(sections, layout::FRAMES, most)?;
        let (entries, rest) = bytes.as_chunks::<FRAME_BYTES>();
        if !rest.is_empty() || entries.len() != expected as usize {
            let has = bytes.len();
            return Err(self.damaged(format!("its table of {expected} frames has {has} bytes")));
        }
        let frames: Vec<_> = entries.iter().map(FrameRecord::parse).collect();
        let most = u64::from(record.frame_pages) * PAGE;
        let mut after = HEADER_BYTES as u64;
        for (number, frame) in frames.iter().enumerate() {
            let fits = frame.len > 0 && u64::from(frame.len) <= most && frame.end() <= end;
            if !fits || frame.offset < after {
                let (from, to) = (frame.offset, frame.end());
                return Err(self.damaged(format!(
                    "frame {number} points outside its place, to {from:#x}..{to:#x}"
                )));
            }
            after = frame.end();
        }
        Ok(frames)
    }

    fn parent(&self, sections: &[Section]) -> Result<Option<ParentRef>, ImageError> {
        let most = (32 + layout::MAX_NAME) as u64;
        let Some(bytes) = self.find(sections, layout::PARENT_OF, most)? else { return Ok(None) };
        let Some((id, name)) = bytes.split_first_chunk::<32>() else {
            return Err(self.damaged(format!("its section PRNT has {} bytes", bytes.len())));
        };
        match std::str::from_utf8(name) {
            Ok(name) if is_plain(name) => {
                Ok(Some(ParentRef { content: ContentId(*id), name: name.to_owned() }))
            }
            _ => Err(self.damaged("its parent's name is no file name")),
        }
    }

    fn index(
        &self,
        sections: &[Section],
        record: &ImageRecord,
        has_parent: bool,
    ) -> Result<PageIndex, ImageError> {
        let most = record.memory_bytes / PAGE * RUN_BYTES as u64;
        let bytes = self.section(sections, layout::PAGES, most)?;
        let (entries, rest) = bytes.as_chunks::<RUN_BYTES>();
        if !rest.is_empty() {
            return Err(self.damaged(format!("its page map has {} bytes", bytes.len())));
        }
        let runs = entries.iter().map(Run::parse).collect();
        // The record was checked to have fewer pages than 32 bits count.
        let pages = u32::try_from(record.memory_bytes / PAGE).unwrap_or(u32::MAX);
        PageIndex::parse(runs, pages, record.stored_pages, has_parent)
            .map_err(|why| self.damaged(why))
    }
}

/// Whether a parent's name is that of a file beside the layer, nowhere else; it
/// may be empty, if it had none.
fn is_plain(name: &str) -> bool {
    name != "." && name != ".." && !name.contains(['/', '\0'])
}

fn to_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
