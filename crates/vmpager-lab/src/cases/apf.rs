//! Linux guests that are told of missing pages, and run something else meanwhile.

use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;
use vmpager_kvm::probe;

use super::Lab;
use super::guest::{Guest, SMALL, Size};
use super::linux::RESET;
use super::saved::Saved;

const ONE: Size = Size { still: 512, readers: 4, moving: 128, ..SMALL };
const BOTH: Size = Size { vcpus: 2, ..ONE };
/// Most of its faults are of readers that wait for pages that nobody else wants.
const LARGE: Size = Size { still: 12288, readers: 48, moving: 256, vcpus: 2, least_mib: 160 };

/// How much the load must do after a restore.
const WORK: u64 = 400;

const TOLD: [&str; 7] =
    ["on-demand", "--delivery", "exit", "--async-pf", "always", "--neighbours", "off"];
const ATTRIBUTES: [&str; 2] = ["--exit-mechanism", "attributes"];
/// Each page takes its own time, so that they come out of order.
const SLOW: [&str; 2] = ["--source-delay", "0-20000"];
const QUICK: [&str; 2] = ["--source-delay", "0-3000"];

/// Page-ready interrupts that only one side counts: one for each time a vCPU came up
/// before the guest was saved, and those of the guest's way from its last count to its
/// end.
const FEW: u64 = 100;

/// In all of the long test.
const FAULTS: u64 = 50_000;

pub(super) fn told_of_faults_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let told = restores(lab, &ONE, &[&TOLD[..], &SLOW].concat())?;
    // What a whole guest does: its kernel misses pages too, with interrupts on and
    // off, and so does the delivery of its events.
    for why in ["kernel", "interrupts_off"] {
        ensure!(number(&told["refused"], why)? > 0, "{told}");
    }
    Ok(())
}

/// By attributes, where there are any.
pub(super) fn told_of_faults_on_two_vcpus_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let attributes = if probe::kvm()?.exact_memory_faults() { &ATTRIBUTES[..] } else { &[] };
    restores(lab, &BOTH, &[&TOLD[..], attributes, &QUICK].concat()).map(drop)
}

/// Tasks that sleep when the guest is saved are woken in every guest restored from
/// that, whoever plays the device then, and miss their pages again.
pub(super) fn saved_with_tasks_asleep_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let first = Saved::shared(lab, &BOTH)?;
    // With neighbours, for saving a guest reads all of its memory.
    let (told, _neighbours_off) = TOLD.split_at(5);
    let guest = first.restore(lab, &[told, &SLOW].concat())?;
    // At once: nearly every task waits for a page.
    let second = first.succeed(lab, guest)?;
    for mode in [&[&TOLD[..], &QUICK].concat()[..], &["on-demand"]] {
        let mut guest = second.restore(lab, mode)?;
        guest.work(WORK / 4)?;
        guest.end_well()?;
    }
    Ok(())
}

/// A vCPU that goes offline turns its device off with tasks asleep, and on again
/// when it comes back.
pub(super) fn told_of_faults_a_vcpu_goes_and_comes_back(lab: &Lab) -> anyhow::Result<()> {
    let saved = Saved::shared(lab, &BOTH)?;
    let mut guest = saved.restore(lab, &[&TOLD[..], &QUICK, &["--json"]].concat())?;
    for _ in 0..3 {
        for online in ["0", "1"] {
            guest.say(&format!("cpu1 {online}"))?;
            let done = format!("load: cpu1 {online}");
            guest.find("a vCPU to go or come", |line| line.contains(&done).then_some(()))?;
        }
    }
    guest.work(WORK / 4)?;
    let told = ends(guest)?;
    // Two after the restore, and one each time it came back.
    ensure!(number(&told, "wake_alls")? >= 2 + 3, "{told}");
    Ok(())
}

