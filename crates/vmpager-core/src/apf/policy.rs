//! Which faults are worth telling the guest of.

use std::fmt::Debug;
use std::time::Duration;

/// Decides about one fault on a page that is not at hand.
pub trait Policy: Debug + Send + Sync {
    /// Whether the guest is told, so that it may run something else. `expected` is
    /// how long the page will take, as far as can be told by the others before it.
    fn goes_async(&self, expected: Option<Duration>) -> bool;
}

/// Every fault that waits goes to the guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Always;

/// None does: the vCPU waits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Never;

/// Those do that are expected to wait at least this long. The first ones, of
/// which nothing is known yet, do not.
#[derive(Clone, Copy, Debug)]
pub struct LongerThan(pub Duration);

impl Policy for Always {
    fn goes_async(&self, _: Option<Duration>) -> bool {
        true
    }
}

impl Policy for Never {
    fn goes_async(&self, _: Option<Duration>) -> bool {
        false
    }
}

impl Policy for LongerThan {
    fn goes_async(&self, expected: Option<Duration>) -> bool {
        expected.is_some_and(|expected| expected >= self.0)
    }
}

/// How long the next page will take, by how long others took: a running mean in
/// which each new one counts for an eighth.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expectation(Option<Duration>);

impl Expectation {
    const WEIGHT: u32 = 8;

    /// `None` while no page was waited for.
    pub fn get(&self) -> Option<Duration> {
        self.0
    }

    /// A page took that long.
    pub fn learn(&mut self, took: Duration) {
        self.0 = Some(match self.0 {
            None => took,
            Some(mean) => {
                mean.saturating_sub(mean / Self::WEIGHT).saturating_add(took / Self::WEIGHT)
            }
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_fault_goes_async_once_waits_are_known_to_be_long() {
        let (policy, mut expected) = (LongerThan(Duration::from_millis(1)), Expectation::default());
        assert!(!policy.goes_async(expected.get()), "nothing is known");
        expected.learn(Duration::from_millis(5));
        assert!(policy.goes_async(expected.get()));
        for _ in 0..40 {
            expected.learn(Duration::from_micros(10));
        }
        assert!(!policy.goes_async(expected.get()), "it has become fast");
        assert!(expected.get() >= Some(Duration::from_micros(10)));
        expected.learn(Duration::MAX);
        assert!(policy.goes_async(expected.get()), "and no overflow");
        assert!(Always.goes_async(None) && !Never.goes_async(expected.get()));
    }
}
