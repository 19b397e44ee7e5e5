//! Decoded frames, kept for the neighbours of the page they were decoded for, and
//! for other VMs. Shared by all readers of an image, bounded in bytes.
//!
//! A lock is held for a look-up or an insertion, never while a frame is read or
//! decoded; there are several, by frame, so that workers seldom meet. Who finds no
//! frame has the [`Turn`] to decode it; whoever needs it meanwhile waits for that,
//! or goes on to something else.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Locks, each for its share of the frames and of the bytes.
const SHARDS: usize = 8;

/// A frame's pages.
pub(crate) type Decoded = Arc<Vec<u8>>;

#[derive(Debug)]
pub(crate) struct FrameCache {
    shards: [Mutex<Shard>; SHARDS],
    /// Of each shard: a turn has ended.
    ended: [Condvar; SHARDS],
    shard_bytes: usize,
}

/// What there is of a frame.
#[derive(Debug)]
pub(crate) enum Lookup<'a> {
    /// Its pages.
    Here(Decoded),
    /// Nothing: it is the caller's to decode.
    Decode(Turn<'a>),
    /// Somebody is decoding it, and the caller does not wait.
    Busy,
}

/// The right to decode a frame, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    cache: &'a FrameCache,
    frame: u32,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.cache.shard(self.frame).decoding.remove(&self.frame);
        self.cache.ended[self.frame as usize % SHARDS].notify_all();
    }
}

#[derive(Debug, Default)]
struct Shard {
    frames: HashMap<u32, Entry>,
    /// Frames in the order in which they are considered for removal.
    hand: VecDeque<u32>,
    bytes: usize,
    /// Frames that somebody has the turn to decode.
    decoding: HashSet<u32>,
}

#[derive(Debug)]
struct Entry {
    bytes: Decoded,
    /// Asked for since the hand passed.
    used: bool,
}

impl FrameCache {
    /// A cache of at most `bytes`; of nothing, if that is less than a few frames.
    pub(crate) fn new(bytes: usize) -> Self {
        let (shards, ended) = Default::default();
        Self { shards, ended, shard_bytes: bytes / SHARDS }
    }

    fn shard(&self, frame: u32) -> MutexGuard<'_, Shard> {
        let shard = &self.shards[frame as usize % SHARDS];
        // Each critical section leaves its data whole, whoever panics elsewhere.
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frame, or the turn to decode it; if somebody else has that, `wait` says
    /// whether to wait for its end.
    pub(crate) fn look(&self, frame: u32, wait: bool) -> Lookup<'_> {
        let mut shard = self.shard(frame);
        loop {
            if let Some(entry) = shard.frames.get_mut(&frame) {
                entry.used = true;
                return Lookup::Here(Arc::clone(&entry.bytes));
            }
            if shard.decoding.insert(frame) {
                return Lookup::Decode(Turn { cache: self, frame });
            }
            if !wait {
                return Lookup::Busy;
            }
            let ended = &self.ended[frame as usize % SHARDS];
            shard = ended.wait(shard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    #[cfg(test)]
    fn get(&self, frame: u32) -> Option<Decoded> {
        match self.look(frame, false) {
            Lookup::Here(decoded) => Some(decoded),
            Lookup::Decode(_) | Lookup::Busy => None,
        }
    }

    /// Whether it is there, without asking for it.
    pub(crate) fn has(&self, frame: u32) -> bool {
        self.shard(frame).frames.contains_key(&frame)
    }

    /// Keeps a frame. Returns a buffer that is free again, if there is one.
    pub(crate) fn put(&self, frame: u32, bytes: &Decoded) -> Option<Vec<u8>> {
        let mut shard = self.shard(frame);
        let mut free = None;
        while shard.bytes + bytes.len() > self.shard_bytes {
            free = shard.remove_one()?.or(free);
        }
        let entry = Entry { bytes: Arc::clone(bytes), used: false };
        shard.bytes += bytes.len();
        match shard.frames.insert(frame, entry) {
            // Two decoded it at the same time.
            Some(before) => shard.bytes -= before.bytes.len(),
            None => shard.hand.push_back(frame),
        }
        free
    }
}

impl Shard {
    /// Removes the frame that was not asked for the longest, roughly. `None` if
    /// there is no frame.
    fn remove_one(&mut self) -> Option<Option<Vec<u8>>> {
        loop {
            let frame = self.hand.pop_front()?;
            let Some(entry) = self.frames.get_mut(&frame) else { continue };
            if std::mem::take(&mut entry.used) {
                self.hand.push_back(frame);
                continue;
            }
            let entry = self.frames.remove(&frame)?;
            self.bytes -= entry.bytes.len();
            return Some(Arc::try_unwrap(entry.bytes).ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: usize = 1000;

    fn put(cache: &FrameCache, frame: u32) -> Option<Vec<u8>> {
        cache.put(frame, &Arc::new(vec![frame.to_le_bytes()[0]; FRAME]))
    }

    fn held(cache: &FrameCache) -> usize {
        cache.shards.iter().map(|shard| shard.lock().unwrap().bytes).sum()
    }

    #[test]
    fn bytes_are_bounded_and_what_is_used_stays() {
        let cache = FrameCache::new(4 * FRAME * SHARDS);
        let shards = u32::try_from(SHARDS).unwrap();
        // All in one shard.
        for n in 0..100 {
            put(&cache, n * shards);
            assert!(cache.get(0).is_some(), "asked for all the time, after {n}");
            assert!(held(&cache) <= 4 * FRAME);
        }
        assert_eq!(cache.get(99 * shards).unwrap()[0], (99 * shards).to_le_bytes()[0]);
        assert!(cache.get(50 * shards).is_none());
        assert_eq!(cache.shards[0].lock().unwrap().hand.len(), 4);
    }

    #[test]
    fn buffers_come_back_unless_somebody_reads_them() {
        let cache = FrameCache::new(FRAME * SHARDS);
        assert_eq!(put(&cache, 0), None);
        let buf = put(&cache, 8).unwrap();
        assert_eq!(buf, vec![0; FRAME]);
        let reading = cache.get(8);
        assert_eq!(put(&cache, 16), None, "still read");
        drop(reading);
    }

    #[test]
    fn one_decodes_and_the_others_wait_for_it() {
        let cache = FrameCache::new(10 * FRAME * SHARDS);
        let decoded = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for frame in 0..20 {
                        let Lookup::Decode(_turn) = cache.look(frame, true) else { continue };
                        decoded.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        assert!(matches!(cache.look(frame, false), Lookup::Busy));
                        std::thread::yield_now();
                        put(&cache, frame);
                    }
                });
            }
        });
        assert_eq!(decoded.into_inner(), 20);
        // A turn that came to nothing is the next one's.
        let Lookup::Decode(turn) = cache.look(77, true) else { panic!("it is not there") };
        drop(turn);
        assert!(matches!(cache.look(77, true), Lookup::Decode(_)));
    }

    #[test]
    fn a_frame_put_twice_counts_once() {
        let cache = FrameCache::new(10 * FRAME * SHARDS);
        put(&cache, 3);
        put(&cache, 3);
        assert_eq!(held(&cache), FRAME);
    }

    #[test]
    fn what_is_larger_than_the_cache_is_not_kept() {
        let cache = FrameCache::new(FRAME);
        assert_eq!(put(&cache, 1), None);
        assert!(cache.get(1).is_none());
        assert_eq!(held(&cache), 0);
    }
}
