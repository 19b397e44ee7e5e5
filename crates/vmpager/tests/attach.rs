//! One memory in many processes: their faults served by one engine.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use]
mod common;

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::child::{self, TestChild};
use common::home::{Home, home, home_with, view};
use common::*;
use vmpager::attach::{AttachError, FaultReader, Page, WaitError};
use vmpager::{Attached, NeighbourPolicy};
use vmpager_sys::memory::Mapping;

#[test]
fn a_view_shows_the_source_and_what_others_write() {
    begin!();
    let home = home(64);
    let (attached, memory) = view(&home);
    assert_eq!(attached.pages().page(5 * PAGE as u64), Some(Page::Missing));
    assert_eq!(page(&memory, 5 * PAGE), Holds::Source(5 * PAGE));
    // A touch may return a moment before that is known.
    eventually("it is known", || attached.pages().page(5 * PAGE as u64) == Some(Page::Present));
    assert_eq!(attached.pages().page(64 * PAGE as u64), None);
    memory.write_u64(5 * PAGE, 42);
    assert_eq!(home.memory.read_u64(5 * PAGE), 42, "there for the pager's own process");
    home.memory.write_u64(9 * PAGE, 43);
    assert_eq!(memory.read_u64(9 * PAGE), 43);
    assert_eq!(memory.read_u64(9 * PAGE + 8), 9 * PAGE as u64 + 9, "the rest is the source's");
    let stats = home.pager.stats();
    assert_eq!((stats.faults, stats.faults_attached), (2, 1));
}

/// What the kernel's copies put into the last word of a page.
const MARK: u64 = 0x4d41_524b_4d41_524b;

/// That a page is the source's, but perhaps for a mark.
fn check(memory: &Mapping, at: usize) {
    let mut bytes = [0; PAGE];
    memory.read(at * PAGE, &mut bytes);
    let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    for (i, word) in words.enumerate() {
        let is_mark = i == PAGE / 8 - 1 && word == MARK;
        let expected = (at * PAGE + i * 8 + 1) as u64;
        assert!(word == expected || is_mark, "page {at}, word {i}: {word:#x}");
    }
}

/// How a process touches pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// By reading them.
    Reads,
    /// By having the kernel copy a word into each.
    Kernel,
    /// By asking the fault queue for each before it reads it.
    Queue,
}

/// Visits every page once, in an order of its own.
fn visit(memory: &Mapping, attached: Option<&Attached>, how: How, seed: u64) {
    let pages = memory.len() / PAGE;
    let mut order: Vec<usize> = (0..pages).collect();
    let mut random = Random::new(seed);
    (1..pages).for_each(|i| order.swap(i, random.below(i + 1)));
    let mut marks = tempfile::tempfile().unwrap();
    if how == How::Kernel {
        marks.write_all(&MARK.to_le_bytes().repeat(pages * PAGE / 8)).unwrap();
    }
    for at in order {
        match (how, attached) {
            (How::Kernel, _) => {
                let word = (at + 1) * PAGE - 8..(at + 1) * PAGE;
                memory.read_from_file(marks.as_fd(), word).unwrap();
            }
            (How::Queue, Some(attached)) => {
                let gpa = (at * PAGE) as u64;
                assert_eq!(attached.pages().wait(gpa, None).unwrap(), Page::Present);
                assert_eq!(attached.pages().page(gpa), Some(Page::Present));
            }
            _ => {}
        }
        check(memory, at);
    }
}

