//! The bytes of a profile, as `docs/profile.md` describes them.

use std::collections::HashSet;
use std::path::Path;

use crate::PAGE;
use crate::bytes::{field, record, u16_at, u32_at, u64_at};
use crate::image::ContentId;

use super::identity::MemoryIdentity;
use super::{HotPage, Profile, ProfileError};

/// The first bytes of every profile.
const MAGIC: [u8; 8] = *b"\x89VMPPRF\n";
/// The version this program writes and reads.
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 96;
/// The same, as the file says it.
const HEADER_LEN: u32 = 96;
const ENTRY_BYTES: usize = 12;
const CRC_BYTES: usize = 4;
/// More pages than an image can have do not exist.
const MAX_PAGES: u64 = u32::MAX as u64 - 15;

impl Profile {
    /// The bytes of its file.
    pub fn encode(&self) -> Vec<u8> {
        let content = self.memory.content.map_or([0; 32], |content| *content.as_bytes());
        // As many as pages, which 32 bits count.
        let count = u32::try_from(self.pages.len()).unwrap_or(u32::MAX);
        let header: [u8; HEADER_BYTES] = record(&[
            &MAGIC,
            &VERSION.to_le_bytes(),
            &[0; 2],
            &HEADER_LEN.to_le_bytes(),
            &self.memory.memory_bytes.to_le_bytes(),
            &self.sessions.to_le_bytes(),
            &count.to_le_bytes(),
            &self.memory.sample,
            &content,
        ]);
        let mut bytes = header.to_vec();
        for page in &self.pages {
            let entry: [u8; ENTRY_BYTES] = record(&[
                &page.page.to_le_bytes(),
                &page.sessions.to_le_bytes(),
                &page.first_us.to_le_bytes(),
            ]);
            bytes.extend(entry);
        }
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// The profile whose file has these bytes; `path` is what that is called.
    ///
    /// # Errors
    ///
    /// See [`ProfileError`].
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Self, ProfileError> {
        let damaged = |why: String| ProfileError::Damaged { path: path.to_owned(), why };
        if !bytes.starts_with(&MAGIC) {
            return Err(ProfileError::NotAProfile { path: path.to_owned() });
        }
        let version = u16_at(bytes, 8);
        if bytes.len() >= 10 && version != VERSION {
            return Err(ProfileError::Version { path: path.to_owned(), version });
        }
        let cut = || damaged(format!("it is cut short, at {} bytes", bytes.len()));
        let (body, crc) = bytes.split_last_chunk::<CRC_BYTES>().ok_or_else(cut)?;
        if body.len() < HEADER_BYTES {
            return Err(cut());
        }
        let (has, should) = (crc32c::crc32c(body), u32::from_le_bytes(*crc));
        if has != should {
            return Err(damaged(format!("its checksum is {has:#010x}, not {should:#010x}")));
        }
        Self::parse(body).map_err(damaged)
    }

    /// What the bytes say, whose checksum is right, or what is wrong with it.
    fn parse(body: &[u8]) -> Result<Self, String> {
        let header_bytes = u32_at(body, 12) as usize;
        let (memory_bytes, sessions) = (u64_at(body, 16), u32_at(body, 24));
        let count = u32_at(body, 28) as usize;
        if !memory_bytes.is_multiple_of(PAGE) || !(1..=MAX_PAGES).contains(&(memory_bytes / PAGE)) {
            return Err(format!("its memory has {memory_bytes} bytes"));
        }
        let entries = body.get(header_bytes..).filter(|_| header_bytes >= HEADER_BYTES);
        let entries = entries.ok_or_else(|| format!("its header has {header_bytes} bytes"))?;
        let (entries, rest) = entries.as_chunks::<ENTRY_BYTES>();
        if entries.len() != count || !rest.is_empty() {
            return Err(format!(
                "it has {} bytes after its header, and should have {count} entries of {ENTRY_BYTES}",
                entries.len() * ENTRY_BYTES + rest.len()
            ));
        }
        let pages: Vec<HotPage> = entries
            .iter()
            .map(|entry| HotPage {
                page: u32_at(entry, 0),
                sessions: u32_at(entry, 4),
                first_us: u32_at(entry, 8),
            })
            .collect();
        check_pages(&pages, memory_bytes / PAGE, sessions)?;
        let (sample, content) = (field(body, 32), field::<32>(body, 64));
        let content = (content != [0; 32]).then_some(ContentId(content));
        Ok(Self { memory: MemoryIdentity { memory_bytes, sample, content }, sessions, pages })
    }
}

fn check_pages(pages: &[HotPage], all: u64, sessions: u32) -> Result<(), String> {
    let mut seen = HashSet::with_capacity(pages.len());
    let mut before = None;
    for (number, page) in pages.iter().enumerate() {
        let key = (page.first_us, page.page);
        if before.is_some_and(|before| before >= key) {
            return Err(format!("its entry {number} is out of order"));
        }
        before = Some(key);
        if u64::from(page.page) >= all || !seen.insert(page.page) {
            return Err(format!("its entry {number} is of page {}", page.page));
        }
        if page.sessions == 0 || page.sessions > sessions {
            return Err(format!(
                "its entry {number} was touched in {} of {sessions} sessions",
                page.sessions
            ));
        }
    }
    Ok(())
}
