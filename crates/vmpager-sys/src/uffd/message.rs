//! What a userfaultfd says: faults, and what happens to the memory.

use std::os::fd::{FromRawFd, OwnedFd};

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

    fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |i: usize| {
            let mut eight = [0; 8];
            eight.copy_from_slice(&bytes[i * 8..i * 8 + 8]);
            u64::from_ne_bytes(eight)
        };
        match u32::from(bytes[0]) {
            raw::UFFD_EVENT_PAGEFAULT => {
                let mut four = [0; 4];
                four.copy_from_slice(&bytes[24..28]);
                let thread = u32::from_ne_bytes(four);
                Self::Fault { flags: word(1), address: word(2), thread }
            }
            raw::UFFD_EVENT_REMOVE => {
                Self::Remove { start: word(1), end: word(2), unmapped: false }
            }
            raw::UFFD_EVENT_UNMAP => Self::Remove { start: word(1), end: word(2), unmapped: true },
            raw::UFFD_EVENT_REMAP => Self::Remap { from: word(1), to: word(2), len: word(3) },
            raw::UFFD_EVENT_FORK => {
                let mut four = [0; 4];
                four.copy_from_slice(&bytes[8..12]);
                // SAFETY: the kernel made this descriptor for the reader of the
                // message, and each message is parsed once (`Messages::drain`).
                Self::Fork { child: unsafe { OwnedFd::from_raw_fd(i32::from_ne_bytes(four)) } }
            }
            _ => Self::Unknown(bytes[0]),
        }
    }
}

/// A buffer for as many messages as one `read` returns.
#[derive(Debug)]
pub struct Messages {
    pub(super) bytes: Box<[u8; Self::BATCH * Message::BYTES]>,
    pub(super) filled: usize,
}

impl Messages {
    /// The most messages one `read` returns.
    pub const BATCH: usize = 64;

    /// An empty buffer.
    pub fn new() -> Self {
        Self { bytes: Box::new([0; Self::BATCH * Message::BYTES]), filled: 0 }
    }

    /// Takes the messages of the last [`Userfaultfd::read`](super::Userfaultfd::read), in the kernel's
    /// order. Each is handed out once: it may own a descriptor.
    pub fn drain(&mut self) -> impl Iterator<Item = Message> + '_ {
        let filled = std::mem::take(&mut self.filled);
        self.bytes[..filled].as_chunks::<{ Message::BYTES }>().0.iter().map(Message::parse)
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
