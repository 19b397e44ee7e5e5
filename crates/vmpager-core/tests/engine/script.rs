//! What the random tests may do, and to which memory.

use proptest::prelude::*;
use proptest::sample::Index;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{ByteRange, Hva, PageSize, Slot};

use crate::HVA;
use crate::world::Outcome;

/// One thing that happens.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A vCPU touches a page.
    Touch(Index),
    /// Several vCPUs touch pages side by side.
    Sweep(Index, u64),
    /// The pager reads the page-fault messages that wait.
    DeliverFaults,
    /// The guest gives pages back; the thread stops in madvise.
    BeginRemove(Index, u64),
    /// The pager reads the oldest event.
    DeliverEvent,
    /// The thread whose event was read goes on: installs work again.
    LetGo,
    /// Its madvise takes the pages away.
    Zap,
    /// The pager is idle and fills, a piece.
    Fill,
    /// A run of so many base pages at most.
    FillSome(u64),
    /// So many neighbours at most.
    Neighbours(u64),
    /// A read ends.
    EndRead(Index, Outcome),
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let page = any::<Index>;
    prop_oneof![
        8 => page().prop_map(Step::Touch),
        3 => (page(), 1..70_u64).prop_map(|(p, n)| Step::Sweep(p, n)),
        8 => Just(Step::DeliverFaults),
        3 => (page(), 1..80_u64).prop_map(|(p, n)| Step::BeginRemove(p, n)),
        4 => Just(Step::DeliverEvent),
        4 => Just(Step::LetGo),
        4 => Just(Step::Zap),
        4 => Just(Step::Fill),
        3 => prop_oneof![1..100_u64, Just(u64::MAX)].prop_map(Step::FillSome),
        5 => (1..100_u64).prop_map(Step::Neighbours),
        8 => (page(), outcome()).prop_map(|(read, outcome)| Step::EndRead(read, outcome)),
    ]
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        6 => Just(Outcome::Install),
        2 => (1..40_u64).prop_map(Outcome::InstallSome),
        1 => Just(Outcome::Fail),
        2 => Just(Outcome::Abandon),
    ]
}

pub(crate) fn policy() -> impl Strategy<Value = NeighbourPolicy> {
    prop_oneof![
        1 => Just(NeighbourPolicy::Off),
        4 => prop::sample::select(vec![0, 1, 4, 5, 6, 9, u8::MAX])
            .prop_map(|first_window_shift| NeighbourPolicy::Adaptive { first_window_shift }),
    ]
}

/// Slots in any order of addresses, with gaps or none, and a few holes of the
/// source.
pub(crate) fn layout() -> impl Strategy<Value = (Vec<Slot>, Vec<ByteRange>)> {
    let pages = prop_oneof![
        prop::sample::select(vec![1_u64, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 600, 700]),
        1..150_u64,
    ];
    let piece = (prop::bool::weighted(0.2), pages, 0..2_u64, 0..2_u64);
    let slots = prop::collection::vec(piece, 1..4).prop_flat_map(|pieces| {
        let order: Vec<usize> = (0..pieces.len()).collect();
        (Just(pieces), Just(order).prop_shuffle())
    });
    let len = prop_oneof![4 => 0..1_u64 << 19, 1 => 0..1_u64 << 22];
    let holes = prop::collection::vec((0..1_u64 << 22, len), 0..5);
    (slots, holes).prop_map(|((pieces, order), holes)| {
        let mut offset = 0;
        let mut slots: Vec<Slot> = pieces
            .iter()
            .map(|&(huge, pages, _, gap)| {
                let page_size = if huge { PageSize::Size2M } else { PageSize::Size4K };
                let pages = if huge { 1 + pages % 4 } else { pages };
                let source_offset = offset + gap * 4096;
                let len = pages * page_size.bytes();
                offset = source_offset + len;
                Slot { hva: Hva(0), len, source_offset, page_size }
            })
            .collect();
        let mut hva = HVA;
        for i in order {
            hva = (hva + pieces[i].2 * 4096).next_multiple_of(slots[i].page_size.bytes());
            slots[i].hva = Hva(hva);
            hva += slots[i].len;
        }
        let holes = holes.into_iter().map(|(start, len)| ByteRange::new(start, len));
        (slots, holes.collect())
    })
}
