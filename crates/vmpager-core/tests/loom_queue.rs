//! The fault queue under loom, with threads that die at any of their steps: no
//! fault is lost, and no waiter sleeps on.
//!
//! Run by `cargo xtask loom`; without `--cfg loom` this file is empty.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use loom::sync::atomic::AtomicU64;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use vmpager_core::Words;
use vmpager_core::queue::{FaultQueue, Position, Request, Taken, WORDS};

/// The words, what stands in for futexes and the eventfd, and for the page.
#[derive(Debug)]
struct Shared {
    words: Box<[AtomicU64]>,
    futex: Mutex<()>,
    woken: Condvar,
    /// The eventfd, and whether the page is present.
    bell: Mutex<(bool, bool)>,
    rung: Condvar,
}

/// A process: it dies when it has looked at the words so many times.
#[derive(Clone, Debug)]
struct Process {
    shared: Arc<Shared>,
    left: std::rc::Rc<Cell<usize>>,
}

struct Died;

impl Deref for Process {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

/// The words as one process sees them.
#[derive(Debug)]
struct Fused(Process);

impl Words for Fused {
    fn words(&self) -> &[AtomicU64] {
        self.0.step();
        &self.0.shared.words
    }
}

impl Process {
    fn new(shared: &Arc<Shared>, left: usize) -> (Self, FaultQueue<Fused>) {
        let left = std::rc::Rc::new(Cell::new(left));
        let process = Self { shared: shared.clone(), left };
        let it = process.clone();
        let steps = it.left.replace(usize::MAX);
        let queue = FaultQueue::open(Fused(process)).unwrap();
        it.left.set(steps);
        (it, queue)
    }

    /// Dies if its time has come.
    fn step(&self) {
        match self.left.get() {
            0 => resume_unwind(Box::new(Died)),
            left => self.left.set(left - 1),
        }
    }

    fn ring(&self) {
        self.step();
        self.bell.lock().unwrap().0 = true;
        self.rung.notify_all();
    }

    fn wake(&self) {
        self.step();
        drop(self.futex.lock().unwrap());
        self.woken.notify_all();
    }

    fn is_present(&self) -> bool {
        self.bell.lock().unwrap().1
    }
}

fn shared() -> Arc<Shared> {
    let words: Box<[AtomicU64]> = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
    let shared = Arc::new(Shared {
        words,
        futex: Mutex::new(()),
        woken: Condvar::new(),
        bell: Mutex::new((false, false)),
        rung: Condvar::new(),
    });
    FaultQueue::new(&shared.words[..]).enable();
    shared
}

/// Three threads have too many ways to go through: those with up to two
/// preemptions at any place are tried.
fn model(what: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(what);
}

/// What happens if the process dies is up to the others. True if it lived.
fn may_die(what: impl FnOnce()) -> bool {
    match catch_unwind(AssertUnwindSafe(what)) {
        Ok(()) => true,
        Err(died) if died.is::<Died>() => false,
        Err(other) => resume_unwind(other),
    }
}

/// A producer: asks for page 0 and waits until it is present.
fn wait_for_page(process: &Process, queue: &FaultQueue<Fused>) {
    while !process.is_present() {
        match queue.request(0, true) {
            Request::Queued(position) => {
                process.ring();
                sleep(process, queue, position);
            }
            Request::Merged { position, tell } => {
                if tell {
                    process.ring();
                }
                sleep(process, queue, position);
            }
            Request::Full => thread::yield_now(),
            Request::Disabled => return,
        }
    }
}

fn sleep(process: &Process, queue: &FaultQueue<Fused>, position: Position) {
    let mut guard = process.futex.lock().unwrap();
    // The page may have come before it was asked for.
    while !queue.is_over(position) && !process.is_present() {
        guard = process.woken.wait(guard).unwrap();
    }
}

/// What a reader does with a fault.
fn bring(process: &Process, queue: &FaultQueue<Fused>, taken: &Taken) {
    assert_eq!(taken.gfn, 0);
    process.step();
    process.bell.lock().unwrap().1 = true;
    process.step();
    if queue.commit(taken) {
        process.wake();
    }
}

/// A reader: sleeps on the bell, and takes faults until the page is there.
fn read(process: &Process, queue: &FaultQueue<Fused>, reader: u64, until: usize) {
    let mut done = 0;
    while done < until {
        match queue.take(reader) {
            Some(taken) => {
                bring(process, queue, &taken);
                done += 1;
            }
            None => {
                let mut bell = process.bell.lock().unwrap();
                while !bell.0 {
                    bell = process.rung.wait(bell).unwrap();
                }
                bell.0 = false;
                drop(bell);
                // What was queued before the bell was silenced is still seen.
            }
        }
    }
}

#[test]
fn two_that_ask_for_one_page_queue_it_once() {
    loom::model(|| {
        let shared = shared();
        let ask = |gfn| {
            let shared = shared.clone();
            thread::spawn(move || Process::new(&shared, usize::MAX).1.request(gfn, true))
        };
        let (a, b) = (ask(3), ask(3));
        let answers = [a.join().unwrap(), b.join().unwrap()];
        let queued = answers.iter().filter(|a| matches!(a, Request::Queued(_))).count();
        assert_eq!(queued, 1, "{answers:?}");
        let queue = FaultQueue::open(&shared.words[..]).unwrap();
        assert_eq!(queue.take(0).map(|t| t.gfn), Some(3));
        assert_eq!(queue.take(0), None);
    });
}

#[test]
fn a_fault_is_taken_by_one_reader() {
    loom::model(|| {
        let shared = shared();
        let queue = FaultQueue::open(&shared.words[..]).unwrap();
        assert!(matches!(queue.request(1, true), Request::Queued(_)));
        let take = |reader| {
            let shared = shared.clone();
            thread::spawn(move || Process::new(&shared, usize::MAX).1.take(reader))
        };
        let (a, b) = (take(1), take(2));
        let taken = [a.join().unwrap(), b.join().unwrap()];
        assert_eq!(taken.iter().flatten().count(), 1, "{taken:?}");
    });
}

#[test]
fn no_wake_is_lost() {
    loom::model(|| {
        let shared = shared();
        let producer = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (process, queue) = Process::new(&shared, usize::MAX);
                wait_for_page(&process, &queue);
            })
        };
        let (process, queue) = Process::new(&shared, usize::MAX);
        read(&process, &queue, 0, 1);
        producer.join().unwrap();
    });
}

