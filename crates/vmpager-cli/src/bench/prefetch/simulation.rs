//! One guest and its pager, by the engine that serves VMs, in a time of their own.
//!
//! The guest is one vCPU, the pager one thread, each with a CPU to itself. The pager
//! does what a worker does: demand first, then what is near; and after each of both a
//! piece of the profile or of the fill, unless the profile is not trusted. A fault that
//! comes during any of these waits for its end.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;

use anyhow::Context;
use vmpager::NeighbourPolicy;
use vmpager::core::page_map::words_for;
use vmpager::core::prefetch::Prefetch;
use vmpager::core::prefetch::limits::{
    CHUNK, COLD_PIECE, COLD_WINDOW, FILL_DEPTH, LONG, Look, PREFETCH_DEPTH,
};
use vmpager::core::{
    ByteRange, Engine, FaultPlan, FillPlan, Hva, PageRun, PageSize, Piece, Slot, SlotSet,
};

use super::trace::Trace;

/// What things cost, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Costs {
    /// A fault, without the page.
    pub(super) fault: u64,
    /// The install of a page.
    pub(super) page: u64,
    /// A read; nothing if all is at hand.
    pub(super) latency: u64,
    /// The bytes of a page on their way, one after the other.
    pub(super) transfer: u64,
}

/// What is brought in unasked.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) neighbours: NeighbourPolicy,
    pub(super) profile: Option<Vec<ByteRange>>,
    pub(super) fill: bool,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    /// Touches that waited.
    pub(super) waits: u64,
    /// And how long, in all.
    pub(super) waited_ns: u64,
    /// Pages brought unasked and touched later.
    pub(super) used: u64,
    /// And those never touched.
    pub(super) unused: u64,
    /// Until the last touch was done.
    pub(super) done_ns: u64,
}

/// A read in flight.
#[derive(Clone, Copy, Debug)]
struct Read {
    run: PageRun,
    ready: u64,
    fill: bool,
    /// For whom it is.
    demanded: Option<u64>,
}

struct Simulation {
    costs: Costs,
    fill: bool,
    engine: Engine<Vec<AtomicU64>>,
    /// When the pager has nothing more to do at once.
    free: u64,
    /// When the source has sent all that it was asked for.
    sent: u64,
    reads: VecDeque<Read>,
    /// Of each page: whether it came unasked.
    unasked: Vec<bool>,
}

/// Where the guest's memory is: anywhere.
const HVA: u64 = 1 << 40;

/// Lets a guest touch what a trace says.
pub(super) fn simulate(trace: &Trace, costs: Costs, policy: &Policy) -> anyhow::Result<Outcome> {
    let pages = u64::from(trace.memory_pages);
    let slot =
        Slot { hva: Hva(HVA), len: pages * 4096, source_offset: 0, page_size: PageSize::Size4K };
    let slots = SlotSet::new(&[slot], slot.len).context("the memory of a trace")?;
    let words = (0..words_for(pages)).map(|_| AtomicU64::new(0)).collect();
    let mut engine = Engine::new(slots, words, policy.neighbours);
    if let Some(order) = &policy.profile {
        engine.replay(order);
    }
    let unasked = vec![false; trace.memory_pages as usize];
    let (reads, fill) = (VecDeque::new(), policy.fill);
    let mut pager = Simulation { costs, fill, engine, free: 0, sent: 0, reads, unasked };
    let (mut now, mut outcome) = (0, Outcome::default());
    for touch in &trace.touches {
        now += touch.think_ns;
        pager.work(now);
        let page = u64::from(touch.page);
        if !pager.engine.map().is_present(page) {
            let answered = pager.fault(page, now);
            outcome.waits += 1;
            outcome.waited_ns += answered - now;
            now = answered;
        }
        let unasked = &mut pager.unasked[touch.page as usize];
        outcome.used += u64::from(std::mem::take(unasked));
    }
    outcome.unused = pager.unasked.iter().filter(|unasked| **unasked).count() as u64;
    outcome.done_ns = now;
    Ok(outcome)
}

impl Simulation {
    /// Somebody waits for a page from then on. Returns until when.
    fn fault(&mut self, page: u64, since: u64) -> u64 {
        self.free = self.free.max(since + self.costs.fault / 2);
        match self.engine.fault(Hva(HVA + page * 4096)) {
            Some(FaultPlan::Fetch { run, .. }) if self.costs.latency == 0 => {
                self.install(run, Some(page));
            }
            Some(FaultPlan::Fetch { run, .. }) => {
                let run = self.shorten(run, page, COLD_WINDOW);
                self.submit(run, false, Some(page));
            }
            // It is being read. (Nothing is zero here, or given back.)
            _ => {
                let mut reads = self.reads.iter_mut();
                if let Some(read) = reads.find(|read| read.run.pages().contains(&page)) {
                    read.demanded = Some(page);
                }
            }
        }
        while !self.engine.map().is_present(page) && self.step(u64::MAX) {}
        let answered = self.free + self.costs.fault / 2;
        self.bring_more(false);
        answered
    }

