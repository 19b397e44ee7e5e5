//! Slots against a list of every page: lookup, location, ranges, and each way
//! a layout can be refused.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use vmpager_core::{ByteRange, Hva, PageRun, PageSize, Slot, SlotError, SlotSet};

const BASE: u64 = 4096;
const HUGE: u64 = 0x20_0000;

/// One page as the oracle knows it.
#[derive(Clone, Copy, Debug)]
struct Page {
    hva: u64,
    source: u64,
    len: u64,
    slot: usize,
}

/// Every page of every slot, in index order.
fn pages_of(slots: &[Slot]) -> Vec<Page> {
    let mut pages = Vec::new();
    for (slot, s) in slots.iter().enumerate() {
        let len = s.page_size.bytes();
        pages.extend((0..s.len / len).map(|i| Page {
            hva: s.hva.0 + i * len,
            source: s.source_offset + i * len,
            len,
            slot,
        }));
    }
    pages
}

/// Consecutive page indices within one slot, as runs sorted by first page.
fn runs_where(pages: &[Page], inside: impl Fn(&Page) -> bool) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for (index, page) in pages.iter().enumerate().filter(|(_, p)| inside(p)) {
        let index = index as u64;
        match runs.last_mut() {
            Some(run)
                if run.end() == index
                    && pages[usize::try_from(run.first).unwrap()].slot == page.slot =>
            {
                run.count += 1;
            }
            _ => runs.push(PageRun::new(index, 1)),
        }
    }
    runs
}

fn sorted(runs: impl Iterator<Item = PageRun>) -> Vec<PageRun> {
    let mut runs: Vec<_> = runs.collect();
    runs.sort_by_key(|run| run.first);
    runs
}

/// Slots that fit together: disjoint, with gaps or none, in any order in
/// either space.
fn layout() -> impl Strategy<Value = Vec<Slot>> {
    let piece = (any::<bool>(), 1..70_u64, 0..3_u64, 0..3_u64);
    prop::collection::vec(piece, 1..5)
        .prop_flat_map(|pieces| {
            let order: Vec<usize> = (0..pieces.len()).collect();
            (Just(pieces), Just(order.clone()).prop_shuffle(), Just(order).prop_shuffle())
        })
        .prop_map(|(pieces, by_hva, by_source)| {
            let mut slots: Vec<Slot> = pieces
                .iter()
                .map(|&(huge, pages, ..)| {
                    let page_size = if huge { PageSize::Size2M } else { PageSize::Size4K };
                    let pages = if huge { 1 + pages % 3 } else { pages };
                    let len = pages * page_size.bytes();
                    Slot { hva: Hva(0), len, source_offset: 0, page_size }
                })
                .collect();
            let mut hva = 0x7f00_0000_0000;
            for i in by_hva {
                hva = (hva + pieces[i].2 * BASE).next_multiple_of(slots[i].page_size.bytes());
                slots[i].hva = Hva(hva);
                hva += slots[i].len;
            }
            let mut offset = 0;
            for i in by_source {
                offset += pieces[i].3 * BASE;
                slots[i].source_offset = offset;
                offset += slots[i].len;
            }
            slots
        })
}

fn source_len(slots: &[Slot]) -> u64 {
    slots.iter().map(|s| s.source_offset + s.len).max().unwrap()
}

/// An address at, just before or just after the start or end of a page, or
/// anywhere.
fn near(starts: &[u64], pick: &prop::sample::Index, delta: i64) -> u64 {
    starts[pick.index(starts.len())].saturating_add_signed(delta)
}

