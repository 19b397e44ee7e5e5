//! Threads that read and decode in the background, shared by all readers of an
//! image; the most urgent read goes first. They wait for no server: a read whose
//! frames are at one comes back when these are here.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

use vmpager_core::{Priority, ReadId, SourceError};

use crate::doorbell::Doorbell;
use crate::queue::ReadQueue;
use crate::remote::{FetchFailed, Fetcher, Frames};

use super::contents::{Contents, Tools, Wait};

/// Enough for storage to have several reads at a time, even where there are few
/// CPUs to decode.
const THREADS: Range<usize> = 4..9;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves its data whole, whoever panics elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pages to be read.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) pages: Range<u32>,
    /// As long as the pages are.
    pub(crate) buf: Vec<u8>,
    /// What has come from servers for it.
    pub(crate) fetched: Frames,
    /// What is at servers is not to be had.
    pub(crate) here_only: bool,
}

/// A read that has ended.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(crate) id: ReadId,
    pub(crate) result: Result<(), SourceError>,
    pub(crate) buf: Vec<u8>,
}

/// The threads of one image. They end soon after the last owner drops this.
#[derive(Debug)]
pub(crate) struct Decoders {
    shared: Arc<Shared>,
    clients: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    contents: Arc<Contents>,
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Debug)]
struct Queue {
    jobs: ReadQueue<(u64, ReadId), (Job, Arc<Outbox>)>,
    closed: bool,
}

/// Where one client's reads go when they have ended.
#[derive(Debug)]
struct Outbox {
    ended: Mutex<Vec<Decoded>>,
    bell: Arc<Doorbell>,
    gone: AtomicBool,
}

impl Outbox {
    fn end(&self, decoded: Decoded) {
        lock(&self.ended).push(decoded);
        self.bell.ring();
    }
}

/// A read that is being worked on.
#[derive(Debug)]
struct Taken {
    key: (u64, ReadId),
    priority: Priority,
    job: Job,
    outbox: Arc<Outbox>,
}

impl Decoders {
    pub(crate) fn spawn(contents: &Arc<Contents>) -> io::Result<Self> {
        let queue = Mutex::new(Queue { jobs: ReadQueue::new(), closed: false });
        let contents = Arc::clone(contents);
        let shared = Arc::new(Shared { contents, queue, work: Condvar::new() });
        let decoders = Self { shared, clients: AtomicU64::new(0) };
        let cpus = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        for _ in 0..cpus.clamp(THREADS.start, THREADS.end - 1) {
            let shared = Arc::clone(&decoders.shared);
            // On failure dropping `decoders` ends those that were started.
            thread::Builder::new().name("vmpager-decode".into()).spawn(move || shared.serve())?;
        }
        Ok(decoders)
    }

    pub(crate) fn client(self: &Arc<Self>, bell: Arc<Doorbell>) -> DecodeClient {
        let (ended, gone) = (Mutex::new(Vec::new()), AtomicBool::new(false));
        DecodeClient {
            id: self.clients.fetch_add(1, Ordering::Relaxed),
            decoders: Arc::clone(self),
            outbox: Arc::new(Outbox { ended, bell, gone }),
        }
    }
}

impl Drop for Decoders {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn serve(self: &Arc<Self>) {
        let mut tools = Tools::new();
        while let Some(mut taken) = self.next() {
            if taken.outbox.gone.load(Ordering::Relaxed) {
                continue;
            }
            tools.fetched = std::mem::take(&mut taken.job.fetched);
            let missing = self.contents.missing(&taken.job.pages, &mut tools);
            if let (Some(fetcher), false) = (&self.contents.fetcher, missing.is_empty()) {
                taken.job.fetched = std::mem::take(&mut tools.fetched);
                match missing.first().filter(|_| taken.job.here_only) {
                    Some(frame) => self.give_up(fetcher.not_asked(*frame), taken),
                    None => self.fetch_first(fetcher, &missing, taken),
                }
                continue;
            }
            let Taken { key: (_, id), job: Job { pages, mut buf, .. }, outbox, .. } = taken;
            let result = self.contents.read(pages, Wait::May, &mut tools, &mut buf).map(|_| ());
            outbox.end(Decoded { id, result, buf });
        }
    }

    /// Has frames fetched, upon which the read takes its turn once more.
    fn fetch_first(self: &Arc<Self>, fetcher: &Fetcher, frames: &[u32], mut taken: Taken) {
        let shared = Arc::downgrade(self);
        fetcher.want(frames, taken.priority, move |result| {
            let Some(shared) = shared.upgrade() else { return };
            match result {
                Ok(frames) => {
                    taken.job.fetched.extend(frames);
                    shared.push(taken);
                }
                Err(failed) => shared.give_up(failed, taken),
            }
        });
    }

    /// A read ends without its pages.
    fn give_up(&self, failed: FetchFailed, taken: Taken) {
        let Taken { key: (_, id), job: Job { pages, buf, .. }, outbox, .. } = taken;
        let result = Err(self.contents.not_fetched(failed, &pages));
        outbox.end(Decoded { id, result, buf });
    }

    fn push(&self, Taken { key, priority, job, outbox }: Taken) {
        lock(&self.queue).jobs.push(key, priority, (job, outbox));
        self.work.notify_one();
    }

    fn next(&self) -> Option<Taken> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if let Some((key, priority, (job, outbox))) = queue.jobs.pop() {
                return Some(Taken { key, priority, job, outbox });
            }
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One reader's access to the threads.
#[derive(Debug)]
pub(crate) struct DecodeClient {
    id: u64,
    decoders: Arc<Decoders>,
    outbox: Arc<Outbox>,
}

impl DecodeClient {
    pub(crate) fn start(&self, id: ReadId, priority: Priority, job: Job) {
        let (key, outbox) = ((self.id, id), Arc::clone(&self.outbox));
        self.decoders.shared.push(Taken { key, priority, job, outbox });
    }

    pub(crate) fn promote(&self, id: ReadId, priority: Priority) {
        lock(&self.decoders.shared.queue).jobs.promote((self.id, id), priority);
    }

    /// Takes what has ended since the last call.
    pub(crate) fn take(&self) -> Vec<Decoded> {
        std::mem::take(&mut lock(&self.outbox.ended))
    }
}

impl Drop for DecodeClient {
    fn drop(&mut self) {
        self.outbox.gone.store(true, Ordering::Relaxed);
        let id = self.id;
        lock(&self.decoders.shared.queue).jobs.retain(|(client, _), _| *client != id);
    }
}
