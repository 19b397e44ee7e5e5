//! Linux guests that boot, and how guests end.

use anyhow::ensure;

use super::Lab;
use super::guest::{Guest, SMALL, Size, TWO};
use super::saved::Saved;

/// Enough of the load to trust it.
const WORK: u64 = 1000;

/// What the program promises (`vmpager vm run --help`).
const PANICKED: i32 = 3;
pub(super) const RESET: i32 = 4;

pub(super) fn linux_boots_works_and_powers_off(lab: &Lab) -> anyhow::Result<()> {
    boots_works_and_powers_off(lab, &SMALL)
}

pub(super) fn linux_boots_on_two_vcpus(lab: &Lab) -> anyhow::Result<()> {
    boots_works_and_powers_off(lab, &TWO)
}

fn boots_works_and_powers_off(lab: &Lab, size: &Size) -> anyhow::Result<()> {
    let mut guest = Guest::boot(lab, size)?;
    guest.work(WORK)?;
    guest.end_well()
}

/// A guest that runs: sooner had than by booting one.
fn restored(lab: &Lab) -> anyhow::Result<Guest> {
    Saved::shared(lab, &TWO)?.restore(lab, &["on-demand"])
}

pub(super) fn a_panic_of_the_guest_is_told(lab: &Lab) -> anyhow::Result<()> {
    let mut guest = restored(lab)?;
    guest.say("panic")?;
    let status = guest.wait()?;
    ensure!(status.code() == Some(PANICKED), "after a panic the VM ended with {status}");
    Ok(())
}

pub(super) fn a_reset_of_the_guest_is_told(lab: &Lab) -> anyhow::Result<()> {
    let mut guest = restored(lab)?;
    guest.say("reset")?;
    let status = guest.wait()?;
    ensure!(status.code() == Some(RESET), "after a reset the VM ended with {status}");
    Ok(())
}

/// A guest that is busy on all vCPUs is no reason not to end.
pub(super) fn a_busy_vm_ends_when_told(lab: &Lab) -> anyhow::Result<()> {
    let mut guest = restored(lab)?;
    guest.work(WORK)?;
    let status = guest.terminate()?;
    ensure!(status.code().is_some(), "it did not end by itself: {status}");
    Ok(())
}
