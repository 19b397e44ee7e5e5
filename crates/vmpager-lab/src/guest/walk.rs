//! The guest of `vmpager bench apf`: a task that computes, and others that walk
//! pages of their own. On the kernel's command line, `lab.walk=PAGES` says how many
//! each of the [`WALKERS`] has. It obeys `walk MILLISECONDS WALKERS PAGES`: one task
//! computes what takes so long, the others check so many of their pages, and a line
//! `walk: done ms=MILLISECONDS wrong=PAGES` says how long all of it took.

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::panic::resume_unwind;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::io::Errno;
use rustix::process::setpriority_process;

use super::CONSOLE;
use crate::init;
use crate::pages::{Kind, Page, mix};

const WALKERS: usize = 7;

/// The `nice` value of whoever computes.
const LEAST_PRIORITY: i32 = 19;

/// Over which the speed of computing is measured.
const MEASURED: Duration = Duration::from_millis(300);

/// Runs until it is told to turn the machine off.
pub(super) fn run(
    console: &mut File,
    commands: &Receiver<String>,
    pages: usize,
) -> anyhow::Result<()> {
    let all: Arc<Vec<Page>> = Arc::new(make(WALKERS * pages));
    let per_ms = speed();
    say(console, &format!("ready walkers={WALKERS} pages={pages}"))?;
    for command in commands {
        let words: Vec<&str> = command.split_whitespace().collect();
        match words[..] {
            [] => {}
            ["poweroff"] => init::power_off()?,
            // Whatever is needed to say something, and to listen.
            ["hello"] => say(console, "hello")?,
            ["walk", compute_ms, walkers, count] => {
                let number = |word: &str| word.parse::<u64>().context("a number in `walk`");
                let work = per_ms * number(compute_ms)?;
                let (walkers, count) = (usize::try_from(number(walkers)?)?, number(count)?);
                let count = usize::try_from(count)?.min(pages);
                let begin = Instant::now();
                let wrong = walk(&all, work, walkers.min(WALKERS), pages, count)?;
                let took = begin.elapsed().as_secs_f64() * 1e3;
                say(console, &format!("done ms={took:.3} wrong={wrong}"))?;
            }
            _ => say(console, &format!("unknown command {command:?}"))?,
        }
    }
    bail!("{CONSOLE} was closed")
}

fn say(console: &mut File, what: &str) -> anyhow::Result<()> {
    console.write_all(format!("walk: {what}\n").as_bytes()).context(CONSOLE)
}

fn make(count: usize) -> Vec<Page> {
    let mut pages = Page::zeroes(count);
    for (number, page) in (0..).zip(&mut pages) {
        page.write(Kind::Still, number, 0);
    }
    pages
}

/// Does both at the same time; how many pages were wrong.
fn walk(
    all: &Arc<Vec<Page>>,
    work: u64,
    walkers: usize,
    pages: usize,
    count: usize,
) -> anyhow::Result<usize> {
    let together = Arc::new(Barrier::new(walkers + 1));
    let threads: Vec<_> = (0..walkers)
        .map(|walker| {
            let (all, together) = (Arc::clone(all), Arc::clone(&together));
            thread::spawn(move || {
                together.wait();
                let own = walker * pages..walker * pages + count;
                own.filter(|at| all[*at].check(Kind::Still, *at as u64, 0).is_err()).count()
            })
        })
        .collect();
    together.wait();
    // In a thread of its own, for priorities are a thread's.
    let computing = thread::spawn(move || {
        // With the priority of the others it may run to its next tick before one of them
        // gets the page that has come: ticks would be measured, the same for everyone.
        setpriority_process(None, LEAST_PRIORITY)?;
        compute(work);
        Ok::<_, Errno>(())
    });
    // A walker that panicked has checked nothing.
    let wrong = threads.into_iter().map(|thread| thread.join().unwrap_or(count)).sum();
    match computing.join() {
        Ok(computed) => computed.context("being nice").map(|()| wrong),
        Err(panic) => resume_unwind(panic),
    }
}

fn compute(steps: u64) {
    for step in 0..steps {
        black_box(mix(step));
    }
}

/// Steps in a millisecond.
fn speed() -> u64 {
    let (begin, mut steps) = (Instant::now(), 0);
    while begin.elapsed() < MEASURED {
        compute(10_000);
        steps += 10_000;
    }
    let millis = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    (steps / millis.max(1)).max(1)
}
