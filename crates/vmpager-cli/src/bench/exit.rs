//! `vmpager bench exit`: missing pages as vCPU exits against vCPUs that wait in
//! the kernel, and against an oracle.
//!
//! The built-in guest touches every page of its memory once, in random order.
//! Each fault brings one page from a warm file: by a userfaultfd and the
//! pager's thread; by an exit, the page found by decoding and walking; and by
//! the same exit with the page known beforehand, the floor of any exit
//! delivery.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use serde::Serialize;
use vmpager::{GuestRange, NeighbourPolicy, Pager};
use vmpager_kvm::probe;
use vmpager_store::RawFile;
use vmpager_sys::memory::Mapping;
use vmpager_vm::{
    Cpu, Delivery, ExitMechanism, Filling, RestoreMemory, Snapshot, SnapshotPaths, Vm, VmConfig,
    Workload,
};

use super::{median, round, to_f64};
use crate::restore::{Cache, prepare_cache};
use crate::scratch::Scratch;
use crate::{output, size};

/// Options of `vmpager bench exit`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager bench exit --rounds 5 --json\n\n\
    Rounds are interleaved; each number is the median of its rounds. With a local\n\
    APIC, KVM takes the faults of vCPUs that wait in the kernel asynchronously.\n\
    Attributes need a KVM with software-protected VMs: null where there is none.")]
pub(crate) struct ExitArgs {
    /// Guest memory, all of which is touched.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = size::parse)]
    memory: u64,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Where to put the snapshots [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    memory_bytes: u64,
    rounds: u32,
    /// An exit by port I/O, and the way back into the guest.
    exit_us: f64,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    vcpus: u64,
    lapic: bool,
    uffd_kfaults_s: f64,
    oracle_kfaults_s: f64,
    view_kfaults_s: f64,
    attributes_kfaults_s: Option<f64>,
    ratio_view_uffd: f64,
    ratio_view_oracle: f64,
    /// Of all exits, those that were left to the userfaultfd.
    fallback_share: f64,
}

/// How pages come in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Uffd,
    View,
    Attributes,
    Oracle,
}

/// One run: its rate, and what its exits came to.
#[derive(Clone, Copy, Debug)]
struct Run {
    kfaults_s: f64,
    exits: u64,
    fallbacks: u64,
}

pub(crate) fn run(args: &ExitArgs) -> anyhow::Result<()> {
    let scratch = Scratch::new(args.dir.as_deref(), args.memory)?;
    let mut rows = Vec::new();
    let mut exit_us = 0.0;
    let kvm = probe::kvm()?;
    for lapic in [false, true].into_iter().filter(|lapic| kvm.irqchip || !lapic) {
        for vcpus in [1, 2, 4, 8] {
            let snapshot = make_snapshot(args, vcpus, lapic, &scratch)?;
            if vcpus == 1 && !lapic {
                exit_us = round(exit_cost(&snapshot)?);
            }
            rows.push(row(args, vcpus, lapic, kvm.exact_memory_faults(), &snapshot)?);
        }
    }
    let report = Report { memory_bytes: args.memory, rounds: args.rounds, exit_us, rows };
    if args.json { output::json(&report) } else { show(&report) }
}

fn make_snapshot(
    args: &ExitArgs,
    vcpus: u64,
    lapic: bool,
    scratch: &Scratch,
) -> anyhow::Result<Snapshot> {
    let filling = Filling::Generated { seed: 1, bytes: None };
    let config = VmConfig { memory_bytes: args.memory, filling, cpu: Cpu::Kvm, vcpus, lapic };
    let mut vm = Vm::build(&config)?;
    vm.prepare()?;
    Ok(vm.snapshot(&SnapshotPaths::in_dir(scratch.path()))?)
}

/// Half a round without work, which is two exits and little else.
fn exit_cost(snapshot: &Snapshot) -> anyhow::Result<f64> {
    const ROUNDS: u32 = 200;
    let mut vm = Vm::restore(snapshot, RestoreMemory::Eager, Cpu::Kvm)?;
    let nothing = Workload { touches: Some(0), ..Workload::default() };
    vm.run(&nothing, Instant::now())?;
    let since = Instant::now();
    for _ in 0..ROUNDS {
        vm.run(&nothing, since)?;
    }
    Ok(since.elapsed().as_secs_f64() * 1e6 / f64::from(2 * ROUNDS))
}

