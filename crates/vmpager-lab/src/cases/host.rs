//! The emulated machine as such, and the built-in guest on it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use vmpager_kvm::probe::{self, Vendor};
use vmpager_vm::memslot_cost;

use super::Lab;
use crate::cpus::guest_command;

/// The lab is worth nothing without KVM that runs guests by itself.
pub(super) fn kvm_is_there(_: &Lab) -> anyhow::Result<()> {
    let kvm = probe::kvm()?;
    ensure!(kvm.irqchip, "KVM has no interrupt controllers");
    ensure!(matches!(kvm.vendor, Some(Vendor::Amd | Vendor::Intel)), "KVM is {:?}", kvm.vendor);
    ensure!(kvm.nested_paging == Some(true), "nested paging: {:?}", kvm.nested_paging);
    Ok(())
}

pub(super) fn doctor_finds_what_restores_need(lab: &Lab) -> anyhow::Result<()> {
    let report = json(Command::new(&lab.vmpager).args(["doctor", "--json"]))?;
    for (answer, wanted) in
        [("on_demand_restore", "yes"), ("guest", "kvm"), ("linux_guests", "yes")]
    {
        let found = &report["verdict"][answer];
        ensure!(found == wanted, "{answer}: {found}, not {wanted}\n{report:#}");
    }
    Ok(())
}

pub(super) fn demo_restores_every_page_on_kvm(lab: &Lab) -> anyhow::Result<()> {
    let report = json(
        guest_command(lab, &lab.vmpager)
            .args(["demo", "--memory", "32M", "--cpu", "kvm", "--json", "--dir", "."]),
    )?;
    ensure!(report["vm"] == "kvm", "its vCPU was {}", report["vm"]);
    ensure!(report["mismatches"] == 0, "mismatches: {report:#}");
    let runs = report["runs"].as_array().map_or(0, Vec::len);
    let verified = report["pages_verified"].as_u64().unwrap_or(0);
    // In each run the guest touches every page, and the host looks at all.
    ensure!(runs == 4 && verified >= 4 * 8192, "{runs} runs, {verified} pages verified");
    println!("{verified} pages verified in {runs} restores");
    Ok(())
}

/// With nested paging, what KVM takes to accept memory does not grow with it.
pub(super) fn large_memory_is_accepted_as_fast(_: &Lab) -> anyhow::Result<()> {
    const TIMES: usize = 9;
    let cost = |mib: u64| {
        let costs = (0..TIMES).map(|_| memslot_cost(mib << 20)).collect::<Result<Vec<_>, _>>();
        let mut costs = costs?;
        costs.sort_unstable();
        println!("{mib} MiB: {:?}", costs[TIMES / 2]);
        anyhow::Ok(costs[TIMES / 2])
    };
    // The first is measured while the machine has just been started.
    let small = cost(256)?.min(cost(1024)?);
    cost(4096)?;
    let large = cost(16_384)?;
    // Sixteen times the memory and more. The rest is the emulator's unsteadiness.
    ensure!(large < small * 3 + Duration::from_millis(2), "{small:?} and {large:?}");
    Ok(())
}

/// A VM that is restored on demand starts as fast, however large it is.
pub(super) fn a_large_vm_starts_as_fast(lab: &Lab) -> anyhow::Result<()> {
    let report = json(guest_command(lab, &lab.vmpager).args([
        "bench",
        "restore",
        "--memory",
        "256M,1G,4G,16G",
        "--filled",
        "16M",
        "--touches",
        "256",
        "--modes",
        "on-demand",
        "--cache",
        "warm",
        "--rounds",
        "3",
        "--cpu",
        "kvm",
        "--dir",
        ".",
        "--json",
    ]))?;
    let rows = report["rows"].as_array().context("no rows")?;
    ensure!(rows.len() == 4, "{} rows: {report:#}", rows.len());
    let first = |row: &Value| {
        println!(
            "{} bytes: first instruction after {} ms",
            row["memory_bytes"], row["first_instruction_ms"]
        );
        row["first_instruction_ms"].as_f64().context("a time")
    };
    let times = rows.iter().map(first).collect::<anyhow::Result<Vec<_>>>()?;
    // Sixty-four times the memory. The rest is the emulator's unsteadiness.
    ensure!(times[3] < times[0].min(times[1]) * 2.0 + 50.0, "{times:?}");
    Ok(())
}

/// Runs a command that prints JSON.
fn json(command: &mut Command) -> anyhow::Result<Value> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let (out, err) = (&output.stdout, String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command:?}: {}\n{err}", output.status);
    serde_json::from_slice(out).with_context(|| format!("what {command:?} printed"))
}
