//! `vmpager bench convert`: pages converted between private and shared, against
//! the bare calls that it takes.
//!
//! A vCPU of the built-in guest asks for each conversion and times it, the way to
//! the VMM and back included; the pages were filled before, so that there is
//! something to discard. Bare, the VMM answers by the same calls, and keeps no
//! account of anything. Where an access can ask (private pages by address), ranges
//! are also converted so, page by page. The same is done while a second vCPU touches
//! pages that are in memory and not mapped: how long that takes is compared with the same
//! while the first vCPU touches pages, too. VMs that never convert are compared with plain
//! ones.

mod never;

use anyhow::Context;
use never::NeverRow;
use serde::Serialize;
use vmpager_kvm::probe;
use vmpager_vm::{ConvertWorkload, Cpu, PrivateBackend, PrivateConfig, Stalls, Vm, VmConfig};

use super::{median, round, to_f64};
use crate::{output, size};

/// Options of `vmpager bench convert`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager bench convert --rounds 5 --json\n\n\
    Rounds are interleaved; each number is the median of its rounds. guest_memfd, and\n\
    guests whose accesses ask for conversions (a fault for each page), need a KVM with\n\
    software-protected VMs; elsewhere private pages stay in place.\n\n\
    Keys of --json: a row has the mean time of a conversion, both ways (conversion_us),\n\
    and by the bare calls (bare_us); and the 99th percentile of another vCPU's faults\n\
    meanwhile (others_p99_us), and while nothing is converted (others_alone_p99_us). A row\n\
    of never_converting has the faults served a second (in thousands) of VMs restored\n\
    lazily: one that could have private pages and has none, and plain ones, with memory\n\
    of a memfd as the first has, and anonymous. Ratios to these: above 1 is better. A\n\
    row's own ratios (below 1 is better) are the medians of those of its rounds.")]
pub(crate) struct ConvertArgs {
    /// Conversions of each size in a round.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(2..=4096))]
    conversions: u64,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Ranges to convert: whole pages, at most 2 MiB + 4 KiB.
    #[arg(long, value_name = "SIZE,...", value_delimiter = ',', value_parser = range,
        default_value = "4K,64K,512K,2M,2052K")]
    sizes: Vec<u64>,
    /// Faults of another vCPU meanwhile, and of each VM that never converts.
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=2000))]
    faults: u64,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    conversions: u64,
    rounds: u32,
    faults: u64,
    rows: Vec<Row>,
    never_converting: Vec<NeverRow>,
}

#[derive(Debug, Serialize)]
struct Row {
    backend: &'static str,
    /// How the guest asks: by a hypercall for the range (a port where there are none),
    /// or by touching its pages.
    asked_by: &'static str,
    bytes: u64,
    /// Converting a range: the medians of both ways, their mean.
    conversion_us: f64,
    conversions_per_s: f64,
    /// The same, answered by the bare calls.
    bare_us: f64,
    ratio_bare: f64,
    /// The 99th percentile of another vCPU's faults, while pages are converted.
    others_p99_us: f64,
    /// The same, while none is.
    others_alone_p99_us: f64,
    ratio_others: f64,
}

/// Where private pages are, and how conversions are asked for.
#[derive(Clone, Copy, Debug)]
struct Way {
    backend: PrivateBackend,
    /// By accesses.
    implicit: bool,
}

fn range(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    if bytes.is_multiple_of(PAGE) && (1..=513).contains(&(bytes / PAGE)) {
        Ok(bytes)
    } else {
        Err(format!("{bytes} bytes are no range; use a multiple of 4096 up to 2052K"))
    }
}

const PAGE: u64 = 4096;

/// What one round measures.
#[derive(Clone, Copy, Debug)]
struct Measured {
    conversion_us: f64,
    bare_us: f64,
    others_p99_us: f64,
    others_alone_p99_us: f64,
}

pub(crate) fn run(args: &ConvertArgs) -> anyhow::Result<()> {
    let mut backends = vec![PrivateBackend::InPlace];
    if probe::kvm()?.exact_memory_faults() {
        backends.insert(0, PrivateBackend::GuestMemfd);
        backends.push(PrivateBackend::ByAddress);
    }
    let mut ways: Vec<Way> =
        backends.iter().map(|backend| Way { backend: *backend, implicit: false }).collect();
    if let Some(backend) = backends.iter().find(|b| **b == PrivateBackend::ByAddress) {
        ways.push(Way { backend: *backend, implicit: true });
    }
    let mut rows = Vec::new();
    for way in ways {
        rows.extend(measure(args, way)?);
    }
    let never_converting = never::rows(&backends, args.rounds, args.faults)?;
    let &ConvertArgs { conversions, rounds, faults, .. } = args;
    let report = Report { conversions, rounds, faults, rows, never_converting };
    if args.json { output::json(&report) } else { show(&report) }
}

/// A row for each size.
fn measure(args: &ConvertArgs, way: Way) -> anyhow::Result<Vec<Row>> {
    let mut measured = vec![Vec::new(); args.sizes.len()];
    for seed in 0..args.rounds {
        // After each size all pages are shared again.
        let mut vm = build(Some(way.backend), 2)?;
        for (bytes, rounds) in args.sizes.iter().zip(&mut measured) {
            let workload = workload(args, way, bytes / PAGE, seed.into());
            rounds.push(one_round(&workload, args.faults, &mut vm)?);
        }
    }
    Ok(args.sizes.iter().zip(&measured).map(|(bytes, rounds)| row(way, *bytes, rounds)).collect())
}

