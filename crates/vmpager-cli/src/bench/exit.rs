//! `vmpager bench exit`: missing pages as vCPU exits against vCPUs that wait in
//! the kernel, and against an oracle.
//!
//! The built-in guest touches every page of its memory once, in random order.
//! Each fault brings one page from a warm file: by a userfaultfd and the
//! pager's thread; by an exit, the page found by decoding and walking, or told by
//! KVM; and by an *oracle*, the floor of any exit delivery: the same exit, the page
//! known beforehand, and nothing done but to copy it from the mapped file (and, with
//! attributes, to let vCPUs have it).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;
use vmpager::{GuestRange, NeighbourPolicy, Pager};
use vmpager_kvm::probe;
use vmpager_store::RawFile;
use vmpager_sys::memory::Mapping;
use vmpager_vm::{
    Cpu, Delivery, DeliveryCosts, ExitMechanism, Filling, InProcess, RestoreMemory, Snapshot,
    SnapshotPaths, Vm, VmConfig, Workload,
};

use super::{median, round, to_f64};
use crate::restore::{Cache, prepare_cache};
use crate::scratch::Scratch;
use crate::{output, size};

/// Options of `vmpager bench exit`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager bench exit --rounds 5 --json\n\n\
    Rounds are interleaved; each number is the median of its rounds. With a local\n\
    APIC, KVM takes the faults of vCPUs that wait in the kernel asynchronously.\n\n\
    Keys of --json: exit_us is an exit by port I/O and the way back; auto has what\n\
    --delivery auto measures, and how long that takes. A row has the faults served a\n\
    second (in thousands) by userfaultfd, by exits (view, attributes), by what auto\n\
    chooses (measured anew for each run), and by the oracle of each kind of exit, which\n\
    does nothing but copy the next page (nor has KVM map it ahead); ratios of these, above 1 is better for the\n\
    first named; and fallback_share, the part of the view's exits that were left to\n\
    the userfaultfd. What needs a KVM with software-protected VMs is null without.")]
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
    auto: Auto,
    rows: Vec<Row>,
}

/// What `--delivery auto` goes by.
#[derive(Debug, Serialize)]
struct Auto {
    /// A fault delivered by an exit, on a VM of its own.
    exit_us: f64,
    /// The same by a userfaultfd.
    uffd_us: f64,
    /// How long it takes to find out.
    measured_in_ms: f64,
    /// How often exits were chosen.
    exit_share: f64,
}

#[derive(Debug, Serialize)]
struct Row {
    vcpus: u64,
    lapic: bool,
    uffd_kfaults_s: f64,
    oracle_kfaults_s: f64,
    view_kfaults_s: f64,
    attributes_kfaults_s: Option<f64>,
    attributes_oracle_kfaults_s: Option<f64>,
    auto_kfaults_s: f64,
    ratio_view_uffd: f64,
    ratio_view_oracle: f64,
    ratio_attributes_oracle: Option<f64>,
    /// Against the better of userfaultfd and view.
    ratio_auto_best: f64,
    /// Of all exits, those that were left to the userfaultfd.
    fallback_share: f64,
}

/// How pages come in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Uffd,
    View,
    Attributes,
    Oracle(ExitMechanism),
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
    let (mut rows, mut choices) = (Vec::new(), Vec::new());
    let mut exit_us = 0.0;
    let kvm = probe::kvm()?;
    for lapic in [false, true].into_iter().filter(|lapic| kvm.irqchip || !lapic) {
        for vcpus in [1, 2, 4, 8] {
            let snapshot = make_snapshot(args, vcpus, lapic, &scratch)?;
            if vcpus == 1 && !lapic {
                exit_us = round(exit_cost(&snapshot)?);
            }
            let runs = Runs::of(args, kvm.exact_memory_faults(), &snapshot)?;
            rows.push(runs.row(vcpus, lapic));
            choices.extend(runs.choices);
        }
    }
    let auto = Auto::of(&choices);
    let report = Report { memory_bytes: args.memory, rounds: args.rounds, exit_us, auto, rows };
    if args.json { output::json(&report) } else { show(&report) }
}

