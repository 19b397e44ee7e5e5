//! One copy of the pages that VMs have not written to, for all VMs of a source.
//!
//! The pages lie in one memfd. A VM maps that privately instead of anonymous memory,
//! and registers the mapping for missing and for minor faults. A page is read from the
//! source, and decoded, by the first fault on it of any VM, and written to the memfd;
//! each VM's fault is then answered by mapping the memfd's page (`UFFDIO_CONTINUE`). What
//! a guest writes is its own VM's: the kernel copies the page (copy on write).
//!
//! ```text
//!   source --> memfd of clean pages <-- private mapping of VM 1: its own copies of what
//!              (written by workers)     it wrote, zeroes of what it gave back
//!                                   <-- private mapping of VM 2 ...
//! ```
//!
//! Which pages the memfd has is known by a bitmap beside it, not by asking the kernel:
//! whoever maps the memfd and looks at a page that it lacks makes a page of zeroes there.
//! A page's bit is set once all of its bytes are in place, and never cleared. Two workers
//! may write the same page at the same time, since they write the same verified bytes;
//! a worker that is killed while it writes one leaves a page that no VM was shown.
//!
//! VMs have the memfd by a descriptor through which it can only be read, and the file
//! is its user's alone to open: so no VM can change what others see
//! (`docs/security.md`). It is not sealed against writing: the worker that takes over
//! from a killed one has to write to it.

mod client;
mod source;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::error;
use vmpager_core::{ByteRange, PageSource};
use vmpager_sys::memfd;
use vmpager_sys::memory::Mapping;
use vmpager_sys::shared::SharedWords;

pub(crate) use self::client::Answer;
pub use self::client::{Offered, ask};
pub(crate) use self::source::CleanSource;

/// The names under which a keeper holds the two files, in their order.
pub const NAMES: [&str; 2] = ["vmpager-clean-pages", "vmpager-clean-map"];

const PAGE: u64 = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"VMPGCLN\0");
const VERSION: u64 = 1;
/// Words before the bitmap: magic, version, pages, fingerprint of the source.
const HEADER: usize = 4;

/// Makes the files of [`CleanPages`], still empty: for whoever outlives the process that
/// serves.
///
/// # Errors
///
/// If the kernel has no memory or descriptor left.
pub fn files() -> io::Result<[OwnedFd; 2]> {
    let [pages, map] = NAMES;
    Ok([memfd::unsized_yet(pages)?, memfd::unsized_yet(map)?])
}

/// Why files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CleanError {
    /// The system refuses.
    #[error("the memory for clean pages: {0}")]
    Io(#[from] io::Error),
    /// They are of something else.
    #[error(
        "the memory for clean pages has {field} {value:#x}, not {expected:#x}: it is of another \
         source or program. Let its VMs end first"
    )]
    Other {
        /// What differs.
        field: &'static str,
        /// What it is.
        value: u64,
        /// What it should be.
        expected: u64,
    },
}

/// The pages of a source that VMs share as long as they do not write to them.
#[derive(Debug)]
pub struct CleanPages {
    pages: OwnedFd,
    /// The same, for VMs.
    lent: OwnedFd,
    mapping: Mapping,
    map: SharedWords,
    len: u64,
    complained: AtomicBool,
}

impl CleanPages {
    /// Those of a source, in [`files`], which others may have begun to fill.
    ///
    /// # Errors
    ///
    /// If the files are of another source, or cannot be mapped.
    pub fn open(files: [OwnedFd; 2], source: &dyn PageSource) -> Result<Self, CleanError> {
        let [pages, map] = files;
        let len = source.len();
        let words = to_index((len / PAGE).div_ceil(64)) + HEADER;
        memfd::size_and_seal(pages.as_fd(), len)?;
        memfd::size_and_seal(map.as_fd(), words as u64 * 8)?;
        let map = SharedWords::open(map)?;
        let header = [
            ("magic", MAGIC),
            ("version", VERSION),
            ("number of pages", len / PAGE),
            ("fingerprint", source.fingerprint()),
        ];
        for ((field, expected), word) in header.into_iter().zip(map.iter()) {
            // A killed process may have written a part of it.
            let value =
                match word.compare_exchange(0, expected, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => continue,
                    Err(value) => value,
                };
            if value != expected {
                return Err(CleanError::Other { field, value, expected });
            }
        }
        let lent = memfd::read_only(pages.as_fd())?;
        let mapping = Mapping::file_read_only(pages.as_fd(), to_index(len))?;
        Ok(Self { pages, lent, mapping, map, len, complained: AtomicBool::new(false) })
    }

