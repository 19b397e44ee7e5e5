//! What came of a run.

use std::time::Duration;

/// The outcome of [`Vm::run`](crate::Vm::run).
#[derive(Clone, Debug)]
pub struct RunReport {
    /// From the caller's start to the guest's first instruction, including
    /// the fraction of a millisecond that laying out the workload takes.
    pub first_instruction: Duration,
    /// From the guest's first instruction to the last page verified.
    pub workload: Duration,
    /// Pages touched and verified.
    pub pages: u64,
    /// Pages whose checksum was not the one from before the snapshot.
    pub mismatches: u64,
    /// The first of them.
    pub first_mismatch: Option<u64>,
    /// How long the touches took.
    pub stalls: Stalls,
}

/// The outcome of [`Vm::verify_from_host`](crate::Vm::verify_from_host).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostReport {
    /// Pages compared.
    pub pages: u64,
    /// Pages that are not what they must be.
    pub mismatches: u64,
    /// The lowest of them.
    pub first_mismatch: Option<u64>,
}

/// How long each touch of a page took, in nanoseconds. A single stall of more
/// than 2^32 cycles of the time stamp counter (about two seconds) counts as
/// 2^32.
#[derive(Clone, Debug, Default)]
pub struct Stalls {
    in_order: Vec<u64>,
    sorted: Vec<u64>,
}

impl Stalls {
    pub(crate) fn new(in_order: Vec<u64>) -> Self {
        let mut sorted = in_order.clone();
        sorted.sort_unstable();
        Self { in_order, sorted }
    }

    /// All of them, in the order of the workload (vCPU by vCPU).
    pub fn in_order(&self) -> &[u64] {
        &self.in_order
    }

    /// All of them, ascending.
    pub fn sorted(&self) -> &[u64] {
        &self.sorted
    }

    /// The stall that `permille` of a thousand do not exceed; 0 if there are
    /// none.
    pub fn permille(&self, permille: usize) -> u64 {
        let rank = (self.sorted.len() * permille.min(1000)).div_ceil(1000);
        self.sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
    }

    /// The median.
    pub fn p50(&self) -> u64 {
        self.permille(500)
    }

    /// The 99th percentile.
    pub fn p99(&self) -> u64 {
        self.permille(990)
    }

    /// The longest.
    pub fn max(&self) -> u64 {
        self.permille(1000)
    }

    /// All of them together.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.sorted.iter().sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_ranks() {
        let stalls = Stalls::new((1..=200).rev().collect());
        assert_eq!((stalls.p50(), stalls.p99(), stalls.max()), (100, 198, 200));
        assert_eq!(stalls.in_order()[0], 200);
        assert_eq!(Stalls::default().max(), 0);
        assert_eq!(Stalls::new(vec![7]).p50(), 7);
    }
}
