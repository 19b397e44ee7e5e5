//! Traps 1 to 3, under fire: a hundred thousand removals race with faults,
//! writes and the background fill, and every byte is checked.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use common::{Holds, PAGE, Random, faulty, mapping, numbered, page, range};
use vmpager::core::ByteRange;
use vmpager::{NeighbourPolicy, Pager};
use vmpager_store::FaultySource;
use vmpager_sys::memory::Mapping;

const LIMIT: Duration = Duration::from_secs(120);

/// How a round's pages come.
#[derive(Clone, Copy, Debug)]
struct Style {
    fill: bool,
    cold: bool,
    window: NeighbourPolicy,
}

impl Style {
    fn of_round(round: usize) -> Self {
        let window = match round % 3 {
            0 => NeighbourPolicy::Off,
            1 => NeighbourPolicy::Mixed,
            _ => NeighbourPolicy::Adaptive { first_window_shift: 5 },
        };
        Self { fill: round & 1 == 0, cold: round & 2 == 0, window }
    }

    /// Serves a new mapping, whose last page never comes: so it stays served.
    /// It lies in a 2 MiB of its own, for nothing else to be read with it.
    fn serve(self, pages: usize) -> (Arc<Mapping>, Arc<FaultySource>, Pager) {
        assert!(pages.is_multiple_of(512));
        let (memory, source) = (mapping(pages + 1), faulty(pages + 1));
        if self.cold {
            source.delay(ByteRange::new(0, 1 << 30), Duration::from_micros(50));
        }
        source.hold(ByteRange::new((pages * PAGE) as u64, PAGE as u64));
        let pager = Pager::builder(source.clone())
            .region(&range(&memory), 0)
            .background_fill(self.fill)
            .neighbours(self.window)
            .start()
            .unwrap();
        (memory, source, pager)
    }
}

/// What came of all rounds.
#[derive(Debug, Default)]
struct Total {
    removals: u64,
    retries: u64,
    confirmed: u64,
}

impl Total {
    fn add(&mut self, removals: u64, pager: &Pager) {
        let stats = pager.stats();
        assert_eq!(stats.pages_poisoned, 0);
        self.removals += removals;
        self.retries += stats.retries;
        self.confirmed += stats.faults_confirmed;
    }

    fn assert_enough(&self) {
        println!("{self:?}");
        assert!(self.removals >= 60_000, "{self:?}");
        assert!(self.retries > 0, "the way over EAGAIN was never taken: {self:?}");
    }
}

/// Pages owned by one thread lie in blocks between those of the others, so
/// that every window and every piece of the fill holds several threads'.
const BLOCK: usize = 4;
const THREADS: usize = 4;

struct Owner {
    thread: usize,
    random: Random,
    /// What each of its pages must hold.
    expected: Vec<Holds>,
    removals: u64,
}

impl Owner {
    fn new(thread: usize, seed: usize, pages: usize) -> Self {
        let random = Random::new((seed * THREADS + thread + 1) as u64);
        let mut owner = Self { thread, random, expected: Vec::new(), removals: 0 };
        for own in 0..pages / THREADS {
            owner.expected.push(Holds::Source(owner.offset(own)));
        }
        owner
    }

    /// Where its `own`th page lies.
    fn offset(&self, own: usize) -> usize {
        ((own / BLOCK * THREADS + self.thread) * BLOCK + own % BLOCK) * PAGE
    }

    fn check(&self, memory: &Mapping, own: usize) {
        let offset = self.offset(own);
        assert_eq!(page(memory, offset), self.expected[own], "page {}", offset / PAGE);
    }

    fn check_all(&self, memory: &Mapping) {
        (0..self.expected.len()).for_each(|own| self.check(memory, own));
    }

    fn act(&mut self, memory: &Mapping) {
        let own = self.random.below(self.expected.len());
        let offset = self.offset(own);
        match self.random.below(10) {
            0..5 => {
                let most = BLOCK - own % BLOCK;
                let count = 1 + self.random.below(most);
                memory.discard(offset..offset + count * PAGE).unwrap();
                self.expected[own..own + count].fill(Holds::Zero);
                self.removals += 1;
            }
            5..7 => {
                let word = self.random.below(usize::MAX) as u64 | 1;
                let words = std::iter::repeat_n(word.to_le_bytes(), PAGE / 8);
                memory.write(offset, &words.flatten().collect::<Vec<u8>>());
                self.expected[own] = Holds::Word(word);
            }
            _ => self.check(memory, own),
        }
    }
}

