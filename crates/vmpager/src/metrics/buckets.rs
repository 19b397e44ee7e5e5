//! Times sorted into buckets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use vmpager_core::Priority;

/// Upper bounds, in nanoseconds, of the buckets that times are shown in: 2 us to
/// 10 s. Whatever is longer is in one more.
pub const STALL_BOUNDS_NS: [u64; BOUNDS] = [
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
    200_000_000,
    500_000_000,
    1_000_000_000,
    2_000_000_000,
    5_000_000_000,
    10_000_000_000,
];

const BOUNDS: usize = 21;

/// How many times lie in each bucket; the last one has no bound.
pub(crate) type Counts = [u64; BOUNDS + 1];

fn bucket(nanos: u64) -> usize {
    STALL_BOUNDS_NS.partition_point(|bound| *bound < nanos)
}

/// What a histogram of nanoseconds has, by bucket. Its resolution moves a time by a
/// hundredth at most.
pub(crate) fn counts(histogram: &Histogram<u64>) -> Counts {
    let mut counts = [0; BOUNDS + 1];
    for step in histogram.iter_recorded() {
        if let Some(count) = counts.get_mut(bucket(step.value_iterated_to())) {
            *count += step.count_at_value();
        }
    }
    counts
}

/// What one worker thread's reads of the source came to. That thread alone writes,
/// anybody reads.
#[derive(Debug, Default)]
pub(crate) struct SourceStats {
    demand: ReadStats,
    prefetch: ReadStats,
    fill: ReadStats,
    failed: AtomicU64,
}

#[derive(Debug, Default)]
struct ReadStats {
    took: [AtomicU64; BOUNDS + 1],
    nanos: AtomicU64,
}

/// Reads of one priority that had to wait for the source.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ReadCounts {
    pub(super) took: Counts,
    pub(super) nanos: u64,
}

/// All of it, at one time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SourceCounts {
    pub(super) demand: ReadCounts,
    pub(super) prefetch: ReadCounts,
    pub(super) fill: ReadCounts,
    pub(super) failed: u64,
}

impl SourceStats {
    /// A read has ended after so long.
    pub(crate) fn ended(&self, priority: Priority, took: Duration, failed: bool) {
        let of = match priority {
            Priority::Demand => &self.demand,
            Priority::Prefetch => &self.prefetch,
            Priority::Fill => &self.fill,
        };
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        add(&of.nanos, nanos);
        if let Some(count) = of.took.get(bucket(nanos)) {
            add(count, 1);
        }
        add(&self.failed, u64::from(failed));
    }

    /// Adds what there is so far.
    pub(super) fn add_to(&self, counts: &mut SourceCounts) {
        for (from, to) in [
            (&self.demand, &mut counts.demand),
            (&self.prefetch, &mut counts.prefetch),
            (&self.fill, &mut counts.fill),
        ] {
            to.nanos += from.nanos.load(Ordering::Relaxed);
            for (from, to) in from.took.iter().zip(&mut to.took) {
                *to += from.load(Ordering::Relaxed);
            }
        }
        counts.failed += self.failed.load(Ordering::Relaxed);
    }
}

/// Only one thread writes: no need to lock the bus.
fn add(to: &AtomicU64, what: u64) {
    to.store(to.load(Ordering::Relaxed).wrapping_add(what), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_in_the_bucket_whose_bound_it_does_not_pass() {
        assert_eq!([0, 2_000, 2_001, 10_000_000_000, u64::MAX].map(bucket), [0, 0, 1, 20, 21]);
        assert!(STALL_BOUNDS_NS.is_sorted());
    }

    #[test]
    fn a_histogram_is_sorted_into_buckets() {
        let mut histogram = Histogram::new_with_bounds(1, 600_000_000_000, 2).expect("in order");
        for nanos in [1, 1_500, 3_000, 3_000, 20_000_000_000] {
            histogram.saturating_record_n(nanos, 2);
        }
        let counts = counts(&histogram);
        assert_eq!((counts[0], counts[1], counts[21]), (4, 4, 2));
        assert_eq!(counts.iter().sum::<u64>(), histogram.len());
    }

    #[test]
    fn reads_are_counted_by_priority() {
        let stats = SourceStats::default();
        stats.ended(Priority::Demand, Duration::from_micros(3), false);
        stats.ended(Priority::Fill, Duration::from_secs(60), true);
        let mut counts = SourceCounts::default();
        stats.add_to(&mut counts);
        stats.add_to(&mut counts);
        assert_eq!((counts.demand.took[1], counts.demand.nanos), (2, 6_000));
        assert_eq!((counts.fill.took[21], counts.prefetch.nanos, counts.failed), (2, 0, 2));
    }
}
