//! One reader's background reads: what waits, what runs, what has ended.
//!
//! ```text
//! submit -> queue -> executor -> complete
//!             |         ^ |
//!          promote      +-+ short reads continue
//! ```
//!
//! Few reads are handed to the executor at a time; the rest wait in the queue,
//! where a demand overtakes and a promotion still counts.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vmpager_core::{ByteRange, Priority, ReadId, ReadRequest};

use crate::buffers::BufferPool;
use crate::doorbell::Doorbell;
use crate::executor::{Executor, Finished, Read};
use crate::queue::ReadQueue;

/// Most reads in flight.
pub(crate) const DEPTH: u32 = 32;
/// Of which fill may take so many, so that a demand finds room.
const FILL_DEPTH: usize = 24;
/// Bytes that demand and prefetch may have in flight beyond the limit, which
/// fill can exhaust.
const URGENT_BYTES: usize = 1 << 20;

/// How a background read ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// All of the range.
    Complete(Vec<u8>),
    /// The file ended first.
    EndOfFile,
    /// The system failed the read.
    Failed(io::Error),
}

#[derive(Debug)]
struct Running {
    id: ReadId,
    range: ByteRange,
    priority: Priority,
    filled: usize,
}

#[derive(Debug)]
pub(crate) struct Background {
    executor: Executor,
    bell: Arc<Doorbell>,
    queue: ReadQueue<ReadId, ByteRange>,
    running: HashMap<u64, Running>,
    running_bytes: usize,
    next_key: u64,
    buffers: BufferPool,
    max_bytes: usize,
    ended: Vec<(ReadId, ByteRange, Outcome)>,
    /// Kept for its capacity.
    finished: Vec<Finished>,
}

impl Background {
    /// `max_bytes` bounds what is in flight, but for one read of any length
    /// and [`URGENT_BYTES`]; half of it may stay idle in between.
    pub(crate) fn new(executor: Executor, bell: Arc<Doorbell>, max_bytes: usize) -> Self {
        Self {
            executor,
            bell,
            queue: ReadQueue::new(),
            running: HashMap::new(),
            running_bytes: 0,
            next_key: 0,
            buffers: BufferPool::new(max_bytes / 2),
            max_bytes,
            ended: Vec::new(),
            finished: Vec::new(),
        }
    }

    /// Readable while ended reads wait for [`complete`](Self::complete), and
    /// now and then when there are none.
    pub(crate) fn ready_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    pub(crate) fn submit(&mut self, request: ReadRequest) {
        self.queue.push(request.id, request.priority, request.range);
        self.start_next();
        if !self.ended.is_empty() || self.executor.is_stalled() {
            self.bell.ring();
        }
    }

    pub(crate) fn promote(&mut self, id: ReadId, priority: Priority) {
        if self.queue.promote(id, priority) {
            self.start_next();
            return;
        }
        for (&key, running) in &mut self.running {
            if running.id == id && running.priority < priority {
                running.priority = priority;
                self.executor.promote(key, priority);
            }
        }
    }

    /// Collects what has ended and starts what waits; true if anything has.
    pub(crate) fn collect(&mut self) -> bool {
        // First the bell, then the reads: one that ends in between rings anew.
        self.bell.clear();
        let mut finished = std::mem::take(&mut self.finished);
        self.executor.drain(&mut finished);
        for read in finished.drain(..) {
            self.finish(read);
        }
        self.finished = finished;
        // The device works on these while the caller installs the others.
        self.start_next();
        if self.executor.is_stalled() {
            self.bell.ring();
        }
        !self.ended.is_empty()
    }

    /// Hands over what [`collect`](Self::collect) found.
    pub(crate) fn deliver(&mut self, mut done: impl FnMut(ReadId, ByteRange, &Outcome)) {
        for (id, range, outcome) in self.ended.drain(..) {
            done(id, range, &outcome);
            if let Outcome::Complete(buf) = outcome {
                self.buffers.give(buf);
            }
        }
        // Their buffers may have been what the next reads waited for.
        self.start_next();
        if !self.ended.is_empty() {
            self.bell.ring();
        }
    }

    fn start_next(&mut self) {
        while let Some((priority, range)) = self.queue.peek() {
            // A range comes from a slot of this process's address width.
            let len = usize::try_from(range.len).unwrap_or(usize::MAX);
            if !self.has_room(priority, len) {
                return;
            }
            let Some((id, priority, range)) = self.queue.pop() else { return };
            let buf = self.buffers.take(len);
            let key = self.next_key;
            self.next_key += 1;
            self.running_bytes += len;
            self.running.insert(key, Running { id, range, priority, filled: 0 });
            self.start(priority, Read { key, offset: range.start, buf, from: 0 });
        }
    }

    fn has_room(&self, priority: Priority, len: usize) -> bool {
        let (depth, bytes) = match priority {
            Priority::Fill => (FILL_DEPTH, self.max_bytes),
            Priority::Prefetch | Priority::Demand => {
                (DEPTH as usize, self.max_bytes.saturating_add(URGENT_BYTES))
            }
        };
        let undelivered: usize = self.ended.iter().map(|(.., outcome)| outcome.bytes()).sum();
        let held = self.running_bytes + undelivered;
        self.running.is_empty() && undelivered == 0
            || self.running.len() < depth && held.saturating_add(len) <= bytes
    }

    fn start(&mut self, priority: Priority, read: Read) {
        if let Err(refused) = self.executor.start(priority, read) {
            self.finish(refused);
        }
    }

