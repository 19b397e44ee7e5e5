//! A session's numbers, in the log.

use tracing::{info, warn};

use crate::stats::{EndReason, SessionSummary};

/// A session has ended.
pub(super) fn session_ended(summary: &SessionSummary) {
    let SessionSummary { session, peer_pid, pages_missing, .. } = *summary;
    let reason = summary.reason.as_ref().map(EndReason::to_string).unwrap_or_default();
    info!(
        session,
        peer_pid,
        faults = summary.faults,
        faults_vcpu = summary.faults_vcpu,
        faults_vmm = summary.faults_vmm,
        faults_kernel = summary.faults_kernel,
        faults_attached = summary.faults_attached,
        faults_queued = summary.faults_queued,
        pages_demand = summary.pages_demand,
        pages_neighbour = summary.pages_neighbour,
        pages_fill = summary.pages_fill,
        pages_profile = summary.pages_profile,
        profile_missed = summary.profile_missed,
        pages_removed = summary.pages_removed,
        bytes_read = summary.bytes_read,
        stall_p50_us = summary.stall_p50_us,
        stall_p99_us = summary.stall_p99_us,
        stall_max_us = summary.stall_max_us,
        fill_ms = summary.fill_ms,
        "session ended: {reason}"
    );
    if pages_missing > 0 && summary.reason == Some(EndReason::Stopped) {
        warn!(
            session,
            peer_pid,
            pages_missing,
            "this VM will stall at the next page it misses, until it is killed or served again"
        );
    }
}
