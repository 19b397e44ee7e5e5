//! `vmpager bench prefetch`: what prefetch policies make of traces, simulated.

mod simulation;
mod trace;

use std::path::PathBuf;

use clap::ValueEnum;
use serde::Serialize;
use vmpager::NeighbourPolicy;
use vmpager::ServeOptions;
use vmpager_store::profile::replay_order;

use self::simulation::{Costs, Outcome, Policy, simulate};
use self::trace::Trace;
use super::{round, to_f64};
use crate::output;

/// Options of `vmpager bench prefetch`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    vmpager bench prefetch\n  \
    vmpager bench prefetch --trace mem.vmprof --latency-us 500 --source-mb-s 1000 --json\n\n\
    A trace is a profile (`vmpager profile record`): the first touches of a guest, with\n\
    their times. The engine is the one that serves VMs; guest, pager and source are\n\
    models: one vCPU and one thread of the pager, each with a CPU to itself, and a source\n\
    that answers any number of reads at once. Touches that were recorded from several\n\
    vCPUs come from one here.")]
pub(crate) struct PrefetchArgs {
    /// A profile as a trace; may be given more than once [default: a Linux guest, and
    /// generated ones].
    #[arg(long, value_name = "PROFILE")]
    trace: Vec<PathBuf>,
    /// What is brought in unasked [default: all of them].
    #[arg(long, value_enum, value_delimiter = ',')]
    policies: Option<Vec<PolicyArg>>,
    /// A fault's way to the pager and back.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 10.0, value_parser = duration)]
    fault_us: f64,
    /// The install of a page.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 1.0, value_parser = duration)]
    page_us: f64,
    /// A read's way to the source and back; 0 if all of it is at hand.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0.0, value_parser = duration)]
    latency_us: f64,
    /// Megabytes a second that the source sends, all reads together.
    #[arg(long, value_name = "MB/S", default_value_t = 2000.0, value_parser = rate)]
    source_mb_s: f64,
    /// What a guest computes between two first touches, in the traces of the default.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 1.0, value_parser = duration)]
    think_us: f64,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Any time up to a minute.
fn duration(text: &str) -> Result<f64, String> {
    let given = text.parse::<f64>().ok().filter(|us| (0.0..=6e7).contains(us));
    given.ok_or_else(|| "a number of microseconds from 0 to 60000000 is needed".into())
}

fn rate(text: &str) -> Result<f64, String> {
    let given = text.parse::<f64>().ok().filter(|rate| (0.001..=1e6).contains(rate));
    given.ok_or_else(|| "a number of megabytes a second from 0.001 to 1000000 is needed".into())
}

/// What is brought in unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PolicyArg {
    /// Nothing.
    Off,
    /// A window that doubles with each fault in the same 2 MiB.
    Adaptive,
    /// What comes next where faults follow each other at equal steps.
    Stride,
    /// Where they do, as stride; elsewhere as adaptive.
    Mixed,
    /// The trace itself, recorded before; adaptive beside it.
    Profile,
    /// The profile of a guest that touches other memory; adaptive beside it.
    Wrong,
    /// Everything; adaptive beside it.
    Fill,
}

impl PolicyArg {
    /// None if the trace leaves no memory for another guest's.
    fn policy(self, trace: &Trace) -> Option<Policy> {
        let neighbours = match self {
            Self::Off => NeighbourPolicy::Off,
            Self::Stride => NeighbourPolicy::Strides,
            Self::Mixed => NeighbourPolicy::Mixed,
            Self::Adaptive | Self::Profile | Self::Wrong | Self::Fill => {
                NeighbourPolicy::Adaptive { first_window_shift: 0 }
            }
        };
        let pages = match self {
            Self::Profile => Some(trace.touches.iter().map(|touch| touch.page).collect()),
            Self::Wrong => Some(trace.elsewhere()),
            _ => None,
        };
        if pages.as_ref().is_some_and(|pages: &Vec<u32>| pages.len() < trace.touches.len() / 4) {
            return None;
        }
        let profile = pages.map(|pages| ServeOptions::ranges_of(replay_order(&pages)));
        Some(Policy { neighbours, profile, fill: self == Self::Fill })
    }
}

