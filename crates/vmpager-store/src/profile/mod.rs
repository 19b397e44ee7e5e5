//! Profiles: which pages a guest touched, in which order, as recorded from runs of
//! it. A later restore brings these pages in first. The file, byte by byte, is
//! described in `docs/profile.md`.
//!
//! A profile belongs to a memory and names it by [`MemoryIdentity`]; for any other
//! one it is refused. Should it be wrong all the same (another workload, another
//! input), pages come that nobody needs, but never wrong bytes.

mod file;
mod identity;
mod order;
mod recorder;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::image::{ImageError, MemoryInput};

pub use self::identity::{MemoryIdentity, Mismatch};
pub use self::order::replay_order;
pub use self::recorder::Recorder;

/// A page that was touched, and when: microseconds after its session began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Number of the page in the memory: its offset divided by 4096.
    pub page: u32,
    /// Saturates after 71 minutes.
    pub at_us: u32,
}

/// A page of a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotPage {
    /// Number of the page in the memory: its offset divided by 4096.
    pub page: u32,
    /// In how many sessions it was touched.
    pub sessions: u32,
    /// When it was touched first, in the session where that was earliest:
    /// microseconds after the session began.
    pub first_us: u32,
}

/// Which pages a guest touched, in the order in which it did first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    memory: MemoryIdentity,
    sessions: u32,
    /// By time, then by page; no page twice.
    pages: Vec<HotPage>,
}

/// Why a profile cannot be read or used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The system refused or failed.
    #[error("cannot read profile {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's own words.
        error: io::Error,
    },
    /// The file does not begin as a profile does.
    #[error(
        "{} is no profile (its first bytes are not those of one); make one with `vmpager profile \
         record`",
        path.display()
    )]
    NotAProfile {
        /// The file.
        path: PathBuf,
    },
    /// A version of the format this program does not know.
    #[error(
        "{} has version {version} of the profile format, and this program reads version 1; use \
         the vmpager that made it, or record it anew",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version it has.
        version: u16,
    },
    /// Its bytes are not those that were written.
    #[error("profile {} is damaged: {why}; copy it again, or record it anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        why: String,
    },
    /// It belongs to another memory.
    #[error(
        "profile {} is not one of {memory}: {mismatch}; record one of that memory with `vmpager \
         profile record`",
        path.display()
    )]
    OtherMemory {
        /// The profile.
        path: PathBuf,
        /// The memory it shall be used with, or the profile it shall be merged with.
        memory: String,
        /// What shows it.
        mismatch: Mismatch,
    },
    /// The memory it shall be used with cannot be read.
    #[error(transparent)]
    Memory(#[from] ImageError),
}

impl Profile {
    /// A profile of a memory of which nothing was recorded yet.
    pub fn new(memory: MemoryIdentity) -> Self {
        Self { memory, sessions: 0, pages: Vec::new() }
    }

    /// Reads a profile from a file.
    ///
    /// # Errors
    ///
    /// See [`ProfileError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ProfileError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path)
            .map_err(|error| ProfileError::Io { path: path.to_owned(), error })?;
        Self::decode(&bytes, path)
    }

    /// Reads a profile of this memory from a file.
    ///
    /// # Errors
    ///
    /// See [`ProfileError`].
    pub fn open_for(path: impl AsRef<Path>, memory: &MemoryInput) -> Result<Self, ProfileError> {
        let profile = Self::open(&path)?;
        let of = match (profile.memory.content, memory.content()) {
            // Then nothing need be read.
            (Some(_), content @ Some(_)) => {
                MemoryIdentity { memory_bytes: memory.memory_bytes(), content, ..profile.memory }
            }
            _ => memory.identity()?,
        };
        profile.memory.check(&of).map_err(|mismatch| ProfileError::OtherMemory {
            path: path.as_ref().to_owned(),
            memory: memory.path().display().to_string(),
            mismatch,
        })?;
        Ok(profile)
    }

    /// The memory it belongs to.
    pub fn memory(&self) -> &MemoryIdentity {
        &self.memory
    }

    /// How many sessions were recorded.
    pub fn sessions(&self) -> u32 {
        self.sessions
    }

    /// Its pages, by the time of their first touch.
    pub fn pages(&self) -> &[HotPage] {
        &self.pages
    }

    /// Adds a session. Touches of pages beyond the memory are left out.
    pub fn add_session(&mut self, touches: &[Touch]) {
        let sessions = 1;
        let pages = touches.iter().map(|touch| HotPage {
            page: touch.page,
            sessions,
            first_us: touch.at_us,
        });
        let mut first: HashMap<u32, HotPage> = HashMap::with_capacity(touches.len());
        for page in pages.filter(|page| u64::from(page.page) < self.memory.pages()) {
            let known = first.entry(page.page).or_insert(page);
            known.first_us = known.first_us.min(page.first_us);
        }
        self.unite(sessions, first.into_values());
    }

    /// Adds what was recorded in another profile of the same memory: the union of
    /// their pages, with the sessions of both.
    ///
    /// # Errors
    ///
    /// If that is one of another memory.
    pub fn merge(&mut self, other: &Self) -> Result<(), Mismatch> {
        self.memory.unite(&other.memory)?;
        self.unite(other.sessions, other.pages.iter().copied());
        Ok(())
    }

    fn unite(&mut self, sessions: u32, pages: impl Iterator<Item = HotPage>) {
        self.sessions = self.sessions.saturating_add(sessions);
        let mine = self.pages.drain(..).map(|page| (page.page, page));
        let mut united: HashMap<u32, HotPage> = mine.collect();
        for page in pages {
            match united.entry(page.page) {
                std::collections::hash_map::Entry::Vacant(new) => {
                    new.insert(page);
                }
                std::collections::hash_map::Entry::Occupied(mut known) => {
                    let known = known.get_mut();
                    known.sessions = known.sessions.saturating_add(page.sessions);
                    known.first_us = known.first_us.min(page.first_us);
                }
            }
        }
        self.pages.extend(united.into_values());
        self.pages.sort_unstable_by_key(|page| (page.first_us, page.page));
    }

    /// The order in which to bring the pages in, and to store them: [`replay_order`].
    pub fn replay_order(&self) -> Vec<Range<u32>> {
        replay_order(&self.pages.iter().map(|page| page.page).collect::<Vec<_>>())
    }
}
