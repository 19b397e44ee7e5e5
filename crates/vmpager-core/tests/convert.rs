//! The rules of conversion against memory of which each page is looked at, with
//! steps that fail half-way.

#![cfg(not(loom))]

use std::collections::BTreeSet;
use std::ops::Range;

use proptest::prelude::*;
use vmpager_core::convert::{
    Begin, Contents, FaultAnswer, Kind, Kinds, Outcome, PAGE_BYTES, Places, Refusal, Request,
    Slots, State, Step,
};

/// Slots that touch, and one apart.
const SLOTS: [Range<u64>; 3] = [4..20, 20..31, 40..52];

fn to_index(page: u64) -> usize {
    usize::try_from(page).expect("a page of the test's")
}

fn all_pages() -> impl Iterator<Item = u64> {
    SLOTS.into_iter().flatten()
}

fn slots() -> Slots {
    let bytes = |slot: Range<u64>| (slot.start * PAGE_BYTES, (slot.end - slot.start) * PAGE_BYTES);
    Slots::new(SLOTS.map(bytes)).expect("whole pages")
}

/// A page's memory: what each kind's holds (0 is nothing, or zeroes), and who
/// reaches which.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Page {
    shared: u32,
    private: u32,
    /// Whose memory the guest reaches.
    guest: Kind,
    /// Whether the host reaches it. (With two places, it reaches the shared one.)
    host: bool,
}

/// A back-end that does as it is told, or half of it.
#[derive(Clone, Debug)]
struct Memory {
    places: Places,
    pages: Vec<Page>,
    /// Steps until one fails, and how many pages of it are done all the same.
    fails: Vec<(usize, u64)>,
    steps: usize,
    log: Vec<Step>,
}

impl Memory {
    fn page(&mut self, page: u64) -> &mut Page {
        &mut self.pages[to_index(page)]
    }

    /// What the guest reads there.
    fn guest_reads(&self, page: u64) -> u32 {
        self.holds(page, self.pages[to_index(page)].guest)
    }

    /// What its memory of that kind holds.
    fn holds(&self, page: u64, kind: Kind) -> u32 {
        let page = &self.pages[to_index(page)];
        match (self.places, kind) {
            (Places::Two, Kind::Private) => page.private,
            _ => page.shared,
        }
    }

    fn guest_writes(&mut self, page: u64, value: u32) {
        let places = self.places;
        let page = self.page(page);
        match (places, page.guest) {
            (Places::Two, Kind::Private) => page.private = value,
            _ => page.shared = value,
        }
    }

