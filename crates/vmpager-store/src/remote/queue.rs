//! Which frames are wanted, by whom and how urgently, and which of them go into one
//! request. Without threads, requests or a clock.

use std::cmp::Reverse;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use vmpager_core::Priority;

use super::error::RemoteError;

/// A frame as it is stored.
pub(crate) type Packed = Arc<Vec<u8>>;

/// What lies between two frames is fetched with them, if it is no more: another
/// request would cost as much.
const GAP: u64 = 64 << 10;
/// Frames of one request end within so many bytes. Who waits gets his frame first,
/// but others may come to wait for the last one.
const DEMAND_BYTES: u64 = 256 << 10;
const AHEAD_BYTES: u64 = 1 << 20;
/// Requests at a time, of all priorities.
pub(crate) const REQUESTS: usize = 8;
/// Of which so many may be for what nobody waits for.
const PREFETCH_REQUESTS: usize = 6;
const FILL_REQUESTS: usize = 4;
/// Bytes of frames that were fetched, or are to be, though nobody has asked for them
/// yet.
const STAGED_BYTES: usize = 16 << 20;

/// Where the frames of all objects are: those of each follow those of the one before.
pub(crate) trait Places {
    /// Which object has a frame.
    fn object_of(&self, frame: u32) -> usize;
    /// The numbers of its frames.
    fn frames_of(&self, object: usize) -> Range<u32>;
    /// Where a frame is in its object.
    fn place(&self, frame: u32) -> Range<u64>;
}

/// Frames next to each other, of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) object: usize,
    pub(crate) frames: Range<u32>,
    pub(crate) priority: Priority,
}

/// What there is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Ask(Batch),
    /// Nothing, before this.
    Wait(Option<Instant>),
}

/// Frames by their numbers.
pub(crate) type Frames = HashMap<u32, Packed>;

/// A frame cannot be had.
#[derive(Clone, Debug)]
pub(crate) struct FetchFailed {
    pub(crate) frame: u32,
    pub(crate) error: RemoteError,
}

/// All frames that somebody waits for together have come, or one cannot be had.
#[derive(Debug)]
pub(crate) struct Ended<T> {
    pub(crate) who: T,
    pub(crate) result: Result<Frames, FetchFailed>,
}

/// In the order of service.
type Turn = (Reverse<Priority>, u64, u32);

#[derive(Debug)]
struct Wanted {
    priority: Priority,
    order: u64,
    since: Instant,
    /// Those who wait for it; some may have given up.
    tickets: Vec<u64>,
    running: bool,
    damaged: u32,
    bytes: usize,
}

impl Wanted {
    fn turn(&self, frame: u32) -> Turn {
        (Reverse(self.priority), self.order, frame)
    }

    /// Makes it more urgent, if it is less so.
    fn raise(&mut self, frame: u32, priority: Priority, turns: &mut BTreeSet<Turn>) {
        if self.priority < priority {
            let waits = turns.remove(&self.turn(frame));
            self.priority = priority;
            if waits {
                turns.insert(self.turn(frame));
            }
        }
    }
}

#[derive(Debug)]
struct Ticket<T> {
    who: T,
    left: usize,
    got: Frames,
}

/// `T` is whoever waits.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    wanted: BTreeMap<u32, Wanted>,
    /// Those that are not on their way, in the order of service.
    turns: BTreeSet<Turn>,
    tickets: HashMap<u64, Ticket<T>>,
    numbers: u64,
    running: [usize; 3],
    staged: HashMap<u32, Packed>,
    staged_order: VecDeque<u32>,
    /// Of staged frames, and of those wanted that nobody waits for.
    ahead_bytes: usize,
}

