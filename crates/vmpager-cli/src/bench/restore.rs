//! `vmpager bench restore`.

use std::path::PathBuf;

use anyhow::bail;
use serde::Serialize;
use vmpager_vm::{SnapshotPaths, Vm, VmConfig};

use super::{median, round, to_f64};
use crate::output;
use crate::restore::{Cache, Mode, Restored, Work, prepare_cache, restore, warm_up_memory};
use crate::scratch::Scratch;
use crate::size;
use crate::vm_process::{GuestCpu, cpu_name};

/// Options of `vmpager bench restore`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager bench restore --touches 24576 --cache warm --rounds 5 --json\n\n\
    Rounds are interleaved; each number is the median of its rounds. Ratios are of the\n\
    time from the start of the VM's process to the end of its work: below 1 is faster.")]
pub(crate) struct RestoreArgs {
    /// Guest memory.
    #[arg(long, value_name = "SIZE", default_value = "100M", value_parser = size::parse)]
    memory: u64,
    /// Distinct pages the guest touches.
    #[arg(long, value_name = "N", default_value_t = 24_576)]
    touches: u64,
    /// Touch pages in ascending order instead of random order.
    #[arg(long)]
    sequential: bool,
    /// State of the page cache [default: warm, then cold].
    #[arg(long, value_enum)]
    cache: Option<Cache>,
    /// Ways to restore [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    modes: Option<Vec<Mode>>,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// What plays the vCPU.
    #[arg(long, value_enum, default_value_t = GuestCpu::Auto)]
    cpu: GuestCpu,
    /// Where to put the snapshot [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

const MODES: [Mode; 5] = [Mode::Naive, Mode::Mmap, Mode::OnDemand, Mode::OnDemandFill, Mode::Eager];

#[derive(Debug, Serialize)]
struct Report {
    vm: &'static str,
    memory_bytes: u64,
    touches: u64,
    rounds: u32,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    mode: &'static str,
    cache: &'static str,
    guest: &'static str,
    first_instruction_ms: f64,
    workload_ms: f64,
    full_ms: Option<f64>,
    faults: f64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
    bytes_read: f64,
    pager_rss_bytes: Option<f64>,
    ratio_mmap: Option<f64>,
    ratio_naive: Option<f64>,
    first_instruction_ratio_mmap: Option<f64>,
}

pub(crate) fn run(args: &RestoreArgs) -> anyhow::Result<()> {
    let scratch = Scratch::new(args.dir.as_deref(), args.memory)?;
    let paths = SnapshotPaths::in_dir(scratch.path());
    let config =
        VmConfig { memory_bytes: args.memory, cpu: args.cpu.into(), ..VmConfig::default() };
    let mut vm = Vm::build(&config)?;
    vm.prepare()?;
    vm.snapshot(&paths)?;
    let kind = cpu_name(vm.cpu());
    drop(vm);

    warm_up_memory(args.memory)?;
    let modes = args.modes.clone().unwrap_or_else(|| MODES.to_vec());
    let caches = args.cache.map_or_else(|| vec![Cache::Warm, Cache::Cold], |cache| vec![cache]);
    let mut rows = Vec::new();
    for cache in caches {
        let mut runs: Vec<Vec<Restored>> = vec![Vec::new(); modes.len()];
        for round in 0..args.rounds {
            for (mode, runs) in modes.iter().zip(&mut runs) {
                prepare_cache(&paths.memory, cache)?;
                let work = Work {
                    touches: Some(args.touches),
                    sequential: args.sequential,
                    seed: u64::from(round) + 1,
                    verify: false,
                    threads: kind == "threads",
                };
                let restored = restore(*mode, &paths, scratch.path(), &work)?;
                if restored.vm.mismatches > 0 {
                    bail!("{}: {} pages were wrong", mode.name(), restored.vm.mismatches);
                }
                runs.push(restored);
            }
        }
        rows.extend(rows_of(&modes, cache, &runs));
    }
    let report = Report {
        vm: kind,
        memory_bytes: args.memory,
        touches: args.touches,
        rounds: args.rounds,
        rows,
    };
    if args.json { output::json(&report) } else { show(&report) }
}

fn rows_of(modes: &[Mode], cache: Cache, runs: &[Vec<Restored>]) -> Vec<Row> {
    let of = |mode: Mode, number: fn(&Restored) -> f64| {
        let index = modes.iter().position(|m| *m == mode)?;
        Some(median(runs[index].iter().map(number)))
    };
    let workload: fn(&Restored) -> f64 = |r| r.vm.workload_ms;
    let first: fn(&Restored) -> f64 = |r| r.vm.first_instruction_ms;
    let ratio = |a: Option<f64>, b: Option<f64>| Some(round(a? / b?));
    let row = |mode: Mode| {
        let middle = |number: fn(&Restored) -> f64| of(mode, number).unwrap_or(0.0);
        Row {
            mode: mode.name(),
            cache: cache.name(),
            guest: "built-in",
            first_instruction_ms: round(middle(first)),
            workload_ms: round(middle(workload)),
            full_ms: of(mode, |r| r.full_ms.unwrap_or(0.0)).filter(|ms| *ms > 0.0).map(round),
            faults: middle(|r| to_f64(r.faults)),
            p50_us: middle(|r| r.vm.p50_us),
            p99_us: middle(|r| r.vm.p99_us),
            max_us: middle(|r| r.vm.max_us),
            bytes_read: middle(|r| to_f64(r.bytes_read)),
            pager_rss_bytes: of(mode, |r| to_f64(r.pager_rss_bytes.unwrap_or(0)))
                .filter(|bytes| *bytes > 0.0),
            ratio_mmap: ratio(of(mode, workload), of(Mode::Mmap, workload)),
            ratio_naive: ratio(of(mode, workload), of(Mode::Naive, workload)),
            first_instruction_ratio_mmap: ratio(of(mode, first), of(Mode::Mmap, first)),
        }
    };
    modes.iter().map(|mode| row(*mode)).collect()
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{} of guest memory, {} pages touched, {} rounds, vCPU by {}\n\n\
         {:<15} {:<5} {:>12} {:>12} {:>9} {:>25} {:>7} {:>7}",
        size::show(report.memory_bytes),
        report.touches,
        report.rounds,
        report.vm,
        "restore",
        "cache",
        "first instr.",
        "work done",
        "faults",
        "stall p50 / p99 / max us",
        "x mmap",
        "x naive"
    ))?;
    let times = |ratio: Option<f64>| ratio.map_or_else(|| "-".into(), |r| format!("{r:.2}"));
    for row in &report.rows {
        output::line(&format!(
            "{:<15} {:<5} {:>9.1} ms {:>9.0} ms {:>9.0} {:>25} {:>7} {:>7}",
            row.mode,
            row.cache,
            row.first_instruction_ms,
            row.workload_ms,
            row.faults,
            format!("{:.1} / {:.0} / {:.0}", row.p50_us, row.p99_us, row.max_us),
            times(row.ratio_mmap),
            times(row.ratio_naive),
        ))?;
    }
    Ok(())
}
