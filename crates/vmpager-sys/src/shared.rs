//! Words of memory that several processes share through a memfd, surfacing as
//! `&[AtomicU64]`.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::memory::Mapping;

/// Zeroed words in a memfd that can be handed to other processes. The memfd is
/// sealed against resizing, so that no mapping of it can ever fault.
pub struct SharedWords {
    mapping: Mapping,
    fd: OwnedFd,
    words: usize,
}

impl fmt::Debug for SharedWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedWords({})", self.words)
    }
}

impl SharedWords {
    /// `words` zeroes. They cost memory only once written.
    ///
    /// # Errors
    ///
    /// If the memfd cannot be made.
    pub fn new(name: &str, words: usize) -> io::Result<Self> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let len = words.max(1).checked_mul(8).ok_or(io::ErrorKind::OutOfMemory)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mapping = Mapping::file_shared(fd.as_fd(), len)?;
        Ok(Self { mapping, fd, words })
    }

    /// The memfd, to pass to another process.
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        let base = self.mapping.hva() as *const AtomicU64;
        // SAFETY: the mapping is page-aligned, at least `words` words long,
        // never resized (sealed), lives as long as `self`, and is only
        // accessed as atomics.
        unsafe { std::slice::from_raw_parts(base, self.words) }
    }
}