impl<T> Queue<T> {
    pub(crate) fn new() -> Self {
        Self {
            wanted: BTreeMap::new(),
            turns: BTreeSet::new(),
            tickets: HashMap::new(),
            numbers: 0,
            running: [0; 3],
            staged: HashMap::new(),
            staged_order: VecDeque::new(),
            ahead_bytes: 0,
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Somebody needs all of these frames. Given back at once if they are staged.
    pub(crate) fn want(
        &mut self,
        frames: &[u32],
        priority: Priority,
        now: Instant,
        places: &impl Places,
        who: T,
    ) -> Option<Ended<T>> {
        let number = self.number();
        let (mut left, mut got) = (0, Frames::new());
        for &frame in frames {
            if let Some(packed) = self.take_staged(frame) {
                got.insert(frame, packed);
                continue;
            }
            left += 1;
            let wanted = self.enter(frame, priority, now, places);
            let nobody_waited = wanted.tickets.is_empty();
            wanted.tickets.push(number);
            let bytes = wanted.bytes;
            if nobody_waited {
                self.ahead_bytes -= bytes;
            }
        }
        if left == 0 {
            return Some(Ended { who, result: Ok(got) });
        }
        self.tickets.insert(number, Ticket { who, left, got });
        None
    }

    /// A frame will probably be asked for. Whether there is room for it.
    pub(crate) fn prefetch(&mut self, frame: u32, now: Instant, places: &impl Places) -> bool {
        if self.staged.contains_key(&frame) || self.wanted.contains_key(&frame) {
            return true;
        }
        if self.ahead_bytes.saturating_add(bytes_of(&places.place(frame))) > STAGED_BYTES {
            return false;
        }
        self.enter(frame, Priority::Prefetch, now, places);
        true
    }

    /// The entry of a frame, made at least so urgent. A new one counts as one that
    /// nobody waits for.
    fn enter(
        &mut self,
        frame: u32,
        priority: Priority,
        now: Instant,
        places: &impl Places,
    ) -> &mut Wanted {
        let order = self.number();
        let Self { wanted, turns, ahead_bytes, .. } = self;
        match wanted.entry(frame) {
            Entry::Occupied(entry) => {
                let wanted = entry.into_mut();
                wanted.raise(frame, priority, turns);
                wanted
            }
            Entry::Vacant(entry) => {
                let bytes = bytes_of(&places.place(frame));
                *ahead_bytes += bytes;
                let (tickets, running, damaged) = (Vec::new(), false, 0);
                let wanted =
                    Wanted { priority, order, since: now, tickets, running, damaged, bytes };
                turns.insert(wanted.turn(frame));
                entry.insert(wanted)
            }
        }
    }

    /// Moves a frame that is not on its way before those of lower priority.
    pub(crate) fn promote(&mut self, frame: u32, priority: Priority) {
        if let Some(wanted) = self.wanted.get_mut(&frame) {
            wanted.raise(frame, priority, &mut self.turns);
        }
    }

    /// Whether somebody wants a frame.
    pub(crate) fn wants(&self, frame: u32) -> bool {
        self.wanted.contains_key(&frame)
    }

    /// A staged frame, for good.
    pub(crate) fn take_staged(&mut self, frame: u32) -> Option<Packed> {
        let packed = self.staged.remove(&frame)?;
        self.ahead_bytes -= packed.len();
        Some(packed)
    }

    /// What to ask for next; `again` says until when an object is left alone.
    pub(crate) fn next(
        &mut self,
        places: &impl Places,
        again: impl Fn(usize) -> Option<Instant>,
    ) -> Next {
        let mut until: Option<Instant> = None;
        let mut found = None;
        for &(Reverse(priority), _, frame) in &self.turns {
            if !self.has_room(priority) {
                break;
            }
            match again(places.object_of(frame)) {
                None => {
                    found = Some((priority, frame));
                    break;
                }
                Some(again) => until = Some(until.map_or(again, |before| before.min(again))),
            }
        }
        let Some((priority, first)) = found else { return Next::Wait(until) };
        let object = places.object_of(first);
        let frames = first..self.last_of(first, priority, &places.frames_of(object), places) + 1;
        for (frame, wanted) in self.wanted.range_mut(frames.clone()) {
            wanted.running = true;
            self.turns.remove(&wanted.turn(*frame));
        }
        self.running[priority as usize] += 1;
        Next::Ask(Batch { object, frames, priority })
    }

    fn has_room(&self, priority: Priority) -> bool {
        let [fill, prefetch, demand] = self.running;
        let all = fill + prefetch + demand;
        match priority {
            Priority::Fill => fill < FILL_REQUESTS && all < PREFETCH_REQUESTS,
            Priority::Prefetch => fill + prefetch < PREFETCH_REQUESTS && all < REQUESTS,
            Priority::Demand => all < REQUESTS,
        }
    }

    /// How far a request that begins with this frame goes.
    fn last_of(
        &self,
        first: u32,
        priority: Priority,
        object: &Range<u32>,
        places: &impl Places,
    ) -> u32 {
        let most = if priority == Priority::Demand { DEMAND_BYTES } else { AHEAD_BYTES };
        let start = places.place(first).start;
        let (mut last, mut end) = (first, places.place(first).end);
        for (&frame, wanted) in self.wanted.range(first + 1..object.end) {
            let place = places.place(frame);
            if wanted.running || place.start > end + GAP || place.end - start > most {
                break;
            }
            (last, end) = (frame, place.end);
        }
        last
    }

    /// A request has ended, as far as others must wait for it.
    pub(crate) fn request_ended(&mut self, batch: &Batch) {
        self.running[batch.priority as usize] -= 1;
    }

    /// A frame has come.
    pub(crate) fn arrived(&mut self, frame: u32, packed: &Packed) -> Vec<Ended<T>> {
        let mut ended = Vec::new();
        let mut is_waited_for = false;
        for number in self.forget(frame) {
            let Some(ticket) = self.tickets.get_mut(&number) else { continue };
            is_waited_for = true;
            ticket.got.insert(frame, Arc::clone(packed));
            ticket.left -= 1;
            if ticket.left == 0
                && let Some(Ticket { who, got, .. }) = self.tickets.remove(&number)
            {
                ended.push(Ended { who, result: Ok(got) });
            }
        }
        if !is_waited_for {
            self.stage(frame, packed);
        }
        ended
    }

    /// Removes a frame that is wanted. Returns those who wait for it.
    fn forget(&mut self, frame: u32) -> Vec<u64> {
        let Some(wanted) = self.wanted.remove(&frame) else { return Vec::new() };
        self.turns.remove(&wanted.turn(frame));
        if wanted.tickets.is_empty() {
            self.ahead_bytes -= wanted.bytes;
        }
        wanted.tickets
    }

    fn stage(&mut self, frame: u32, packed: &Packed) {
        if self.staged.insert(frame, Arc::clone(packed)).is_none() {
            self.ahead_bytes += packed.len();
            self.staged_order.push_back(frame);
        }
        while self.ahead_bytes > STAGED_BYTES
            && let Some(oldest) = self.staged_order.pop_front()
        {
            self.take_staged(oldest);
        }
        if self.staged_order.len() > 2 * self.staged.len() + 64 {
            let Self { staged, staged_order, .. } = self;
            staged_order.retain(|frame| staged.contains_key(frame));
        }
    }

    /// What a request asked for and did not get is to be asked for again, or, if that
    /// `is_final`, given up with all else of its object.
    pub(crate) fn failed(
        &mut self,
        frames: Range<u32>,
        object: Range<u32>,
        is_final: bool,
        error: &RemoteError,
    ) -> Vec<Ended<T>> {
        self.put_back(frames);
        if !is_final {
            return Vec::new();
        }
        let of_object = self.wanted.range(object);
        let left: Vec<u32> =
            of_object.filter(|(_, wanted)| !wanted.running).map(|(frame, _)| *frame).collect();
        left.into_iter().flat_map(|frame| self.give_up(frame, error)).collect()
    }

    /// Since when the frame was wanted that somebody has waited for longest.
    pub(crate) fn longest(&self) -> Option<Instant> {
        self.waited_for().map(|(_, wanted)| wanted.since).min()
    }

    fn waited_for(&self) -> impl Iterator<Item = (&u32, &Wanted)> {
        let waits = |ticket: &u64| self.tickets.contains_key(ticket);
        self.wanted.iter().filter(move |(_, wanted)| wanted.tickets.iter().any(waits))
    }

    /// The frames that somebody has waited for since then or before, on their way or not.
    pub(crate) fn late(&self, since: Instant) -> Vec<u32> {
        let late = self.waited_for().filter(|(_, wanted)| wanted.since <= since);
        late.map(|(frame, _)| *frame).collect()
    }

    /// Frames that did not come wait for their turn again; those that nobody waits
    /// for are forgotten.
    fn put_back(&mut self, frames: Range<u32>) {
        let tickets = &self.tickets;
        let mut unwanted = Vec::new();
        for (&frame, wanted) in self.wanted.range_mut(frames) {
            if !std::mem::take(&mut wanted.running) {
                continue;
            }
            if wanted.tickets.iter().any(|ticket| tickets.contains_key(ticket)) {
                self.turns.insert(wanted.turn(frame));
            } else {
                unwanted.push(frame);
            }
        }
        for frame in unwanted {
            self.forget(frame);
        }
    }

    /// A frame's bytes were not what they must be. How often that was so.
    pub(crate) fn damaged(&mut self, frame: u32) -> u32 {
        let count = self.wanted.get_mut(&frame).map_or(1, |wanted| {
            wanted.damaged += 1;
            wanted.damaged
        });
        self.put_back(frame..frame + 1);
        count
    }

    /// A frame cannot be had.
    pub(crate) fn give_up(&mut self, frame: u32, error: &RemoteError) -> Vec<Ended<T>> {
        let waiting = self.forget(frame);
        let tickets = waiting.into_iter().filter_map(|number| self.tickets.remove(&number));
        let failed = || FetchFailed { frame, error: error.clone() };
        tickets.map(|Ticket { who, .. }| Ended { who, result: Err(failed()) }).collect()
    }
}

fn bytes_of(place: &Range<u64>) -> usize {
    usize::try_from(place.end - place.start).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