    fn finish(&mut self, finished: Finished) {
        let Finished { key, result, buf } = finished;
        let Some(running) = self.running.get_mut(&key) else { return };
        match result {
            Ok(n) if n > 0 && running.filled + n < buf.len() => {
                running.filled += n;
                let from = running.filled;
                let (priority, offset) = (running.priority, running.range.start + from as u64);
                self.start(priority, Read { key, offset, buf, from });
            }
            Ok(0) => self.end(key, Some(buf), Outcome::EndOfFile),
            Ok(_) => self.end(key, None, Outcome::Complete(buf)),
            Err(error) => self.end(key, Some(buf), Outcome::Failed(error)),
        }
    }

    fn end(&mut self, key: u64, unused: Option<Vec<u8>>, outcome: Outcome) {
        if let Some(buf) = unused {
            self.buffers.give(buf);
        }
        if let Some(running) = self.running.remove(&key) {
            self.running_bytes -= usize::try_from(running.range.len).unwrap_or(usize::MAX);
            self.ended.push((running.id, running.range, outcome));
        }
    }
}

impl Outcome {
    fn bytes(&self) -> usize {
        match self {
            Self::Complete(buf) => buf.len(),
            Self::EndOfFile | Self::Failed(_) => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    /// Reads of a pipe: they end when the test writes, and in pieces.
    fn pipe(max_bytes: usize) -> Option<(Background, File)> {
        let (from, to) = rustix::pipe::pipe().unwrap();
        let bell = Arc::new(Doorbell::new().unwrap());
        match Executor::ring(from.into(), DEPTH, &bell) {
            Ok(executor) => Some((Background::new(executor, bell, max_bytes), to.into())),
            Err(error) => {
                vmpager_testing::skipped(&format!("no io_uring ({error})"));
                None
            }
        }
    }

    fn submit(background: &mut Background, id: u64, len: u64, priority: Priority) {
        let range = ByteRange::new(0, len);
        background.submit(ReadRequest { id: ReadId(id), range, priority, here_only: false });
    }

    fn wait(background: &mut Background) -> Vec<(u64, Result<Vec<u8>, ()>)> {
        let mut ended = Vec::new();
        for _ in 0..20 {
            if background.collect() {
                background.deliver(|id, _, outcome| match outcome {
                    Outcome::Complete(buf) => ended.push((id.0, Ok(buf.clone()))),
                    Outcome::EndOfFile | Outcome::Failed(_) => ended.push((id.0, Err(()))),
                });
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        ended
    }

    #[test]
    fn short_reads_continue_where_they_stopped() {
        let Some((mut background, to)) = pipe(1 << 20) else { return };
        submit(&mut background, 1, 3 * 4096, Priority::Demand);
        for (written, byte) in [(4096, 1), (100, 2)] {
            rustix::io::write(&to, &vec![byte; written]).unwrap();
            assert_eq!(wait(&mut background), [], "the range is not complete");
        }
        rustix::io::write(&to, &[3; 2 * 4096 - 100]).unwrap();
        let (id, bytes) = wait(&mut background).remove(0);
        let bytes = bytes.unwrap();
        assert_eq!((id, bytes[4095], bytes[4096], bytes[4195], bytes[4196]), (1, 1, 2, 2, 3));
        assert_eq!(background.running_bytes, 0);

        submit(&mut background, 2, 8192, Priority::Demand);
        rustix::io::write(&to, &[4; 4096]).unwrap();
        drop(to);
        assert_eq!(wait(&mut background), [(2, Err(()))], "half of it is none of it");
    }

    #[test]
    fn continued_reads_go_on_in_the_file_too() {
        let bytes: Vec<u8> = (0..5 * 4096_u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
        let bell = Arc::new(Doorbell::new().unwrap());
        let executor =
            Executor::Short { bytes: bytes.clone(), at_most: 1000, finished: Vec::new() };
        let mut background = Background::new(executor, bell, 1 << 20);
        for (id, start) in [(1, 0), (2, 4096), (3, 3 * 4096)] {
            let range = ByteRange::new(start, 3 * 4096);
            background.submit(ReadRequest {
                id: ReadId(id),
                range,
                priority: Priority::Fill,
                here_only: false,
            });
        }
        let mut ended = wait(&mut background);
        ended.sort();
        assert_eq!(ended[0], (1, Ok(bytes[..3 * 4096].to_vec())));
        assert_eq!(ended[1], (2, Ok(bytes[4096..4 * 4096].to_vec())));
        assert_eq!(ended[2], (3, Err(())), "the file ends before");
    }

    #[test]
    fn reads_and_bytes_in_flight_are_bounded() {
        let Some((mut background, _to)) = pipe(1 << 20) else { return };
        for id in 0..100 {
            submit(&mut background, id, 4096, Priority::Fill);
        }
        assert_eq!(background.running.len(), FILL_DEPTH);
        for id in 100..200 {
            submit(&mut background, id, 4096, Priority::Demand);
        }
        assert_eq!(background.running.len(), DEPTH as usize);
        drop(background);

        let Some((mut background, _to)) = pipe(1 << 20) else { return };
        for (from, priority, bytes) in
            [(0, Priority::Fill, 1 << 20), (100, Priority::Prefetch, (1 << 20) + URGENT_BYTES)]
        {
            for id in from..from + 100 {
                submit(&mut background, id, 256 << 10, priority);
            }
            assert_eq!(background.running_bytes, bytes);
        }
        let Some((mut background, _to)) = pipe(0) else { return };
        submit(&mut background, 0, 4 << 20, Priority::Fill);
        assert_eq!(background.running_bytes, 4 << 20, "one always runs");
        submit(&mut background, 1, 4096, Priority::Fill);
        assert_eq!(background.running.len(), 1);
    }
}
