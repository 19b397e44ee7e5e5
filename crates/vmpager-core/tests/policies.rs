//! What holds of every policy, whatever the guest does: pages that are proposed lie
//! in one slot, are missing, and in nobody's hands; no more come than were asked
//! for; and a guest that touches nothing more is left alone in the end.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use proptest::sample::Index;
use vmpager_core::page_map::words_for;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{
    ByteRange, Engine, FaultPlan, FillPlan, Hva, PageRun, PageSize, Piece, Slot, SlotSet,
};

const HVA: u64 = 0x7f00_0000_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Missing,
    Claimed,
    Present,
    GivenBack,
}

#[derive(Clone, Debug)]
enum Step {
    /// Faults at so many pages, at equal steps from one on.
    Faults(Index, i64, u64),
    Near(u64),
    Replayed(u64),
    Fill(u64),
    /// A read ends, well or not.
    End(Index, bool),
    Remove(Index, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let page = any::<Index>;
    prop_oneof![
        8 => (page(), prop_oneof![-3..4_i64, -600..600_i64], 1..9_u64)
            .prop_map(|(page, step, count)| Step::Faults(page, step, count)),
        6 => (1..600_u64).prop_map(Step::Near),
        3 => (1..600_u64).prop_map(Step::Replayed),
        1 => (1..600_u64).prop_map(Step::Fill),
        6 => (page(), any::<bool>()).prop_map(|(read, well)| Step::End(read, well)),
        1 => (page(), 1..40_u64).prop_map(|(page, count)| Step::Remove(page, count)),
    ]
}

fn policy() -> impl Strategy<Value = NeighbourPolicy> {
    prop_oneof![
        Just(NeighbourPolicy::Off),
        Just(NeighbourPolicy::Adaptive { first_window_shift: 0 }),
        Just(NeighbourPolicy::Strides),
        Just(NeighbourPolicy::Mixed),
    ]
}

struct World {
    engine: Engine<Vec<AtomicU64>>,
    slots: Vec<PageRun>,
    states: Vec<State>,
    reads: Vec<PageRun>,
}

fn at(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

impl World {
    fn new(lens: &[u64], policy: NeighbourPolicy, order: &[(Index, u64)]) -> Self {
        let (mut slots, mut runs, mut first) = (Vec::new(), Vec::new(), 0);
        for (nth, len) in (0..).zip(lens) {
            let hva = Hva(HVA + nth * (1 << 30));
            let (len, source_offset) = (len * 4096, first * 4096);
            slots.push(Slot { hva, len, source_offset, page_size: PageSize::Size4K });
            runs.push(PageRun::new(first, len / 4096));
            first += len / 4096;
        }
        let set = SlotSet::new(&slots, first * 4096).unwrap();
        let words = (0..words_for(first)).map(|_| AtomicU64::new(0)).collect();
        let mut engine = Engine::new(set, words, policy);
        let range = |(page, count): &(Index, u64)| {
            ByteRange::new(page.index(at(first)) as u64 * 4096, count * 4096)
        };
        engine.replay(&order.iter().map(range).collect::<Vec<_>>());
        Self { engine, slots: runs, states: vec![State::Missing; at(first)], reads: Vec::new() }
    }

    fn pages(&self) -> u64 {
        self.states.len() as u64
    }

    fn hva(&self, page: u64) -> Hva {
        let holds = |(_, slot): &(u64, &PageRun)| slot.pages().contains(&page);
        let (nth, slot) = (0..).zip(&self.slots).find(holds).unwrap();
        Hva(HVA + nth * (1 << 30) + (page - slot.first) * 4096)
    }

    /// The engine proposes to read these pages.
    fn claim(&mut self, run: PageRun, most: u64) {
        assert!(run.count > 0 && run.count <= most, "{run:?}, {most} at most");
        let within = |slot: &PageRun| slot.first <= run.first && run.end() <= slot.end();
        assert!(self.slots.iter().any(within), "{run:?} lies in no slot of {:?}", self.slots);
        for page in run.pages() {
            assert_eq!(self.states[at(page)], State::Missing, "page {page} of {run:?}");
            self.states[at(page)] = State::Claimed;
        }
        self.reads.push(run);
    }

    fn bring(&mut self, piece: Option<Piece>, most: u64) -> bool {
        match piece {
            Some(Piece::Fetch(run)) => self.claim(run, most),
            Some(Piece::Zero(run)) => panic!("{run:?} is no hole"),
            None => return false,
        }
        true
    }

    fn fault(&mut self, page: u64) {
        let state = self.states[at(page)];
        match (self.engine.fault(self.hva(page)).unwrap(), state) {
            (FaultPlan::Fetch { page: asked, run }, State::Missing) => {
                assert!(asked == page && run.pages().contains(&page), "{run:?} for {page}");
                self.claim(run, 512);
            }
            (FaultPlan::InFlight(_), State::Claimed) | (FaultPlan::Confirm(_), State::Present) => {}
            (FaultPlan::Zero(run), State::GivenBack) => {
                for page in run.pages() {
                    assert_eq!(self.states[at(page)], State::GivenBack, "{run:?}");
                    self.states[at(page)] = State::Present;
                }
                self.engine.installed(run);
            }
            (plan, state) => panic!("{plan:?} of page {page}, which is {state:?}"),
        }
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Faults(page, step, count) => {
                let first = page.index(self.states.len()) as u64;
                for nth in 0..*count {
                    let page = first.checked_add_signed(step * nth.cast_signed());
                    if let Some(page) = page.filter(|page| *page < self.pages()) {
                        self.fault(page);
                    }
                }
            }
            Step::Near(most) => {
                let near = self.engine.next_neighbours(*most).map(|near| near.piece);
                self.bring(near, *most);
            }
            Step::Replayed(most) => {
                let piece = self.engine.next_replayed(*most);
                self.bring(piece, *most);
            }
            Step::Fill(most) => {
                if let FillPlan::Bring(piece) = self.engine.next_fill(*most) {
                    self.bring(Some(piece), *most);
                }
            }
            Step::End(read, well) if !self.reads.is_empty() => {
                let run = self.reads.swap_remove(read.index(self.reads.len()));
                self.end(run, *well);
            }
            Step::End(..) => {}
            Step::Remove(page, count) => {
                let first = page.index(self.states.len()) as u64;
                let slot = self.slots.iter().find(|slot| slot.pages().contains(&first)).unwrap();
                let end = (first + count).min(slot.end());
                let hva = self.hva(first);
                self.engine.removed(hva, Hva(hva.0 + (end - first) * 4096));
                (first..end).for_each(|page| self.states[at(page)] = State::GivenBack);
            }
        }
    }

    fn end(&mut self, run: PageRun, well: bool) {
        let parts: Vec<PageRun> = self.engine.still_claimed(run).collect();
        for part in parts {
            let state = if well { State::Present } else { State::Missing };
            part.pages().for_each(|page| self.states[at(page)] = state);
            if well { self.engine.installed(part) } else { self.engine.released(part) }
        }
    }
}

proptest! {
    #[test]
    fn policies_propose_what_is_missing_and_come_to_an_end(
        lens in prop::collection::vec(prop_oneof![1..40_u64, 400..1500_u64], 1..4),
        policy in policy(),
        order in prop::collection::vec((any::<Index>(), 1..100_u64), 0..8),
        steps in prop::collection::vec(step(), 0..120),
    ) {
        let mut world = World::new(&lens, policy, &order);
        for step in &steps {
            world.apply(step);
        }
        // Nobody faults any more: what is still proposed ends, though reads fail.
        let all = world.pages();
        let mut proposed = 0;
        loop {
            let near = world.engine.next_neighbours(64).map(|near| near.piece);
            let some = world.bring(near, 64) || {
                let piece = world.engine.next_replayed(64);
                world.bring(piece, 64)
            };
            if !some {
                break;
            }
            let run = *world.reads.last().unwrap();
            world.reads.pop();
            world.end(run, false);
            proposed += 1;
            prop_assert!(proposed < 64 * (all + 600), "no end of proposals");
        }
        while let FillPlan::Bring(piece) = world.engine.next_fill(64) {
            world.bring(Some(piece), 64);
        }
        for run in std::mem::take(&mut world.reads) {
            world.end(run, true);
        }
        prop_assert_eq!(world.engine.next_fill(64), FillPlan::Complete);
    }
}
