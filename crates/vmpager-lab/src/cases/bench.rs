//! Benchmarks in full, for their numbers to be read.

use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::Lab;
use crate::cpus::guest_command;

/// Says which, with what options: words with colons between.
const SETTING: &str = "VMPAGER_LAB_TEST_BENCH";
const ALL: [&str; 3] = ["exit", "convert", "apf"];

/// Every ratio of every row must be one.
pub(super) fn benches_in_full(lab: &Lab) -> anyhow::Result<()> {
    match std::env::var(SETTING) {
        Ok(words) => bench(lab, &words.split(':').collect::<Vec<_>>()),
        Err(_) => ALL.iter().try_for_each(|name| bench(lab, &[name])),
    }
}

fn bench(lab: &Lab, words: &[&str]) -> anyhow::Result<()> {
    let is_apf = words.first() == Some(&"apf");
    // That one keeps its vCPU on the last CPU by itself.
    let mut command =
        if is_apf { Command::new(&lab.vmpager) } else { guest_command(lab, &lab.vmpager) };
    command.arg("bench").args(words).arg("--json");
    if is_apf {
        command.arg("--kernel").arg(&lab.kernel).arg("--initrd").arg(&lab.initrd);
    }
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {error}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).context("its report")?;
    let parts = report.as_object().context("its report is no object")?;
    let rows: Vec<&Value> = parts.values().filter_map(Value::as_array).flatten().collect();
    ensure!(!rows.is_empty(), "no rows: {report}");
    for row in rows {
        println!("{row}");
        let numbers = row.as_object().context("a row is no object")?.iter();
        let mut ratios =
            numbers.filter(|(key, value)| key.starts_with("ratio") && !value.is_null());
        ensure!(ratios.all(|(_, ratio)| ratio.as_f64().is_some_and(|r| r > 0.0)), "{row}");
    }
    Ok(())
}