/// What a child does: `visit <how> <seed> <path>`, `write <which> <path>`,
/// `hoard <path>`.
fn run(task: &str) {
    let mut words = task.splitn(4, ' ');
    match words.next().unwrap() {
        "visit" => {
            let how = match words.next().unwrap() {
                "reads" => How::Reads,
                "kernel" => How::Kernel,
                _ => How::Queue,
            };
            let seed = words.next().unwrap().parse().unwrap();
            let attached = Attached::connect(Path::new(words.next().unwrap())).unwrap();
            child::say("attached");
            wait_for_line();
            visit(&attached.regions()[0].memory, Some(&attached), how, seed);
            child::say("done");
        }
        "write" => {
            let which: usize = words.next().unwrap().parse().unwrap();
            let attached = Attached::connect(Path::new(words.next().unwrap())).unwrap();
            child::say("attached");
            write_for_ever(&attached.regions()[0].memory, which, &AtomicBool::new(false));
        }
        "hoard" => {
            let (reader, _socket) = FaultReader::connect(Path::new(words.next().unwrap())).unwrap();
            child::say("attached");
            loop {
                while reader.take().is_some() {}
                let mut fds = [rustix::event::PollFd::new(&reader, rustix::event::PollFlags::IN)];
                rustix::event::poll(&mut fds, None).unwrap();
            }
        }
        other => panic!("{other}"),
    }
    wait_for_line();
}

/// Until the parent says something or ends.
fn wait_for_line() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

fn spawn(test: &str, task: &str, home: &Home) -> TestChild {
    let child = child::spawn(test, &format!("{task} {}", home.path.display()));
    assert_eq!(child.hear(), "attached");
    child
}

fn one_fetch_a_page(test: &str, background: bool) {
    let home = home_with(512, if background { NeighbourPolicy::Off } else { Default::default() });
    if background {
        home.source.never_at_hand();
    }
    let tasks = ["visit reads 1", "visit kernel 2", "visit queue 3"];
    let mut children = tasks.map(|task| spawn(test, task, &home));
    children.iter_mut().for_each(|child| child.tell("go"));
    visit(&home.memory, None, How::Reads, 4);
    children.iter().for_each(|child| assert_eq!(child.hear(), "done"));
    let fetches = home.source.all_fetches();
    assert!(fetches.iter().all(|n| *n == 1), "one fetch a page: {fetches:?}");
    (0..512).for_each(|at| {
        check(&home.memory, at);
        assert_eq!(home.memory.read_u64((at + 1) * PAGE - 8), MARK, "the kernel's copy is there");
    });
    let stats = home.pager.stats();
    println!("background {background}: {stats:?}");
    // Warm and with neighbours, whoever is first may bring all.
    let all_ways = stats.faults_attached > 0 && stats.faults_queued > 0;
    assert!(all_ways || !background, "{stats:?}");
}

#[test]
fn what_three_processes_and_the_kernel_miss_at_once_is_fetched_once() {
    if let Some(task) = child::task() {
        return run(&task);
    }
    begin!();
    one_fetch_a_page(this_test!(), false);
    one_fetch_a_page(this_test!(), true);
}

/// Kills one of three processes at a random moment of their visit to all pages;
/// the others go on, and nothing is lost or fetched twice.
fn kill_at_random(test: &str, rounds: usize) {
    let mut random = Random::new(rounds as u64);
    for round in 0..rounds {
        let home = home(1024);
        if round % 2 == 0 {
            home.source.never_at_hand();
        }
        let victims = ["visit reads 1", "visit queue 2", "visit kernel 3", "hoard"];
        let victim = victims[random.below(victims.len())];
        let mut dying = spawn(test, victim, &home);
        let mut living = ["visit reads 5", "visit queue 6"].map(|task| spawn(test, task, &home));
        dying.tell("go");
        living.iter_mut().for_each(|child| child.tell("go"));
        std::thread::sleep(Duration::from_micros(random.below(12_000) as u64));
        dying.kill();
        visit(&home.memory, None, How::Reads, 7);
        for child in &living {
            assert_eq!(child.hear(), "done", "round {round}, {victim} killed");
        }
        let fetches = home.source.all_fetches();
        assert!(fetches.iter().all(|n| *n == 1), "round {round}, {victim} killed: {fetches:?}");
    }
}

#[test]
fn a_process_killed_at_random_harms_nobody() {
    if let Some(task) = child::task() {
        return run(&task);
    }
    begin!();
    kill_at_random(this_test!(), 40);
}

/// The same for long: `cargo test -p vmpager --test attach -- --ignored`.
#[test]
#[ignore = "takes minutes"]
fn a_thousand_processes_killed_at_random_harm_nobody() {
    if have_userfaultfd() {
        // A child is not told that it may run what is ignored.
        kill_at_random("a_process_killed_at_random_harms_nobody", 1000);
    }
}

