//! The fault queue between processes: the state machine of
//! [`vmpager_core::queue`], an eventfd that is readable if and only if a fault
//! waits to be taken, and futexes for those who wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use vmpager_core::queue::{FaultQueue, MAX_GFN, Position, Request, Taken, WORDS};
use vmpager_sys::futex::{self, Woken};
use vmpager_sys::shared::SharedWords;

use super::door::PAGER;
use crate::worker::{doorbell, ring, unring};

/// Why waiting for a page ended without it.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The queue is disabled, or was while waiting.
    #[error("the fault queue is disabled: nobody resolves faults at the moment")]
    Disabled,
    /// A signal handler ran meanwhile.
    #[error("interrupted by a signal; ask again")]
    Interrupted,
    /// It took longer than the caller would wait.
    #[error("the page did not come in time")]
    TimedOut,
    /// So many faults are queued that there is no room for another.
    #[error("the fault queue is full; ask again later")]
    Full,
    /// No such page can be asked for.
    #[error("guest frame number {0:#x} is beyond {MAX_GFN:#x}, the most the queue takes")]
    Gfn(u64),
    /// The system refused.
    #[error("waiting for a page: {0}")]
    Io(#[from] io::Error),
}

/// A queue and its eventfd.
#[derive(Debug)]
struct Ends {
    queue: FaultQueue<SharedWords>,
    bell: OwnedFd,
}

impl Ends {
    fn wake(&self, position: Position) {
        futex::wake_all(self.queue.futex(position));
    }

    fn duplicate(&self) -> io::Result<Self> {
        let words = SharedWords::open(self.queue.storage().memfd().try_clone_to_owned()?)?;
        let queue = FaultQueue::open(words).map_err(io::Error::other)?;
        Ok(Self { queue, bell: self.bell.try_clone()? })
    }
}

/// The queue, as whoever made it sees it: it may be enabled and disabled, and
/// cleaned up after processes that died.
#[derive(Debug)]
pub struct QueueOwner(Ends);

impl QueueOwner {
    /// Makes a queue, enabled.
    ///
    /// # Errors
    ///
    /// If no memory or descriptor is left.
    pub fn new() -> io::Result<Self> {
        let queue = FaultQueue::new(SharedWords::new("vmpager-faults", WORDS)?);
        queue.enable();
        Ok(Self(Ends { queue, bell: doorbell()? }))
    }

    /// Goes on with the queue of a pager that has died. What that had taken is queued
    /// again; other processes notice nothing.
    ///
    /// # Errors
    ///
    /// If the words are no queue this program knows.
    pub(super) fn take_over(words: OwnedFd, bell: OwnedFd) -> io::Result<Self> {
        let FaultClient(ends) = FaultClient::open(words, bell)?;
        let queue = Self(ends);
        queue.recover(Some(PAGER));
        Ok(queue)
    }

    /// What another process needs to take part: the words and the eventfd.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.0.queue.storage().memfd(), self.0.bell.as_fd()]
    }

    /// A way for this process to ask for pages.
    ///
    /// # Errors
    ///
    /// If no memory or descriptor is left.
    pub fn client(&self) -> io::Result<FaultClient> {
        Ok(FaultClient(self.0.duplicate()?))
    }

    /// A way for this process to resolve faults. No two living readers may
    /// have the same number, which is below
    /// [`MAX_READERS`](vmpager_core::queue::MAX_READERS).
    ///
    /// # Errors
    ///
    /// If no memory or descriptor is left.
    pub fn reader(&self, id: u64) -> io::Result<FaultReader> {
        Ok(FaultReader { ends: self.0.duplicate()?, id })
    }

    /// Whether there is a fault that no reader has taken.
    pub fn has_faults(&self) -> bool {
        self.0.queue.has_queued()
    }

    /// Lets faults be queued from now on.
    pub fn enable(&self) {
        self.0.queue.enable();
    }

    /// Ends every wait, in every process, with [`WaitError::Disabled`].
    pub fn disable(&self) {
        self.0.queue.disable(|position| self.0.wake(position));
        unring(&self.0.bell);
    }

    /// A process that had the queue has died. What it had taken as a reader is
    /// queued again, and whoever it may have left asleep looks again.
    pub fn recover(&self, reader: Option<u64>) {
        if let Some(reader) = reader {
            self.0.queue.recover(reader);
        }
        ring(&self.0.bell);
        self.0.queue.positions().for_each(|position| self.0.wake(position));
    }
}

/// A process's way to ask for pages, and to wait for them.
#[derive(Debug)]
pub struct FaultClient(Ends);

