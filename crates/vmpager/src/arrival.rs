//! When those who miss a page began to wait, as far as that can be known: the kernel
//! does not say, and faults lie in its queue while the worker serves others.
//!
//! What is known is when nobody waited yet: at the last look that left nothing behind.
//! Stalls are counted from there, so that they include every queue, and are too long
//! rather than too short: by as much as the thread ran on in its guest after that look,
//! at most by the time between two looks at a VM. That is microseconds where few VMs
//! fault, and one round of turns where many do. Not included is how long a worker thread
//! that slept took to wake up: from then on it is known that somebody waits, not since
//! when.

use std::time::{Duration, Instant};

/// Since when nobody can have waited for one memory.
#[derive(Debug)]
pub(crate) struct Arrival {
    nobody_at: Instant,
    since: Instant,
}

impl Arrival {
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self { nobody_at: now, since: now }
    }

    /// A look that begins at this time. Whoever it finds has come [`since`](Self::since)
    /// the look before.
    pub(crate) fn look(&mut self, at: Instant) {
        self.since = self.nobody_at;
        self.nobody_at = at;
    }

    /// It has left some of them where they were.
    pub(crate) fn left_some(&mut self) {
        self.nobody_at = self.since;
    }

    /// Nobody waited at this time, either.
    pub(crate) fn nobody_at(&mut self, at: Instant) {
        self.nobody_at = self.nobody_at.max(at);
    }

    /// When those whom the last look has found can have come at the earliest.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }
}

/// The same for all memories of a worker that sleeps in epoll.
#[derive(Debug)]
pub(crate) struct Asked {
    nobody_at: Instant,
}

/// Whoever is answered within this time has likely not slept.
const NO_SLEEP: Duration = Duration::from_micros(50);

impl Asked {
    pub(crate) fn new() -> Self {
        Self { nobody_at: Instant::now() }
    }

    /// It was asked `from` who waits, and has answered by now with `all` of them, or as
    /// many as there was room for. Returns when these can have come at the earliest.
    pub(crate) fn answered(&mut self, from: Instant, now: Instant, all: bool) -> Instant {
        let slept = now.saturating_duration_since(from) >= NO_SLEEP;
        let earliest = if slept { now } else { self.nobody_at };
        if all {
            self.nobody_at = if slept { now } else { from };
        }
        earliest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_found_has_come_since_the_look_before() {
        let mut arrival = Arrival::new();
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        arrival.look(at(1));
        arrival.look(at(2));
        assert_eq!(arrival.since(), at(1));
        arrival.left_some();
        arrival.look(at(3));
        assert_eq!(arrival.since(), at(1), "some had been left behind");
        arrival.nobody_at(at(2));
        arrival.look(at(4));
        assert_eq!(arrival.since(), at(3), "the later one counts");
        arrival.nobody_at(at(9));
        arrival.look(at(10));
        assert_eq!(arrival.since(), at(9), "the worker was asleep");
    }

    #[test]
    fn whoever_wakes_a_worker_has_not_waited_while_it_slept() {
        let mut asked = Asked::new();
        let begun = Instant::now();
        let at = |us| begun + Duration::from_micros(us);
        asked.answered(at(0), at(1), true);
        assert_eq!(asked.answered(at(400), at(401), true), at(0), "it was busy until 400");
        assert_eq!(asked.answered(at(500), at(900), true), at(900), "it slept");
        assert_eq!(asked.answered(at(1000), at(1001), false), at(900));
        assert_eq!(asked.answered(at(1100), at(1101), true), at(900), "not all had been named");
        assert_eq!(asked.answered(at(1200), at(1201), true), at(1100));
    }
}
