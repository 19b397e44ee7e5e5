//! Workers are killed, at any instruction and at every state change: VMs wait for
//! the next one, and every byte is right.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::child::{self, TestChild};
use common::clean_vm::{CleanVm, numbered};
use common::kept::{Kept, Plan, run_if_worker};
use common::peer::{Dialect, Memory, PeerPlan};
use common::{Holds, PAGE, Random, page, watchdog};
use serde::{Deserialize, Serialize};
use vmpager_sys::memory::Mapping;

/// What a guest thread knows of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Source,
    Zero,
    Word(u64),
}

/// A thread of the guest. The pages from `first` on are its own: nobody else
/// changes them, so that it knows what each must hold.
#[derive(Debug)]
struct Guest {
    memory: Arc<Mapping>,
    first: usize,
    known: Vec<Known>,
    random: Random,
    longest: Duration,
}

impl Guest {
    fn check(&mut self, at: usize) {
        let page_at = self.first + at;
        let since = Instant::now();
        let holds = page(&self.memory, page_at * PAGE);
        self.longest = self.longest.max(since.elapsed());
        let expected = match self.known[at] {
            Known::Source => Holds::Source(page_at * PAGE),
            Known::Zero => Holds::Zero,
            Known::Word(word) => Holds::Word(word),
        };
        assert_eq!(holds, expected, "page {page_at} of {:#x}", self.memory.hva());
    }

    fn act(&mut self) {
        let at = self.random.below(self.known.len());
        match self.random.below(10) {
            0 => {
                let count = (1 + self.random.below(24)).min(self.known.len() - at);
                let from = (self.first + at) * PAGE;
                self.memory.discard(from..from + count * PAGE).unwrap();
                self.known[at..at + count].fill(Known::Zero);
                // At once, for a lost removal to be seen.
                self.check(at + count - 1);
            }
            1 => {
                let word = (self.random.below(1 << 40) as u64) << 16 | 0xabcd;
                let bytes = [word.to_le_bytes(); PAGE / 8];
                self.memory.write((self.first + at) * PAGE, bytes.as_flattened());
                self.known[at] = Known::Word(word);
            }
            _ => self.check(at),
        }
    }
}

/// A VM, in a process of its own: what it is told.
#[derive(Debug, Serialize, Deserialize)]
struct Vm {
    socket: PathBuf,
    pages: usize,
    dialect: usize,
    seed: u64,
    ms: u64,
    /// Its memory is a mapping of the daemon's clean pages.
    clean: bool,
}

const VM: &str = "vm ";

impl Vm {
    fn spawn(&self, test: &str) -> TestChild {
        child::spawn(test, &format!("{VM}{}", serde_json::to_string(self).unwrap()))
    }

    /// Hands over memory, touches it, gives it back and writes to it for a while,
    /// then looks at all of it. Returns the longest that a page took.
    fn run(&self) -> Duration {
        if self.clean {
            return self.run_sharing();
        }
        let memory = Memory::new(&[self.pages], PAGE);
        let socket = UnixStream::connect(&self.socket).unwrap();
        let dialect = Dialect::ALL[self.dialect % Dialect::ALL.len()];
        memory.hand_over(&socket, dialect);
        let _socket = (!dialect.hangs_up()).then_some(socket);
        let (threads, until) = (3, Instant::now() + Duration::from_millis(self.ms));
        let each = (self.pages - 1) / threads;
        std::thread::scope(|scope| {
            let guests = (0..threads).map(|index| {
                let mut guest = Guest {
                    memory: memory.regions[0].0.clone(),
                    first: index * each,
                    known: vec![Known::Source; each],
                    random: Random::new(self.seed * 31 + index as u64),
                    longest: Duration::ZERO,
                };
                scope.spawn(move || {
                    while Instant::now() < until {
                        guest.act();
                    }
                    (0..each).for_each(|at| guest.check(at));
                    guest.longest
                })
            });
            let guests: Vec<_> = guests.collect();
            guests.into_iter().map(|guest| guest.join().unwrap()).max().unwrap_or_default()
        })
    }
}