fn row(
    args: &ExitArgs,
    vcpus: u64,
    lapic: bool,
    has_attributes: bool,
    snapshot: &Snapshot,
) -> anyhow::Result<Row> {
    let (mut uffd, mut view, mut oracle) = (Vec::new(), Vec::new(), Vec::new());
    let mut attributes = Vec::new();
    for seed in 0..args.rounds {
        let workload = Workload { seed: seed.into(), ..Workload::default() };
        prepare_cache(&snapshot.paths().memory, Cache::Warm)?;
        uffd.push(one_run(snapshot, Way::Uffd, &workload)?);
        view.push(one_run(snapshot, Way::View, &workload)?);
        oracle.push(one_run(snapshot, Way::Oracle, &workload)?);
        if has_attributes {
            attributes.push(one_run(snapshot, Way::Attributes, &workload)?);
        }
    }
    let rate = |runs: &[Run]| median(runs.iter().map(|run| run.kfaults_s));
    let total = |what: fn(&Run) -> u64| to_f64(view.iter().map(what).sum());
    Ok(Row {
        vcpus,
        lapic,
        uffd_kfaults_s: round(rate(&uffd)),
        oracle_kfaults_s: round(rate(&oracle)),
        view_kfaults_s: round(rate(&view)),
        attributes_kfaults_s: has_attributes.then(|| round(rate(&attributes))),
        ratio_view_uffd: round(rate(&view) / rate(&uffd)),
        ratio_view_oracle: round(rate(&view) / rate(&oracle)),
        fallback_share: round(total(|run| run.fallbacks) / total(|run| run.exits).max(1.0)),
    })
}

fn one_run(snapshot: &Snapshot, way: Way, workload: &Workload) -> anyhow::Result<Run> {
    let (mut vm, _pager) = restore(snapshot, way)?;
    vm.bring_fixed();
    if way == Way::Oracle {
        vm.foretell(workload, true)?;
    }
    let report = vm.run(workload, Instant::now())?;
    if report.mismatches > 0 {
        bail!("{} wrong pages by {way:?}", report.mismatches);
    }
    let stats = vm.exit_stats().unwrap_or_default();
    Ok(Run {
        kfaults_s: to_f64(report.pages) / report.workload.as_secs_f64() / 1e3,
        exits: stats.exits,
        fallbacks: stats.fallbacks,
    })
}

/// A page per fault in every way: no neighbours.
fn restore(snapshot: &Snapshot, way: Way) -> anyhow::Result<(Vm, Option<Pager>)> {
    if way != Way::Uffd {
        let attributes = way == Way::Attributes;
        let mechanism = if attributes { ExitMechanism::Attributes } else { ExitMechanism::View };
        let delivery = Delivery::Exit(mechanism);
        let memory = RestoreMemory::InProcess { background_fill: false, delivery };
        return Ok((Vm::restore(snapshot, memory, Cpu::Kvm)?, None));
    }
    let len = usize::try_from(snapshot.memory_bytes()).context("guest memory")?;
    let memory = Arc::new(Mapping::anonymous(len)?);
    let pager = Pager::builder(RawFile::open(&snapshot.paths().memory)?)
        .region(&GuestRange::of_mapping(&memory), 0)
        .neighbours(NeighbourPolicy::Off)
        .start()?;
    let vm = Vm::restore(snapshot, RestoreMemory::Prepared(memory), Cpu::Kvm)?;
    Ok((vm, Some(pager)))
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{} of guest memory, a page per fault; a bare exit and re-entry: {:.1} us\n",
        size::show(report.memory_bytes),
        report.exit_us
    ))?;
    output::line(&format!(
        "{:>5} {:>5} {:>14} {:>14} {:>14} {:>14} {:>11} {:>13} {:>10}",
        "vCPUs",
        "LAPIC",
        "userfaultfd",
        "exits (view)",
        "(attributes)",
        "oracle",
        "view/uffd",
        "view/oracle",
        "fallbacks"
    ))?;
    for row in &report.rows {
        output::line(&format!(
            "{:>5} {:>5} {:>11.1} k/s {:>11.1} k/s {:>14} {:>11.1} k/s {:>10.2}x {:>12.2}x \
             {:>9.2}%",
            row.vcpus,
            if row.lapic { "yes" } else { "no" },
            row.uffd_kfaults_s,
            row.view_kfaults_s,
            row.attributes_kfaults_s.map_or("-".into(), |rate| format!("{rate:.1} k/s")),
            row.oracle_kfaults_s,
            row.ratio_view_uffd,
            row.ratio_view_oracle,
            row.fallback_share * 100.0
        ))?;
    }
    Ok(())
}