fn delta() -> impl Strategy<Value = i64> {
    prop_oneof![Just(0), -1..=1_i64, Just(4096), Just(-4096), -0x30_0000..0x30_0000_i64]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn agrees_with_a_list_of_pages(
        slots in layout(),
        probes in prop::collection::vec(
            (any::<prop::sample::Index>(), delta(), any::<prop::sample::Index>(), delta()),
            1..20,
        ),
    ) {
        let set = SlotSet::new(&slots, source_len(&slots)).unwrap();
        let pages = pages_of(&slots);
        let ends = |start: fn(&Page) -> u64| -> Vec<u64> {
            pages.iter().flat_map(|p| [start(p), start(p) + p.len]).collect()
        };
        let (hvas, offsets) = (ends(|p| p.hva), ends(|p| p.source));

        prop_assert_eq!(set.pages(), pages.len() as u64);
        prop_assert_eq!(set.bytes(), slots.iter().map(|s| s.len).sum::<u64>());
        prop_assert!(set.iter().map(|s| s.hva).is_sorted());
        prop_assert_eq!(set.iter().count(), slots.len());

        for (a, da, b, db) in &probes {
            let hva = near(&hvas, a, *da);
            let expected = pages.iter().position(|p| p.hva <= hva && hva < p.hva + p.len);
            prop_assert_eq!(set.page_at(Hva(hva)), expected.map(|p| p as u64), "{:#x}", hva);

            let (start, end) = (hva, near(&hvas, b, *db));
            let expected = runs_where(&pages, |p| start <= p.hva && p.hva + p.len <= end);
            let seen = sorted(set.runs_within(Hva(start), Hva(end)));
            prop_assert_eq!(seen, expected, "{:#x}..{:#x}", start, end);

            let start = near(&offsets, a, *da);
            let range = ByteRange::new(start, near(&offsets, b, *db).saturating_sub(start));
            let expected =
                runs_where(&pages, |p| start <= p.source && p.source + p.len <= range.end());
            prop_assert_eq!(sorted(set.runs_of_source(range)), expected, "{}", range);
        }
        for (index, page) in pages.iter().enumerate() {
            let first = index as u64;
            let (slot, all) = set.slot_of(first);
            prop_assert_eq!(slot, &slots[page.slot]);
            let members: Vec<u64> =
                (0..).zip(&pages).filter(|(_, p)| p.slot == page.slot).map(|(i, _)| i).collect();
            prop_assert_eq!(all.pages().collect::<Vec<_>>(), members);
            for count in [1, all.end() - first] {
                let place = set.locate(PageRun::new(first, count));
                let bytes = ByteRange::new(page.source, count * page.len);
                prop_assert_eq!(place, (Hva(page.hva), bytes));
            }
        }
    }

    /// Whatever is given, the answer is an error or a set whose pages are all
    /// different ones; never a panic.
    #[test]
    fn any_values_are_judged(
        raw in prop::collection::vec((edge(), edge(), edge(), any::<bool>()), 0..4),
        source_len in edge(),
    ) {
        let slots: Vec<Slot> = raw
            .iter()
            .map(|&(hva, len, source_offset, huge)| Slot {
                hva: Hva(hva),
                len,
                source_offset,
                page_size: if huge { PageSize::Size2M } else { PageSize::Size4K },
            })
            .collect();
        let fits = |s: &Slot| {
            let unit = s.page_size.bytes();
            let ends = (s.hva.0.checked_add(s.len), s.source_offset.checked_add(s.len));
            s.len > 0
                && s.hva.0.is_multiple_of(unit)
                && s.len.is_multiple_of(unit)
                && s.source_offset.is_multiple_of(BASE)
                && matches!(ends, (Some(_), Some(end)) if end <= source_len)
        };
        let apart = |a: u64, a_len: u64, b: u64, b_len: u64| a + a_len <= b || b + b_len <= a;
        let sound = !slots.is_empty()
            && slots.iter().all(fits)
            && slots.iter().enumerate().all(|(i, a)| {
                slots[..i].iter().all(|b| {
                    apart(a.hva.0, a.len, b.hva.0, b.len)
                        && apart(a.source_offset, a.len, b.source_offset, b.len)
                })
            });
        let answer = SlotSet::new(&slots, source_len);
        prop_assert_eq!(answer.is_ok(), sound, "{:?}", answer.err().map(|e| e.to_string()));
    }
}

