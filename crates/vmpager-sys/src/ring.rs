//! Positioned reads of one file through io_uring(7).
//!
//! The kernel writes into a read's buffer at a time of its own choosing, so
//! the ring **owns** every buffer from [`ReadRing::submit`] until its read has
//! ended, and the file for as long as it lives. Dropping the ring cancels what
//! can be cancelled and waits for the rest; should a device not answer, the
//! buffers of its reads are leaked rather than freed under the kernel's hands.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, Fd, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

/// How long a dropped ring waits for its reads.
const DROP_PATIENCE: Duration = Duration::from_secs(2);

/// How long it waits before it cancels them once more.
const CANCEL_EVERY: Duration = Duration::from_millis(5);

/// A read to be started.
#[derive(Debug)]
pub struct RingRead {
    /// The caller's name for it, returned with its completion.
    pub user_data: u64,
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// Receives the bytes, from index `from` to its end.
    pub buf: Vec<u8>,
    /// Where in `buf` the bytes go: more than 0 to continue a short read.
    pub from: usize,
    /// Whether to hand the read to a kernel thread at once. Otherwise bytes
    /// that are already in the page cache are copied before
    /// [`ReadRing::submit`] returns, which is quicker for a few of them.
    pub offload: bool,
}

/// A read that did not start, with its buffer.
#[derive(Debug)]
pub struct Refused {
    /// `WouldBlock` if the ring is full, else why the ring is unusable.
    pub error: io::Error,
    /// The buffer of the read.
    pub buf: Vec<u8>,
}

#[derive(Debug)]
struct InFlight {
    user_data: u64,
    buf: Vec<u8>,
}

/// A bounded number of reads of one file, in flight in the kernel.
pub struct ReadRing {
    ring: IoUring,
    file: OwnedFd,
    /// A read's position here is its name in the kernel.
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Slots whose entry the kernel has not taken yet, oldest first.
    queued: VecDeque<usize>,
    /// Set when the kernel refuses to take entries for good.
    broken: Option<Errno>,
}