/// Explores a program in which one process dies after so many steps, for each
/// number of steps up to all it has. `program` says whether it lived to its end.
fn dying_at_any_step(program: fn(usize) -> bool) {
    for steps in 0..100 {
        let lived = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let seen = lived.clone();
        model(move || {
            if !program(steps) {
                seen.store(false, std::sync::atomic::Ordering::Relaxed);
            }
        });
        if lived.load(std::sync::atomic::Ordering::Relaxed) {
            assert!(steps > 5, "it has more steps than that");
            return;
        }
    }
    panic!("it always died");
}

/// Kills a producer of a page at each of its steps; a second one asks for the
/// same page, and must get it.
#[test]
fn a_producer_that_dies_at_any_step_harms_nobody() {
    dying_at_any_step(|steps| {
        let shared = shared();
        let dying = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (process, queue) = Process::new(&shared, steps);
                may_die(|| match queue.request(0, true) {
                    Request::Queued(_) | Request::Merged { tell: true, .. } => process.ring(),
                    _ => {}
                })
            })
        };
        let reader = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (process, queue) = Process::new(&shared, usize::MAX);
                read(&process, &queue, 0, 1);
            })
        };
        let (process, queue) = Process::new(&shared, usize::MAX);
        wait_for_page(&process, &queue);
        let lived = dying.join().unwrap();
        reader.join().unwrap();
        lived
    });
}

/// Kills a reader at each of its steps; somebody notices, and another reader
/// brings the page.
#[test]
fn a_reader_that_dies_at_any_step_loses_no_fault() {
    dying_at_any_step(|steps| {
        let shared = shared();
        let producer = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (process, queue) = Process::new(&shared, usize::MAX);
                wait_for_page(&process, &queue);
            })
        };
        let (process, queue) = Process::new(&shared, steps);
        let lived = may_die(|| read(&process, &queue, 1, 1));
        if !lived {
            let (process, queue) = Process::new(&shared, usize::MAX);
            queue.recover(1);
            process.ring();
            // It may have died with the page in place and the waiter awake.
            while !process.is_present() || queue.has_queued() {
                read(&process, &queue, 2, 1);
            }
            // Or between the commit and the wake.
            process.wake();
        }
        producer.join().unwrap();
        lived
    });
}

#[test]
fn disabling_leaves_no_waiter_asleep() {
    loom::model(|| {
        let shared = shared();
        let producer = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (process, queue) = Process::new(&shared, usize::MAX);
                wait_for_page(&process, &queue);
            })
        };
        let (process, queue) = Process::new(&shared, usize::MAX);
        queue.disable(|_| process.wake());
        producer.join().unwrap();
        assert!(!queue.has_queued(), "nobody waits for it");
    });
}