    /// Does what there is to do until then.
    fn work(&mut self, until: u64) {
        while self.free < until && self.step(until) {}
    }

    /// One thing: a read that has ended, or something nobody waits for. False if
    /// there is nothing before `until`.
    fn step(&mut self, until: u64) -> bool {
        let ended = self.reads.iter().position(|read| read.ready <= self.free);
        if let Some(read) = ended.and_then(|at| self.reads.remove(at)) {
            self.install(read.run, read.demanded);
            return true;
        }
        let near = self.bring_near();
        if self.bring_more(!near) || near {
            return true;
        }
        let next = self.reads.iter().map(|read| read.ready).min();
        match next.filter(|ready| *ready < until) {
            Some(ready) => self.free = ready,
            None => return false,
        }
        true
    }

    fn bring_near(&mut self) -> bool {
        let mut look = Look::of(CHUNK);
        while look.left() > 0
            && let Some(near) = self.engine.next_neighbours(look.left())
        {
            let run = near.piece.run();
            look.brought(run);
            if self.costs.latency == 0 {
                self.install(run, None);
            } else if near.expected && self.may_prefetch() {
                self.submit(run, false, None);
            } else {
                self.engine.released(run);
            }
        }
        !look.is_empty()
    }

    fn may_prefetch(&self) -> bool {
        self.reads.iter().filter(|read| read.demanded.is_none()).count() < PREFETCH_DEPTH
    }

    fn may_fill(&self) -> bool {
        self.reads.iter().filter(|read| read.fill).count() < FILL_DEPTH
    }

    fn is_late(&self, started: u64) -> bool {
        u128::from(self.free - started) >= LONG.as_nanos()
    }

    /// A piece of the profile, or of the fill.
    fn bring_more(&mut self, idle: bool) -> bool {
        match self.engine.replaying().filter(|replay| replay.next().is_some()) {
            Some(replay) if !idle && !replay.is_trusted() => false,
            Some(_) => self.replay(),
            None => self.fill(),
        }
    }

    fn replay(&mut self) -> bool {
        let (piece, started, mut done) = (self.engine.replay_piece(), self.free, 0);
        while done < piece && self.may_prefetch() && !self.is_late(started) {
            let Some(next) = self.engine.next_replayed(CHUNK.min(piece - done)) else { break };
            let run = next.run();
            match self.costs.latency {
                0 => self.install(run, None),
                _ => self.submit(run, false, None),
            }
            done += run.count;
        }
        done > 0
    }

    fn fill(&mut self) -> bool {
        if !self.fill || !self.may_fill() {
            return false;
        }
        let (piece, started, mut done) = (self.engine.fill_piece(), self.free, 0);
        while done < piece && self.may_fill() && !self.is_late(started) {
            let FillPlan::Bring(Piece::Fetch(run)) = self.engine.next_fill(piece - done) else {
                break;
            };
            let run = match self.costs.latency {
                // A worker looks at the clock after each.
                0 => self.shorten(run, run.first, CHUNK),
                _ => self.shorten(run, run.first, COLD_PIECE),
            };
            match self.costs.latency {
                0 => self.install(run, None),
                _ => self.submit(run, true, None),
            }
            done += run.count;
        }
        done > 0
    }

    /// Keeps of a claimed run only the pages around one, aligned to `most`.
    fn shorten(&mut self, run: PageRun, page: u64, most: u64) -> PageRun {
        let first = run.first.max(page / most * most);
        let end = run.end().min((page / most + 1) * most);
        self.engine.released(PageRun::new(run.first, first - run.first));
        self.engine.released(PageRun::new(end, run.end() - end));
        PageRun::new(first, end - first)
    }

    fn submit(&mut self, run: PageRun, fill: bool, demanded: Option<u64>) {
        // What is demanded is sent first.
        let transfer = run.count * self.costs.transfer;
        let start = if demanded.is_some() { self.free } else { self.free.max(self.sent) };
        self.sent = self.sent.max(self.free) + transfer;
        let ready = start + self.costs.latency + transfer;
        self.reads.push_back(Read { run, ready, fill, demanded });
    }

