//! Streams of faults on a source that takes its time: what is ahead of them is read
//! before it is asked for, and every byte is right.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::time::Duration;

use common::{Holds, PAGE, faulty, mapping, page, range};
use vmpager::{NeighbourPolicy, Pager, SessionSummary};
use vmpager_store::faulty::ALL;

const PAGES: usize = 4096;

/// Touches pages of a source nothing of which is at hand.
fn touch(policy: NeighbourPolicy, pages: impl Iterator<Item = usize>) -> SessionSummary {
    let source = faulty(PAGES);
    source.delay(ALL, Duration::from_millis(2));
    let memory = mapping(PAGES);
    let region = range(&memory);
    let pager = Pager::builder(source).region(&region, 0).neighbours(policy).start().unwrap();
    for at in pages {
        assert_eq!(page(&memory, at * PAGE), Holds::Source(at * PAGE), "page {at}");
    }
    pager.stats()
}

/// How many pages came, or were on their way, before they were asked for. Steps are
/// long enough that none comes along with another.
fn ahead(stats: &SessionSummary) -> u64 {
    stats.pages_neighbour + stats.faults_joined
}

#[test]
fn what_is_ahead_is_read_before_it_is_asked_for() {
    begin!();
    for policy in [NeighbourPolicy::Strides, NeighbourPolicy::Mixed] {
        let stats = touch(policy, (0..100).map(|nth| nth * 40));
        assert!(ahead(&stats) > 50, "forward, {policy:?}: {stats:?}");
        let stats = touch(policy, (0..100).rev().map(|nth| nth * 40));
        assert!(ahead(&stats) > 50, "backward, {policy:?}: {stats:?}");
    }
    let stats = touch(NeighbourPolicy::Off, (0..100).map(|nth| nth * 40));
    assert_eq!((ahead(&stats), stats.pages_demand), (0, 100), "{stats:?}");
}

#[test]
fn a_sequential_stream_reads_far_ahead() {
    begin!();
    for backward in [false, true] {
        let place = |nth| if backward { PAGES - 1 - nth } else { nth };
        let stats = touch(NeighbourPolicy::Strides, (0..PAGES).map(place));
        // A read of 64 pages for each that is not on its way would be 64 of these.
        let fresh = stats.faults - stats.faults_joined;
        assert!(fresh < 48, "backward {backward}: {fresh} of {stats:?}");
    }
}
