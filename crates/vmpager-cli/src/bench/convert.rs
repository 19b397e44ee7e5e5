//! `vmpager bench convert`: pages converted between private and shared, against
//! the bare calls that it takes.
//!
//! A vCPU of the built-in guest asks for each conversion and times it, the way to
//! the VMM and back included; the pages were filled before, so that there is
//! something to discard. Bare, the VMM answers by the same calls, and keeps no
//! account of anything. Where an access can ask (private pages by address), ranges
//! are also converted so, page by page. Meanwhile a second vCPU touches pages that are in memory
//! and not mapped: how long that takes is compared with the same while the first
//! vCPU touches pages, too.

use anyhow::Context;
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
    software-protected VMs; elsewhere private pages stay in place.")]
pub(crate) struct ConvertArgs {
    /// Conversions of each size in a round.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(2..=4096))]
    conversions: u64,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    conversions: u64,
    rounds: u32,
    rows: Vec<Row>,
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

/// 4 KiB to 2 MiB + 4 KiB.
const PAGES: [u64; 5] = [1, 16, 128, 512, 513];

/// What one round measures.
#[derive(Clone, Copy, Debug)]
struct Measured {
    conversion_us: f64,
    bare_us: f64,
    others_p99_us: f64,
    others_alone_p99_us: f64,
}

pub(crate) fn run(args: &ConvertArgs) -> anyhow::Result<()> {
    let mut ways = vec![Way { backend: PrivateBackend::InPlace, implicit: false }];
    if probe::kvm()?.exact_memory_faults() {
        ways.insert(0, Way { backend: PrivateBackend::GuestMemfd, implicit: false });
        let backend = PrivateBackend::ByAddress;
        ways.extend([false, true].map(|implicit| Way { backend, implicit }));
    }
    let mut rows = Vec::new();
    for way in ways {
        for pages in PAGES {
            rows.push(row(args, way, pages)?);
        }
    }
    let report = Report { conversions: args.conversions, rounds: args.rounds, rows };
    if args.json { output::json(&report) } else { show(&report) }
}

fn row(args: &ConvertArgs, way: Way, pages: u64) -> anyhow::Result<Row> {
    let rounds = (0..args.rounds).map(|seed| one_round(args, way, pages, seed.into()));
    let rounds = rounds.collect::<anyhow::Result<Vec<Measured>>>()?;
    let all = |what: fn(&Measured) -> f64| median(rounds.iter().map(what));
    let (conversion_us, bare_us) = (all(|r| r.conversion_us), all(|r| r.bare_us));
    let others = all(|r| r.others_p99_us);
    let alone = all(|r| r.others_alone_p99_us);
    let name = match way.backend {
        PrivateBackend::GuestMemfd => "guest_memfd",
        PrivateBackend::InPlace | PrivateBackend::Auto => "memory in place",
        PrivateBackend::MappedGuestMemfd => "guest_memfd in place",
        PrivateBackend::ByAddress => "by address",
    };
    Ok(Row {
        backend: name,
        asked_by: if way.implicit { "access" } else { "hypercall" },
        bytes: pages * 4096,
        conversion_us: round(conversion_us),
        conversions_per_s: round(1e6 / conversion_us),
        bare_us: round(bare_us),
        ratio_bare: round(conversion_us / bare_us),
        others_p99_us: round(others),
        others_alone_p99_us: round(alone),
        ratio_others: round(others / alone),
    })
}

fn one_round(args: &ConvertArgs, way: Way, pages: u64, seed: u64) -> anyhow::Result<Measured> {
    let Way { backend, implicit } = way;
    // As many faults as there are hypercalls, and each way once.
    let conversions = if implicit { (args.conversions / pages).max(2) } else { args.conversions };
    let sizes = vec![pages];
    let workload = ConvertWorkload { conversions, seed, sizes, implicit, to_and_fro: true };
    let idle = ConvertWorkload { conversions: 0, ..workload.clone() };
    let mut vm = build(backend)?;
    let touches = (vm.content_pages() / 2).min(2000);
    let (_, alone) = vm.time_conversions(&idle, touches)?;
    let (converted, others) = vm.time_conversions(&workload, touches)?;
    let mut bare_vm = build(backend)?;
    bare_vm.private().context("private memory")?.answer_by_bare_calls();
    let (bare, _) = bare_vm.time_conversions(&workload, touches)?;
    Ok(Measured {
        conversion_us: both_ways_us(&converted),
        bare_us: both_ways_us(&bare),
        others_p99_us: to_f64(others.p99()) / 1e3,
        others_alone_p99_us: to_f64(alone.p99()) / 1e3,
    })
}

/// The mean of the two directions' medians: they take turns, and differ.
fn both_ways_us(stalls: &Stalls) -> f64 {
    let way = |first| {
        let each = stalls.in_order().iter().skip(first).step_by(2);
        median(each.map(|nanoseconds| to_f64(*nanoseconds) / 1e3))
    };
    (way(0) + way(1)) / 2.0
}

fn build(backend: PrivateBackend) -> anyhow::Result<Vm> {
    let private = Some(PrivateConfig { backend, ..PrivateConfig::default() });
    let config = VmConfig {
        memory_bytes: 16 << 20,
        cpu: Cpu::Kvm,
        vcpus: 2,
        private,
        ..VmConfig::default()
    };
    let mut vm = Vm::build(&config)?;
    vm.prepare()?;
    Ok(vm)
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
    Ok(())
}
