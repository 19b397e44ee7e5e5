//! Faults that follow each other at equal steps.

use super::Prefetch;
use crate::addr::PageRun;

/// Finds streams of faults, forward and backward, several at a time, and brings in
/// what comes next on them.
///
/// Three faults in a row make a sequential stream, four at any other step: among
/// touches at random in 2 MiB, chance makes few of these. Each further fault on
/// its way doubles what is brought ahead. A fault that is on no stream's way takes
/// away what has not been brought yet, and halves what will be: so a stream that
/// has ended, or was none, costs at most what its last fault was answered with.
#[derive(Debug)]
pub struct Strides {
    streams: [Stream; STREAMS],
    /// The last faults, in a ring.
    seen: [Seen; SEEN],
    /// Faults so far.
    faults: u64,
}

/// Streams followed at a time.
const STREAMS: usize = 8;
/// Faults remembered to find new ones.
const SEEN: usize = 16;
/// The longest step, in pages: 2 MiB.
const LONGEST: u64 = 512;
/// Pages brought ahead of the fault that makes a stream.
const FIRST_AHEAD: u64 = 8;
/// The most of a sequential stream: 1 MiB.
const MOST_AHEAD: u64 = 256;
/// The most of any other: each is an install of its own.
const MOST_STEPS: u64 = 32;

/// A fault, and what was brought with it.
#[derive(Clone, Copy, Debug)]
struct Seen {
    page: u64,
    first: u64,
    last: u64,
}

impl Seen {
    const NOTHING: Self = Self { page: u64::MAX, first: u64::MAX, last: u64::MAX };

    /// The step from here to a later fault: sequential, if that is just beyond
    /// what was brought. Zero if there is none that a stream could have.
    fn step_to(self, page: u64) -> i64 {
        if self.page == u64::MAX || self.page == page {
            0
        } else if page == self.last + 1 {
            1
        } else if page + 1 == self.first {
            -1
        } else if self.page.abs_diff(page) <= LONGEST {
            page.wrapping_sub(self.page).cast_signed()
        } else {
            0
        }
    }
}

/// A stream of faults.
#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The last fault.
    page: u64,
    /// From one to the next; zero if this is no stream.
    step: i64,
    /// How many pages are brought beyond a fault.
    ahead: u64,
    /// How many are beyond the last one, within its slot.
    reach: u64,
    /// The next to be brought, and how many of them.
    next: u64,
    left: u64,
    /// The number of its last fault.
    used: u64,
}

impl Stream {
    const NONE: Self = Self { page: 0, step: 0, ahead: 0, reach: 0, next: 0, left: 0, used: 0 };

    fn is_sequential(&self) -> bool {
        self.step.unsigned_abs() == 1
    }

    /// Whether a fault is on its way: just beyond what was brought, or before, or
    /// beyond some pages more, which may have been in place.
    fn leads_to(&self, page: u64) -> bool {
        let (far, step) = (self.page.abs_diff(page), self.step.unsigned_abs());
        step > 0
            && far > 0
            && (page > self.page) == (self.step > 0)
            && far.is_multiple_of(step)
            && far / step <= 2 * (self.reach + 1)
    }

    /// The fault that it leads to.
    fn advance(&mut self, page: u64, bounds: PageRun, now: u64) {
        let room = if self.step > 0 { bounds.end() - 1 - page } else { page - bounds.first };
        self.page = page;
        self.reach = self.ahead.min(room / self.step.unsigned_abs());
        self.left = self.reach;
        self.next = page.wrapping_add_signed(self.step);
        self.used = now;
        let most = if self.is_sequential() { MOST_AHEAD } else { MOST_STEPS };
        self.ahead = (self.ahead * 2).min(most);
    }

    /// The pages to be brought next.
    fn run(&self) -> Option<PageRun> {
        (self.left > 0).then(|| match self.step {
            1 => PageRun::new(self.next, self.left),
            -1 => PageRun::new(self.next + 1 - self.left, self.left),
            _ => PageRun::new(self.next, 1),
        })
    }
}