fn row(way: Way, bytes: u64, rounds: &[Measured]) -> Row {
    let all = |what: fn(&Measured) -> f64| median(rounds.iter().map(what));
    // A round's VM is another one.
    let ratio_bare = all(|r| r.conversion_us / r.bare_us);
    let ratio_others = all(|r| r.others_p99_us / r.others_alone_p99_us);
    let (conversion_us, bare_us) = (all(|r| r.conversion_us), all(|r| r.bare_us));
    let others = all(|r| r.others_p99_us);
    let alone = all(|r| r.others_alone_p99_us);
    Row {
        backend: name(way.backend),
        asked_by: if way.implicit { "access" } else { "hypercall" },
        bytes,
        conversion_us: round(conversion_us),
        conversions_per_s: round(1e6 / conversion_us),
        bare_us: round(bare_us),
        ratio_bare: round(ratio_bare),
        others_p99_us: round(others),
        others_alone_p99_us: round(alone),
        ratio_others: round(ratio_others),
    }
}

fn name(backend: PrivateBackend) -> &'static str {
    match backend {
        PrivateBackend::GuestMemfd => "guest_memfd",
        PrivateBackend::InPlace | PrivateBackend::Auto => "memory in place",
        PrivateBackend::MappedGuestMemfd => "guest_memfd in place",
        PrivateBackend::ByAddress => "by address",
    }
}

/// Each way as often, so that all is shared in the end.
fn workload(args: &ConvertArgs, way: Way, pages: u64, seed: u64) -> ConvertWorkload {
    let conversions = match way.implicit {
        // About as many faults as there are hypercalls.
        true => (args.conversions / pages).max(args.conversions / 25),
        false => args.conversions,
    };
    ConvertWorkload {
        conversions: conversions.next_multiple_of(2).max(2),
        seed,
        sizes: vec![pages],
        implicit: way.implicit,
        to_and_fro: true,
    }
}

/// How often a round turns from conversions to the bare calls or back, and again. All in
/// one VM, for no two have memory that is equally fast; in short turns, for the machine
/// becomes slower and faster meanwhile.
const TURNS: u64 = 12;

fn one_round(workload: &ConvertWorkload, faults: u64, vm: &mut Vm) -> anyhow::Result<Measured> {
    let idle = ConvertWorkload { conversions: 0, ..workload.clone() };
    let (_, alone) = vm.time_conversions(&idle, faults)?;
    let (_, others) = vm.time_conversions(workload, faults)?;
    // With nobody else who wants the CPU. An even number of conversions leaves all shared.
    let slice = (workload.conversions / TURNS).next_multiple_of(2).max(2);
    let slice = ConvertWorkload { conversions: slice, ..workload.clone() };
    let answer = |vm: &Vm, by_bare_calls| {
        vm.private().context("private memory").map(|p| p.answer_by_bare_calls(by_bare_calls))
    };
    let (mut converted, mut bare) = (Ways::default(), Ways::default());
    for _ in 0..TURNS / 2 {
        for is_bare in [false, true, true, false] {
            answer(vm, is_bare)?;
            let ways = if is_bare { &mut bare } else { &mut converted };
            ways.add(&vm.time_conversions(&slice, 1)?.0);
        }
    }
    answer(vm, false)?;
    Ok(Measured {
        conversion_us: converted.mean_us(),
        bare_us: bare.mean_us(),
        others_p99_us: to_f64(others.p99()) / 1e3,
        others_alone_p99_us: to_f64(alone.p99()) / 1e3,
    })
}

/// How long conversions took, in microseconds: to private, and to shared.
#[derive(Debug, Default)]
struct Ways([Vec<f64>; 2]);

impl Ways {
    /// They take turns.
    fn add(&mut self, stalls: &Stalls) {
        for both in stalls.in_order().chunks(2) {
            for (way, nanoseconds) in self.0.iter_mut().zip(both) {
                way.push(to_f64(*nanoseconds) / 1e3);
            }
        }
    }

    /// The mean of the two medians.
    fn mean_us(&self) -> f64 {
        let [private, shared] = &self.0;
        f64::midpoint(median(private.iter().copied()), median(shared.iter().copied()))
    }
}

const MEMORY: u64 = 16 << 20;

fn build(backend: Option<PrivateBackend>, vcpus: u64) -> anyhow::Result<Vm> {
    let private = backend.map(|backend| PrivateConfig { backend, ..PrivateConfig::default() });
    let memory_bytes = MEMORY;
    let config = VmConfig { memory_bytes, cpu: Cpu::Kvm, vcpus, private, ..VmConfig::default() };
    Ok(Vm::build(&config)?)
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{:>16} {:>10} {:>12} {:>12} {:>12} {:>7} {:>14} {:>14} {:>7}",
        "private pages",
        "asked by",
        "range",
        "conversion",
        "bare calls",
        "ratio",
        "others' p99",
        "alone",
        "ratio"
    ))?;
    for row in &report.rows {
        output::line(&format!(
            "{:>16} {:>10} {:>12} {:>9.1} us {:>9.1} us {:>6.2}x {:>11.1} us {:>11.1} us {:>6.2}x",
            row.backend,
            row.asked_by,
            size::show(row.bytes),
            row.conversion_us,
            row.bare_us,
            row.ratio_bare,
            row.others_p99_us,
            row.others_alone_p99_us,
            row.ratio_others
        ))?;
    }
    never::show(&report.never_converting)
}
