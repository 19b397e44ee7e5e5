//! How page contents are asked for: the contract between the pager and the
//! places memory comes from (a file, an image, a peer, an object store).
//!
//! A [`PageSource`] is shared by all sessions. Each worker thread opens a
//! [`PageReader`] of its own, so that reading needs no lock and a finished
//! read is seen by the very thread that will install the page. A reader
//! answers in one of two ways:
//!
//! - **at once**, by [`PageReader::try_read`], if the bytes can be had without
//!   waiting (they are in the page cache, in a decoded frame, …);
//! - **later**: [`PageReader::submit`] starts the read, [`PageReader::ready_fd`]
//!   becomes readable, [`PageReader::complete`] hands the bytes over.
//!
//! A reader never blocks the calling thread on storage or on a network (I5),
//! and never returns a byte it did not read: a short read is an error, and
//! only ranges known to be holes are zero (I3).

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::addr::ByteRange;

/// Why a source could not deliver a range.
///
/// Cloneable, because one failed read may concern many pages and sessions.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourceError {
    /// The operating system refused or failed the read.
    #[error("reading {range} of {name}: {error}")]
    Io {
        /// What was read, as the user named it.
        name: Arc<str>,
        /// The range asked for.
        range: ByteRange,
        /// The system's own words.
        error: Arc<std::io::Error>,
    },
    /// It was asked for as long as somebody wanted to wait.
    #[error("{range} of {name} did not come while it was waited for: {why}")]
    GaveUp {
        /// What was read, as the user named it.
        name: Arc<str>,
        /// The range asked for.
        range: ByteRange,
        /// What came instead, and what to do.
        why: Arc<str>,
    },
    /// The source ended before the range did.
    #[error("{name} ends at {len:#x}, before {range}: it was truncated while being served")]
    Truncated {
        /// What was read, as the user named it.
        name: Arc<str>,
        /// The range asked for.
        range: ByteRange,
        /// Where the source ends now.
        len: u64,
    },
    /// The source was written to after it was opened; none of its bytes can be
    /// trusted to be the VM's any more.
    #[error("{name} was modified while being served; write snapshots to a new file and rename it")]
    Changed {
        /// What was read, as the user named it.
        name: Arc<str>,
    },
    /// Its bytes are not those that were written: a checksum does not hold.
    #[error(
        "{name} is damaged at {what}, needed for {range}; copy it again from where it was made"
    )]
    Damaged {
        /// What was read, as the user named it.
        name: Arc<str>,
        /// The range asked for.
        range: ByteRange,
        /// Which part of it, and what is wrong.
        what: Arc<str>,
    },
}

impl SourceError {
    /// Whether asking again may succeed, soon enough. A changed, truncated or damaged
    /// source will not grow the right bytes back.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}

/// How urgent a read is (I6). Ordered: later variants go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Background fill: nobody asked yet.
    Fill,
    /// Somebody will probably ask soon.
    Prefetch,
    /// A vCPU or thread is stopped on it.
    Demand,
}

/// Names a submitted read; chosen by the caller, unique among its reads in
/// flight on one reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReadId(pub u64);

/// A read to be done in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadRequest {
    /// The caller's name for it.
    pub id: ReadId,
    /// What to read.
    pub range: ByteRange,
    /// How urgent it is.
    pub priority: Priority,
    /// Somebody has waited for it long enough: it is answered with what there is here,
    /// and nobody elsewhere is asked.
    pub here_only: bool,
}

/// Page contents, lent by a reader until its next call.
#[derive(Clone, Copy)]
pub enum PageData<'a> {
    /// Bytes in this process's memory.
    Bytes(&'a [u8]),
    /// Bytes in a mapping of a file, for the **kernel** to read (as the source
    /// of `UFFDIO_COPY` or `write`): others may change or truncate the file,
    /// so this process must never dereference the address itself. A system
    /// call that meets a page which cannot be read fails with `EFAULT`.
    Mapped {
        /// Where the range begins in this process.
        addr: usize,
        /// Its length in bytes.
        len: usize,
    },
}

impl PageData<'_> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Mapped { len, .. } => *len,
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the kernel finds the bytes, until the reader's next call. This
    /// process must not read them there.
    pub fn address(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.as_ptr() as usize,
            Self::Mapped { addr, .. } => *addr,
        }
    }
}

impl fmt::Debug for PageData<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::Mapped { addr, len } => write!(f, "Mapped({addr:#x}, {len})"),
        }
    }
}

/// A place page contents come from, shared by all sessions that restore from
/// it.
pub trait PageSource: Send + Sync + fmt::Debug {
    /// What to call it in errors and logs (a path, a URL).
    fn name(&self) -> Arc<str>;

    /// Its length in bytes: a multiple of 4096.
    fn len(&self) -> u64;

    /// A number that differs, as far as can be told, from that of every source
    /// with other contents: what was begun from one source must not be ended from
    /// another. The same in every process.
    fn fingerprint(&self) -> u64;

    /// Whether it holds no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `visit` for every range **known** to read as zeroes without
    /// reading it (holes of a sparse file), in ascending order. These pages
    /// are never read (R-F2).
    fn visit_zero_ranges(&self, visit: &mut dyn FnMut(ByteRange));

    /// Opens a reader for one worker thread.
    ///
    /// # Errors
    ///
    /// If the resources of a reader (descriptors, threads, ring memory) cannot
    /// be had.
    fn open_reader(self: Arc<Self>) -> Result<Box<dyn PageReader>, SourceError>;
}

/// One worker's way into a [`PageSource`].
pub trait PageReader: Send + fmt::Debug {
    /// The range's bytes if all of them are at hand, `None` if getting them
    /// could wait. The range is not empty, and within the source.
    ///
    /// # Errors
    ///
    /// If the bytes cannot be had. The caller may [`submit`](Self::submit) the
    /// same range to try again.
    fn try_read(&mut self, range: ByteRange) -> Result<Option<PageData<'_>>, SourceError>;

    /// The longest range worth asking [`try_read`](Self::try_read) for: of longer
    /// ones it says `None`, since even getting bytes that are at hand takes long.
    /// A power of two.
    fn at_hand_bytes(&self) -> u64 {
        1 << 63
    }

    /// Says that these ranges will be asked for soon, in this order, so that a
    /// reader can have larger pieces fetched than are asked for. Does not wait.
    fn will_need(&mut self, ranges: &[ByteRange]) {
        let _ = ranges;
    }

    /// Starts reading in the background. Every accepted request is answered
    /// exactly once by [`complete`](Self::complete), failures included.
    fn submit(&mut self, request: ReadRequest);

    /// Moves a submitted read that has not started yet before all reads of
    /// lower priority. Unknown ids are ignored: the read may just have ended.
    fn promote(&mut self, id: ReadId, priority: Priority);

    /// Calls `done` with each read that has finished, and does not wait.
    fn complete(&mut self, done: &mut dyn FnMut(ReadId, Result<PageData<'_>, SourceError>));

    /// A descriptor that is readable while finished reads wait for
    /// [`complete`](Self::complete); `None` if this reader never waits.
    fn ready_fd(&self) -> Option<BorrowedFd<'_>>;
}
