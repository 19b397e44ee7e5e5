//! The threads of the load.
//!
//! - Writers, one for each vCPU or more: each has pages of its own; takes one at
//!   random, checks that it is of the generation it was left in, writes the
//!   next. A page that was lost, or came back from an older time, is found when
//!   it is next taken, the latest at the end.
//! - Readers, one or more, check the pages that never change, each in a random order
//!   of its own.
//! - Two threads pass a growing number to each other and sleep in between: lost
//!   wake-ups and lost timers stop them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::pages::{Difference, Kind, Page, mix};

/// How long a passed number may take; far longer than any restore stops a
/// guest.
const PASSING: Duration = Duration::from_secs(60);

/// How much of a load.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) writers: usize,
    pub(super) readers: usize,
    /// Pages that never change.
    pub(super) still: usize,
    /// Pages of each writer.
    pub(super) moving: usize,
}

/// What the threads have done and found.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Pages written by the writers.
    pub(super) written: AtomicU64,
    /// Pages checked by the readers.
    pub(super) read: AtomicU64,
    /// Numbers passed.
    pub(super) passed: AtomicU64,
    over: AtomicBool,
    wrong: Mutex<Vec<String>>,
}

impl Load {
    /// Everything that was not what it ought to be.
    pub(super) fn wrong(&self) -> MutexGuard<'_, Vec<String>> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, found: Result<(), Difference>) {
        if let Err(difference) = found {
            self.wrong().push(difference.to_string());
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// The running threads.
#[derive(Debug)]
pub(super) struct Threads(Vec<JoinHandle<()>>);

impl Threads {
    /// Makes the pages, then starts the threads.
    pub(super) fn start(load: &Arc<Load>, size: &Size) -> Self {
        let mut threads = Vec::new();
        for writer in 0..size.writers {
            let mut pages = Moving::new(writer, size.moving);
            let load = Arc::clone(load);
            threads.push(thread::spawn(move || pages.run(&load)));
        }
        let still = Arc::new(still(size.still));
        let readers = size.readers;
        for reader in 0..readers {
            let still = Arc::clone(&still);
            threads.push(spawn(load, move |load| walk((reader, readers), &still, load)));
        }
        let ((to_there, there), (to_here, here)) = (channel(), channel());
        threads.push(spawn(load, move |load| pass(&here, &to_there, load, Some(1))));
        threads.push(spawn(load, move |load| pass(&there, &to_here, load, None)));
        Self(threads)
    }

    /// Ends the threads; all they have is checked before they go.
    pub(super) fn stop(self, load: &Load) {
        load.over.store(true, Ordering::Relaxed);
        for thread in self.0 {
            if thread.join().is_err() {
                load.wrong().push("a thread of the load panicked".into());
            }
        }
    }
}

fn spawn(load: &Arc<Load>, run: impl FnOnce(&Load) + Send + 'static) -> JoinHandle<()> {
    let load = Arc::clone(load);
    thread::spawn(move || run(&load))
}

/// The pages of a writer, and the generation in which it left each.
struct Moving {
    first: u64,
    pages: Vec<Page>,
    generations: Vec<u64>,
}

impl Moving {
    fn new(writer: usize, count: usize) -> Self {
        let mut pages = Page::zeroes(count);
        let first = (writer * count) as u64;
        for (number, page) in (first..).zip(&mut pages) {
            page.write(Kind::Moving, number, 0);
        }
        Self { first, pages, generations: vec![0; count] }
    }

    fn run(&mut self, load: &Load) {
        for at in random(self.first, self.pages.len()).take_while(|_| !load.is_over()) {
            load.note(self.check(at));
            self.generations[at] += 1;
            let number = self.first + at as u64;
            self.pages[at].write(Kind::Moving, number, self.generations[at]);
            load.written.fetch_add(1, Ordering::Relaxed);
        }
        (0..self.pages.len()).for_each(|at| load.note(self.check(at)));
    }

    fn check(&self, at: usize) -> Result<(), Difference> {
        self.pages[at].check(Kind::Moving, self.first + at as u64, self.generations[at])
    }
}

fn still(count: usize) -> Vec<Page> {
    let mut pages = Page::zeroes(count);
    for (number, page) in (0..).zip(&mut pages) {
        page.write(Kind::Still, number, 0);
    }
    pages
}

fn walk((reader, readers): (usize, usize), pages: &[Page], load: &Load) {
    let check = |at: usize| load.note(pages[at].check(Kind::Still, at as u64, 0));
    for at in random(!(reader as u64), pages.len()).take_while(|_| !load.is_over()) {
        check(at);
        load.read.fetch_add(1, Ordering::Relaxed);
    }
    // Together they check all, and no two wait for one page.
    let part = |reader: usize| pages.len() * reader / readers;
    (part(reader)..part(reader + 1)).for_each(check);
}

/// Endless numbers below `count`, in an order that depends on `seed`; none if
/// `count` is 0.
fn random(seed: u64, count: usize) -> impl Iterator<Item = usize> {
    let numbers = (1..).map(move |step: u64| mix(seed ^ mix(step)));
    let count = count as u64;
    numbers.map_while(move |number| usize::try_from(number.checked_rem(count)?).ok())
}

/// Takes the number that must come next, passes the one after it on.
fn pass(from: &Receiver<u64>, to: &Sender<u64>, load: &Load, first: Option<u64>) {
    let mut expected = 1;
    if let Some(first) = first {
        // The other end takes odd numbers, this one even ones.
        let _ = to.send(first);
        expected = 2;
    }
    while !load.is_over() {
        match from.recv_timeout(PASSING) {
            Ok(number) if number == expected => {}
            Ok(number) => {
                load.wrong().push(format!("passed number {number}, not {expected}"));
                return;
            }
            Err(RecvTimeoutError::Timeout) => {
                load.wrong().push(format!("number {expected} did not come"));
                return;
            }
            // The other end has seen the load end first.
            Err(RecvTimeoutError::Disconnected) => return,
        }
        thread::sleep(Duration::from_millis(1));
        load.passed.fetch_add(1, Ordering::Relaxed);
        if to.send(expected + 1).is_err() {
            return;
        }
        expected += 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Size = Size { writers: 2, readers: 2, still: 16, moving: 8 };

    fn run(size: &Size, spoil: impl FnOnce(&Load)) -> Arc<Load> {
        let load = Arc::new(Load::default());
        let threads = Threads::start(&load, size);
        let enough = |count: &AtomicU64| count.load(Ordering::Relaxed) > 20;
        while ![&load.written, &load.read, &load.passed].into_iter().all(enough) {
            thread::sleep(Duration::from_millis(1));
        }
        spoil(&load);
        threads.stop(&load);
        load
    }

    #[test]
    fn a_load_on_good_memory_finds_nothing_wrong() {
        let load = run(&SMALL, |_| ());
        assert!(load.wrong().is_empty(), "{:?}", load.wrong());
    }

    #[test]
    fn a_page_of_an_older_generation_is_found() {
        let load = Load::default();
        let mut pages = Moving::new(1, 4);
        let old = pages.pages[2].clone();
        pages.generations[2] = 1;
        pages.pages[2].write(Kind::Moving, pages.first + 2, 1);
        load.over.store(true, Ordering::Relaxed);
        pages.run(&load);
        assert!(load.wrong().is_empty(), "{:?}", load.wrong());
        pages.pages[2] = old;
        pages.run(&load);
        assert_eq!(load.wrong().len(), 1, "{:?}", load.wrong());
    }

    #[test]
    fn a_number_that_is_not_the_next_is_found() {
        let load = Load::default();
        let ((to_it, from_here), (to_here, from_it)) = (channel(), channel());
        to_it.send(1).expect("it listens");
        to_it.send(5).expect("it listens");
        pass(&from_here, &to_here, &load, None);
        assert_eq!(from_it.recv(), Ok(2));
        assert_eq!(*load.wrong(), ["passed number 5, not 3"]);
    }
}
