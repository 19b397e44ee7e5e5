//! What a userfaultfd says: faults, and what happens to the memory.

use std::fmt;
use std::ops::Deref;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use linux_raw_sys::general as raw;

/// One message read from a userfaultfd.
#[derive(Debug)]
pub enum Message {
    /// Somebody waits for a page.
    Fault {
        /// The address touched (rounded down to its page unless
        /// `EXACT_ADDRESS` was negotiated).
        address: u64,
        /// `UFFD_PAGEFAULT_FLAG_*`.
        flags: u64,
        /// The thread that waits, by the number it has in its own process's PID
        /// namespace; 0 unless [`THREAD_ID`](super::Features::THREAD_ID) was
        /// negotiated.
        thread: u32,
    },
    /// The pages of a range were given back (`MADV_DONTNEED`, `MADV_REMOVE`)
    /// or, with `unmapped`, the mapping itself is gone.
    Remove {
        /// First address of the range.
        start: u64,
        /// One past the last.
        end: u64,
        /// Whether it was `munmap`.
        unmapped: bool,
    },
    /// A registered range moved.
    Remap {
        /// Its old address.
        from: u64,
        /// Its new one.
        to: u64,
        /// Its length.
        len: u64,
    },
    /// The process forked; the child's memory has this userfaultfd.
    Fork {
        /// The child's userfaultfd.
        child: OwnedFd,
    },
    /// An event of a kind this version does not know.
    Unknown(u8),
}

impl Message {
    /// The flag of a fault on a page that is there and protected against writing.
    pub const PROTECTED: u64 = raw::UFFD_PAGEFAULT_FLAG_WP as u64;

    /// Size of a message on the wire.
    pub(super) const BYTES: usize = 32;

    fn parse(words: &[AtomicU64]) -> Self {
        match Raw::of(words) {
            Raw { event: raw::UFFD_EVENT_PAGEFAULT, args: [flags, address, thread] } => {
                let four = thread.to_ne_bytes();
                let thread = u32::from_ne_bytes([four[0], four[1], four[2], four[3]]);
                Self::Fault { flags, address, thread }
            }
            Raw { event: raw::UFFD_EVENT_REMAP, args: [from, to, len] } => {
                Self::Remap { from, to, len }
            }
            Raw { event: raw::UFFD_EVENT_FORK, args: [fd, _, _] } => {
                let fd = fd.to_ne_bytes();
                let fd = i32::from_ne_bytes([fd[0], fd[1], fd[2], fd[3]]);
                // SAFETY: the kernel made this descriptor for the reader of the
                // message, and each message is parsed once (`Messages::drain`).
                Self::Fork { child: unsafe { OwnedFd::from_raw_fd(fd) } }
            }
            raw => match raw.removed() {
                Some((start, end, unmapped)) => Self::Remove { start, end, unmapped },
                None => Self::Unknown(u8::try_from(raw.event).unwrap_or(u8::MAX)),
            },
        }
    }
}

/// The words of a message, native-endian as the kernel writes them: the event is
/// the first byte.
struct Raw {
    event: u32,
    args: [u64; 3],
}

impl Raw {
    fn of(words: &[AtomicU64]) -> Self {
        let word = |i: usize| words[i].load(Ordering::Acquire);
        let event = u32::from(word(0).to_ne_bytes()[0]);
        Self { event, args: [word(1), word(2), word(3)] }
    }

    /// The range given back, and whether its mapping is gone, too.
    fn removed(&self) -> Option<(u64, u64, bool)> {
        let [start, end, _] = self.args;
        match self.event {
            raw::UFFD_EVENT_REMOVE => Some((start, end, false)),
            raw::UFFD_EVENT_UNMAP => Some((start, end, true)),
            _ => None,
        }
    }
}

/// What a reader that died left behind of what it had read: see
/// [`Messages::left_behind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The pages of a range were given back.
    Removed {
        /// First address of the range.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// A registered range moved.
    Moved,
    /// The process forked; the child's userfaultfd died with its reader.
    Forked,
}

/// Memory for messages: words, so that what one process left there another one
/// may read.
type Words = dyn Deref<Target = [AtomicU64]> + Send;

/// A buffer for as many messages as one `read` returns.
///
/// The kernel forgets a message once it was read, and lets whoever gave memory
/// back go on. If the reader is killed before it has taken note, nobody knows of
/// it any more; so the buffer may lie in memory that outlives the reader:
///
/// ```text
///   all clear -> read: the kernel puts messages there -> applied -> clear
/// ```
///
/// A process is killed in user mode, or on its way there: a read that has begun
/// to take messages puts them into the buffer, whole. What lies there when a
/// reader is dead is therefore everything that was read and may not have been
/// applied.
pub struct Messages {
    words: Box<Words>,
    /// Bytes read and not drained.
    pub(super) filled: usize,
    /// Messages that may lie there and are to be cleared.
    dirty: usize,
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Messages({})", self.len())
    }
}

impl Messages {
    /// The most messages one `read` returns.
    pub const BATCH: usize = 64;
    /// Words a message takes.
    const SIZE: usize = Message::BYTES / 8;
    /// Words a buffer takes.
    pub const WORDS: usize = Self::BATCH * Self::SIZE;

    /// An empty buffer in memory of this process.
    pub fn new() -> Self {
        let words: Vec<AtomicU64> = (0..Self::WORDS).map(|_| AtomicU64::new(0)).collect();
        Self { words: Box::new(words), filled: 0, dirty: 0 }
    }

    /// A buffer in the first [`WORDS`](Self::WORDS) of these words, which nobody
    /// else writes to. It is empty unless a reader left something behind.
    ///
    /// # Panics
    ///
    /// If there are fewer.
    pub fn within(words: impl Deref<Target = [AtomicU64]> + Send + 'static) -> Self {
        assert!(words.len() >= Self::WORDS, "{} words, {} needed", words.len(), Self::WORDS);
        Self { words: Box::new(words), filled: 0, dirty: Self::BATCH }
    }

    /// Where the kernel puts messages.
    pub(super) fn buffer(&self) -> &[AtomicU64] {
        &self.words[..Self::WORDS]
    }

    /// The kernel has put so many bytes there.
    pub(super) fn fill(&mut self, bytes: usize) {
        self.filled = bytes;
        self.dirty = bytes / Message::BYTES;
    }

    /// Takes the messages of the last [`Userfaultfd::read`](super::Userfaultfd::read), in the kernel's
    /// order. Each is handed out once: it may own a descriptor.
    pub fn drain(&mut self) -> impl Iterator<Item = Message> + '_ {
        let filled = std::mem::take(&mut self.filled) / 8;
        self.buffer()[..filled].chunks_exact(Self::SIZE).map(Message::parse)
    }

    /// What lies there, for whoever comes after a reader that died.
    pub fn left_behind(&self) -> impl Iterator<Item = Left> + '_ {
        self.buffer().chunks_exact(Self::SIZE).filter_map(|words| match Raw::of(words) {
            Raw { event: raw::UFFD_EVENT_REMAP, .. } => Some(Left::Moved),
            Raw { event: raw::UFFD_EVENT_FORK, .. } => Some(Left::Forked),
            raw => raw.removed().map(|(start, end, _)| Left::Removed { start, end }),
        })
    }

    /// What was read has been applied: forgets it.
    pub fn clear(&mut self) {
        for index in (0..std::mem::take(&mut self.dirty)).rev() {
            self.buffer()[index * Self::SIZE].store(0, Ordering::Release);
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.filled / Message::BYTES
    }

    /// Whether the last read found nothing.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }
}

impl Default for Messages {
    fn default() -> Self {
        Self::new()
    }
}