    fn perform(&mut self, step: &Step) -> bool {
        self.log.push(step.clone());
        let (Step::Close { pages, .. }
        | Step::Discard { pages, .. }
        | Step::Open { pages, .. }
        | Step::Reopen { pages, .. }) = step;
        let fails = self.fails.iter().find(|(at, _)| *at == self.steps).map(|(_, part)| *part);
        self.steps += 1;
        let end = fails.map_or(pages.end, |part| pages.end.min(pages.start + part));
        for number in pages.start..end {
            let places = self.places;
            let page = self.page(number);
            match (step, places) {
                (Step::Close { to, .. } | Step::Reopen { to, .. }, Places::Two) => page.guest = *to,
                // Closing to one is opening to the other.
                (Step::Open { to, .. }, Places::Two) => assert_eq!(page.guest, *to),
                (Step::Close { to, .. }, Places::One) => page.host &= *to == Kind::Shared,
                (Step::Open { to, .. } | Step::Reopen { to, .. }, Places::One) => {
                    page.host = *to == Kind::Shared
                }
                (Step::Discard { of: Kind::Private, .. }, Places::Two) => page.private = 0,
                (Step::Discard { .. }, _) => page.shared = 0,
            }
        }
        fails.is_none()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Convert {
        first: u64,
        pages: u64,
        to: Kind,
        contents: Contents,
        fails: Vec<(usize, u64)>,
    },
    Write {
        page: u64,
        value: u32,
    },
    /// Written by the guest while the next conversion is at that step.
    WriteDuring {
        step: usize,
        page: u64,
        value: u32,
    },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let kind = prop_oneof![Just(Kind::Shared), Just(Kind::Private)];
    let contents = prop_oneof![3 => Just(Contents::Zero), 1 => Just(Contents::Preserve)];
    let fails = prop_oneof![
        2 => Just(Vec::new()),
        3 => prop::collection::vec((0..7usize, 0..30u64), 1..4),
        // The step, the way back, and what that leaves.
        1 => Just(vec![(1, 0), (3, 0)]),
    ];
    let convert = (0..55u64, 0..30u64, kind, contents, fails).prop_map(
        |(first, pages, to, contents, fails)| Op::Convert { first, pages, to, contents, fails },
    );
    let write = (0..52u64, 1..u32::MAX).prop_map(|(page, value)| Op::Write { page, value });
    let during = (0..5usize, 4..52u64, 1..u32::MAX)
        .prop_map(|(step, page, value)| Op::WriteDuring { step, page, value });
    prop::collection::vec(prop_oneof![3 => convert, 3 => write, 2 => during], 1..40)
}

/// Kinds and memory, and what a slow and simple reader of the rules expects.
struct World {
    kinds: Kinds,
    memory: Memory,
    kind: Vec<Kind>,
    content: Vec<u32>,
    stale: BTreeSet<u64>,
    during: Vec<(usize, u64, u32)>,
}

impl World {
    fn new(places: Places, kind: Kind) -> Self {
        let page = Page { shared: 0, private: 0, guest: kind, host: kind == Kind::Shared };
        let memory =
            Memory { places, pages: vec![page; 60], fails: Vec::new(), steps: 0, log: Vec::new() };
        Self {
            kinds: Kinds::new(slots(), places, kind),
            memory,
            kind: vec![kind; 60],
            content: vec![0; 60],
            stale: BTreeSet::new(),
            during: Vec::new(),
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Write { page, value } if self.may_write(page) => {
                self.memory.guest_writes(page, value);
                self.content[to_index(page)] = value;
            }
            Op::Write { .. } => {}
            Op::WriteDuring { step, page, value } if self.may_write(page) => {
                self.during.push((step, page, value));
            }
            Op::WriteDuring { .. } => {}
            Op::Convert { first, pages, to, contents, fails } => {
                let request = Request { gpa: first * PAGE_BYTES, len: pages * PAGE_BYTES, to };
                self.convert(&request, contents, fails);
            }
        }
        self.check();
    }

    fn may_write(&self, page: u64) -> bool {
        self.kinds.kind(page).is_some() && !self.kinds.is_closed(page)
    }

    fn convert(&mut self, request: &Request, contents: Contents, fails: Vec<(usize, u64)>) {
        let pages = request.gpa / PAGE_BYTES..(request.gpa + request.len) / PAGE_BYTES;
        if !self.kinds.can(contents) {
            return;
        }
        let is_memory =
            !pages.is_empty() && pages.clone().all(|page| all_pages().any(|p| p == page));
        let begun = self.kinds.begin(request, contents);
        if !is_memory {
            assert!(matches!(begun, Err(Refusal::Outside { .. } | Refusal::Empty { .. })));
            return;
        }
        let mut conversion = match begun.expect("memory") {
            Begin::Start(conversion) => conversion,
            Begin::Nothing => {
                assert!(pages.clone().all(|page| self.kind_of(page) == request.to));
                return;
            }
            Begin::Busy => panic!("nothing else goes on"),
        };
        (self.memory.fails, self.memory.steps) = (fails, 0);
        self.memory.log.clear();
        let mut written = Vec::new();
        let mut steps = 0;
        while let Some(step) = conversion.next_step() {
            assert!(matches!(self.kinds.begin(request, contents), Ok(Begin::Busy)));
            assert_eq!(self.kinds.on_fault(pages.start, request.to), FaultAnswer::Busy);
            for (_, page, value) in self.during.iter().filter(|(at, ..)| *at == steps) {
                self.memory.guest_writes(*page, *value);
                written.push((steps, *page, *value));
            }
            conversion.answer(self.memory.perform(&step));
            steps += 1;
            assert!(steps < 200, "it never ends");
        }
        self.during.clear();
        let outcome = self.kinds.finish(conversion);
        self.expect(&pages, request.to, contents, &outcome, &written);
    }

