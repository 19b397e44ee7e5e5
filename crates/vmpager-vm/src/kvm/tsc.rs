//! The frequency of the time stamp counter.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long one cycle takes, measured once per process against
/// CLOCK_MONOTONIC. The guest's counter runs at the host's rate.
pub(crate) fn nanoseconds_per_cycle() -> f64 {
    static MEASURED: OnceLock<f64> = OnceLock::new();
    *MEASURED.get_or_init(measure)
}

fn measure() -> f64 {
    let (started, first) = (Instant::now(), cycles());
    std::thread::sleep(Duration::from_millis(20));
    let (elapsed, last) = (started.elapsed(), cycles());
    #[allow(clippy::cast_precision_loss, reason = "20 ms of cycles are far below 2^53")]
    let counted = last.saturating_sub(first).max(1) as f64;
    elapsed.as_secs_f64() * 1e9 / counted
}

fn cycles() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets user space use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}
