//! How windows and fill pieces grow, and where they stop.
#![cfg(not(loom))]

use vmpager_core::PageRun;
use vmpager_core::prefetch::{NeighbourPolicy, Neighbours, Pace, Prefetch};

const ALL: PageRun = PageRun::new(0, 2048);

fn adaptive(first_window_shift: u8) -> Neighbours {
    Neighbours::new(NeighbourPolicy::Adaptive { first_window_shift }, ALL.count)
}

fn sizes(neighbours: &mut Neighbours, page: u64, faults: usize) -> Vec<u64> {
    (0..faults).map(|_| neighbours.window(page, ALL).count).collect()
}

#[test]
fn off_is_one_page_however_often() {
    let mut off = Neighbours::new(NeighbourPolicy::Off, ALL.count);
    for _ in 0..20 {
        assert_eq!(off.window(700, ALL), PageRun::new(700, 1));
    }
}

#[test]
fn windows_double_up_to_64_pages_then_are_their_2_mib() {
    let expected = vec![1, 2, 4, 8, 16, 32, 64, 512, 512];
    assert_eq!(sizes(&mut adaptive(0), 600, 9), expected);
    assert_eq!(sizes(&mut adaptive(4), 600, 5), [16, 32, 64, 512, 512]);
    assert_eq!(sizes(&mut adaptive(8), 600, 2), [256, 512]);
}

#[test]
fn the_default_starts_at_one_page() {
    let mut neighbours = Neighbours::new(NeighbourPolicy::default(), ALL.count);
    assert_eq!(sizes(&mut neighbours, 0, 2), [1, 2]);
}

#[test]
fn an_absurd_first_window_is_the_whole_2_mib() {
    for shift in [9, 10, 63, 64, u8::MAX] {
        assert_eq!(sizes(&mut adaptive(shift), 600, 3), [512, 512, 512], "shift {shift}");
    }
}

#[test]
fn interest_is_counted_per_2_mib() {
    let mut neighbours = adaptive(0);
    assert_eq!(sizes(&mut neighbours, 511, 4), [1, 2, 4, 8]);
    assert_eq!(sizes(&mut neighbours, 512, 2), [1, 2]);
    assert_eq!(sizes(&mut neighbours, 0, 1), [16]);
}

#[test]
fn windows_are_aligned_and_hold_the_page() {
    for page in [0, 1, 511, 512, 1023, 2047] {
        let mut neighbours = adaptive(0);
        for _ in 0..12 {
            let window = neighbours.window(page, ALL);
            assert!(window.pages().contains(&page), "{window:?}");
            assert_eq!(window.first % window.count, 0, "{window:?}");
        }
    }
}

#[test]
fn windows_stay_within_the_slot() {
    let slot = PageRun::new(510, 5);
    let mut neighbours = adaptive(9);
    assert_eq!(neighbours.window(511, slot), PageRun::new(510, 2), "up to the next 2 MiB");
    assert_eq!(neighbours.window(512, slot), PageRun::new(512, 3), "up to the slot's end");
    let one = PageRun::new(514, 1);
    assert_eq!(neighbours.window(514, one), one);
}

#[test]
fn a_page_beyond_the_map_gets_no_neighbours() {
    let mut neighbours = adaptive(9);
    assert_eq!(neighbours.window(4096, PageRun::new(0, 8192)), PageRun::new(4096, 1));
}

#[test]
fn fill_pieces_grow_to_4_mib() {
    let mut pace = Pace::new();
    let pieces: Vec<u64> = (0..8).map(|_| pace.next_pages()).collect();
    assert_eq!(pieces, [16, 32, 64, 128, 256, 512, 1024, 1024]);
    assert_eq!(Pace::default().next_pages(), 16);
}

/// Up to 32 MiB in place, a fault makes the next piece an eighth of that, to a
/// power of two below.
#[test]
fn a_piece_after_a_fault_is_a_fraction_of_what_is_filled() {
    let mut pace = Pace::new();
    let mut filled = 0;
    let mut seen = Vec::new();
    while filled < 8 * 1024 + 2048 {
        pace.demanded();
        pace.demanded();
        let piece = pace.next_pages();
        let most = (filled / 8).clamp(16, 1024);
        assert!(piece.is_power_of_two() && piece <= most && most < 2 * piece, "{piece}, {filled}");
        filled += piece;
        seen.push(piece);
    }
    seen.dedup();
    assert_eq!(seen, [16, 32, 64, 128, 256, 512, 1024]);
}

#[test]
fn pieces_grow_again_from_the_fraction() {
    let mut pace = Pace::new();
    let filled: u64 = (0..8).map(|_| pace.next_pages()).sum();
    assert_eq!(filled, 3056);
    pace.demanded();
    let pieces: Vec<u64> = (0..5).map(|_| pace.next_pages()).collect();
    assert_eq!(pieces, [256, 512, 1024, 1024, 1024]);
}

#[test]
fn faults_alone_fill_nothing() {
    let mut pace = Pace::new();
    for _ in 0..10_000 {
        pace.demanded();
    }
    assert_eq!(pace.next_pages(), 16);
}
