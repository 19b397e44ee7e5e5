//! The threads that ask servers for frames, shared by all layers and readers of an
//! image.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};
use std::{io, thread};

use vmpager_core::Priority;

use crate::image::FrameRecord;

use super::cache::{CacheFile, Piece};
use super::error::{Problem, RemoteError};
use super::object::Object;
use super::queue::{Batch, Ended, Frames, Next, Packed, Places, Queue, REQUESTS};
use super::{Counters, RemoteNumbers, RemoteOptions};

pub(crate) use super::queue::FetchFailed;

/// What came, or why not all of it.
type Fetched = Result<Frames, FetchFailed>;

/// So long at least pass between two looks for those who have waited too long.
const SHORTEST: Duration = Duration::from_millis(10);

/// How often a frame whose bytes are wrong is asked for.
const DAMAGED_TRIES: u32 = 4;

/// A layer that is at a server.
#[derive(Debug)]
pub(crate) struct Remote {
    pub(crate) object: Arc<Object>,
    pub(crate) frames: Arc<[FrameRecord]>,
    /// The number of its first frame among those of all layers.
    pub(crate) first_frame: u32,
    pub(crate) cache: Option<Arc<CacheFile>>,
}

impl Remote {
    fn numbers(&self) -> Range<u32> {
        let count = u32::try_from(self.frames.len()).unwrap_or(u32::MAX);
        self.first_frame..self.first_frame.saturating_add(count)
    }

    fn record(&self, frame: u32) -> FrameRecord {
        self.frames[(frame - self.first_frame) as usize]
    }
}

/// The layers at servers, in the order of their frames' numbers.
#[derive(Debug)]
struct Remotes(Vec<Remote>);

impl Places for Remotes {
    fn object_of(&self, frame: u32) -> usize {
        self.0.partition_point(|remote| remote.first_frame <= frame).saturating_sub(1)
    }

    fn frames_of(&self, object: usize) -> Range<u32> {
        self.0[object].numbers()
    }

    fn place(&self, frame: u32) -> Range<u64> {
        let record = self.0[self.object_of(frame)].record(frame);
        record.offset..record.end()
    }
}

/// What is done for whoever waits, on a thread of the fetcher's.
struct Done(Box<dyn FnOnce(Fetched) + Send>);

impl fmt::Debug for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Done")
    }
}

/// The threads of one image; they end soon after it is dropped.
#[derive(Debug)]
pub(crate) struct Fetcher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    remotes: Remotes,
    queue: Mutex<Queue<Done>>,
    work: Condvar,
    closed: AtomicBool,
    patience: Duration,
    counters: Arc<Counters>,
}

