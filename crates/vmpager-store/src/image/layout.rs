//! The bytes of an image file, as `docs/format.md` describes them: fixed
//! records, little-endian, each encoded and parsed here and nowhere else.

use crate::bytes::{field, record, u16_at, u32_at, u64_at};

use super::codec::Codec;

/// The first bytes of every image. Not text, so that a file that went through
/// a text conversion is noticed.
pub(crate) const MAGIC: [u8; 8] = *b"\x89VMPIMG\n";
/// The last bytes of every image.
pub(crate) const END_MAGIC: [u8; 8] = *b"VMPIMGE\n";
/// The version this program writes and reads.
pub(crate) const VERSION: u16 = 1;

pub(crate) const HEADER_BYTES: usize = 16;
pub(crate) const TRAILER_BYTES: usize = 40;
pub(crate) const SECTION_BYTES: usize = 32;
pub(crate) const RECORD_BYTES: usize = 56;
pub(crate) const FRAME_BYTES: usize = 16;
pub(crate) const RUN_BYTES: usize = 8;

/// Most sections a file may have.
pub(crate) const MAX_SECTIONS: u32 = 256;
/// Most pages a frame may have: 2 MiB.
pub(crate) const MAX_FRAME_PAGES: u32 = 512;
/// Longest name of a parent, in bytes.
pub(crate) const MAX_NAME: usize = 255;

/// A page that is all zeroes.
pub(crate) const ZERO: u32 = u32::MAX;
/// A page that is as in the parent.
pub(crate) const PARENT: u32 = u32::MAX - 1;
/// Stored pages are numbered below this; the numbers from it on have meanings.
pub(crate) const MAX_STORED: u32 = u32::MAX - 15;

/// Kinds of sections.
pub(crate) const IMAGE: [u8; 4] = *b"IMAG";
pub(crate) const FRAMES: [u8; 4] = *b"FRMS";
pub(crate) const PAGES: [u8; 4] = *b"PMAP";
pub(crate) const PARENT_OF: [u8; 4] = *b"PRNT";

/// Those that are read.
pub(crate) const KNOWN: [[u8; 4]; 4] = [IMAGE, FRAMES, PAGES, PARENT_OF];

/// Flag of a section without which the image cannot be read right.
pub(crate) const REQUIRED: u32 = 1;

/// What the first bytes of a file say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Header {
    Image,
    NotAnImage,
    Version(u16),
    Damaged,
}

impl Header {
    pub(crate) fn encode() -> [u8; HEADER_BYTES] {
        let head: [u8; 12] = record(&[&MAGIC, &VERSION.to_le_bytes(), &[0; 2]]);
        record(&[&head, &crc32c::crc32c(&head).to_le_bytes()])
    }

    pub(crate) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        if bytes[..8] != MAGIC {
            Self::NotAnImage
        } else if u32_at(bytes, 12) != crc32c::crc32c(&bytes[..12]) {
            Self::Damaged
        } else {
            match u16_at(bytes, 8) {
                VERSION => Self::Image,
                other => Self::Version(other),
            }
        }
    }
}

/// The last bytes of a file: where everything else is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) file_bytes: u64,
    pub(crate) directory: u64,
    pub(crate) sections: u32,
    pub(crate) directory_crc: u32,
}

impl Trailer {
    pub(crate) fn encode(&self) -> [u8; TRAILER_BYTES] {
        let head: [u8; 28] = record(&[
            &self.file_bytes.to_le_bytes(),
            &self.directory.to_le_bytes(),
            &self.sections.to_le_bytes(),
            &self.directory_crc.to_le_bytes(),
            &[0; 4],
        ]);
        record(&[&head, &crc32c::crc32c(&head).to_le_bytes(), &END_MAGIC])
    }

    /// Its fields, if these are the last bytes of an image.
    pub(crate) fn parse(bytes: &[u8; TRAILER_BYTES]) -> Option<Self> {
        if bytes[32..] != END_MAGIC || u32_at(bytes, 28) != crc32c::crc32c(&bytes[..28]) {
            return None;
        }
        Some(Self {
            file_bytes: u64_at(bytes, 0),
            directory: u64_at(bytes, 8),
            sections: u32_at(bytes, 16),
            directory_crc: u32_at(bytes, 20),
        })
    }
}

