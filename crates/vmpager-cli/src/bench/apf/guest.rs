//! The guest that walks: booted once, restored for each run.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use vmpager::NeighbourPolicy;
use vmpager::core::ByteRange;
use vmpager_store::RawFile;
use vmpager_store::faulty::FaultySource;
use vmpager_vm::{
    AsyncFaults, Delivery, InProcess, LinuxBoot, LinuxConfig, LinuxVm, RestoreMemory, Snapshot,
    SnapshotPaths,
};

use super::cpus::Cpus;
use crate::vm::AsyncPf;

const PAGE: u64 = 4096;

/// The first word of the pages that are walked.
const WALKED: u64 = 0x9b1e_64c8_5f07_a3d1;

/// How long the guest may be silent.
const PATIENCE: Duration = Duration::from_secs(120);

/// How pages come in a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) delivery: Delivery,
    pub(super) async_faults: Option<AsyncFaults>,
}

/// The work of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    /// How long the source takes for a page.
    pub(super) latency: Duration,
    pub(super) compute_ms: u64,
    pub(super) walkers: u64,
    pub(super) pages: u64,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Run {
    /// By the guest's clock.
    pub(super) seconds: f64,
    pub(super) told: Option<AsyncPf>,
}

/// A guest saved before its first walk.
#[derive(Debug)]
pub(super) struct WalkingGuest {
    snapshot: Snapshot,
    memory: PathBuf,
    /// Pages that are walked, in the memory file.
    walked: Vec<ByteRange>,
    /// The other pages that are not zero, by their offset.
    others: Vec<u64>,
    cpus: Cpus,
}

impl WalkingGuest {
    pub(super) fn boot(
        kernel: PathBuf,
        initrd: PathBuf,
        memory_bytes: u64,
        pages: u64,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        // No huge pages: a walk is of 4 KiB pages.
        let cmdline = format!("{} transparent_hugepage=never lab.walk={pages}", LinuxBoot::CMDLINE);
        let boot = LinuxBoot { kernel, initrd: Some(initrd), cmdline };
        let config = LinuxConfig { boot, memory_bytes, vcpus: 1, huge_pages: false };
        let (console, lines) = Console::new();
        let mut vm = LinuxVm::boot(&config, Box::new(console))?;
        let cpus = Cpus::set_apart()?;
        cpus.on_vcpus(|| vm.resume())??;
        find(&lines, "walk: ready")?;
        // It is not to go on, and that elsewhere, once it is saved.
        vm.pause();
        let paths = SnapshotPaths::in_dir(dir);
        let snapshot = vm.snapshot(&paths)?;
        let (walked, others) = look(&paths.memory)?;
        ensure!(!walked.is_empty(), "the guest's memory has no pages to be walked");
        Ok(Self { snapshot, memory: paths.memory, walked, others, cpus })
    }

    /// Restores it, has everything in place but the pages that are walked, and has
    /// them walked.
    pub(super) fn run(&self, walk: &Walk, way: Way) -> anyhow::Result<Run> {
        let source = FaultySource::wrap(RawFile::open(&self.memory)?);
        if !walk.latency.is_zero() {
            for range in &self.walked {
                source.delay(*range, walk.latency);
            }
        }
        let memory = RestoreMemory::InProcess(InProcess {
            delivery: way.delivery,
            async_faults: way.async_faults,
            neighbours: NeighbourPolicy::Off,
            source: Some(source),
            ..InProcess::default()
        });
        let (console, lines) = Console::new();
        let mut vm = LinuxVm::restore(&self.snapshot, memory, Box::new(console))?;
        for offset in &self.others {
            vm.memory().read_u64(usize::try_from(*offset)?);
        }
        self.cpus.on_vcpus(|| vm.resume())??;
        say(&vm, "hello\n")?;
        find(&lines, "walk: hello")?;
        let Walk { compute_ms, walkers, pages, .. } = walk;
        say(&vm, &format!("walk {compute_ms} {walkers} {pages}\n"))?;
        let done = find(&lines, "walk: done")?;
        vm.pause();
        let number = |key: &str| {
            let mut words = done.split_whitespace();
            words.find_map(|word| word.strip_prefix(key)?.parse::<f64>().ok())
        };
        let wrong = number("wrong=").with_context(|| format!("no `wrong=` in {done:?}"))?;
        ensure!(wrong == 0.0, "the guest found wrong pages: {done}");
        let millis = number("ms=").with_context(|| format!("no `ms=` in {done:?}"))?;
        let stats = vm.async_fault_stats().zip(vm.exit_stats());
        let told = stats.map(|(stats, exits)| AsyncPf::new(stats, exits));
        Ok(Run { seconds: millis / 1e3, told })
    }
}

/// Which pages of a memory file are walked, and which of the others hold anything.
fn look(path: &Path) -> anyhow::Result<(Vec<ByteRange>, Vec<u64>)> {
    let at = || format!("reading {}", path.display());
    let mut file = BufReader::with_capacity(1 << 20, File::open(path).with_context(at)?);
    let (mut walked, mut others): (Vec<ByteRange>, _) = (Vec::new(), Vec::new());
    let mut page = [0; 4096];
    for offset in (0..).step_by(page.len()) {
        match file.read_exact(&mut page) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error).with_context(at),
        }
        if page.starts_with(&WALKED.to_le_bytes()) {
            match walked.last_mut() {
                Some(last) if last.end() == offset => last.len += PAGE,
                _ => walked.push(ByteRange::new(offset, PAGE)),
            }
        } else if page.iter().any(|byte| *byte != 0) {
            others.push(offset);
        }
    }
    Ok((walked, others))
}

fn say(vm: &LinuxVm, command: &str) -> anyhow::Result<()> {
    let (console, deadline) = (vm.console(), Instant::now() + PATIENCE);
    let mut left = command.as_bytes();
    while !left.is_empty() {
        let taken = console.send(left, Duration::from_secs(1));
        left = left.get(taken..).unwrap_or_default();
        ensure!(Instant::now() < deadline, "the guest does not read its console");
    }
    Ok(())
}

/// Waits for a line of the guest's that has this in it.
fn find(lines: &Receiver<String>, what: &str) -> anyhow::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    let mut last = String::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(line) = lines.recv_timeout(left) else {
            bail!("the guest did not say `{what}`; the last it said was {last:?}")
        };
        if line.contains(what) {
            return Ok(line);
        }
        last = line;
    }
}

/// A guest's console, in lines.
struct Console {
    line: Vec<u8>,
    lines: Sender<String>,
}

impl Console {
    fn new() -> (Self, Receiver<String>) {
        let (lines, receiver) = channel();
        (Self { line: Vec::new(), lines }, receiver)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line).trim_end().to_owned();
                // Nobody may be listening any more.
                let _ = self.lines.send(line);
                self.line.clear();
            } else {
                self.line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