impl Fetcher {
    pub(crate) fn spawn(remotes: Vec<Remote>, options: &RemoteOptions) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            remotes: Remotes(remotes),
            queue: Mutex::new(Queue::new()),
            work: Condvar::new(),
            closed: AtomicBool::new(false),
            patience: options.patience,
            counters: Arc::clone(&options.counters),
        });
        let fetcher = Self { shared };
        for _ in 0..REQUESTS {
            let shared = Arc::clone(&fetcher.shared);
            // On failure dropping `fetcher` ends those that were started.
            thread::Builder::new().name("vmpager-fetch".into()).spawn(move || shared.serve())?;
        }
        let shared = Arc::clone(&fetcher.shared);
        let name = "vmpager-waits".to_owned();
        thread::Builder::new().name(name).spawn(move || shared.give_up_late())?;
        Ok(fetcher)
    }

    /// Says of a frame that nobody asks for it any more.
    pub(crate) fn not_asked(&self, frame: u32) -> FetchFailed {
        FetchFailed { frame, error: self.shared.late(frame) }
    }

    /// What was asked for so far.
    pub(crate) fn numbers(&self) -> RemoteNumbers {
        self.shared.counters.numbers()
    }

    /// Whether a frame is one of a layer at a server.
    pub(crate) fn has(&self, frame: u32) -> bool {
        let remotes = &self.shared.remotes;
        remotes.0.get(remotes.object_of(frame)).is_some_and(|of| of.numbers().contains(&frame))
    }

    /// A frame that came before anybody asked for it, or is in the cache on disk; if
    /// not `wait`, only if the kernel has it in memory. Its checksum was verified.
    pub(crate) fn at_hand(&self, frame: u32, wait: bool) -> Option<Packed> {
        if let Some(packed) = self.shared.lock().take_staged(frame) {
            return Some(packed);
        }
        let remote = &self.shared.remotes.0[self.shared.remotes.object_of(frame)];
        let packed = remote.cache.as_ref()?.read(remote.record(frame), wait)?;
        self.shared.counters.cached.fetch_add(1, Ordering::Relaxed);
        Some(Arc::new(packed))
    }

    /// Has frames fetched, and calls `done` when all have come, or one cannot be had.
    pub(crate) fn want(
        &self,
        frames: &[u32],
        priority: Priority,
        done: impl FnOnce(Fetched) + Send + 'static,
    ) {
        let done = Done(Box::new(done));
        let (remotes, now) = (&self.shared.remotes, Instant::now());
        let ended = self.shared.lock().want(frames, priority, now, remotes, done);
        match ended {
            Some(Ended { who, result }) => (who.0)(result),
            None => self.shared.work.notify_all(),
        }
    }

    /// Fetches frames, and waits for them.
    pub(crate) fn fetch(&self, frames: &[u32], priority: Priority) -> Fetched {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.want(frames, priority, move |result| {
            // Whoever does not wait any more needs no answer.
            let _ = sender.send(result);
        });
        receiver.recv().unwrap_or_else(|_| {
            let frame = frames.first().copied().unwrap_or_default();
            let object = &self.shared.remotes.0[self.shared.remotes.object_of(frame)].object;
            let problem = Problem::Unreachable { what: "it is not asked any more".into() };
            Err(FetchFailed { frame, error: object.error(problem) })
        })
    }

    /// Frames that will probably be asked for soon. Does not wait.
    pub(crate) fn will_need(&self, frames: impl Iterator<Item = u32>) {
        let (remotes, now) = (&self.shared.remotes, Instant::now());
        let mut queue = self.shared.lock();
        for frame in frames {
            let remote = &remotes.0[remotes.object_of(frame)];
            let record = remote.record(frame);
            if let Some(cache) = &remote.cache
                && cache.may_have(record)
            {
                cache.will_need(record);
            } else if !queue.prefetch(frame, now, remotes) {
                break;
            }
        }
        drop(queue);
        self.shared.work.notify_all();
    }

    /// Somebody waits for these now.
    pub(crate) fn promote(&self, frames: impl Iterator<Item = u32>, priority: Priority) {
        let mut queue = self.shared.lock();
        frames.for_each(|frame| queue.promote(frame, priority));
        drop(queue);
        self.shared.work.notify_all();
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        // Whoever looks at `closed` holds the lock until it waits.
        drop(self.shared.lock());
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue<Done>> {
        // Each critical section leaves its data whole, whoever panics elsewhere.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        while let Some(batch) = self.next() {
            self.ask(&batch);
        }
    }

    fn next(&self) -> Option<Batch> {
        let mut queue = self.lock();
        loop {
            if self.closed.load(Ordering::Relaxed) {
                return None;
            }
            let now = Instant::now();
            let again = |object: usize| self.remotes.0[object].object.again(now);
            match queue.next(&self.remotes, again) {
                Next::Ask(batch) => return Some(batch),
                Next::Wait(None) => {
                    queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                Next::Wait(Some(until)) => {
                    let pause = until.saturating_duration_since(now);
                    let waited = self.work.wait_timeout(queue, pause);
                    queue = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// Why a frame is waited for no longer.
    fn late(&self, frame: u32) -> RemoteError {
        let object = &self.remotes.0[self.remotes.object_of(frame)].object;
        object.error(Problem::Late { what: object.trouble(), waited: self.patience })
    }

    /// Has those hear of it who have waited for too long, whatever the requests do: a
    /// server that says nothing has these last much longer than somebody may want to
    /// wait.
    fn give_up_late(&self) {
        let mut queue = self.lock();
        while !self.closed.load(Ordering::Relaxed) {
            let now = Instant::now();
            let late = now.checked_sub(self.patience).map(|since| queue.late(since));
            let ended: Vec<_> = late
                .into_iter()
                .flatten()
                .flat_map(|frame| queue.give_up(frame, &self.late(frame)))
                .collect();
            if !ended.is_empty() {
                drop(queue);
                Self::tell(ended);
                queue = self.lock();
                continue;
            }
            let until = queue.longest().and_then(|since| since.checked_add(self.patience));
            let left = until.map(|until| until.saturating_duration_since(now));
            queue = match left {
                None => self.work.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.work.wait_timeout(queue, left.max(SHORTEST));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Makes one request, and hands over what comes.
    fn ask(&self, batch: &Batch) {
        let remote = &self.remotes.0[batch.object];
        let mut at = batch.frames.start;
        let mut pieces = Vec::new();
        let result = self.receive(remote, batch, &mut at, &mut pieces);
        let ended = {
            let mut queue = self.lock();
            queue.request_ended(batch);
            match result {
                Ok(()) => Vec::new(),
                Err(problem) => {
                    remote.object.failed(&problem);
                    let is_final = problem.is_final();
                    let error = remote.object.error(problem);
                    queue.failed(at..batch.frames.end, remote.numbers(), is_final, &error)
                }
            }
        };
        self.work.notify_all();
        Self::tell(ended);
        if let Some(cache) = &remote.cache {
            cache.store(pieces, batch.priority != Priority::Demand);
        }
    }

    /// Receives the frames of a request, one after the other. `at` is the first one
    /// that has not come.
    fn receive(
        &self,
        remote: &Remote,
        batch: &Batch,
        at: &mut u32,
        pieces: &mut Vec<Piece>,
    ) -> Result<(), Problem> {
        let places = |frame| self.remotes.place(frame);
        let part = places(batch.frames.start).start..places(batch.frames.end - 1).end;
        let mut body = remote.object.get(&part)?;
        let mut offset = part.start;
        for frame in batch.frames.clone() {
            let record = remote.record(frame);
            if remote.cache.as_ref().is_some_and(|cache| cache.may_have(record))
                && !self.lock().wants(frame)
            {
                // It lies between others, and is read with what is before the next.
                continue;
            }
            body.skip(record.offset - offset)?;
            self.counters.bytes.fetch_add(record.end() - offset, Ordering::Relaxed);
            let mut bytes = vec![0; record.len as usize];
            body.read_exact(&mut bytes)?;
            offset = record.end();
            remote.object.answered();
            *at = frame + 1;
            let crc = crc32c::crc32c(&bytes);
            if crc == record.crc {
                self.counters.fetched.fetch_add(1, Ordering::Relaxed);
                let packed = Arc::new(bytes);
                pieces.push(Piece { record, packed: Arc::clone(&packed) });
                let ended = self.lock().arrived(frame, &packed);
                Self::tell(ended);
            } else {
                self.damaged(remote, frame, crc)?;
            }
        }
        body.finish();
        Ok(())
    }

    /// A frame is not what was written: its server is asked once more, unless the
    /// object is another one, or it was so each time.
    fn damaged(&self, remote: &Remote, frame: u32, crc: u32) -> Result<(), Problem> {
        let record = remote.record(frame);
        let what = format!("its checksum is {crc:#010x}, and should be {:#010x}", record.crc);
        let count = self.lock().damaged(frame);
        if count >= DAMAGED_TRIES {
            let frame_of_layer = frame - remote.first_frame;
            let problem = Problem::Damaged { frame: frame_of_layer, what };
            let ended = self.lock().give_up(frame, &remote.object.error(problem));
            Self::tell(ended);
            return Ok(());
        }
        remote.object.same_again(what).map(|_| ())
    }

    fn tell(ended: Vec<Ended<Done>>) {
        for Ended { who, result } in ended {
            (who.0)(result);
        }
    }
}
