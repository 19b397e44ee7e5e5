//! What a guest was told of pages it waited for, for reports.

use std::collections::BTreeMap;

use serde::Serialize;
use vmpager_vm::{ApfStats, ExitStats, Refusal};

/// What the device for asynchronous page faults has done, on all vCPUs.
#[derive(Debug, Default, Serialize)]
pub(crate) struct AsyncPf {
    /// Pages that were at hand: installed in place, the guest not told.
    pub(crate) in_place: u64,
    /// Faults on pages that were not.
    pub(crate) waits: u64,
    /// Of these, the share of which the guest was told.
    pub(crate) injected_share: f64,
    /// Faults the guest was told of.
    pub(crate) injected: u64,
    /// Pages the guest was told are ready.
    pub(crate) ready: u64,
    /// Times all its sleepers were woken.
    pub(crate) wake_alls: u64,
    /// Pages that came after the guest had turned the device off.
    pub(crate) late: u64,
    /// Times a vCPU waited as if halted.
    pub(crate) parked: u64,
    /// Times an INIT had turned the device off.
    pub(crate) inits: u64,
    /// Faults the guest was not told of, by cause.
    pub(crate) refused: BTreeMap<&'static str, u64>,
}

impl AsyncPf {
    pub(crate) fn new(stats: ApfStats, exits: ExitStats) -> Self {
        let ApfStats { counts, parked, inits } = stats;
        let waits = stats.waits();
        let share = counts.injected as f64 / waits.max(1) as f64;
        Self {
            in_place: exits.installed,
            waits,
            injected_share: (share * 1e4).round() / 1e4,
            injected: counts.injected,
            ready: counts.ready,
            wake_alls: counts.wake_alls,
            late: counts.late,
            parked,
            inits,
            refused: Refusal::ALL.iter().map(|why| why.name()).zip(counts.refused).collect(),
        }
    }
}