impl FaultClient {
    /// Takes part in a queue that another process made.
    ///
    /// # Errors
    ///
    /// If the words are no queue this program knows.
    pub fn open(words: OwnedFd, bell: OwnedFd) -> io::Result<Self> {
        let queue = FaultQueue::open(SharedWords::open(words)?).map_err(io::Error::other)?;
        Ok(Self(Ends { queue, bell }))
    }

    /// Asks for a page without waiting for it.
    ///
    /// # Errors
    ///
    /// [`WaitError::Full`] or [`WaitError::Disabled`]: nobody will bring it.
    pub fn request(&self, gfn: u64) -> Result<(), WaitError> {
        match self.ask(gfn, false)? {
            Some(_) => Ok(()),
            None => Err(WaitError::Full),
        }
    }

    /// Asks for a page and sleeps until `settled` says that it need not be
    /// waited for, until `limit` has passed, or a signal handler has run.
    ///
    /// # Errors
    ///
    /// Why it is not settled. Nothing of this caller is left in the queue then.
    pub fn wait(
        &self,
        gfn: u64,
        limit: Option<Duration>,
        settled: impl Fn() -> bool,
    ) -> Result<(), WaitError> {
        let until = limit.map(|limit| Instant::now() + limit);
        while !settled() {
            match self.ask(gfn, true)? {
                Some(position) => {
                    let slept = self.sleep(position, until, &settled);
                    if self.0.queue.leave(position) {
                        self.0.wake(position);
                    }
                    slept?;
                }
                // Room comes when the oldest is over.
                None => self.sleep(self.0.queue.oldest(), until, &settled)?,
            }
        }
        Ok(())
    }

    /// None if there is no room.
    fn ask(&self, gfn: u64, waits: bool) -> Result<Option<Position>, WaitError> {
        if gfn >= MAX_GFN {
            return Err(WaitError::Gfn(gfn));
        }
        let (position, tell) = match self.0.queue.request(gfn, waits) {
            Request::Queued(position) => (position, true),
            Request::Merged { position, tell } => (position, tell),
            Request::Full => return Ok(None),
            Request::Disabled => return Err(WaitError::Disabled),
        };
        if tell {
            ring(&self.0.bell);
        }
        Ok(Some(position))
    }

    fn sleep(
        &self,
        position: Position,
        until: Option<Instant>,
        settled: impl Fn() -> bool,
    ) -> Result<(), WaitError> {
        let queue = &self.0.queue;
        loop {
            let word = queue.word_at(position);
            if queue.is_over(position) || settled() {
                return Ok(());
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(WaitError::TimedOut);
            }
            match futex::wait_while(queue.futex(position), word, left)? {
                Woken::Look | Woken::TimedOut => {}
                Woken::Interrupted => return Err(WaitError::Interrupted),
            }
        }
    }
}

/// A process's way to resolve faults.
#[derive(Debug)]
pub struct FaultReader {
    ends: Ends,
    id: u64,
}

impl AsFd for FaultReader {
    /// Readable if and only if there is a fault to take.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ends.bell.as_fd()
    }
}

impl FaultReader {
    /// Takes part in a queue that another process made, under the number it
    /// gave.
    ///
    /// # Errors
    ///
    /// If the words are no queue this program knows.
    pub fn open(words: OwnedFd, bell: OwnedFd, id: u64) -> io::Result<Self> {
        let FaultClient(ends) = FaultClient::open(words, bell)?;
        Ok(Self { ends, id })
    }

    /// The oldest fault that nobody has taken, if there is one.
    /// [`commit`](Self::commit) or [`abandon`](Self::abandon) must follow.
    pub fn take(&self) -> Option<Taken> {
        let taken = self.ends.queue.take(self.id);
        if !self.ends.queue.has_queued() {
            unring(&self.ends.bell);
            // Rung for something that came in between?
            if self.ends.queue.has_queued() {
                ring(&self.ends.bell);
            }
        }
        taken
    }

    /// A fault is dealt with: its waiters look at their page.
    pub fn commit(&self, taken: &Taken) {
        if self.ends.queue.commit(taken) {
            self.ends.wake(taken.position());
        }
    }

    /// A fault could not be dealt with: it is the oldest again, for any reader.
    pub fn abandon(&self, taken: &Taken) {
        if self.ends.queue.abandon(taken) {
            ring(&self.ends.bell);
        }
    }

    /// A page came without the queue's doing: whoever waits for it looks.
    pub fn resolved(&self, gfn: u64) {
        if let Some(position) = self.ends.queue.resolved(gfn) {
            self.ends.wake(position);
        }
    }
}