/// An entry of the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Section {
    pub(crate) kind: [u8; 4],
    pub(crate) flags: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) crc: u32,
}

impl Section {
    pub(crate) fn encode(&self) -> [u8; SECTION_BYTES] {
        record(&[
            &self.kind,
            &self.flags.to_le_bytes(),
            &self.offset.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.crc.to_le_bytes(),
            &[0; 4],
        ])
    }

    pub(crate) fn parse(bytes: &[u8; SECTION_BYTES]) -> Self {
        Self {
            kind: field(bytes, 0),
            flags: u32_at(bytes, 4),
            offset: u64_at(bytes, 8),
            len: u64_at(bytes, 16),
            crc: u32_at(bytes, 24),
        }
    }

    /// Its kind for people.
    pub(crate) fn name(&self) -> String {
        self.kind.escape_ascii().to_string()
    }
}

/// The section `IMAG`: what the image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ImageRecord {
    pub(crate) memory_bytes: u64,
    pub(crate) stored_pages: u32,
    pub(crate) frame_pages: u32,
    pub(crate) codec: Codec,
    pub(crate) content: [u8; 32],
}

impl ImageRecord {
    pub(crate) fn encode(&self) -> [u8; RECORD_BYTES] {
        record(&[
            &self.memory_bytes.to_le_bytes(),
            &self.stored_pages.to_le_bytes(),
            &self.frame_pages.to_le_bytes(),
            &self.codec.number().to_le_bytes(),
            &[0; 4],
            &self.content,
        ])
    }

    /// Its fields, or the one that is wrong. A longer record is one with fields
    /// that came later.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < RECORD_BYTES {
            return Err(format!("its record has {} bytes, not {RECORD_BYTES}", bytes.len()));
        }
        let number = u32_at(bytes, 16);
        let codec = Codec::of_number(number)
            .ok_or_else(|| format!("its codec is {number}; 0 to 2 are known"))?;
        let parsed = Self {
            memory_bytes: u64_at(bytes, 0),
            stored_pages: u32_at(bytes, 8),
            frame_pages: u32_at(bytes, 12),
            codec,
            content: field(bytes, 24),
        };
        let pages = parsed.memory_bytes / 4096;
        if !parsed.memory_bytes.is_multiple_of(4096) || pages == 0 || pages > MAX_STORED.into() {
            return Err(format!("its memory has {} bytes", parsed.memory_bytes));
        }
        if parsed.stored_pages > MAX_STORED {
            return Err(format!("it stores {} pages", parsed.stored_pages));
        }
        if parsed.frame_pages > MAX_FRAME_PAGES || !parsed.frame_pages.is_power_of_two() {
            return Err(format!("its frames have {} pages", parsed.frame_pages));
        }
        Ok(parsed)
    }
}

/// An entry of the section `FRMS`: where a frame's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameRecord {
    pub(crate) offset: u64,
    pub(crate) len: u32,
    pub(crate) crc: u32,
}

impl FrameRecord {
    pub(crate) fn encode(&self) -> [u8; FRAME_BYTES] {
        record(&[&self.offset.to_le_bytes(), &self.len.to_le_bytes(), &self.crc.to_le_bytes()])
    }

    pub(crate) fn parse(bytes: &[u8; FRAME_BYTES]) -> Self {
        Self { offset: u64_at(bytes, 0), len: u32_at(bytes, 8), crc: u32_at(bytes, 12) }
    }

    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(self.len.into())
    }
}

/// An entry of the section `PMAP`: pages from `first` on, up to the next
/// entry's, are [`ZERO`], [`PARENT`], or stored pages from `value` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u32,
    pub(crate) value: u32,
}

impl Run {
    pub(crate) fn encode(self) -> [u8; RUN_BYTES] {
        record(&[&self.first.to_le_bytes(), &self.value.to_le_bytes()])
    }

    pub(crate) fn parse(bytes: &[u8; RUN_BYTES]) -> Self {
        Self { first: u32_at(bytes, 0), value: u32_at(bytes, 4) }
    }

    /// Whether its pages are stored in the image.
    pub(crate) fn is_stored(self) -> bool {
        self.value < MAX_STORED
    }
}
