//! What one memory may take of what all share: reads of the source in flight, and its
//! bandwidth.
//!
//! Bandwidth is kept by two accounts that are refilled at the same rate. Everything
//! brought from the source is booked to the first one; while that is empty, nothing is
//! brought that nobody waits for (fill, profile, neighbours). Pages that somebody waits
//! for are booked to the second one, too, and it alone delays them: so demand takes
//! precedence over all else, and waits only if it exceeds the limit by itself. A limit
//! that demand did not count for would be none: a VM that touches memory as fast as it
//! can would take the whole of a source that others need.

use std::time::{Duration, Instant};

use super::{Lost, Served};
use crate::reads::Reads;

/// What one memory may take of what all share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// Reads of the source in flight that somebody waits for. Those that wait for a
    /// further one wait until one of them has ended.
    pub reads: usize,
    /// Bytes a second from the source.
    pub bandwidth: Option<u64>,
}

impl Default for SessionLimits {
    /// As many reads as one look at the kernel's queue brings faults; any bandwidth.
    fn default() -> Self {
        Self { reads: vmpager_sys::uffd::Messages::BATCH, bandwidth: None }
    }
}

/// Bytes that may be taken: as many as a tenth of a second brings, after a pause.
#[derive(Debug)]
struct Account {
    /// Less than nothing if the last piece was more than was left.
    bytes: f64,
    at: Instant,
}

impl Account {
    fn refill(&mut self, rate: f64, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.bytes = (self.bytes + passed * rate).min((rate / 10.0).max(LEAST_BURST));
    }

    /// When it will not be empty any more; None if it is not now.
    fn pause(&mut self, rate: f64, now: Instant) -> Option<Duration> {
        self.refill(rate, now);
        (self.bytes <= 0.0).then(|| Duration::from_secs_f64((1.0 - self.bytes) / rate))
    }
}

/// A page or a few, however low the rate.
const LEAST_BURST: f64 = 65536.0;

/// How much a memory has taken lately.
#[derive(Debug)]
pub(super) struct Bandwidth {
    rate: f64,
    all: Account,
    demanded: Account,
}

impl Bandwidth {
    pub(super) fn new(rate: u64, now: Instant) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "rates are below 2^53 bytes a second")]
        let rate = rate.max(1) as f64;
        let account = || Account { bytes: (rate / 10.0).max(LEAST_BURST), at: now };
        Self { rate, all: account(), demanded: account() }
    }

    /// So many bytes were taken, so many of them because somebody waited.
    fn take(&mut self, bytes: u64, demanded: u64) {
        #[expect(clippy::cast_precision_loss, reason = "a piece has less than 2^53 bytes")]
        let [all, demanded] = [bytes, demanded].map(|bytes| bytes as f64);
        self.all.bytes -= all;
        self.demanded.bytes -= demanded;
    }
}

impl Served {
    /// So many bytes came from the source, so many of them because somebody waited.
    pub(super) fn took(&mut self, bytes: u64, demanded: u64) {
        self.counters.bytes_read += bytes;
        if let Some(bandwidth) = &mut self.bandwidth {
            bandwidth.take(bytes, demanded);
        }
    }

    /// Whether something may be taken that nobody waits for.
    pub(super) fn may_take(&mut self, now: Instant) -> bool {
        self.take_pause(now).is_none()
    }

    fn take_pause(&mut self, now: Instant) -> Option<Duration> {
        self.bandwidth.as_mut().and_then(|it| it.all.pause(it.rate, now))
    }

    /// When the fill goes on that waits for bandwidth.
    pub(crate) fn fill_at(&mut self, now: Instant) -> Option<Instant> {
        self.take_pause(now).map(|pause| now + pause)
    }

    /// Whether something may be taken that somebody waits for. If not, it will be tried
    /// again when it may.
    pub(super) fn may_take_demanded(&mut self, now: Instant) -> bool {
        let pause = self.bandwidth.as_mut().and_then(|it| it.demanded.pause(it.rate, now));
        let Some(at) = pause.map(|pause| now + pause) else { return true };
        self.retry.at = Some(self.retry.at.map_or(at, |other| other.min(at)));
        false
    }

    /// Reads what could not be read while too many reads were in flight.
    pub(crate) fn read_queued(&mut self, reads: &mut Reads) -> Result<(), Lost> {
        // Whoever has to wait once more comes last: one round.
        for _ in 0..self.unread.len() {
            if reads.demands_of(self.id) >= self.limits.reads {
                break;
            }
            let Some(waiter) = self.unread.pop_front() else { break };
            let plan = self.engine.plan(waiter.page);
            self.carry_out(plan, waiter.since, reads)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A second of taking as much as may be taken, a piece each millisecond.
    #[test]
    fn no_more_is_taken_than_the_rate_and_a_tenth_of_a_second_of_it() {
        let start = Instant::now();
        let rate = 10_000_000;
        let mut bandwidth = Bandwidth::new(rate, start);
        let mut taken = 0;
        for ms in 0..1000 {
            let now = start + Duration::from_millis(ms);
            while bandwidth.all.pause(bandwidth.rate, now).is_none() {
                bandwidth.take(100_000, 0);
                taken += 100_000;
            }
        }
        assert!((10_900_000..=11_200_000).contains(&taken), "{taken}");
        let end = start + Duration::from_secs(1);
        assert!(bandwidth.demanded.pause(bandwidth.rate, end).is_none(), "nobody waited");
    }

    #[test]
    fn demand_waits_only_for_demand() {
        let start = Instant::now();
        let mut bandwidth = Bandwidth::new(1_000_000, start);
        bandwidth.take(1_000_000, 0);
        assert!(bandwidth.all.pause(1e6, start).is_some());
        assert!(bandwidth.demanded.pause(1e6, start).is_none());
        bandwidth.take(200_000, 200_000);
        let pause = bandwidth.demanded.pause(1e6, start).expect("a pause");
        assert!(pause > Duration::from_millis(99) && pause < Duration::from_millis(101));
        assert!(bandwidth.demanded.pause(1e6, start + pause).is_none(), "it ends");
    }
}
