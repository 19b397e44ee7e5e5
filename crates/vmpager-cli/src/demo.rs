//! `vmpager demo`: the main job, end to end.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use vmpager_vm::{Snapshot, SnapshotPaths, Vm, VmConfig};

use crate::output;
use crate::restore::{Cache, Mode, Restored, Work, prepare_cache, restore, warm_up_memory};
use crate::scratch::Scratch;
use crate::size;
use crate::vm_process::{GuestCpu, cpu_name, millis};

/// Options of `vmpager demo`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager demo --memory 1G\n\n\
    Exit status: 0 if every page of every restore was right, 1 otherwise.")]
pub(crate) struct DemoArgs {
    /// Guest memory.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size::parse)]
    memory: u64,
    /// Where to put the snapshot [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// What plays the vCPU.
    #[arg(long, value_enum, default_value_t = GuestCpu::Auto)]
    cpu: GuestCpu,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

const MODES: [Mode; 4] = [Mode::Eager, Mode::Mmap, Mode::OnDemand, Mode::OnDemandFill];

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct DemoReport {
    vm: &'static str,
    memory_bytes: u64,
    runs: Vec<Run>,
    pages_verified: u64,
    mismatches: u64,
}

#[derive(Debug, Serialize)]
struct Run {
    mode: &'static str,
    first_instruction_ms: f64,
    workload_ms: f64,
    full_ms: Option<f64>,
    faults: u64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
    bytes_read: u64,
}

impl Run {
    fn new(mode: Mode, restored: &Restored) -> Self {
        let vm = &restored.vm;
        Self {
            mode: mode.name(),
            first_instruction_ms: vm.first_instruction_ms,
            workload_ms: vm.workload_ms,
            full_ms: restored.full_ms,
            faults: restored.faults,
            p50_us: vm.p50_us,
            p99_us: vm.p99_us,
            max_us: vm.max_us,
            bytes_read: restored.bytes_read,
        }
    }
}

/// Tells a person what is going on; silent with `--json`.
struct Story {
    silent: bool,
}

impl Story {
    fn tell(&self, text: &str) -> anyhow::Result<()> {
        if self.silent { Ok(()) } else { output::line(text) }
    }

    /// A spinner on a terminal's stderr, nothing elsewhere.
    fn work(&self, what: &'static str) -> ProgressBar {
        let bar = if self.silent { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        let style = ProgressStyle::with_template("  {spinner} {msg} {elapsed}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_message(what);
        bar.enable_steady_tick(std::time::Duration::from_millis(120));
        bar
    }
}

pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let story = Story { silent: args.json };
    probe(&story)?;
    let scratch = Scratch::new(args.dir.as_deref(), args.memory)?;
    let paths = SnapshotPaths::in_dir(scratch.path());
    let (snapshot, vm) = make_snapshot(args, &paths, &story)?;

    story.tell(&format!(
        "\nRestoring it {} times, each in a fresh process, from a warm page cache. The guest\n\
         touches every page in random order, times each first touch, and verifies each page.",
        MODES.len()
    ))?;
    let mut report = DemoReport {
        vm,
        memory_bytes: snapshot.memory_bytes(),
        runs: Vec::new(),
        pages_verified: 0,
        mismatches: 0,
    };
    warm_up_memory(snapshot.memory_bytes())?;
    for mode in MODES {
        let bar = story.work(mode.name());
        prepare_cache(&paths.memory, Cache::Warm)?;
        let work = Work { seed: 7, verify: true, threads: vm == "threads", ..Work::default() };
        let restored = restore(mode, &paths, scratch.path(), &work)?;
        bar.finish_and_clear();
        report.pages_verified += restored.vm.pages + restored.vm.host_pages;
        report.mismatches += restored.vm.mismatches + restored.vm.host_mismatches;
        report.runs.push(Run::new(mode, &restored));
    }
    if args.json {
        output::json(&report)?;
    } else {
        tell_results(&story, &report)?;
    }
    if report.mismatches > 0 {
        bail!("{} pages were not what they must be", report.mismatches);
    }
    Ok(())
}

fn probe(story: &Story) -> anyhow::Result<()> {
    let host = vmpager_sys::probe::host();
    story.tell(&format!("vmpager demo on Linux {}, {} CPUs", host.kernel_release, host.cpus))?;
    if !host.userfaultfd.kernel_mode() {
        bail!(
            "this user cannot have a userfaultfd that reports the kernel's own accesses, which \
             a VM needs; `vmpager doctor` tells what to change"
        );
    }
    story.tell("  userfaultfd: yes")
}

fn make_snapshot(
    args: &DemoArgs,
    paths: &SnapshotPaths,
    story: &Story,
) -> anyhow::Result<(Snapshot, &'static str)> {
    let config =
        VmConfig { memory_bytes: args.memory, cpu: args.cpu.into(), ..VmConfig::default() };
    let bar = story.work("making a VM and its memory");
    let started = Instant::now();
    let mut vm = Vm::build(&config)?;
    let kind = cpu_name(vm.cpu());
    bar.set_message("the guest computes the checksum of every page");
    vm.prepare()?;
    bar.set_message("taking a snapshot");
    let snapshot = vm.snapshot(paths)?;
    bar.finish_and_clear();
    story.tell(match kind {
        "kvm" => "  vCPU: /dev/kvm",
        _ => "  vCPU: a host thread (no usable /dev/kvm; `vmpager doctor` tells why)",
    })?;
    story.tell(&format!(
        "Made a VM with {} of memory (a third zeroes; text, random and repeated pages), let it\n\
         compute a checksum of each page, and took a snapshot: {:.0} ms.",
        size::show(args.memory),
        millis(started.elapsed())
    ))?;
    Ok((snapshot, kind))
}

fn tell_results(story: &Story, report: &DemoReport) -> anyhow::Result<()> {
    story.tell(&format!(
        "\n{:<15} {:>11} {:>11} {:>11} {:>8} {:>23} {:>11}\n{:<15} {:>11} {:>11} {:>11} {:>8} {:>23} {:>11}",
        "", "first", "workload", "all memory", "", "stall of a first touch", "",
        "restore", "instruction", "done", "in place", "faults", "p50 / p99 / max us", "bytes read",
    ))?;
    for run in &report.runs {
        let full = run.full_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.0} ms"));
        story.tell(&format!(
            "{:<15} {:>8.1} ms {:>8.0} ms {:>11} {:>8} {:>23} {:>11}",
            run.mode,
            run.first_instruction_ms,
            run.workload_ms,
            full,
            run.faults,
            format!("{:.1} / {:.0} / {:.0}", run.p50_us, run.p99_us, run.max_us),
            size::show(run.bytes_read),
        ))?;
    }
    story.tell(
        "\nTimes run from the start of the VM's process. Faults are page faults of that process\n\
         for eager and mmap, faults answered by the pager for the others. Stalls are measured\n\
         in the guest. Each way was run once, with everything touched at once and the file in\n\
         the page cache: the best case for mmap, which copies nothing, and at the mercy of\n\
         whatever else this machine does. `vmpager bench restore` compares them in repeated,\n\
         interleaved rounds, also with a cold cache and packed images.",
    )?;
    story.tell(&format!(
        "\n{} pages verified by guest and host, {} mismatches",
        report.pages_verified, report.mismatches
    ))
}