    fn install(&mut self, run: PageRun, demanded: Option<u64>) {
        self.free += run.count * self.costs.page;
        self.engine.installed(run);
        for page in run.pages().filter(|page| Some(*page) != demanded) {
            if let Some(unasked) =
                usize::try_from(page).ok().and_then(|at| self.unasked.get_mut(at))
            {
                *unasked = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vmpager::ServeOptions;
    use vmpager_store::profile::replay_order;

    use super::*;
    use crate::bench::to_f64;

    const WARM: Costs = Costs { fault: 10_000, page: 1_000, latency: 0, transfer: 0 };
    const SLOW: Costs = Costs { latency: 1_000_000, transfer: 4_000, ..WARM };

    fn run(name: &str, costs: Costs, policy: Policy) -> (u64, Outcome) {
        let traces = Trace::known(500).expect("the Linux guest's can be read");
        let trace = traces.into_iter().find(|trace| trace.name == name).expect("it is known");
        (trace.touches.len() as u64, simulate(&trace, costs, &policy).expect("simulated"))
    }

    fn only(neighbours: NeighbourPolicy) -> Policy {
        Policy { neighbours, profile: None, fill: false }
    }

    /// What it must cost can be told beforehand.
    #[test]
    fn without_prefetch_every_touch_waits_for_a_fault_and_its_page() {
        for (costs, each) in [(WARM, 11_000), (SLOW, 1_015_000)] {
            let (touches, outcome) = run("random", costs, only(NeighbourPolicy::Off));
            assert_eq!((outcome.waits, outcome.used + outcome.unused), (touches, 0));
            assert_eq!(outcome.waited_ns, touches * each);
            assert_eq!(outcome.done_ns, touches * (each + 500));
        }
    }

    #[test]
    fn streams_wait_less_and_bring_nothing_else() {
        for costs in [WARM, SLOW] {
            let (_, off) = run("sequential", costs, only(NeighbourPolicy::Off));
            let (_, strides) = run("sequential", costs, only(NeighbourPolicy::Strides));
            assert!(strides.waits * 20 < off.waits && strides.done_ns * 4 < off.done_ns);
            assert!(strides.unused <= 256, "what is ahead of its last page: {strides:?}");
        }
    }

    #[test]
    fn a_fill_brings_everything_and_demand_goes_first() {
        for costs in [WARM, SLOW] {
            let policy = Policy { fill: true, ..only(NeighbourPolicy::default()) };
            let (touches, outcome) = run("sparse", costs, policy);
            let (_, off) = run("sparse", costs, only(NeighbourPolicy::Off));
            assert!(outcome.waits < off.waits && outcome.waits + outcome.used == touches);
            let worst = 2 * costs.latency + 1_000_000;
            assert!(outcome.waited_ns / outcome.waits < worst, "{outcome:?}");
        }
    }

    /// Without prefetch by a profile, with one of these pages, and with neighbours in each
    /// case: when the guest is done.
    fn with_profile(trace: &Trace, costs: Costs, pages: Option<Vec<u32>>) -> u64 {
        let profile = pages.map(|pages| ServeOptions::ranges_of(replay_order(&pages)));
        let policy = Policy { profile, ..only(NeighbourPolicy::default()) };
        simulate(trace, costs, &policy).expect("simulated").done_ns
    }

    /// Whatever a page costs, and however much the guest computes.
    #[test]
    fn a_wrong_profile_costs_at_most_a_twentieth() {
        for (page, fault) in [(1_000, 10_000), (2_000, 10_000), (4_000, 20_000), (4_000, 40_000)] {
            let costs = Costs { page, fault, ..WARM };
            for think_ns in [500, 3_000, 20_000] {
                for trace in Trace::known(think_ns).expect("they can be made") {
                    let none = with_profile(&trace, costs, None);
                    let wrong = with_profile(&trace, costs, Some(trace.elsewhere()));
                    let ratio = to_f64(wrong) / to_f64(none);
                    assert!(ratio <= 1.05, "{}, {costs:?}, {think_ns}: {ratio:.3}", trace.name);
                }
            }
        }
    }

    /// What a right profile gains is what it gained before wrong ones were bounded.
    #[test]
    fn a_right_profile_is_replayed_at_full_speed() {
        let gains = [
            ("linux", 0.078),
            ("sequential", 0.637),
            ("backward", 0.804),
            ("strided", 0.980),
            ("streams", 0.728),
            ("mixed", 0.693),
            ("sparse", 0.067),
            ("dense", 0.856),
            ("random", 0.907),
        ];
        for (trace, (name, before)) in
            Trace::known(500).expect("they can be made").iter().zip(gains)
        {
            assert_eq!(trace.name, name);
            let none = with_profile(trace, WARM, None);
            let right = trace.touches.iter().map(|touch| touch.page).collect();
            let ratio = to_f64(with_profile(trace, WARM, Some(right))) / to_f64(none);
            assert!(ratio < before + 0.001, "{name}: {ratio:.4}, before {before}");
        }
    }
}