impl ReadRing {
    /// A ring for `depth` reads of `file`. If `bell` is given, an eventfd, the
    /// kernel adds to it whenever a read ends, once or several times.
    ///
    /// # Errors
    ///
    /// `ENOSYS` or `EPERM` where io_uring does not exist or is forbidden
    /// (seccomp, `kernel.io_uring_disabled`), `Unsupported` if it is too old
    /// to read files, `ENOMEM` if the locked-memory limit is used up.
    pub fn new(file: OwnedFd, depth: u32, bell: Option<impl AsFd>) -> io::Result<Self> {
        let ring = IoUring::new(depth.max(1))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring cannot read files (IORING_OP_READ is missing)",
            ));
        }
        if let Some(bell) = bell {
            ring.submitter().register_eventfd(bell.as_fd().as_raw_fd())?;
        }
        let depth = depth.max(1) as usize;
        let slots = (0..depth).map(|_| None).collect();
        let free = (0..depth).rev().collect();
        Ok(Self { ring, file, slots, free, queued: VecDeque::new(), broken: None })
    }

    /// Number of reads that have been submitted and not yet handed back.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether [`submit`](Self::submit) would refuse another read.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Whether entries wait because the kernel was short of memory:
    /// [`completions`](Self::completions) tries again.
    pub fn is_stalled(&self) -> bool {
        !self.queued.is_empty()
    }

    /// Starts a read. Its buffer comes back by
    /// [`completions`](Self::completions).
    ///
    /// # Errors
    ///
    /// [`Refused`] with the buffer, if the ring is full or unusable.
    pub fn submit(&mut self, read: RingRead) -> Result<(), Refused> {
        let RingRead { user_data, offset, mut buf, from, offload } = read;
        if let Some(errno) = self.broken {
            return Err(Refused { error: errno.into(), buf });
        }
        let Some(target) = buf.get_mut(from..) else {
            let error = io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("read to index {from} of a buffer of {} bytes", buf.len()),
            );
            return Err(Refused { error, buf });
        };
        let Some(slot) = self.free.pop() else {
            return Err(Refused { error: io::ErrorKind::WouldBlock.into(), buf });
        };
        // A read returns at most 2 GiB anyway; the caller continues it.
        let len = u32::try_from(target.len()).unwrap_or(u32::MAX);
        let flags = if offload { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = opcode::Read::new(Fd(self.file.as_raw_fd()), target.as_mut_ptr(), len)
            .offset(offset)
            .build()
            .flags(flags)
            .user_data(slot as u64);
        // Moving the vector does not move the bytes the entry points to.
        self.slots[slot] = Some(InFlight { user_data, buf });
        // SAFETY: the entry's file is owned by the ring, and its buffer by a
        // slot that is emptied only when the read has ended or was never
        // handed to the kernel.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // There are at least as many entries as slots, and each slot has
            // one entry at most.
            let buf = self.take(slot).map_or_else(Vec::new, |read| read.buf);
            return Err(Refused { error: io::ErrorKind::WouldBlock.into(), buf });
        }
        self.queued.push_back(slot);
        self.enter();
        Ok(())
    }

    /// Hands back every read that has ended: its name, how many bytes were
    /// read (fewer than asked for at the end of the file, or if the kernel
    /// chose so), and its buffer. Does not wait.
    pub fn completions(&mut self, mut done: impl FnMut(u64, io::Result<usize>, Vec<u8>)) {
        if !self.queued.is_empty() {
            self.enter();
        }
        if let Some(errno) = self.broken {
            while let Some(slot) = self.queued.pop_front() {
                if let Some(read) = self.take(slot) {
                    done(read.user_data, Err(errno.into()), read.buf);
                }
            }
        }
        while let Some((read, result)) = self.next_completion() {
            let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            done(read.user_data, result, read.buf);
        }
    }

    fn next_completion(&mut self) -> Option<(InFlight, i32)> {
        let entry = self.ring.completion().next()?;
        let slot = usize::try_from(entry.user_data()).ok()?;
        Some((self.take(slot)?, entry.result()))
    }

    fn take(&mut self, slot: usize) -> Option<InFlight> {
        let read = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(read)
    }

    /// Lets the kernel take the queued entries.
    fn enter(&mut self) {
        match self.ring.submit() {
            Ok(taken) => {
                self.queued.drain(..taken.min(self.queued.len()));
            }
            Err(error) => match Errno::from_io_error(&error) {
                // Short of memory, or interrupted: the next call tries again.
                Some(Errno::AGAIN | Errno::BUSY | Errno::NOMEM | Errno::INTR) => {}
                other => self.broken = Some(other.unwrap_or(Errno::IO)),
            },
        }
    }

    /// Cancels what has not begun and waits for the rest; false if a device
    /// did not answer in time.
    fn wind_up(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        // Entries the kernel has not taken are never entered again.
        for slot in mem::take(&mut self.queued) {
            self.take(slot);
        }
        loop {
            // Absent before Linux 6.0, when one waits instead. It does not see a
            // read that is just going from a kernel thread to where it waits
            // for its file to be ready: hence again and again.
            let at_once = Timespec::new();
            let _ = self.ring.submitter().register_sync_cancel(Some(at_once), CancelBuilder::any());
            while self.next_completion().is_some() {}
            if self.in_flight() == 0 {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.wait_for_completion(left.min(CANCEL_EVERY));
        }
    }

    fn wait_for_completion(&self, at_most: Duration) {
        // SAFETY: the descriptor is the ring's own, and lives as long as it.
        let ring = unsafe { rustix::fd::BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        let timeout = rustix::event::Timespec::try_from(at_most).ok();
        // An interrupted or failed wait only makes the caller look again.
        let _ = rustix::event::poll(&mut [PollFd::new(&ring, PollFlags::IN)], timeout.as_ref());
    }
}

impl Drop for ReadRing {
    fn drop(&mut self) {
        if !self.wind_up(DROP_PATIENCE) {
            mem::forget(mem::take(&mut self.slots));
        }
    }
}

impl fmt::Debug for ReadRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadRing")
            .field("depth", &self.slots.len())
            .field("in_flight", &self.in_flight())
            .field("queued", &self.queued.len())
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::EventfdFlags;
    use std::fs::File;

    /// A file of `pages` pages, each filled with its number.
    fn file(pages: u8) -> File {
        let path = std::env::temp_dir().join(format!(
            "vmpager-ring-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let bytes: Vec<u8> = (0..pages).flat_map(|page| [page; 4096]).collect();
        std::fs::write(&path, bytes).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file
    }

    /// A ring, or `None` with a note where the host has no io_uring.
    fn ring(file: impl Into<OwnedFd>, depth: u32) -> Option<ReadRing> {
        match ReadRing::new(file.into(), depth, None::<OwnedFd>) {
            Ok(ring) => Some(ring),
            Err(error) => {
                vmpager_testing::skipped(&format!("no io_uring ({error})"));
                None
            }
        }
    }

    fn read(user_data: u64, page: u64) -> RingRead {
        RingRead { user_data, offset: page * 4096, buf: vec![0; 4096], from: 0, offload: false }
    }

    fn is_readable(fd: impl AsFd, millis: i64) -> bool {
        let timeout =
            rustix::event::Timespec { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 };
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap() == 1
    }

    #[test]
    fn reads_come_back_with_their_names_and_bytes() {
        let Some(mut ring) = ring(file(16), 8) else { return };
        let mut seen = 0_u32;
        for round in 0..2_u64 {
            for page in 0..8 {
                let offload = page % 2 == 1;
                ring.submit(RingRead { offload, ..read(100 + page, round * 8 + page) }).unwrap();
            }
            assert!(ring.is_full());
            let refused = ring.submit(read(1, 1)).unwrap_err();
            assert_eq!(refused.error.kind(), io::ErrorKind::WouldBlock);
            assert_eq!(refused.buf.len(), 4096);
            while ring.in_flight() > 0 {
                ring.completions(|user_data, result, buf| {
                    assert_eq!(result.unwrap(), 4096);
                    let page = u8::try_from(user_data - 100 + round * 8).unwrap();
                    assert_eq!(buf, [page; 4096]);
                    seen += 1;
                });
            }
        }
        assert_eq!(seen, 16);
    }

    #[test]
    fn the_end_of_the_file_and_continued_reads() {
        let Some(mut ring) = ring(file(2), 8) else { return };
        let buf = vec![9; 3 * 4096];
        ring.submit(RingRead { user_data: 1, offset: 0, buf, from: 0, offload: false }).unwrap();
        let buf = vec![9; 8192];
        ring.submit(RingRead { user_data: 2, offset: 4096, buf, from: 4096, offload: true })
            .unwrap();
        ring.submit(read(3, 2)).unwrap();
        let mut results = Vec::new();
        while ring.in_flight() > 0 {
            ring.completions(|user_data, result, buf| {
                results.push((user_data, result.unwrap(), buf[0], buf[4095]));
                if user_data == 2 {
                    assert_eq!(buf[4096..], [1; 4096]);
                }
            });
        }
        results.sort_unstable();
        assert_eq!(results, [(1, 8192, 0, 0), (2, 4096, 9, 9), (3, 0, 0, 0)]);
        let beyond = RingRead { from: 4097, ..read(4, 0) };
        assert_eq!(ring.submit(beyond).unwrap_err().error.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn a_failed_read_reports_its_error() {
        let directory = File::open(std::env::temp_dir()).unwrap();
        let Some(mut ring) = ring(directory, 1) else { return };
        ring.submit(read(7, 0)).unwrap();
        let mut failures = 0;
        while ring.in_flight() > 0 {
            ring.completions(|user_data, result, _| {
                assert_eq!(user_data, 7);
                assert_eq!(Errno::from_io_error(&result.unwrap_err()), Some(Errno::ISDIR));
                failures += 1;
            });
        }
        assert_eq!(failures, 1);
    }

    #[test]
    fn the_bell_rings_when_a_read_ends() {
        let bell = rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (from, to) = rustix::pipe::pipe().unwrap();
        let Ok(mut ring) = ReadRing::new(from, 4, Some(&bell)) else {
            vmpager_testing::skipped("no io_uring");
            return;
        };
        let at_once = RingRead { offset: u64::MAX, ..read(5, 0) };
        ring.submit(at_once).unwrap();
        assert!(!is_readable(&bell, 20), "nothing has been read yet");
        rustix::io::write(&to, b"abc").unwrap();
        assert!(is_readable(&bell, 5000));
        let mut seen = 0;
        ring.completions(|user_data, result, buf| {
            assert_eq!((user_data, result.unwrap(), &buf[..3]), (5, 3, &b"abc"[..]));
            seen += 1;
        });
        assert_eq!(seen, 1);
    }

    #[test]
    fn dropping_the_ring_cancels_and_frees_what_is_in_flight() {
        let (from, _to) = rustix::pipe::pipe().unwrap();
        let Some(mut ring) = ring(from, 4) else { return };
        for name in 0..4 {
            ring.submit(RingRead { offset: u64::MAX, offload: name % 2 == 0, ..read(name, 0) })
                .unwrap();
        }
        assert!(ring.wind_up(Duration::from_secs(5)), "reads of a pipe can be cancelled");
        assert_eq!(ring.in_flight(), 0);

        let big = file(200);
        let Some(mut ring) = self::ring(big.try_clone().unwrap(), 16) else { return };
        rustix::fs::fadvise(&big, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        for name in 0..16 {
            ring.submit(RingRead { offload: name % 2 == 0, ..read(name, name * 12) }).unwrap();
        }
        drop(ring);
    }

    #[test]
    fn reads_outlive_the_thread_that_submitted_them() {
        let Some(mut ring) = ring(file(8), 8) else { return };
        let mut ring = std::thread::spawn(move || {
            for page in 0..8 {
                ring.submit(RingRead { offload: true, ..read(page, page) }).unwrap();
            }
            ring
        })
        .join()
        .unwrap();
        let mut ended = 0;
        let deadline = Instant::now() + Duration::from_secs(10);
        while ring.in_flight() > 0 && Instant::now() < deadline {
            // Each ends with its bytes or cancelled, but it ends.
            ring.completions(|_, _, _| ended += 1);
        }
        assert_eq!(ended, 8);
    }
}
