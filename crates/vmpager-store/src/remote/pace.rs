//! When to ask a server again that has failed: pauses that double, of which a part
//! is chance, so that many who wait do not come back at the same moment.

use std::time::{Duration, Instant};

/// The pause after the first failure, which may be but a connection that was closed
/// for being idle.
const FIRST: Duration = Duration::from_millis(20);
/// The longest pause of our own.
const LONGEST: Duration = Duration::from_secs(5);
/// The longest that a server may ask for.
const LONGEST_ASKED: Duration = Duration::from_secs(60);

/// How one server has answered lately. Without a clock of its own.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    failures: u32,
    again: Option<Instant>,
}

impl Pace {
    /// It has failed at `now`. `chance` is below 1.
    pub(crate) fn failed(&mut self, now: Instant, retry_after: Option<Duration>, chance: f64) {
        let pause = FIRST.saturating_mul(2_u32.saturating_pow(self.failures.min(16))).min(LONGEST);
        let pause = pause.mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0));
        let asked = retry_after.unwrap_or_default().min(LONGEST_ASKED);
        self.failures = self.failures.saturating_add(1);
        let again = now + pause.max(asked);
        self.again = Some(self.again.map_or(again, |before| before.max(again)));
    }

    /// It has answered. Returns how often it had failed before, in a row.
    pub(crate) fn succeeded(&mut self) -> u32 {
        self.again = None;
        std::mem::take(&mut self.failures)
    }

    /// When it may be asked again, if not at once.
    pub(crate) fn again(&self, now: Instant) -> Option<Instant> {
        self.again.filter(|again| *again > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause(pace: &Pace, now: Instant) -> Duration {
        pace.again(now).map_or(Duration::ZERO, |again| again - now)
    }

    #[test]
    fn pauses_double_up_to_a_limit_and_end_with_success() {
        let (now, mut pace) = (Instant::now(), Pace::default());
        let mut seen = Vec::new();
        for _ in 0..12 {
            // Each failure comes when the pause before it is over.
            let at = pace.again(now).unwrap_or(now);
            pace.failed(at, None, 1.0);
            seen.push(pause(&pace, at));
        }
        assert_eq!(seen[..3], [20, 40, 80].map(Duration::from_millis));
        assert_eq!(seen[11], LONGEST);
        assert_eq!(pace.succeeded(), 12);
        assert_eq!((pause(&pace, now), pace.succeeded()), (Duration::ZERO, 0));
    }

    #[test]
    fn half_of_a_pause_is_chance() {
        let now = Instant::now();
        for (chance, millis) in [(0.0, 10), (0.5, 15), (1.0, 20)] {
            let mut pace = Pace::default();
            pace.failed(now, None, chance);
            assert_eq!(pause(&pace, now), Duration::from_millis(millis));
        }
    }

    #[test]
    fn a_server_may_ask_for_longer_but_not_for_ever() {
        let now = Instant::now();
        for (asked, seconds) in [(7, 7), (1 << 30, 60)] {
            let mut pace = Pace::default();
            pace.failed(now, Some(Duration::from_secs(asked)), 1.0);
            // Those whose requests were under way do not shorten it.
            pace.failed(now, None, 1.0);
            assert_eq!(pause(&pace, now), Duration::from_secs(seconds));
        }
    }
}