/// Nobody is told of what comes afterwards, and nothing keeps the VM from ending.
pub(super) fn a_reset_with_tasks_asleep_is_told(lab: &Lab) -> anyhow::Result<()> {
    let saved = Saved::shared(lab, &BOTH)?;
    let mut guest = saved.restore(lab, &[&TOLD[..], &SLOW].concat())?;
    // At once: nearly every task waits for a page.
    guest.say("reset")?;
    let status = guest.wait()?;
    ensure!(status.code() == Some(RESET), "after a reset the VM ended with {status}");
    Ok(())
}

/// Only that all is measured, and right: times mean little here.
pub(super) fn bench_apf_measures_every_way(lab: &Lab) -> anyhow::Result<()> {
    // It keeps its vCPU on the last CPU by itself.
    let mut command = Command::new(&lab.vmpager);
    command.args(["bench", "apf", "--latency", "0,5", "--walkers", "4", "--rounds", "1"]);
    command.args(["--json", "--dir", ".", "--kernel"]).arg(&lab.kernel);
    command.arg("--initrd").arg(&lab.initrd);
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {error}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).context("its report")?;
    let rows = report["rows"].as_array().context("no rows")?;
    rows.iter().for_each(|row| println!("{row}"));
    ensure!(rows.len() == 2, "{} rows, not 2", rows.len());
    for row in rows {
        let measured = ["sync_s", "kernel_apf_s", "vmpager_s", "ratio_sync", "ratio_kernel"];
        let all = measured.iter().all(|key| row[key].as_f64().is_some_and(|number| number > 0.0));
        let is_hit = row["latency_ms"].as_f64() == Some(0.0);
        let told = number(&row["vmpager"], "injected")?;
        ensure!(all && (told > 0) != is_hit, "{row}");
    }
    Ok(())
}

/// Restores until the guests were told of so many faults in all, with one vCPU and
/// with two, by each mechanism there is.
pub(super) fn told_of_50000_faults_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let (mut faults, mut restores_done) = (0, 0);
    let mechanisms = if probe::kvm()?.exact_memory_faults() { 2 } else { 1 };
    while faults < FAULTS {
        let attributes = if restores_done / 2 % mechanisms == 1 { &ATTRIBUTES[..] } else { &[] };
        let size = Size { vcpus: 1 + restores_done % 2, ..LARGE };
        let told = restores(lab, &size, &[&TOLD[..], attributes, &SLOW].concat())?;
        faults += number(&told, "injected")?;
        restores_done += 1;
        println!("{faults} faults in {restores_done} restores");
    }
    Ok(())
}

/// Restores a guest under load so, which checks its memory. What its device for
/// asynchronous page faults came to.
fn restores(lab: &Lab, size: &Size, mode: &[&str]) -> anyhow::Result<Value> {
    let saved = Saved::shared(lab, size)?;
    let mut guest = saved.restore(lab, &[mode, &["--json"]].concat())?;
    guest.work(WORK)?;
    let told = ends(guest)?;
    ensure!(number(&told, "injected")? > 100, "{told}");
    Ok(told)
}

/// Ends a guest, each page of which is checked then.
fn ends(mut guest: Guest) -> anyhow::Result<Value> {
    guest.verdict()?;
    guest.say("interrupts")?;
    let interrupts = guest.find("its interrupts", |line| {
        line.split_once("load: interrupts async_pf=")?.1.trim().parse::<u64>().ok()
    })?;
    let summary = guest.end_summed_up()?;
    let told = summary["async_pf"].clone();
    println!("{} {told}", summary["exits"]);
    let (injected, ready) = (number(&told, "injected")?, number(&told, "ready")?);
    // All the guest was told of has come, but for what was turned off or never taken.
    // The guest's own count has few before the restore, and misses few after it was
    // asked.
    let posted = ready + number(&told, "wake_alls")?;
    println!("{posted} posted, of which the guest had counted {interrupts}");
    ensure!(interrupts.abs_diff(posted) <= FEW, "the guest counted {interrupts}: {told}");
    ensure!(ready <= injected && injected <= ready + number(&told, "late")? + 200, "{told}");
    Ok(told)
}

fn number(report: &Value, name: &str) -> anyhow::Result<u64> {
    report[name].as_u64().with_context(|| format!("no {name} in {report}"))
}