    /// What VMs map: all of it, for reading or privately.
    pub(crate) fn lent(&self) -> BorrowedFd<'_> {
        self.lent.as_fd()
    }

    /// How many bytes there are, and will be.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Tells these files from others, as long as they are there; not 0.
    pub(crate) fn id(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.pages)?.st_ino.max(1))
    }

    /// How many pages it has.
    pub fn count(&self) -> u64 {
        self.map.iter().skip(HEADER).map(|word| u64::from(bits(word).count_ones())).sum()
    }

    /// The first part of a range that it lacks.
    fn gap(&self, within: ByteRange) -> Option<ByteRange> {
        let mut pages = within.start / PAGE..within.end().div_ceil(PAGE);
        let first = pages.find(|page| !self.has_page(*page))?;
        let end = pages.find(|page| self.has_page(*page)).unwrap_or(pages.end);
        Some(ByteRange::new(first * PAGE, (end - first) * PAGE))
    }

    /// Whether it has all pages of a range.
    pub(crate) fn has(&self, range: ByteRange) -> bool {
        self.gap(range).is_none()
    }

    /// Whether it has no page of a range.
    pub(crate) fn lacks_all(&self, range: ByteRange) -> bool {
        self.gap(range).is_some_and(|gap| gap == range)
    }

    fn has_page(&self, page: u64) -> bool {
        bits(&self.map[HEADER + to_index(page / 64)]) >> (page % 64) & 1 == 1
    }

    /// Takes a copy of the bytes of a range, of what it lacks of them.
    fn put(&self, range: ByteRange, bytes: &[u8]) -> io::Result<()> {
        let mut left = range;
        while let Some(gap) = self.gap(left) {
            let skip = to_index(gap.start - range.start);
            let part = bytes.get(skip..skip + to_index(gap.len));
            let mut part = part.ok_or(io::ErrorKind::UnexpectedEof)?;
            let mut at = gap.start;
            while !part.is_empty() {
                let done = rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.pages, part, at))?;
                let rest = part.get(done..).filter(|_| done > 0);
                part = rest.ok_or(io::ErrorKind::WriteZero)?;
                at += done as u64;
            }
            crate::kill::point("clean written");
            for page in gap.start / PAGE..gap.end() / PAGE {
                let word = &self.map[HEADER + to_index(page / 64)];
                word.fetch_or(1 << (page % 64), Ordering::Release);
            }
            left = ByteRange::new(gap.end(), range.end() - gap.end());
            if left.len == 0 {
                break;
            }
        }
        Ok(())
    }

    /// As `put`. False if there is no memory: the pages can be had all the same, in a
    /// copy for each VM.
    fn took(&self, range: ByteRange, bytes: &[u8]) -> bool {
        let Err(problem) = self.put(range, bytes) else { return true };
        if !self.complained.swap(true, Ordering::Relaxed) {
            error!(
                "no memory for clean pages ({problem}): each VM gets a copy of its own of what is \
                 not there yet"
            );
        }
        false
    }

    /// Where the kernel finds a range that it has.
    pub(crate) fn address(&self, range: ByteRange) -> usize {
        to_index(self.mapping.hva() + range.start)
    }

    /// Whether that is an address of its pages.
    pub(crate) fn holds(&self, address: usize) -> bool {
        (address as u64).checked_sub(self.mapping.hva()).is_some_and(|offset| offset < self.len)
    }
}

fn bits(word: &std::sync::atomic::AtomicU64) -> u64 {
    word.load(Ordering::Acquire)
}

fn to_index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
