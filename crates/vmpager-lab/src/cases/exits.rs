//! Linux guests whose missing pages are exits of their vCPUs, by both
//! mechanisms.

use anyhow::{Context, ensure};
use serde_json::Value;
use vmpager_kvm::probe;

use super::Lab;
use super::guest::TWO;
use super::restore::work_and_compare;
use super::saved::Saved;
use crate::cpus::guest_command;

const VIEW: [&str; 3] = ["on-demand", "--delivery", "exit"];
const ATTRIBUTES: [&str; 5] = ["on-demand", "--delivery", "exit", "--exit-mechanism", "attributes"];
const AUTO: [&str; 3] = ["on-demand", "--delivery", "auto"];
const FILL: &str = "--background-fill";

pub(super) fn restored_by_exits_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let exits = restores(lab, &VIEW)?;
    few_fallbacks(&exits)
}

pub(super) fn restored_by_exits_with_fill_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let exits = restores(lab, &[&VIEW[..], &[FILL]].concat())?;
    few_fallbacks(&exits)
}

/// Whichever it takes here.
pub(super) fn restored_by_what_is_cheaper_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let exits = restores(lab, &AUTO)?;
    if exits.is_null() { Ok(()) } else { few_fallbacks(&exits) }
}

pub(super) fn restored_by_attributes_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    if !probe::kvm()?.exact_memory_faults() {
        return is_refused(lab);
    }
    let exits = restores(lab, &ATTRIBUTES)?;
    let count = |name| number(&exits, name);
    let (all, installed, cleared) = (count("exits")?, count("installed")?, count("cleared")?);
    // Of the pages that a vCPU installs, another may change the attribute, at a
    // neighbour.
    let overtaken = count("overtaken")?;
    ensure!(installed > 1000 && cleared + overtaken >= installed, "{exits}");
    // Whatever a vCPU exits for, or asks for again, ends in one of four ways.
    let ends = cleared + overtaken + count("reentered")? + count("waited")?;
    ensure!(all + count("asked_again")? == ends, "{exits}");
    ensure!(overtaken <= installed / 20, "{exits}");
    ensure!(count("fallbacks")? == 0, "{exits}");
    Ok(())
}

pub(super) fn restored_by_attributes_with_fill_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    if !probe::kvm()?.exact_memory_faults() {
        return is_refused(lab);
    }
    let exits = restores(lab, &[&ATTRIBUTES[..], &[FILL]].concat())?;
    // What the fill brought becomes accessible in pieces: page by page, each that is
    // touched would have to be cleared, those of the kernel besides.
    let touched = u64::try_from(TWO.still + TWO.vcpus * TWO.moving)?;
    ensure!((1..touched).contains(&number(&exits, "cleared")?), "{exits}");
    ensure!(number(&exits, "fallbacks")? == 0, "{exits}");
    Ok(())
}

/// Each kind of access in each mode of the processor, with each of its pages
/// missing in turn.
pub(super) fn every_access_finds_its_page(lab: &Lab) -> anyhow::Result<()> {
    let mut command = guest_command(lab, &lab.matrix);
    command.args(["--nocapture", "--test-threads=1"]);
    if !lab.direct {
        // QEMU 7.2 ends without a word (docs/lab.md).
        command.args(["--skip", "events_in_protected_mode"]);
    }
    let status = command.status().with_context(|| format!("running {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// Only that all ways are measured: times mean little here.
pub(super) fn bench_exit_measures_every_way(lab: &Lab) -> anyhow::Result<()> {
    let mut command = guest_command(lab, &lab.vmpager);
    command.args(["bench", "exit", "--memory", "4M", "--rounds", "1", "--json", "--dir", "."]);
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {error}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).context("its report")?;
    let rows = report["rows"].as_array().context("no rows")?;
    rows.iter().for_each(|row| println!("{row}"));
    ensure!(rows.len() == 8, "{} rows, not 8", rows.len());
    let has_attributes = probe::kvm()?.exact_memory_faults();
    for row in rows {
        let is_measured = |key: &str| row[key].as_f64().is_some_and(|rate| rate > 0.0);
        let all = ["uffd_kfaults_s", "view_kfaults_s", "oracle_kfaults_s", "auto_kfaults_s"];
        let attributes = ["attributes_kfaults_s", "attributes_oracle_kfaults_s"];
        ensure!(all.iter().all(|key| is_measured(key)), "{row}");
        ensure!(attributes.iter().all(|key| is_measured(key) == has_attributes), "{row}");
    }
    Ok(())
}

/// Restores a guest under load so, and has its memory checked by itself and by
/// the host. What its exits came to.
fn restores(lab: &Lab, mode: &[&str]) -> anyhow::Result<Value> {
    let saved = Saved::shared(lab, &TWO)?;
    let mut guest = saved.restore(lab, &[mode, &["--json"]].concat())?;
    work_and_compare(lab, &saved, &mut guest)?;
    let summary = guest.end_summed_up()?;
    let exits = summary["exits"].clone();
    println!("{exits}");
    Ok(exits)
}

/// Without software-protected VMs the command says so, and what to do.
fn is_refused(lab: &Lab) -> anyhow::Result<()> {
    let saved = Saved::shared(lab, &TWO)?;
    let mut command = guest_command(lab, &lab.vmpager);
    command.args(["vm", "restore", "--state"]).arg(&saved.state);
    command.arg("--memory").arg(&saved.memory).arg("--memory-mode").args(ATTRIBUTES);
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    let names_all = error.contains("memory attributes") && error.contains("write-only view");
    ensure!(output.status.code() == Some(1) && names_all, "{}: {error}", output.status);
    println!("refused: {}", error.trim());
    Ok(())
}

/// Left to the userfaultfd are fewer than 0.3% of the faults, and those of the
/// first moments.
fn few_fallbacks(exits: &Value) -> anyhow::Result<()> {
    let (all, fallbacks) = (number(exits, "exits")?, number(exits, "fallbacks")?);
    ensure!(all > 0 && fallbacks * 1000 <= 3 * all + 1000, "{exits}");
    Ok(())
}

fn number(exits: &Value, name: &str) -> anyhow::Result<u64> {
    exits[name].as_u64().with_context(|| format!("no {name} in {exits}"))
}
