//! Adaptive polling: while faults keep coming, looking again beats sleeping,
//! because waking a sleeping thread on another CPU costs more than serving the
//! fault. While none come, looking is waste. The rule is that of KVM's halt
//! polling: grow the time spent looking if the last sleep turned out short,
//! drop it if the sleep was long.

use std::time::{Duration, Instant};

/// The longest time to look, unless the caller knows better: longer gaps are
/// better slept through. On a single CPU looking only keeps those from running
/// who might fault.
pub(crate) fn default_max() -> Duration {
    match std::thread::available_parallelism() {
        Ok(cpus) if cpus.get() > 1 => Duration::from_micros(100),
        _ => Duration::ZERO,
    }
}

/// How long to look before sleeping.
#[derive(Debug)]
pub(crate) struct Polling {
    budget: Duration,
    max: Duration,
    /// When something was last served.
    last: Instant,
}

impl Polling {
    const START: Duration = Duration::from_micros(20);

    /// Looks for at most `max` after the last activity; zero never looks.
    pub(crate) fn new(max: Duration) -> Self {
        Self { budget: Duration::ZERO, max, last: Instant::now() }
    }

    /// Faults were served.
    pub(crate) fn served(&mut self, now: Instant) {
        self.last = now;
    }

    /// Whether to look again instead of sleeping.
    pub(crate) fn keep_looking(&self) -> bool {
        !self.budget.is_zero() && self.last.elapsed() < self.budget
    }

    /// A sleep ended because there was something to serve.
    pub(crate) fn woken(&mut self, now: Instant) {
        let idle = now.saturating_duration_since(self.last);
        self.budget = if idle <= self.max {
            (self.budget * 2).max(Self::START).min(self.max)
        } else {
            Duration::ZERO
        };
        self.last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_grow_the_budget_and_a_long_one_drops_it() {
        let max = Duration::from_micros(100);
        let mut polling = Polling::new(max);
        assert!(!polling.keep_looking(), "never looks before faults came");
        let mut now = polling.last;
        for expected in [20, 40, 80, 100, 100] {
            now += Duration::from_micros(50);
            polling.woken(now);
            assert_eq!(polling.budget, Duration::from_micros(expected));
        }
        polling.woken(now + Duration::from_millis(1));
        assert_eq!(polling.budget, Duration::ZERO);
    }

    #[test]
    fn a_maximum_of_zero_never_looks() {
        let mut polling = Polling::new(Duration::ZERO);
        polling.woken(polling.last);
        assert!(!polling.keep_looking());
    }
}