/// Writes to page after page, and over again.
fn write_for_ever(memory: &Mapping, which: usize, stop: &AtomicBool) {
    let pages = memory.len() / PAGE;
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        memory.write_u64(n * 7 % pages * PAGE + which * 8, n as u64);
    }
}

fn snapshot(memory: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; memory.len()];
    memory.read(0, &mut bytes);
    bytes
}

#[test]
fn a_freeze_stops_the_writers_of_three_processes() {
    if let Some(task) = child::task() {
        return run(&task);
    }
    begin!();
    let home = home(256);
    let test = this_test!();
    let _children = ["write 1", "write 2"].map(|task| spawn(test, task, &home));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| write_for_ever(&home.memory, 0, &stop));
        for round in 0..10 {
            // The first one while pages are still missing.
            std::thread::sleep(Duration::from_millis(round * 3));
            home.pager.freeze().unwrap();
            let before = snapshot(&home.memory);
            // Who comes during a freeze is kept from writing, too.
            let (attached, late) = view(&home);
            let writer = std::thread::spawn(move || {
                late.write_u64(8 * 3, round + 1);
                attached
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(snapshot(&home.memory) == before, "round {round}: somebody wrote");
            assert!(!writer.is_finished());
            home.pager.thaw().unwrap();
            writer.join().unwrap();
            for which in 0..3 {
                let words = || -> Vec<u64> {
                    (0..256).map(|at| home.memory.read_u64(at * PAGE + which * 8)).collect()
                };
                let frozen = words();
                eventually("a writer goes on", || words() != frozen);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn the_fault_queue_brings_pages_and_answers_at_once() {
    begin!();
    child::alone(this_test!(), brings_and_answers);
}

fn brings_and_answers() {
    let home = home(64);
    let (attached, memory) = view(&home);
    let gpa = |at: usize| (at * PAGE) as u64;
    attached.pages().request(gpa(3)).unwrap();
    eventually("it is brought without being touched", || {
        attached.pages().page(gpa(3)) == Some(Page::Present)
    });
    assert_eq!(attached.pages().wait(gpa(4), None).unwrap(), Page::Present);
    assert_eq!(page(&memory, 4 * PAGE), Holds::Source(4 * PAGE));
    assert!(matches!(attached.pages().wait(gpa(64), None), Err(WaitError::Gfn(64))));
    assert_eq!(home.pager.stats().faults_attached, 0, "no touch waited");
    assert_idle("a door, a view and an empty queue");
}

#[test]
fn a_page_that_cannot_be_had_is_an_answer() {
    begin!();
    let home = home(64);
    let bad = vmpager::core::ByteRange::new(9 * PAGE as u64, PAGE as u64);
    home.source.fail(bad, vmpager_store::faulty::Times::Always);
    let (attached, memory) = view(&home);
    assert_eq!(attached.pages().wait(9 * PAGE as u64, None).unwrap(), Page::Poisoned);
    assert!(page_by_kernel(&memory, 9 * PAGE).is_err(), "SIGBUS, not zeroes, in the view");
    assert!(page_by_kernel(&home.memory, 9 * PAGE).is_err(), "and at home");
    let (_late, late) = view(&home);
    assert!(page_by_kernel(&late, 9 * PAGE).is_err(), "and for who comes later");
    assert_eq!(page(&memory, 8 * PAGE), Holds::Source(8 * PAGE));
}

#[test]
fn a_wait_ends_in_time_or_when_the_queue_is_disabled_and_leaves_nothing() {
    begin!();
    child::alone(this_test!(), wait_ends);
}

fn wait_ends() {
    let home = home(64);
    home.source.hold(vmpager::core::ByteRange::new(0, 64 * PAGE as u64));
    home.source.never_at_hand();
    let (attached, _) = view(&home);
    let limit = Some(Duration::from_millis(50));
    assert!(matches!(attached.pages().wait(0, limit), Err(WaitError::TimedOut)));
    std::thread::scope(|scope| {
        let waits = (1..5).map(|at| {
            scope.spawn({
                let attached = &attached;
                move || attached.pages().wait(at * PAGE as u64, None)
            })
        });
        let waits: Vec<_> = waits.collect();
        std::thread::sleep(Duration::from_millis(50));
        let used = cpu_time_over(Duration::from_millis(300));
        assert!(used < Duration::from_millis(20), "waiting used {used:?} of CPU time");
        home.door.queue().disable();
        for wait in waits {
            assert!(matches!(wait.join().unwrap(), Err(WaitError::Disabled)));
        }
    });
    assert!(matches!(attached.pages().request(0), Err(WaitError::Disabled)));
    home.door.queue().enable();
    home.source.release();
    assert_eq!(attached.pages().wait(7 * PAGE as u64, None).unwrap(), Page::Present);
}

#[test]
fn what_a_view_gives_back_reads_zero_everywhere() {
    begin!();
    let home = home(64);
    let (attached, memory) = view(&home);
    assert_eq!(page(&memory, 2 * PAGE), Holds::Source(2 * PAGE));
    // Pages 2 and 3: one in place, one not fetched yet.
    memory.remove(2 * PAGE..4 * PAGE).unwrap();
    for at in [2, 3] {
        assert_eq!(page(&home.memory, at * PAGE), Holds::Zero);
        assert_eq!(page(&memory, at * PAGE), Holds::Zero);
    }
    assert_eq!(home.source.fetches(3), 0);
    drop(attached);
}

#[test]
fn bad_messages_are_refused_by_name_and_harm_nobody() {
    begin!();
    let home = home(64);
    let refusal = |bytes: &[u8]| {
        let mut socket = UnixStream::connect(&home.path).unwrap();
        socket.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        std::io::Read::read_to_end(&mut socket, &mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let frame = |version: u8, kind: u8, body: &[u8]| {
        let mut bytes = b"VMPA".to_vec();
        bytes.extend([version, 0, kind, 0, u8::try_from(body.len()).unwrap(), 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(body);
        bytes
    };
    for (bytes, words) in [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "not with \"VMPA\""),
        (frame(9, 1, &[]), "version 9"),
        (frame(1, 200, &[]), "kind 200"),
        (frame(1, 3, &[0; 8]), "View([0])"),
        ([frame(1, 1, &[]), frame(1, 1, &[])].concat(), "Offered"),
        ([frame(1, 1, &[]), frame(1, 3, &[0; 16])].concat(), "2 addresses for 1 regions"),
        ([frame(1, 1, &[]), frame(1, 3, &[0, 16, 0, 0, 0, 0, 0, 0])].concat(), "0 descriptors"),
    ] {
        let answer = refusal(&bytes);
        assert!(answer.contains(words), "{answer:?} does not say {words:?}");
    }
    let memory = view(&home).1;
    assert_eq!(page(&memory, PAGE), Holds::Source(PAGE), "served though nobody is attached");
    let nowhere = Attached::connect(Path::new("/nowhere")).unwrap_err();
    assert!(matches!(nowhere, AttachError::Connect { .. }), "{nowhere}");
}

/// A program in C, written from `docs/sharing.md` alone.
#[test]
fn a_program_in_c_takes_part() {
    begin!();
    let home = home(64);
    let program = home.path.with_file_name("sharing");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sharing.c");
    let gcc = std::process::Command::new("cc")
        .args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
        .args([program.as_os_str(), source.as_ref()])
        .output();
    match gcc {
        Ok(done) => assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr)),
        Err(error) => return vmpager_testing::skipped(&format!("no C compiler (cc): {error}")),
    }
    let done = std::process::Command::new(program).arg(&home.path).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(String::from_utf8_lossy(&done.stdout), "1\n4097\n8193\n");
    let mut last = [0];
    home.memory.read(3 * PAGE - 1, &mut last);
    assert_eq!(&last, b"C", "what the kernel wrote for it");
    let stats = home.pager.stats();
    assert_eq!((stats.faults_queued, stats.faults_attached), (1, 2));
}