#[test]
fn traps_1_to_3_what_each_thread_removes_and_writes_is_what_it_reads() {
    begin!();
    let mut total = Total::default();
    for round in 0..48 {
        let pages = 1024;
        let (memory, source, pager) = Style::of_round(round).serve(pages);
        let owners: Vec<Owner> = std::thread::scope(|scope| {
            let threads = (0..THREADS).map(|thread| {
                let memory = &memory;
                scope.spawn(move || {
                    let mut owner = Owner::new(thread, round, pages);
                    for _ in 0..700 {
                        owner.act(memory);
                    }
                    owner
                })
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        owners.iter().for_each(|owner| owner.check_all(&memory));
        source.release();
        pager.fill();
        assert!(pager.wait_filled(LIMIT), "round {round}");
        owners.iter().for_each(|owner| owner.check_all(&memory));
        total.add(owners.iter().map(|owner| owner.removals).sum(), &pager);
    }
    total.assert_enough();
}

/// Words a writer may write to, at the end of each page.
const WRITERS: usize = 2;
const CHECKED: usize = PAGE / 8 - WRITERS;

struct Contested {
    memory: Arc<Mapping>,
    /// Pages whose removal has returned.
    removed: Vec<AtomicBool>,
    removals: AtomicU64,
}

impl Contested {
    fn remove(&self, random: &mut Random) {
        let first = random.below(self.removed.len());
        let end = self.removed.len().min(first + 1 + random.below(4));
        self.memory.discard(first * PAGE..end * PAGE).unwrap();
        for removed in &self.removed[first..end] {
            removed.store(true, Ordering::Release);
        }
        self.removals.fetch_add(1, Ordering::Relaxed);
    }

    fn tag(writer: usize, page: usize) -> u64 {
        u64::MAX - (writer * 100_000 + page) as u64
    }

    fn write(&self, random: &mut Random, writer: usize) {
        let page = random.below(self.removed.len());
        let at = page * PAGE + (CHECKED + writer) * 8;
        self.memory.write_u64(at, Self::tag(writer, page));
    }

    /// Reads a page while others remove it and write to it. From its first
    /// word to its last it may turn from the source's to zero, never back,
    /// and nothing else may show.
    fn check(&self, random: &mut Random) {
        let page = random.below(self.removed.len());
        let removed = self.removed[page].load(Ordering::Acquire);
        let mut bytes = [0; PAGE];
        self.memory.read(page * PAGE, &mut bytes);
        let mut zero = removed;
        for (i, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            let source = (page * PAGE + i * 8 + 1) as u64;
            let may_be_tag = i >= CHECKED && word == Self::tag(i - CHECKED, page);
            match word {
                0 => zero = true,
                word if word == source && !zero => {}
                _ if may_be_tag => {}
                word => panic!("page {page} word {i}: {word:#x} (removed {removed}, zero {zero})"),
            }
        }
    }
}

#[test]
fn traps_1_to_3_in_a_race_a_page_turns_from_source_to_zero_and_never_back() {
    begin!();
    let mut total = Total::default();
    for round in 0..96 {
        let pages = 512;
        let (memory, _source, pager) = Style::of_round(round).serve(pages);
        let contested = Contested {
            memory,
            removed: (0..pages).map(|_| AtomicBool::new(false)).collect(),
            removals: AtomicU64::new(0),
        };
        std::thread::scope(|scope| {
            for thread in 0..2 * WRITERS {
                let contested = &contested;
                let mut random = Random::new((round * 16 + thread + 1) as u64);
                scope.spawn(move || {
                    for _ in 0..180 {
                        contested.remove(&mut random);
                        contested.check(&mut random);
                        if thread < WRITERS {
                            contested.write(&mut random, thread);
                        }
                    }
                });
            }
            for thread in 0..2 {
                let contested = &contested;
                let mut random = Random::new((round * 16 + thread + 9) as u64);
                scope.spawn(move || (0..300).for_each(|_| contested.check(&mut random)));
            }
        });
        total.add(contested.removals.into_inner(), &pager);
    }
    total.assert_enough();
}

#[test]
fn trap_2_a_page_that_vanishes_just_after_its_install_is_installed_again() {
    begin!();
    // One thread gives back an absent page while another touches it: the
    // install may come after the event was read, and before the kernel zaps.
    let rounds = 5_000;
    let memory = mapping(rounds);
    let pager = Pager::builder(numbered(rounds))
        .region(&range(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()
        .unwrap();
    memory.discard(0..rounds * PAGE).unwrap();
    let ready = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let meet = |own: usize, round: usize| {
        ready[own].store(round + 1, Ordering::Release);
        while ready[1 - own].load(Ordering::Acquire) <= round {
            std::thread::yield_now();
        }
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Keeps the address space busy, for which the zap has to wait and the
        // install has not.
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let other = Mapping::anonymous(64 * PAGE).unwrap();
                other.populate(0..other.len()).unwrap();
            }
        });
        scope.spawn(|| {
            for round in 0..rounds {
                meet(0, round);
                memory.discard(round * PAGE..(round + 1) * PAGE).unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        for round in 0..rounds {
            meet(1, round);
            assert_eq!(page(&memory, round * PAGE), Holds::Zero, "page {round}");
        }
    });
    // Nobody removes anything any more, and each page comes back.
    for round in 0..rounds {
        assert_eq!(page(&memory, round * PAGE), Holds::Zero, "page {round}");
    }
    let stats = pager.stats();
    println!("{} pages had vanished", stats.faults_confirmed);
}

/// A removal that comes in the middle of a piece of the fill: pages further on
/// in the same piece, given back by it, must not get their old bytes.
#[test]
fn a_piece_of_the_fill_ends_where_a_removal_interrupts_it() {
    begin!();
    const PAGES: usize = 2048;
    let mut interrupted = 0;
    for round in 0..400 {
        let memory = mapping(PAGES);
        let pager = Pager::builder(numbered(PAGES)).region(&range(&memory), 0).start().unwrap();
        let mut random = Random::new(round + 1);
        // All at once, and then a look at each.
        let removed: Vec<usize> = (0..4).map(|i| i * 512 + 384 + random.below(128)).collect();
        pager.fill();
        for at in &removed {
            memory.discard(at * PAGE..(at + 1) * PAGE).unwrap();
        }
        for at in &removed {
            assert_eq!(page(&memory, at * PAGE), Holds::Zero, "page {at}, round {round}");
        }
        assert!(pager.wait_filled(LIMIT));
        for at in removed {
            assert_eq!(page(&memory, at * PAGE), Holds::Zero, "page {at}, round {round}");
        }
        interrupted += pager.stats().retries;
    }
    println!("{interrupted} installs put off");
}
