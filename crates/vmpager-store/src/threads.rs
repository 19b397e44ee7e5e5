//! Background reads by threads, where io_uring is not to be had. The threads
//! are shared by all readers of one file and serve the most urgent read first.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use vmpager_core::Priority;

use crate::doorbell::Doorbell;
use crate::executor::{Finished, Read};
use crate::queue::ReadQueue;

/// Storage answers several reads at a time; more threads than this only wait
/// in the same device queue.
const THREADS: usize = 4;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves its data whole, whoever panics elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The threads of one file. They end soon after the last owner drops this, or
/// when the reads they are in return: a thread stuck in a read is not waited
/// for.
#[derive(Debug)]
pub(crate) struct ReadThreads {
    shared: Arc<Shared>,
    clients: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    file: File,
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Debug)]
struct Queue {
    reads: ReadQueue<(u64, u64), Job>,
    closed: bool,
}

#[derive(Debug)]
struct Job {
    read: Read,
    client: Arc<Outbox>,
}

/// Where one client's finished reads go.
#[derive(Debug)]
struct Outbox {
    finished: Mutex<Vec<Finished>>,
    bell: Arc<Doorbell>,
    gone: AtomicBool,
}

impl ReadThreads {
    pub(crate) fn spawn(file: File) -> io::Result<Self> {
        let queue = Mutex::new(Queue { reads: ReadQueue::new(), closed: false });
        let shared = Arc::new(Shared { file, queue, work: Condvar::new() });
        let threads = Self { shared, clients: AtomicU64::new(0) };
        for _ in 0..THREADS {
            let shared = Arc::clone(&threads.shared);
            // On failure dropping `threads` ends those that were started.
            thread::Builder::new().name("vmpager-read".into()).spawn(move || shared.serve())?;
        }
        Ok(threads)
    }

    pub(crate) fn client(self: &Arc<Self>, bell: Arc<Doorbell>) -> ThreadClient {
        ThreadClient {
            id: self.clients.fetch_add(1, Ordering::Relaxed),
            threads: Arc::clone(self),
            outbox: Arc::new(Outbox {
                finished: Mutex::new(Vec::new()),
                bell,
                gone: AtomicBool::new(false),
            }),
        }
    }
}

impl Drop for ReadThreads {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn serve(&self) {
        while let Some(Job { mut read, client }) = self.next_job() {
            if client.gone.load(Ordering::Relaxed) {
                continue;
            }
            let result = loop {
                match self.file.read_at(&mut read.buf[read.from..], read.offset) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    result => break result,
                }
            };
            lock(&client.finished).push(Finished { key: read.key, result, buf: read.buf });
            client.bell.ring();
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if let Some((.., job)) = queue.reads.pop() {
                return Some(job);
            }
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One reader's access to the threads.
#[derive(Debug)]
pub(crate) struct ThreadClient {
    id: u64,
    threads: Arc<ReadThreads>,
    outbox: Arc<Outbox>,
}

impl ThreadClient {
    pub(crate) fn start(&self, priority: Priority, read: Read) {
        let key = (self.id, read.key);
        let job = Job { read, client: Arc::clone(&self.outbox) };
        lock(&self.threads.shared.queue).reads.push(key, priority, job);
        self.threads.shared.work.notify_one();
    }

    pub(crate) fn promote(&self, key: u64, priority: Priority) {
        lock(&self.threads.shared.queue).reads.promote((self.id, key), priority);
    }

    pub(crate) fn drain(&self, finished: &mut Vec<Finished>) {
        finished.append(&mut lock(&self.outbox.finished));
    }
}

impl Drop for ThreadClient {
    fn drop(&mut self) {
        self.outbox.gone.store(true, Ordering::Relaxed);
        let id = self.id;
        lock(&self.threads.shared.queue).reads.retain(|key, _| key.0 != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_takes_its_waiting_reads_along() {
        let queue = Mutex::new(Queue { reads: ReadQueue::new(), closed: false });
        let file = File::open("/proc/self/exe").unwrap();
        // No threads, so that reads wait.
        let shared = Arc::new(Shared { file, queue, work: Condvar::new() });
        let threads = Arc::new(ReadThreads { shared, clients: AtomicU64::new(0) });
        let bell = Arc::new(Doorbell::new().unwrap());
        let clients = [threads.client(Arc::clone(&bell)), threads.client(bell)];
        for key in 0..2 {
            for client in &clients {
                let read = Read { key, offset: 0, buf: vec![0; 1], from: 0 };
                client.start(Priority::Fill, read);
            }
        }
        let [first, second] = clients;
        second.promote(1, Priority::Demand);
        drop(first);
        let mut queue = lock(&threads.shared.queue);
        let left: Vec<_> = std::iter::from_fn(|| queue.reads.pop())
            .map(|(key, priority, _)| (key, priority))
            .collect();
        assert_eq!(left, [((1, 1), Priority::Demand), ((1, 0), Priority::Fill)]);
    }
}