    /// What each page must be now, by what failed and what was written meanwhile.
    fn expect(
        &mut self,
        pages: &Range<u64>,
        to: Kind,
        contents: Contents,
        outcome: &Outcome,
        written: &[(usize, u64, u32)],
    ) {
        let has_failed = self.memory.fails.iter().any(|(at, _)| *at < self.memory.steps);
        assert_eq!(outcome.failed.is_some(), has_failed, "{outcome:?}");
        let within = |ranges: &[Range<u64>], page| ranges.iter().any(|r| r.contains(&page));
        let log = self.memory.log.clone();
        let closes: Vec<_> = log.iter().filter(|s| matches!(s, Step::Close { .. })).collect();
        for page in all_pages() {
            let index = to_index(page);
            let differed = pages.contains(&page) && self.kind[index] != to;
            assert_eq!(
                differed,
                within(&outcome.converted, page) || within(&outcome.unconverted, page),
                "page {page}: {outcome:?}"
            );
            let in_closes = closes.iter().filter(|step| touches(step, page)).count();
            assert!(in_closes <= usize::from(differed), "page {page} is invalidated for nothing");
            let is_converted = within(&outcome.converted, page);
            if !has_failed {
                assert_eq!(is_converted, differed);
            }
            // The last of its contents' discarding, and of what was written since.
            let discard = log.iter().rposition(|step| {
                matches!(step, Step::Discard { of, .. } if *of == to.other()) && touches(step, page)
            });
            let close =
                log.iter().position(|s| matches!(s, Step::Close { .. }) && touches(s, page));
            let since = match (self.memory.places, is_converted) {
                (Places::Two, true) => close.map_or(0, |at| at + 1),
                (Places::One, _) if contents == Contents::Zero => discard.map_or(0, |at| at + 1),
                (Places::One, _) => 0,
                (Places::Two, false) => 0,
            };
            let before_close = |at: usize| close.is_none_or(|close| at <= close);
            let counts = |at: usize| match (self.memory.places, is_converted, differed) {
                // What went to the other kind's memory is gone with it.
                (Places::Two, false, true) => before_close(at),
                _ => at >= since,
            };
            if is_converted {
                self.kind[index] = to;
                if contents == Contents::Zero {
                    self.content[index] = 0;
                }
            }
            let last = written.iter().rfind(|(at, number, _)| *number == page && counts(*at));
            if let Some((_, _, value)) = last {
                self.content[index] = *value;
            }
            // A step that failed half-way did half of it.
            let is_damaged = matches!(&outcome.failed, Some(Step::Discard { of, pages })
                if *of == to.other() && pages.contains(&page));
            let is_torn = differed && has_failed && written.iter().any(|w| w.1 == page);
            if is_damaged || is_torn {
                self.content[index] = self.memory.holds(page, self.kind[index]);
            }
        }
        self.stale.extend(outcome.stale.iter().cloned().flatten());
        let converted: BTreeSet<u64> = outcome.converted.iter().cloned().flatten().collect();
        self.stale.retain(|page| !converted.contains(page));
        let one_range = outcome.failed.is_none() && outcome.converted.len() == 1;
        assert!(!one_range || closes.len() == 1, "{closes:?}");
        let stands = !outcome.converted.is_empty()
            || !outcome.closed.is_empty()
            || !outcome.stale.is_empty();
        let state = match (has_failed, stands) {
            (false, _) => State::Done,
            (true, false) => State::Undone,
            (true, true) => State::Stands,
        };
        assert_eq!(outcome.state(), state);
    }

    fn kind_of(&self, page: u64) -> Kind {
        self.kind[to_index(page)]
    }

    /// One kind per page, in one memory, with its contents, reached by whom it is
    /// for.
    fn check(&self) {
        for page in all_pages() {
            let index = to_index(page);
            let kind = self.kind[index];
            assert_eq!(self.kinds.kind(page), Some(kind), "page {page}");
            let is_private = self.kinds.private_runs().iter().any(|run| run.contains(&page));
            assert_eq!(is_private, kind == Kind::Private);
            let found = self.memory.pages[index];
            if self.kinds.is_closed(page) {
                assert_eq!(self.kinds.on_fault(page, kind), FaultAnswer::Closed);
                continue;
            }
            assert_eq!(self.kinds.on_fault(page, kind), FaultAnswer::Matches);
            assert_eq!(self.kinds.on_fault(page, kind.other()), FaultAnswer::Mismatch);
            match self.memory.places {
                Places::Two => {
                    assert_eq!(found.guest, kind, "page {page}");
                    let other = if kind == Kind::Private { found.shared } else { found.private };
                    assert!(other == 0 || self.stale.contains(&page), "page {page} is in both");
                }
                Places::One => assert_eq!(found.host, kind == Kind::Shared, "page {page}"),
            }
            assert_eq!(self.memory.guest_reads(page), self.content[index], "page {page}");
        }
        for page in [0, 3, 31, 39, 52] {
            assert_eq!(self.kinds.on_fault(page, Kind::Private), FaultAnswer::Outside);
        }
    }

