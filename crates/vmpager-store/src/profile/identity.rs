//! Which memory a profile belongs to.

use std::fmt;

use crate::PAGE;
use crate::image::ContentId;

/// What memory contents are told apart by, at little cost: their size, a hash of a
/// sample of their pages, and what an image calls them, where it is known.
///
/// The sample does not depend on how the memory is kept, so that a profile that
/// was recorded from a raw file is good for an image packed from it. Two memories
/// that differ in few pages may have the same sample; where both are images their
/// whole contents are compared instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryIdentity {
    pub(crate) memory_bytes: u64,
    pub(crate) sample: [u8; 32],
    pub(crate) content: Option<ContentId>,
}

/// How many pages the sample has.
pub(crate) const SAMPLE_PAGES: u64 = 64;

/// What shows that two memories are not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// They have not the same size: that of the profile, and the other one.
    Size(u64, u64),
    /// They have not the same contents, as far as images tell.
    Content(ContentId, ContentId),
    /// The pages of the sample are not the same.
    Sample,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(profile, memory) => {
                write!(f, "it is for {profile} bytes of memory, not for {memory}")
            }
            Self::Content(profile, memory) => {
                write!(f, "it is for the contents {profile:.16}, not for {memory:.16}")
            }
            Self::Sample => f.write_str("the contents differ"),
        }
    }
}

impl MemoryIdentity {
    /// The identity of a memory of so many bytes, the given pages of which `read`
    /// reads.
    pub(crate) fn sample<E>(
        memory_bytes: u64,
        content: Option<ContentId>,
        mut read: impl FnMut(u32, &mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&memory_bytes.to_le_bytes());
        let pages = memory_bytes / PAGE;
        let mut bytes = [0; 4096];
        for nth in 0..SAMPLE_PAGES.min(pages) {
            let page = nth * pages / SAMPLE_PAGES.min(pages);
            // Memories have fewer pages than 32 bits count.
            read(u32::try_from(page).unwrap_or(u32::MAX), &mut bytes)?;
            hasher.update(&bytes);
        }
        Ok(Self { memory_bytes, sample: *hasher.finalize().as_bytes(), content })
    }

    /// Bytes of memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// What an image calls the contents, if that is known.
    pub fn content(&self) -> Option<ContentId> {
        self.content
    }

    pub(crate) fn pages(&self) -> u64 {
        self.memory_bytes / PAGE
    }

    /// Whether `other` is the same memory.
    ///
    /// # Errors
    ///
    /// What shows that it is not.
    pub fn check(&self, other: &Self) -> Result<(), Mismatch> {
        if self.memory_bytes != other.memory_bytes {
            return Err(Mismatch::Size(self.memory_bytes, other.memory_bytes));
        }
        match (self.content, other.content) {
            (Some(own), Some(other)) if own != other => Err(Mismatch::Content(own, other)),
            (Some(_), Some(_)) => Ok(()),
            _ if self.sample != other.sample => Err(Mismatch::Sample),
            _ => Ok(()),
        }
    }

    /// Takes over what the other one, of the same memory, knows.
    pub(crate) fn unite(&mut self, other: &Self) -> Result<(), Mismatch> {
        self.check(other)?;
        self.content = self.content.or(other.content);
        Ok(())
    }
}
