//! Work on page ranges, spread over the host's processors.

use std::ops::Range;

/// More threads than this only fight for memory bandwidth.
const MAX_THREADS: usize = 8;

/// Cuts a range into contiguous parts, one per processor, and runs `work` on
/// all of them at once. The answers are in the parts' order.
pub(crate) fn in_parallel<R: Send>(
    range: Range<u64>,
    work: impl Fn(Range<u64>) -> R + Sync,
) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    let parts = split(range, threads);
    std::thread::scope(|scope| {
        let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(|| work(part))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic in the work")).collect()
    })
}

/// Cuts a range into `parts` contiguous ranges whose lengths differ by one at
/// most.
pub(crate) fn split(range: Range<u64>, parts: usize) -> Vec<Range<u64>> {
    let parts = parts as u64;
    let len = range.end - range.start;
    let at = |i: u64| range.start + len * i / parts;
    (0..parts).map(|i| at(i)..at(i + 1)).collect()
}