/// Numbers around which arithmetic goes wrong, and ordinary ones.
fn edge() -> impl Strategy<Value = u64> {
    let top = u64::MAX - (HUGE - 1);
    prop_oneof![
        2 => (0..6_u64).prop_map(|n| n * BASE),
        3 => (0..6_u64).prop_map(|n| n * HUGE),
        1 => prop::sample::select(vec![0, 1, 4095, 4097, top, top - HUGE, u64::MAX - 4095, u64::MAX]),
        1 => prop::sample::select(vec![1 << 63, (1 << 63) - HUGE]),
    ]
}

fn slot(hva: u64, len: u64, source_offset: u64) -> Slot {
    Slot { hva: Hva(hva), len, source_offset, page_size: PageSize::Size4K }
}

fn refusal(slots: &[Slot], source_len: u64) -> SlotError {
    SlotSet::new(slots, source_len).unwrap_err()
}

#[test]
fn no_slots() {
    assert_eq!(refusal(&[], 0), SlotError::NoSlots);
}

#[test]
fn an_empty_slot() {
    let slots = [slot(0, BASE, 0), slot(BASE, 0, BASE)];
    assert_eq!(refusal(&slots, BASE), SlotError::Empty { index: 1 });
}

#[test]
fn misaligned_fields() {
    let misaligned =
        |field, value, page_size| SlotError::Misaligned { index: 0, field, value, page_size };
    assert_eq!(refusal(&[slot(1, BASE, 0)], BASE), misaligned("address", 1, BASE));
    assert_eq!(refusal(&[slot(0, BASE + 1, 0)], HUGE), misaligned("size", BASE + 1, BASE));
    assert_eq!(refusal(&[slot(0, BASE, 512)], HUGE), misaligned("offset", 512, BASE));
    let huge = |hva, len| Slot { page_size: PageSize::Size2M, ..slot(hva, len, 0) };
    assert_eq!(refusal(&[huge(BASE, HUGE)], HUGE), misaligned("address", BASE, HUGE));
    assert_eq!(refusal(&[huge(0, HUGE + BASE)], 2 * HUGE), misaligned("size", HUGE + BASE, HUGE));
}

#[test]
fn a_huge_slot_may_start_at_any_4k_of_the_source() {
    let slots = [Slot { page_size: PageSize::Size2M, ..slot(0, HUGE, BASE) }];
    assert!(SlotSet::new(&slots, HUGE + BASE).is_ok());
}

#[test]
fn overflowing_fields() {
    let top = u64::MAX - 4095;
    let overflow = |field| SlotError::Overflow { index: 0, field, value: top, len: 2 * BASE };
    assert_eq!(refusal(&[slot(top, 2 * BASE, 0)], HUGE), overflow("address"));
    assert_eq!(refusal(&[slot(0, 2 * BASE, top)], u64::MAX), overflow("offset"));
}

#[test]
fn beyond_the_source() {
    let beyond =
        SlotError::BeyondSource { index: 0, offset: BASE, len: BASE, source_len: 2 * BASE - 1 };
    assert_eq!(refusal(&[slot(0, BASE, BASE)], 2 * BASE - 1), beyond);
    assert!(SlotSet::new(&[slot(0, BASE, BASE)], 2 * BASE).is_ok());
}

#[test]
fn overlaps_name_both() {
    let slots = [slot(HUGE, BASE, 0), slot(0, BASE, BASE), slot(HUGE - BASE, 2 * BASE, 4 * BASE)];
    let overlap = SlotError::Overlap { first: 2, second: 0, what: "host addresses" };
    assert_eq!(refusal(&slots, HUGE), overlap);
    let slots = [slot(0, 2 * BASE, BASE), slot(HUGE, BASE, BASE)];
    let overlap = SlotError::Overlap { first: 0, second: 1, what: "the source" };
    assert_eq!(refusal(&slots, HUGE), overlap);
}

#[test]
fn errors_say_what_where_and_the_value() {
    let text = refusal(&[slot(1, BASE, 0)], BASE).to_string();
    assert_eq!(text, "region 0: address 0x1 is not a multiple of its page size 0x1000");
}