impl Vm {
    /// The same, of clean pages, by one thread.
    fn run_sharing(&self) -> Duration {
        let mut vm = CleanVm::connect(&self.socket, self.seed * 0x9e37_79b9);
        let until = Instant::now() + Duration::from_millis(self.ms);
        let mut longest = Duration::ZERO;
        while Instant::now() < until {
            let since = Instant::now();
            vm.step(10, numbered);
            longest = longest.max(since.elapsed());
        }
        vm.check_all(numbered);
        longest
    }
}

/// Runs the VM this process was started as, if it was; then returns true.
fn run_if_vm() -> bool {
    let Some(task) = child::task() else { return false };
    let Some(vm) = task.strip_prefix(VM) else { return false };
    let vm: Vm = serde_json::from_str(vm).unwrap();
    child::say(&vm.run().as_micros().to_string());
    true
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// VMs, one after another, while workers die, until so many have.
fn under_fire(test: &str, plan: &Plan, kills: usize) {
    let kept = Kept::start(test, plan);
    let (mut rounds, mut longest) = (0, 0);
    while kept.kills() < kills {
        let (socket, pages) = (kept.socket.clone(), plan.pages);
        let (dialect, seed) = (rounds, rounds as u64);
        let vm = Vm { socket, pages, dialect, seed, ms: 400, clean: false };
        let mut child = vm.spawn(test);
        // Where there is much else to do, most workers die before they serve anybody.
        let said = child.hear_within(Duration::from_secs(150)).expect("the VM has ended");
        longest = longest.max(said.parse::<u64>().unwrap());
        assert!(child.wait().success());
        rounds += 1;
    }
    println!("{} kills in {rounds} VMs' lives, no page took over {longest} us", kept.kills());
    kept.stop();
}

#[test]
fn workers_killed_at_random_lose_nothing() {
    if !common::have_userfaultfd() || run_if_worker() || run_if_vm() {
        return;
    }
    let kills = number("VMPAGER_KILLS", 200);
    let _dog = watchdog(this_test!(), Duration::from_secs(60 + kills as u64));
    for (slow_us, fill) in [(None, true), (Some(2000), true), (None, false), (Some(300), false)] {
        let plan = Plan {
            pages: 2049,
            slow_us,
            fill,
            kill_within_ms: Some(number("VMPAGER_MS", 40) as u64),
            ..Plan::default()
        };
        under_fire(this_test!(), &plan, kills.div_ceil(4));
    }
}

/// Handshakes come while workers die: none is lost, and nobody reads zeroes,
/// whether or not the VMM keeps a copy of its userfaultfd.
#[test]
fn handshakes_survive_workers() {
    if !common::have_userfaultfd() || common::peer::run_if_peer() || run_if_worker() {
        return;
    }
    let _dog = watchdog(this_test!(), Duration::from_secs(180));
    let plan = Plan { pages: 64, kill_within_ms: Some(12), ..Plan::default() };
    let kept = Kept::start(this_test!(), &plan);
    for round in 0..12 {
        let dialect = Dialect::ALL[round % Dialect::ALL.len()];
        let peer = PeerPlan { dialect, ..PeerPlan::new(&kept.socket, &[64]) };
        let mut peer = PeerPlan { keeps_userfaultfd: round % 2 == 0, ..peer }.spawn(this_test!());
        for at in (0..64).rev() {
            peer.expect_source(0, at);
        }
        peer.child.kill();
    }
    println!("{} kills", kept.kills());
    assert!(kept.kills() > 0, "no worker was killed");
    kept.stop();
}

/// Daemons replace each other under a VM, which notices nothing but a pause.
#[test]
fn daemons_that_replace_each_other_lose_nothing() {
    if !common::have_userfaultfd() || run_if_worker() || run_if_vm() {
        return;
    }
    let replaces = number("VMPAGER_REPLACES", 20);
    let _dog = watchdog(this_test!(), Duration::from_secs(60 + replaces as u64));
    let plan = Plan { pages: 2049, slow_us: Some(300), ..Plan::default() };
    let mut kept = Kept::start(this_test!(), &plan);
    let other = Plan { pages: 2048, ..Plan::default() };
    let of_another_version = Plan { other_layout: true, ..Plan::default() };
    let (mut done, mut rounds, mut longest) = (0, 0, 0);
    while done < replaces {
        let vm = Vm {
            socket: kept.socket.clone(),
            pages: plan.pages,
            dialect: rounds,
            seed: rounds as u64,
            ms: 1000,
            clean: false,
        };
        let mut child = vm.spawn(this_test!());
        let problem = kept.cannot_be_replaced(this_test!(), &other);
        assert!(problem.contains("another source; nothing was taken"), "{problem}");
        let problem = kept.cannot_be_replaced(this_test!(), &of_another_version);
        assert!(problem.contains("this program's of 0x6300000001; nothing was taken"), "{problem}");
        for _ in 0..10 {
            kept.replace(this_test!(), &plan);
            done += 1;
        }
        longest = longest.max(child.hear().parse::<u64>().unwrap());
        assert!(child.wait().success());
        rounds += 1;
    }
    println!("{done} daemons replaced in {rounds} VMs' lives, no page took over {longest} us");
    kept.stop();
}

/// Every place where state changes.
#[cfg(feature = "kill-points")]
const POINTS: [&str; 17] = [
    "welcomed",
    "offered",
    "kept",
    "read",
    "removed",
    "applied",
    "cleared",
    "planned",
    "submitted",
    "put",
    "published",
    "zero put",
    "left applied",
    "taken over",
    "detaching",
    "ended",
    CLEAN,
];
/// That one is reached where VMs share pages.
#[cfg(feature = "kill-points")]
const CLEAN: &str = "clean written";

#[cfg(feature = "kill-points")]
#[test]
fn workers_killed_at_every_state_change_lose_nothing() {
    if !common::have_userfaultfd() || run_if_worker() || run_if_vm() {
        return;
    }
    let _dog = watchdog(this_test!(), Duration::from_secs(300));
    let mut reached = Vec::new();
    let can_share = common::clean_vm::have_minor_faults();
    let points: Vec<_> = POINTS.into_iter().filter(|point| can_share || *point != CLEAN).collect();
    for &point in &points {
        for (fill, first, slow_us) in
            [(false, 1, None), (true, 1, None), (false, 6, Some(100)), (true, 9, Some(100))]
        {
            let (clean, point_and_first) = (point == CLEAN, Some((point.to_owned(), first)));
            let plan = Plan {
                pages: 513,
                fill,
                slow_us,
                point: point_and_first,
                clean,
                ..Plan::default()
            };
            let kept = Kept::start(this_test!(), &plan);
            let (socket, seed) = (kept.socket.clone(), u64::from(first));
            let vm = Vm { socket, pages: 513, dialect: 4, seed, ms: 60, clean };
            let mut child = vm.spawn(this_test!());
            let longest = child.hear();
            assert!(child.wait().success(), "{point}");
            // The end of a session is a place, too.
            std::thread::sleep(Duration::from_millis(30));
            let kills = kept.starts() - 1;
            println!("{point}, fill {fill}: {kills} killed, no page took over {longest} us");
            if kills > 0 {
                reached.push(point);
            }
            kept.stop();
        }
    }
    // That needs a page given back, whose event is not read yet, to be touched.
    let missed: Vec<_> = points.iter().filter(|point| !reached.contains(point)).collect();
    assert!(missed.iter().all(|point| **point == "zero put"), "never reached: {missed:?}");
}