#[derive(Debug, Serialize)]
struct Report {
    fault_us: f64,
    page_us: f64,
    latency_us: f64,
    source_mb_s: f64,
    think_us: f64,
    rows: Vec<Row>,
}

/// A policy on a trace.
#[derive(Debug, Serialize)]
struct Row {
    trace: String,
    policy: String,
    /// Pages that the guest touches.
    touches: u64,
    /// Touches that waited.
    waits: u64,
    /// How long one did, on average.
    wait_us: f64,
    /// Pages brought unasked, and touched later.
    used: u64,
    /// Pages brought unasked, and never touched.
    unused: u64,
    done_ms: f64,
    /// Of that time to the one without prefetch; absent if that was not asked for.
    ratio_off: Option<f64>,
}

impl Row {
    fn new(trace: &Trace, policy: PolicyArg, outcome: Outcome) -> Self {
        let policy = policy.to_possible_value();
        Self {
            trace: trace.name.clone(),
            policy: policy.map_or_else(String::new, |value| value.get_name().to_owned()),
            touches: trace.touches.len() as u64,
            waits: outcome.waits,
            wait_us: round(to_f64(outcome.waited_ns) / 1e3 / to_f64(outcome.waits.max(1))),
            used: outcome.used,
            unused: outcome.unused,
            done_ms: round(to_f64(outcome.done_ns) / 1e6),
            ratio_off: None,
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "options are within bounds far below 2^53"
)]
fn nanoseconds(us: f64) -> u64 {
    (us * 1e3).round() as u64
}

pub(crate) fn run(args: &PrefetchArgs) -> anyhow::Result<()> {
    let costs = Costs {
        fault: nanoseconds(args.fault_us),
        page: nanoseconds(args.page_us),
        latency: nanoseconds(args.latency_us),
        transfer: nanoseconds(4096.0 / args.source_mb_s),
    };
    let each = costs.fault + costs.page + costs.latency;
    let traces = match &args.trace[..] {
        [] => Trace::known(nanoseconds(args.think_us))?,
        given => given.iter().map(|path| Trace::recorded(path, each)).collect::<Result<_, _>>()?,
    };
    let policies = args.policies.clone();
    let policies = policies.unwrap_or_else(|| PolicyArg::value_variants().to_vec());
    let mut rows = Vec::new();
    for trace in &traces {
        let first = rows.len();
        for arg in &policies {
            let Some(policy) = arg.policy(trace) else { continue };
            rows.push(Row::new(trace, *arg, simulate(trace, costs, &policy)?));
        }
        let off = policies.contains(&PolicyArg::Off);
        let off = rows[first..].iter().find(|row| off && row.policy == "off");
        if let Some(off) = off.map(|row| row.done_ms) {
            rows[first..].iter_mut().for_each(|row| row.ratio_off = Some(round(row.done_ms / off)));
        }
    }
    let report = Report {
        fault_us: args.fault_us,
        page_us: args.page_us,
        latency_us: args.latency_us,
        source_mb_s: args.source_mb_s,
        think_us: args.think_us,
        rows,
    };
    if args.json { output::json(&report) } else { show(&report) }
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "simulated: a fault {} us, a page {} us, a read {} us\n\n\
         {:<24} {:<9} {:>8} {:>8} {:>9} {:>8} {:>8} {:>10} {:>7}",
        report.fault_us,
        report.page_us,
        report.latency_us,
        "trace",
        "prefetch",
        "touched",
        "waited",
        "us each",
        "in time",
        "in vain",
        "done",
        "x off"
    ))?;
    for row in &report.rows {
        output::line(&format!(
            "{:<24} {:<9} {:>8} {:>8} {:>9.1} {:>8} {:>8} {:>7.1} ms {:>7}",
            row.trace,
            row.policy,
            row.touches,
            row.waits,
            row.wait_us,
            row.used,
            row.unused,
            row.done_ms,
            row.ratio_off.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}")),
        ))?;
    }
    Ok(())
}
