//! The init of a Linux guest: a load that keeps memory changing, and checks
//! all the time that memory is what it ought to be. What it says on the console
//! begins with `load:`; it obeys what is typed there:
//!
//! | command | effect |
//! |---|---|
//! | `stop` | ends the load, checks everything once more, tells the verdict |
//! | `interrupts` | tells how often the host said that a page is ready |
//! | `cpu1 0`, `cpu1 1` | takes the second CPU offline, or back; says the same then |
//! | `poweroff`, `reset` | what the words say |
//! | `panic` | the guest's kernel panics |
//!
//! The kernel's command line says how much of it there is: `lab.load=THREADS`,
//! `lab.still=PAGES`, `lab.readers=THREADS` (that go through these),
//! `lab.moving=PAGES` (for each thread). With `lab.walk=PAGES` it is another guest:
//! `walk`.

mod load;
mod walk;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::init::{self, CommandLine};
use load::{Load, Size, Threads};

const CONSOLE: &str = "/dev/console";

/// Between two lines that tell how far the load is.
const BEAT: Duration = Duration::from_millis(250);

/// Runs until it is told to turn the machine off; returns only to panic it.
pub(crate) fn run(command_line: &CommandLine) -> anyhow::Result<()> {
    let open = || OpenOptions::new().read(true).write(true).open(CONSOLE);
    let mut console = open().context(CONSOLE)?;
    let commands = listen(open().context(CONSOLE)?);
    let walked = command_line.number("lab.walk", 0)?;
    if walked > 0 {
        return walk::run(&mut console, &commands, walked);
    }
    let size = Size {
        writers: command_line.number("lab.load", 1)?,
        readers: command_line.number("lab.readers", 1)?,
        still: command_line.number("lab.still", 2048)?,
        moving: command_line.number("lab.moving", 1024)?,
    };
    let load = Arc::new(Load::default());
    let mut threads = Some(Threads::start(&load, &size));
    let Size { writers, still, moving, .. } = size;
    let cpus = thread::available_parallelism().context("counting CPUs")?;
    say(
        &mut console,
        &format!("ready writers={writers} still={still} moving={moving} cpus={cpus}"),
    )?;

    let mut beats = 0u64;
    let begin = Instant::now();
    loop {
        match commands.recv_timeout(BEAT) {
            Ok(command) => match command.trim() {
                "" => {}
                "stop" => {
                    end(&mut threads, &load);
                    tell_verdict(&mut console, &load)?;
                }
                "interrupts" => tell_interrupts(&mut console)?,
                "cpu1 0" | "cpu1 1" => set_second_cpu(&mut console, command.trim())?,
                // A kernel whose tick is the PIT stops it before it is done, and whoever
                // has its CPU then keeps it: nobody may want it, as with any init.
                "poweroff" => {
                    end(&mut threads, &load);
                    init::power_off()?;
                }
                "reset" => {
                    end(&mut threads, &load);
                    init::reset()?;
                }
                "panic" => bail!("told to"),
                other => say(&mut console, &format!("unknown command {other:?}"))?,
            },
            Err(RecvTimeoutError::Timeout) if threads.is_none() => {}
            Err(RecvTimeoutError::Timeout) => {
                beats += 1;
                tell_beat(&mut console, &load, beats, begin.elapsed())?;
            }
            Err(RecvTimeoutError::Disconnected) => bail!("{CONSOLE} was closed"),
        }
    }
}

/// Ends the load, if it has not ended.
fn end(threads: &mut Option<Threads>, load: &Load) {
    if let Some(threads) = threads.take() {
        threads.stop(load);
    }
}

fn listen(console: File) -> Receiver<String> {
    let (sender, commands) = channel();
    thread::spawn(move || {
        for line in BufReader::new(console).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    commands
}

/// The guest's kernel counts interrupts of asynchronous page faults, on all CPUs, as
/// the hypervisor's.
fn tell_interrupts(console: &mut File) -> anyhow::Result<()> {
    const COUNTS: &str = "/proc/interrupts";
    let counts = std::fs::read_to_string(COUNTS).context(COUNTS)?;
    let line = counts.lines().find_map(|line| line.trim_start().strip_prefix("HYP:"));
    let numbers = line.unwrap_or_default().split_whitespace().map_while(|n| n.parse::<u64>().ok());
    say(console, &format!("interrupts async_pf={}", numbers.sum::<u64>()))
}

/// `cpu1 0`, or `cpu1 1`.
fn set_second_cpu(console: &mut File, command: &str) -> anyhow::Result<()> {
    const ONLINE: &str = "/sys/devices/system/cpu/cpu1/online";
    let state = command.strip_prefix("cpu1 ").unwrap_or_default();
    std::fs::write(ONLINE, state).with_context(|| format!("writing {state} to {ONLINE}"))?;
    say(console, command)
}

/// One line, in one piece.
fn say(console: &mut File, what: &str) -> anyhow::Result<()> {
    console.write_all(format!("load: {what}\n").as_bytes()).context(CONSOLE)
}

fn tell_beat(console: &mut File, load: &Load, beats: u64, running: Duration) -> anyhow::Result<()> {
    let numbers = numbers(load);
    let millis = running.as_millis();
    say(
        console,
        &format!("beat n={beats} {numbers} clock_ms={millis} wrong={}", load.wrong().len()),
    )
}

fn tell_verdict(console: &mut File, load: &Load) -> anyhow::Result<()> {
    let wrong = load.wrong();
    for what in wrong.iter().take(8) {
        say(console, &format!("wrong: {what}"))?;
    }
    let verdict = if wrong.is_empty() { "right" } else { "wrong" };
    say(console, &format!("verdict {verdict} {} wrong={}", numbers(load), wrong.len()))
}

fn numbers(load: &Load) -> String {
    let [written, read, passed] =
        [&load.written, &load.read, &load.passed].map(|count| count.load(Ordering::Relaxed));
    format!("written={written} read={read} passed={passed}")
}