fn make_snapshot(
    args: &ExitArgs,
    vcpus: u64,
    lapic: bool,
    scratch: &Scratch,
) -> anyhow::Result<Snapshot> {
    let filling = Filling::Generated { seed: 1, bytes: None };
    let config = VmConfig {
        memory_bytes: args.memory,
        filling,
        cpu: Cpu::Kvm,
        vcpus,
        lapic,
        ..VmConfig::default()
    };
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

/// What `auto` measured once, and how long that took.
#[derive(Clone, Copy, Debug)]
struct Choice {
    costs: DeliveryCosts,
    took: Duration,
}

impl Choice {
    fn make() -> anyhow::Result<Self> {
        let since = Instant::now();
        Ok(Self { costs: DeliveryCosts::measure()?, took: since.elapsed() })
    }

    fn way(&self) -> Way {
        match self.costs.delivery() {
            Delivery::Userfaultfd => Way::Uffd,
            Delivery::Exit(_) => Way::View,
        }
    }
}

impl Auto {
    fn of(choices: &[Choice]) -> Self {
        let micros = |what: fn(&Choice) -> Duration| {
            median(choices.iter().map(|choice| what(choice).as_secs_f64() * 1e6))
        };
        let exits = choices.iter().filter(|choice| choice.way() == Way::View).count();
        Self {
            exit_us: round(micros(|choice| choice.costs.exit)),
            uffd_us: round(micros(|choice| choice.costs.userfaultfd)),
            measured_in_ms: round(micros(|choice| choice.took) / 1e3),
            exit_share: round(to_f64(exits as u64) / to_f64(choices.len() as u64)),
        }
    }
}

/// All rounds of one row.
#[derive(Debug, Default)]
struct Runs {
    uffd: Vec<Run>,
    view: Vec<Run>,
    oracle: Vec<Run>,
    auto: Vec<Run>,
    /// Empty where there are none.
    attributes: Vec<Run>,
    attributes_oracle: Vec<Run>,
    choices: Vec<Choice>,
}

impl Runs {
    fn of(args: &ExitArgs, has_attributes: bool, snapshot: &Snapshot) -> anyhow::Result<Self> {
        let mut runs = Self::default();
        for seed in 0..args.rounds {
            let workload = Workload { seed: seed.into(), ..Workload::default() };
            prepare_cache(&snapshot.paths().memory, Cache::Warm)?;
            let run = |way| one_run(snapshot, way, &workload);
            runs.uffd.push(run(Way::Uffd)?);
            runs.view.push(run(Way::View)?);
            runs.oracle.push(run(Way::Oracle(ExitMechanism::View))?);
            let choice = Choice::make()?;
            runs.auto.push(run(choice.way())?);
            runs.choices.push(choice);
            if has_attributes {
                runs.attributes.push(run(Way::Attributes)?);
                runs.attributes_oracle.push(run(Way::Oracle(ExitMechanism::Attributes))?);
            }
        }
        Ok(runs)
    }

    fn row(&self, vcpus: u64, lapic: bool) -> Row {
        let rate = |runs: &[Run]| median(runs.iter().map(|run| run.kfaults_s));
        let if_any = |runs: &[Run]| (!runs.is_empty()).then(|| rate(runs));
        let (uffd, view, oracle) = (rate(&self.uffd), rate(&self.view), rate(&self.oracle));
        let (attributes, floor) = (if_any(&self.attributes), if_any(&self.attributes_oracle));
        let total = |what: fn(&Run) -> u64| to_f64(self.view.iter().map(what).sum());
        Row {
            vcpus,
            lapic,
            uffd_kfaults_s: round(uffd),
            oracle_kfaults_s: round(oracle),
            view_kfaults_s: round(view),
            attributes_kfaults_s: attributes.map(round),
            attributes_oracle_kfaults_s: floor.map(round),
            auto_kfaults_s: round(rate(&self.auto)),
            ratio_view_uffd: round(view / uffd),
            ratio_view_oracle: round(view / oracle),
            ratio_attributes_oracle: attributes.zip(floor).map(|(rate, of)| round(rate / of)),
            ratio_auto_best: round(rate(&self.auto) / uffd.max(view)),
            fallback_share: round(total(|run| run.fallbacks) / total(|run| run.exits).max(1.0)),
        }
    }
}

fn one_run(snapshot: &Snapshot, way: Way, workload: &Workload) -> anyhow::Result<Run> {
    let (mut vm, _pager) = restore(snapshot, way)?;
    if let Way::Oracle(_) = way {
        vm.foretell(workload, true)?;
    } else {
        vm.bring_fixed();
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
    let in_process =
        |delivery| RestoreMemory::InProcess(InProcess { delivery, ..InProcess::default() });
    let by_exits = match way {
        Way::Uffd => None,
        Way::View => Some(in_process(Delivery::Exit(ExitMechanism::View))),
        Way::Attributes => Some(in_process(Delivery::Exit(ExitMechanism::Attributes))),
        Way::Oracle(mechanism) => Some(RestoreMemory::Oracle(mechanism)),
    };
    if let Some(memory) = by_exits {
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
    let Auto { exit_us, uffd_us, measured_in_ms, exit_share } = report.auto;
    output::line(&format!(
        "{} of guest memory, a page per fault; a bare exit and re-entry: {:.1} us\n\
         auto: an exit {exit_us:.1} us, a userfaultfd {uffd_us:.1} us, found out in \
         {measured_in_ms:.1} ms; chose exits {:.0} times of 100\n",
        size::show(report.memory_bytes),
        report.exit_us,
        exit_share * 100.0,
    ))?;
    output::line(&format!(
        "{:>5} {:>5} {:>12} {:>9} {:>9} {:>9} {:>11} {:>9} {:>10} {:>12} {:>10} {:>10} {:>10}",
        "vCPUs",
        "LAPIC",
        "userfaultfd",
        "view",
        "oracle",
        "auto",
        "attributes",
        "oracle",
        "view/uffd",
        "view/oracle",
        "att/oracle",
        "auto/best",
        "fallbacks"
    ))?;
    let rate = |rate: f64| format!("{rate:.1} k/s");
    let times = |ratio: f64| format!("{ratio:.2}x");
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    for row in &report.rows {
        output::line(&format!(
            "{:>5} {:>5} {:>12} {:>9} {:>9} {:>9} {:>11} {:>9} {:>10} {:>12} {:>10} {:>10} {:>9.2}%",
            row.vcpus,
            if row.lapic { "yes" } else { "no" },
            rate(row.uffd_kfaults_s),
            rate(row.view_kfaults_s),
            rate(row.oracle_kfaults_s),
            rate(row.auto_kfaults_s),
            or_none(row.attributes_kfaults_s.map(rate)),
            or_none(row.attributes_oracle_kfaults_s.map(rate)),
            times(row.ratio_view_uffd),
            times(row.ratio_view_oracle),
            or_none(row.ratio_attributes_oracle.map(times)),
            times(row.ratio_auto_best),
            row.fallback_share * 100.0
        ))?;
    }
    Ok(())
}
