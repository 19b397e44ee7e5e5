//! An installer beside the thread that applies removals, under loom, with a
//! model of what the kernel does to one page: no interleaving shows the
//! source's bytes in a page that was given back.
//!
//! Run by `cargo xtask loom`; without `--cfg loom` this file is empty.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use loom::sync::atomic::AtomicU64;
use loom::sync::{Arc, Mutex};
use loom::thread;
use vmpager_core::page_map::words_for;
use vmpager_core::prefetch::NeighbourPolicy;
use vmpager_core::{Content, Engine, Hva, PageRun, PageSize, Pages, Slot, SlotSet};

const PAGE: PageRun = PageRun { first: 0, count: 1 };
const BASE: u64 = 1 << 20;

/// One page as the kernel has it, and a `madvise(MADV_DONTNEED)` of it
/// (traps 1 and 2).
#[derive(Debug, Default)]
struct Kernel {
    from_source: bool,
    /// From the call on until its thread runs again after the event was read.
    /// Installs are refused with EAGAIN.
    changing: bool,
    unread: bool,
}

impl Kernel {
    /// `UFFDIO_COPY`.
    fn copy(&mut self) -> bool {
        if !self.changing {
            self.from_source = true;
        }
        !self.changing
    }
}

type Words = Box<[AtomicU64]>;

fn engine() -> Engine<Words> {
    let slot = Slot { hva: Hva(BASE), len: 4096, source_offset: 0, page_size: PageSize::Size4K };
    let words: Vec<_> = (0..words_for(1)).map(|_| AtomicU64::new(0)).collect();
    let slots = SlotSet::new(&[slot], 4096).unwrap();
    Engine::new(slots, words.into_boxed_slice(), NeighbourPolicy::Off)
}

/// What an installer does, within the gate or not.
fn install(pages: &Pages<Words>, gate: Option<&Mutex<()>>, kernel: &Mutex<Kernel>) {
    if pages.map().claim_up(0, 1) == 0 {
        return;
    }
    let _gate = gate.map(|gate| gate.lock().unwrap());
    if pages.still_claimed(PAGE).next() == Some(PAGE) && kernel.lock().unwrap().copy() {
        pages.installed(PAGE);
    }
}

fn remove(kernel: &Mutex<Kernel>) {
    {
        let mut kernel = kernel.lock().unwrap();
        (kernel.changing, kernel.unread) = (true, true);
    }
    while kernel.lock().unwrap().unread {
        thread::yield_now();
    }
    kernel.lock().unwrap().changing = false;
    kernel.lock().unwrap().from_source = false;
}

/// Reads the event once it is there and applies it.
fn apply(engine: &mut Engine<Words>, gate: Option<&Mutex<()>>, kernel: &Mutex<Kernel>) {
    loop {
        let _gate = gate.map(|gate| gate.lock().unwrap());
        if std::mem::take(&mut kernel.lock().unwrap().unread) {
            assert_eq!(engine.removed(Hva(BASE), Hva(BASE + 4096)), 1);
            return;
        }
        drop(_gate);
        thread::yield_now();
    }
}

fn race(with_gate: bool) {
    loom::model(move || {
        let mut engine = engine();
        let pages = engine.pages().clone();
        let kernel = Arc::new(Mutex::new(Kernel::default()));
        let gate = Arc::new(Mutex::new(()));
        let installer = {
            let (pages, kernel, gate) = (pages.clone(), kernel.clone(), gate.clone());
            thread::spawn(move || install(&pages, with_gate.then_some(&*gate), &kernel))
        };
        let remover = {
            let kernel = kernel.clone();
            thread::spawn(move || remove(&kernel))
        };
        apply(&mut engine, with_gate.then_some(&*gate), &kernel);
        installer.join().unwrap();
        remover.join().unwrap();
        assert!(!kernel.lock().unwrap().from_source, "bytes of the source came back");
        if with_gate {
            assert_eq!(pages.map().content(0), Content::Zero);
            assert_eq!(pages.outstanding(), 0);
        }
    });
}

#[test]
fn the_gate_keeps_removed_pages_removed() {
    race(true);
}

/// That the model can fail.
#[test]
#[should_panic(expected = "came back")]
fn without_the_gate_old_bytes_come_back() {
    race(false);
}