    /// Whatever failed, the next conversion repairs it.
    fn repair(&mut self) {
        for to in [Kind::Private, Kind::Shared] {
            for slot in [4..31, 40..52] {
                let (gpa, len) = (slot.start * PAGE_BYTES, (slot.end - slot.start) * PAGE_BYTES);
                self.convert(&Request { gpa, len, to }, Contents::Zero, Vec::new());
                self.check();
                for page in slot {
                    assert!(self.kind_of(page) == to && !self.kinds.is_closed(page));
                }
            }
        }
    }
}

fn touches(step: &Step, page: u64) -> bool {
    let (Step::Close { pages, .. }
    | Step::Discard { pages, .. }
    | Step::Open { pages, .. }
    | Step::Reopen { pages, .. }) = step;
    pages.contains(&page)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_page_is_of_one_kind_and_holds_what_it_must(
        is_one_place in any::<bool>(),
        is_private in any::<bool>(),
        ops in ops(),
    ) {
        let places = if is_one_place { Places::One } else { Places::Two };
        let kind = if is_private { Kind::Private } else { Kind::Shared };
        let mut world = World::new(places, kind);
        for op in ops {
            world.apply(op);
        }
        world.repair();
    }
}

#[test]
fn what_is_refused_changes_nothing() {
    let mut kinds = Kinds::new(slots(), Places::Two, Kind::Shared);
    let page = PAGE_BYTES;
    for (gpa, len) in [
        (0, page),
        (3 * page, 2 * page),
        (4 * page, 28 * page),
        (30 * page, 11 * page),
        (51 * page, 2 * page),
        (52 * page, page),
        (5 * page, 0),
        (5 * page + 1, page),
        (5 * page, page - 1),
        (u64::MAX - page + 1, page),
        (u64::MAX - 2 * page + 1, page),
        (5 * page, u64::MAX - page + 1),
    ] {
        let begun = kinds.begin(&Request { gpa, len, to: Kind::Private }, Contents::Zero);
        assert!(begun.is_err(), "{gpa:#x} {len:#x}: {begun:?}");
        assert_eq!(kinds.private_runs(), []);
    }
    assert!(!kinds.can(Contents::Preserve));
}

/// Disjoint ranges go on at the same time; those that overlap wait.
#[test]
fn conversions_wait_for_each_other_only_where_they_meet() {
    let mut kinds = Kinds::new(slots(), Places::Two, Kind::Shared);
    let asked = |first: u64, pages: u64| Request {
        gpa: first * PAGE_BYTES,
        len: pages * PAGE_BYTES,
        to: Kind::Private,
    };
    let mut begin =
        |first, pages| kinds.begin(&asked(first, pages), Contents::Zero).expect("memory");
    let Begin::Start(mut first) = begin(4, 4) else { panic!("it can begin") };
    let Begin::Start(second) = begin(8, 4) else { panic!("they only touch") };
    assert!(matches!(begin(7, 1), Begin::Busy));
    assert!(matches!(begin(2 + 2, 10), Begin::Busy));
    while first.next_step().is_some() {
        first.answer(true);
    }
    assert_eq!(kinds.finish(first).converted.first(), Some(&(4..8)));
    assert_eq!(kinds.on_fault(4, Kind::Private), FaultAnswer::Matches);
    assert_eq!(kinds.on_fault(8, Kind::Private), FaultAnswer::Busy);
    assert_eq!(kinds.finish(second).converted, [], "a conversion given up changes nothing");
}

/// A range over two slots that touch is closed at once, and discarded in each.
#[test]
fn one_range_is_invalidated_once() {
    let mut kinds = Kinds::new(slots(), Places::Two, Kind::Shared);
    let request = Request { gpa: 18 * PAGE_BYTES, len: 4 * PAGE_BYTES, to: Kind::Private };
    let Ok(Begin::Start(mut conversion)) = kinds.begin(&request, Contents::Zero) else {
        panic!("it can begin")
    };
    let mut steps = Vec::new();
    while let Some(step) = conversion.next_step() {
        steps.push(step);
        conversion.answer(true);
    }
    assert_eq!(
        steps,
        [
            Step::Close { pages: 18..22, to: Kind::Private },
            Step::Discard { pages: 18..20, of: Kind::Shared },
            Step::Discard { pages: 20..22, of: Kind::Shared },
            Step::Open { pages: 18..22, to: Kind::Private },
        ]
    );
    assert_eq!(kinds.finish(conversion).state(), State::Done);
}