impl Strides {
    pub(super) fn new() -> Self {
        Self { streams: [Stream::NONE; STREAMS], seen: [Seen::NOTHING; SEEN], faults: 0 }
    }

    /// Whether the last fault is that page, and on a stream's way.
    pub(super) fn leads_to(&self, page: u64) -> bool {
        self.stream_at(page).is_some()
    }

    /// These pages came with that fault.
    pub(super) fn brought(&mut self, page: u64, run: PageRun) {
        if let Some(seen) = self.seen.iter_mut().find(|seen| seen.page == page) {
            (seen.first, seen.last) = (run.first, run.end() - 1);
        }
    }

    fn stream_at(&self, page: u64) -> Option<&Stream> {
        self.streams.iter().find(|stream| stream.step != 0 && stream.page == page)
    }

    /// The step by which the faults before lead to this one, or zero. Where there
    /// are several, that of the latest fault.
    fn step_to(&self, page: u64) -> i64 {
        let came = |to: u64, step: i64| self.seen.iter().find(|seen| seen.step_to(to) == step);
        let newest_first = (1..=SEEN as u64).map(|back| self.faults.wrapping_sub(back));
        let mut seen = newest_first.map(|number| self.seen[slot_of(number)]);
        let is_step = |seen: &Seen| {
            let step = seen.step_to(page);
            let two = (step != 0).then(|| came(seen.page, step)).flatten();
            two.is_some_and(|two| step.unsigned_abs() == 1 || came(two.page, step).is_some())
        };
        seen.find(is_step).map_or(0, |seen| seen.step_to(page))
    }

    fn turn(&self) -> Option<usize> {
        let streams = self.streams.iter().enumerate();
        let waiting = streams.filter(|(_, stream)| stream.left > 0);
        waiting.max_by_key(|(_, stream)| stream.used).map(|(index, _)| index)
    }
}

fn slot_of(number: u64) -> usize {
    usize::try_from(number % SEEN as u64).unwrap_or(0)
}

impl Prefetch for Strides {
    fn faulted(&mut self, page: u64, bounds: PageRun) {
        if self.leads_to(page) {
            return; // another thread waits for the same page
        }
        let now = self.faults;
        let old = self.streams.iter_mut().filter(|stream| stream.leads_to(page));
        if let Some(stream) = old.min_by_key(|stream| stream.page.abs_diff(page)) {
            stream.advance(page, bounds, now);
            self.faults += 1;
            return;
        }
        for stream in &mut self.streams {
            stream.left = 0;
            stream.ahead = (stream.ahead / 2).max(FIRST_AHEAD);
        }
        let step = self.step_to(page);
        self.seen[slot_of(now)] = Seen { page, first: page, last: page };
        self.faults += 1;
        if step != 0
            && let Some(stream) = self.streams.iter_mut().min_by_key(|stream| stream.used)
        {
            *stream = Stream { step, ahead: FIRST_AHEAD, ..Stream::NONE };
            stream.advance(page, bounds, now);
        }
    }

    /// Of a sequential stream, the page and what comes next.
    fn window(&mut self, page: u64, bounds: PageRun) -> PageRun {
        let one = PageRun::new(page, 1);
        let Some(stream) = self.stream_at(page) else { return one };
        // Its slot is that of the fault, so that what it reaches is within.
        match stream.step {
            1 => PageRun::new(page, (1 + stream.reach).min(bounds.end() - page)),
            -1 => PageRun::new(page - stream.reach, 1 + stream.reach),
            _ => one,
        }
    }

    fn next(&self) -> Option<PageRun> {
        self.turn().and_then(|index| self.streams[index].run())
    }

    fn took(&mut self, until: u64) {
        let Some(stream) = self.turn().map(|index| &mut self.streams[index]) else { return };
        match stream.step {
            1 => {
                let until = until.clamp(stream.next, stream.next + stream.left);
                stream.left -= until - stream.next;
                stream.next = until;
            }
            -1 => stream.left = (stream.next + 1).saturating_sub(until).min(stream.left),
            step => {
                stream.left -= 1;
                stream.next = stream.next.wrapping_add_signed(step);
            }
        }
    }
}
