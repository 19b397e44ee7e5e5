//! Private guest memory: the built-in guest converts pages to and fro, and every
//! byte of them is checked, in the guest and by the host.

use anyhow::{Context, ensure};
use serde_json::Value;
use vmpager_kvm::probe;

use super::Lab;
use crate::cpus::guest_command;

/// Conversions of each vCPU; the long run has more.
const CONVERSIONS: u64 = 400;

pub(super) fn pages_are_converted_to_and_fro(lab: &Lab) -> anyhow::Result<()> {
    let many = std::env::var("VMPAGER_LAB_CONVERSIONS").ok();
    let each = match many {
        Some(number) => {
            number.parse().with_context(|| format!("VMPAGER_LAB_CONVERSIONS={number}"))?
        }
        None => CONVERSIONS,
    };
    let report = converts(lab, "auto", each, &[])?;
    // Without attributes private pages are kept in place, which tests less.
    let wanted =
        if probe::kvm()?.exact_memory_faults() { "guest_memfd" } else { "memory in place" };
    ensure!(report["backend"] == wanted, "not by {wanted}: {report}");
    Ok(())
}

pub(super) fn pages_are_converted_in_place(lab: &Lab) -> anyhow::Result<()> {
    converts(lab, "in-place", CONVERSIONS, &[])?;
    converts(lab, "in-place", CONVERSIONS, &["--preserve"])?;
    Ok(())
}

fn converts(lab: &Lab, place: &str, each: u64, more: &[&str]) -> anyhow::Result<Value> {
    const VCPUS: u64 = 3;
    let mut command = guest_command(lab, &lab.vmpager);
    command.args(["vm", "run", "--guest", "builtin", "--memory", "16M", "--json"]);
    command.args(["--vcpus", &VCPUS.to_string(), "--conversions", &each.to_string()]);
    command.arg(format!("--private-memory={place}")).args(more);
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code().is_some_and(|code| code < 2), "{command:?}: {error}");
    let report: Value =
        serde_json::from_slice(&output.stdout).with_context(|| error.into_owned())?;
    let conversions = &report["conversions"];
    println!("{place}: {conversions}");
    for wrong in ["mismatches", "host_mismatches"] {
        ensure!(conversions[wrong] == 0, "{wrong}: {conversions}");
    }
    ensure!(report["mismatches"] == 0 && output.status.success(), "{report}");
    ensure!(conversions["conversions"] == VCPUS * each, "{conversions}");
    Ok(conversions.clone())
}
