//! What came of the restores, for people and programs.

use serde::Serialize;

use super::subject::Subject;
use crate::bench::{median, round, to_f64};
use crate::output;
use crate::restore::{Cache, Mode, Restored};
use crate::size;

/// All restores. Of several memory sizes, the first is named here; each row has
/// its own.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    vm: &'static str,
    memory_bytes: u64,
    touches: u64,
    rounds: u32,
    pub(super) rows: Vec<Row>,
}

/// One way to restore one snapshot. A Linux guest has no workload to end: its
/// numbers are those of the time it was given.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    memory_bytes: u64,
    mode: &'static str,
    cache: &'static str,
    guest: &'static str,
    first_instruction_ms: f64,
    /// What of it KVM takes to accept the memory; absent without KVM.
    memslot_ms: Option<f64>,
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

impl Row {
    /// A row for each mode; each number is the median of that mode's runs.
    pub(super) fn of(
        modes: &[Mode],
        cache: Cache,
        subject: &Subject,
        runs: &[Vec<Restored>],
        memslots: &[f64],
    ) -> Vec<Self> {
        let memslot_ms = (!memslots.is_empty()).then(|| median(memslots.iter().copied()));
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
                memory_bytes: subject.memory_bytes,
                mode: mode.name(),
                cache: cache.name(),
                guest: subject.guest,
                first_instruction_ms: round(middle(first)),
                memslot_ms: memslot_ms.map(round),
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
}

impl Report {
    pub(super) fn new(rounds: u32) -> Self {
        Self { rounds, ..Self::default() }
    }

    /// What the rows to come are of.
    pub(super) fn add(&mut self, subject: &Subject) {
        if self.rows.is_empty() {
            self.vm = subject.vm;
            self.memory_bytes = subject.memory_bytes;
            self.touches = subject.touches;
        }
    }

    pub(super) fn print(&self, json: bool) -> anyhow::Result<()> {
        if json { output::json(self) } else { show(self) }
    }
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{} guest, {} pages touched, {} rounds, vCPU by {}\n\n\
         {:>10} {:<15} {:<5} {:>12} {:>12} {:>12} {:>9} {:>25} {:>7} {:>7}",
        report.rows.first().map_or("no", |row| row.guest),
        report.touches,
        report.rounds,
        report.vm,
        "memory",
        "restore",
        "cache",
        "first instr.",
        "memslot",
        "work done",
        "faults",
        "stall p50 / p99 / max us",
        "x mmap",
        "x naive"
    ))?;
    let times = |ratio: Option<f64>| ratio.map_or_else(|| "-".into(), |r| format!("{r:.2}"));
    for row in &report.rows {
        output::line(&format!(
            "{:>10} {:<15} {:<5} {:>9.1} ms {:>12} {:>9.0} ms {:>9.0} {:>25} {:>7} {:>7}",
            size::show(row.memory_bytes),
            row.mode,
            row.cache,
            row.first_instruction_ms,
            row.memslot_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1} ms")),
            row.workload_ms,
            row.faults,
            format!("{:.1} / {:.0} / {:.0}", row.p50_us, row.p99_us, row.max_us),
            times(row.ratio_mmap),
            times(row.ratio_naive),
        ))?;
    }
    Ok(())
}
