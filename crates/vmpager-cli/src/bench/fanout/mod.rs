//! `vmpager bench fanout`: what the memory of many VMs of one image takes.
//!
//! The daemon is `vmpager serve --image`; each VM is a process with memory and a
//! userfaultfd of its own, that touches all of its memory, compares what it finds and
//! writes to some of it. The memory is counted when all are done and still there: each
//! page once, however many have it (`Pss` of `/proc/PID/smaps_rollup`), of VMs and
//! daemon alike.

mod client;

use std::io::{BufRead, BufReader};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use serde::Serialize;
use vmpager_store::MemorySource;
use vmpager_store::image::{Codec, MemoryInput, PackOptions};

use self::client::Plan;
use super::daemon::{Daemon, proportional};
use super::{round, to_f64};
use crate::restore::process::{Running, vmpager_to_talk_to};
use crate::scratch::Scratch;
use crate::{output, size};

/// Options of `vmpager bench fanout`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager bench fanout --json\n  \
    vmpager bench fanout --vms 10,50 --memory 256M --written 5\n\n\
    \"copies\" are VMs with anonymous memory, as Firecracker's is: each gets a copy of what\n\
    it touches. \"shared\" are VMs that map the daemon's clean pages (vmpager serve\n\
    --share-clean). The ratio is of all memory, the daemon's too, to that of the copies.")]
pub(crate) struct FanoutArgs {
    /// How many VMs.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,10,50",
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    vms: Vec<u32>,
    /// Memory of each, none of it zero.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size::parse)]
    memory: u64,
    /// How much of it each VM writes to, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 10,
          value_parser = clap::value_parser!(u8).range(0..=100))]
    written: u8,
    /// Where to put the image [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Be a VM.
    #[arg(long, hide = true)]
    play: Option<String>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    memory_bytes: u64,
    written_percent: u8,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    mode: &'static str,
    vms: u32,
    /// Of VMs and daemon, each page once, in bytes.
    memory_bytes: u64,
    /// The daemon's part of it.
    daemon_bytes: u64,
    /// To that of as many copies.
    ratio_copies: f64,
    /// Pages that the daemon has for all of them.
    clean_pages: Option<u64>,
}

/// How VMs have their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Copies,
    Shared,
}

impl Mode {
    const ALL: [Self; 2] = [Self::Copies, Self::Shared];

    fn name(self) -> &'static str {
        match self {
            Self::Copies => "copies",
            Self::Shared => "shared",
        }
    }
}

pub(crate) fn run(args: &FanoutArgs) -> anyhow::Result<()> {
    if let Some(plan) = &args.play {
        return client::run(plan);
    }
    let bytes = args.memory.next_multiple_of(2 << 20);
    let scratch = Scratch::new(args.dir.as_deref(), 2 * bytes)?;
    let image = make_image(bytes, scratch.path())?;
    let bar = ProgressBar::new_spinner();
    let mut rows: Vec<Row> = Vec::new();
    for &vms in &args.vms {
        let mut copies = None;
        for mode in Mode::ALL {
            bar.set_message(format!("{vms} VMs, {}", mode.name()));
            bar.tick();
            let bench = Bench { args, vms, mode, image: &image, dir: scratch.path(), bytes };
            let mut row = bench.run()?;
            let copies = *copies.get_or_insert(row.memory_bytes);
            row.ratio_copies = round(to_f64(row.memory_bytes) / to_f64(copies));
            rows.push(row);
        }
    }
    bar.finish_and_clear();
    let report = Report { memory_bytes: bytes, written_percent: args.written, rows };
    if args.json { output::json(&report) } else { show(&report) }
}

fn make_image(bytes: u64, dir: &Path) -> anyhow::Result<PathBuf> {
    let (raw, image) = (dir.join("memory"), dir.join("image"));
    std::fs::write(&raw, MemorySource::numbered(bytes / 4096).bytes())
        .context("writing the memory file")?;
    let input = MemoryInput::raw(&raw)?;
    let options = PackOptions::default().codec(Codec::Lz4);
    options.pack(&input, &image, &mut |_| ControlFlow::Continue(()))?;
    std::fs::remove_file(&raw).context("removing the memory file")?;
    Ok(image)
}

/// One daemon and so many VMs.
struct Bench<'a> {
    args: &'a FanoutArgs,
    vms: u32,
    mode: Mode,
    image: &'a Path,
    dir: &'a Path,
    bytes: u64,
}

impl Bench<'_> {
    fn run(&self) -> anyhow::Result<Row> {
        let socket = self.dir.join("pager.sock");
        let mut options = vec![Path::new("--image"), self.image];
        options.extend((self.mode == Mode::Shared).then_some(Path::new("--share-clean")));
        let daemon = Daemon::with(&socket, &options)?;
        let plan = Plan {
            socket: socket.clone(),
            bytes: usize::try_from(self.bytes)?,
            written_percent: self.args.written,
            shares: self.mode == Mode::Shared,
        };
        let plan = serde_json::to_string(&plan)?;
        let args = ["bench", "fanout", "--play", &plan].map(PathBuf::from);
        let vms: anyhow::Result<Vec<Vm>> = (0..self.vms).map(|_| Vm::start(&args)).collect();
        let mut vms = vms?;
        vms.iter_mut().try_for_each(Vm::wait_until_done)?;
        let processes = vms.iter().map(|vm| vm.running.id().context("a VM has ended"));
        let processes: Vec<u32> = processes.collect::<anyhow::Result<_>>()?;
        let daemon_bytes = all_of(&daemon.processes()?)?;
        let memory_bytes = all_of(&processes)? + daemon_bytes;
        vms.into_iter().try_for_each(Vm::end)?;
        let clean_pages = daemon.stop()?.clean_pages;
        let (mode, vms) = (self.mode.name(), self.vms);
        Ok(Row { mode, vms, memory_bytes, daemon_bytes, ratio_copies: 1.0, clean_pages })
    }
}

fn all_of(processes: &[u32]) -> anyhow::Result<u64> {
    processes.iter().map(|process| proportional(*process)).sum()
}

/// A process that is a VM.
struct Vm {
    running: Running,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Vm {
    fn start(args: &[PathBuf]) -> anyhow::Result<Self> {
        let (running, to, from) = vmpager_to_talk_to(args)?;
        Ok(Self { running, to, from })
    }

    /// Waits until it has touched all of its memory.
    fn wait_until_done(&mut self) -> anyhow::Result<()> {
        let mut line = String::new();
        self.from.read_line(&mut line).context("hearing a VM")?;
        match line.as_str() {
            client::DONE_LINE => Ok(()),
            _ => bail!("a VM ended before it was done; it says why"),
        }
    }

    fn end(self) -> anyhow::Result<()> {
        drop((self.to, self.from));
        self.running.output().map(drop).context("a VM")
    }
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{:>6} {:>8} {:>12} {:>12} {:>7}",
        "VMs", "memory", "all", "the daemon", "ratio"
    ))?;
    for row in &report.rows {
        output::line(&format!(
            "{:>6} {:>8} {:>12} {:>12} {:>7.3}",
            row.vms,
            row.mode,
            size::show(row.memory_bytes),
            size::show(row.daemon_bytes),
            row.ratio_copies
        ))?;
    }
    Ok(())
}
