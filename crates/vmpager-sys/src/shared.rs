//! Words of memory that several processes share through a memfd, surfacing as
//! `&[AtomicU64]`.

use std::fmt;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SeekFrom;

use crate::memfd;
use crate::memory::Mapping;

/// Words in a memfd that can be handed to other processes. The memfd is sealed
/// against resizing, so that no mapping of it can ever fault.
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
        let len = words.max(1).checked_mul(8).ok_or(io::ErrorKind::OutOfMemory)?;
        let fd = memfd::sealed(name, len as u64)?;
        let mapping = Mapping::file_shared(fd.as_fd(), len)?;
        Ok(Self { mapping, fd, words })
    }

    /// The words of a memfd that another process made.
    ///
    /// # Errors
    ///
    /// If it is not sealed against shrinking, or may not be written.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        let len = whole_words(fd.as_fd())?;
        let mapping = Mapping::file_shared(fd.as_fd(), len)?;
        Ok(Self { mapping, fd, words: len / 8 })
    }

    /// The memfd, to pass to another process.
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The words that were ever written, to whole pages: all others are zero, and have
    /// no memory until somebody looks at them.
    ///
    /// # Errors
    ///
    /// If the kernel does not say (lseek(2)).
    pub fn written(&self) -> io::Result<Vec<Range<usize>>> {
        let mut written = Vec::new();
        let mut at = 0;
        loop {
            let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(at)) {
                Ok(start) => start,
                // There is no more.
                Err(rustix::io::Errno::NXIO) => return Ok(written),
                Err(error) => return Err(error.into()),
            };
            at = rustix::fs::seek(&self.fd, SeekFrom::Hole(start))?;
            let word = |byte: u64| usize::try_from(byte / 8).map_err(io::Error::other);
            written.push(word(start)?..word(at)?.min(self.words));
        }
    }

    /// Keeps the kernel from taking the words' memory away, however long they
    /// are not used: touching them never waits for storage.
    ///
    /// # Errors
    ///
    /// If this user may not lock that much (`RLIMIT_MEMLOCK`).
    pub fn lock(&self, words: Range<usize>) -> io::Result<()> {
        self.mapping.lock(words.start * 8..words.end * 8)
    }
}

/// Some words of shared memory that several in this process have.
#[derive(Clone, Debug)]
pub struct Part {
    words: Arc<SharedWords>,
    range: Range<usize>,
}

impl Part {
    /// These words of the memory. None if it is shorter.
    pub fn of(words: Arc<SharedWords>, range: Range<usize>) -> Option<Self> {
        words.get(range.clone())?;
        Some(Self { words, range })
    }
}

impl Deref for Part {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        &self.words[self.range.clone()]
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

/// Words in another process's memfd that are only read here.
pub struct ReadOnlyWords {
    mapping: Mapping,
    words: usize,
}

impl fmt::Debug for ReadOnlyWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadOnlyWords({})", self.words)
    }
}

impl ReadOnlyWords {
    /// The words of a memfd that another process made.
    ///
    /// # Errors
    ///
    /// If it is not sealed against shrinking.
    pub fn open(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let len = whole_words(fd)?;
        Ok(Self { mapping: Mapping::file_read_only(fd, len)?, words: len / 8 })
    }
}

impl ReadOnlyWords {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.words
    }

    /// What a word holds, with acquire ordering. None beyond the last.
    #[inline]
    pub fn load(&self, index: usize) -> Option<u64> {
        if index >= self.words {
            return None;
        }
        let base = self.mapping.hva() as *const AtomicU64;
        // SAFETY: within the mapping, as just checked.
        let at = unsafe { base.add(index) };
        // SAFETY: aligned, mapped as long as `self` lives (sealed against
        // shrinking), and loads of a word's size may be from read-only memory.
        Some(unsafe { &*at }.load(Ordering::Acquire))
    }
}

/// The length of a shared memfd in bytes, cut to whole words.
fn whole_words(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let len = usize::try_from(memfd::sealed_len(fd)?).map_err(io::Error::other)?;
    match len / 8 * 8 {
        0 => Err(io::Error::new(io::ErrorKind::InvalidInput, "the memfd holds no word")),
        len => Ok(len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_mapping_writes_the_others_read() {
        let words = SharedWords::new("test", 1000).expect("a memfd");
        let fd = memfd::read_only(words.memfd()).expect("/proc is there");
        let reader = ReadOnlyWords::open(fd.as_fd()).expect("sealed");
        let writer = words.memfd().try_clone_to_owned().and_then(SharedWords::open);
        writer.expect("sealed")[999].store(7, Ordering::Release);
        assert_eq!((reader.count(), reader.load(999), reader.load(1000)), (1000, Some(7), None));
        assert!(SharedWords::open(fd).is_err(), "cannot be written by way of this descriptor");
    }

    #[test]
    fn what_was_never_written_has_no_memory() {
        let words = SharedWords::new("test", 10 * 512).expect("a memfd");
        assert_eq!(words.written().expect("said"), []);
        for word in [512, 1030, 5119] {
            words[word].store(1, Ordering::Relaxed);
        }
        let successor = words.memfd().try_clone_to_owned().and_then(SharedWords::open);
        let successor = successor.expect("sealed");
        assert_eq!(successor.written().expect("said"), [512..1536, 4608..5120]);
        assert_eq!(successor[2000].load(Ordering::Relaxed), 0, "a look fills it");
        assert_eq!(words.written().expect("said"), [512..2048, 4608..5120]);
    }

    #[test]
    fn a_file_that_can_shrink_is_refused() {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).expect("room");
        rustix::fs::ftruncate(&file, 4096).expect("room");
        let error = ReadOnlyWords::open(file.as_fd()).expect_err("not sealed").to_string();
        assert!(error.contains("F_SEAL_SHRINK"), "{error}");
    }
}
