//! A Linux guest saved under load, and brought back in every way.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use vmpager::{EndReason, SessionSummary};

use super::Lab;
use super::back_end::BackEnd;
use super::guest::{Guest, SMALL, Size, TWO};
use super::pager::Serve;
use super::saved::Saved;

/// How much the load must do after a restore: most pages are touched by then.
const WORK: u64 = 2000;

const THROUGH_PAGER: [&str; 3] = ["on-demand", "--pager", "pager.sock"];

pub(super) fn a_snapshot_under_load_has_every_page(lab: &Lab) -> anyhow::Result<()> {
    let saved = Saved::shared(lab, &TWO)?;
    saved.compare(&saved.memory)
}

/// Restores, lets the guest work, has it saved again for the comparison, and
/// lets it work on.
fn restores(lab: &Lab, saved: &Saved, mode: &[&str]) -> anyhow::Result<()> {
    let guest = saved.restore(lab, mode)?;
    works_and_compares(lab, saved, guest)
}

fn works_and_compares(lab: &Lab, saved: &Saved, mut guest: Guest) -> anyhow::Result<()> {
    work_and_compare(lab, saved, &mut guest)?;
    guest.end_well()
}

/// The same, up to the guest's end.
pub(super) fn work_and_compare(lab: &Lab, saved: &Saved, guest: &mut Guest) -> anyhow::Result<()> {
    guest.work(WORK)?;
    let later = Path::new("later");
    guest.snapshot(lab, Path::new("later-state"), later, false)?;
    saved.compare(later)?;
    guest.work(WORK / 4)?;
    Ok(())
}

pub(super) fn restored_eagerly_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    restores(lab, &Saved::shared(lab, &TWO)?, &["eager"])
}

pub(super) fn restored_by_mmap_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    restores(lab, &Saved::shared(lab, &TWO)?, &["mmap"])
}

pub(super) fn restored_on_demand_in_process_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    restores(lab, &Saved::shared(lab, &TWO)?, &["on-demand"])
}

/// The guest's vCPUs leave it on missing pages and ask by the fault queue; a back-end in
/// a process of its own maps the same memory; one pager brings the pages of both.
pub(super) fn restored_through_serve_with_a_back_end_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let saved = Saved::shared(lab, &TWO)?;
    let doors = Path::new("doors");
    fs::create_dir(doors).context("making a directory for doors")?;
    let serve = Serve::start(lab, &saved.memory, &["--attach", "doors"])?;
    let mode = [&THROUGH_PAGER[..], &["--attach", "doors", "--delivery", "exit"]].concat();
    let begin = Instant::now();
    let mut guest = saved.start(lab, &mode, "control")?;
    let back_end = BackEnd::start(doors, &saved.memory)?;
    saved.goes_on(&mut guest, begin)?;
    back_end.end_well()?;
    works_and_compares(lab, &saved, guest)?;
    let sessions = serve.stop()?;
    let [session] = &sessions[..] else { anyhow::bail!("{} sessions, not one", sessions.len()) };
    ensure!(session.faults > 0 && session.pages_poisoned == 0, "{session:?}");
    let SessionSummary { faults_vcpu, faults_vmm, faults_kernel, .. } = session;
    let SessionSummary { faults_attached, faults_queued, .. } = session;
    let origins = [faults_vcpu, faults_vmm, faults_kernel, faults_attached, faults_queued];
    println!("faults of vCPUs, the VMM, the kernel, the back-end, the queue: {origins:?}");
    ensure!(origins.into_iter().sum::<u64>() == session.faults, "{session:?}");
    ensure!(*faults_attached > 0 && *faults_queued > 0, "{session:?}");
    Ok(())
}

pub(super) fn restored_through_serve_with_fill_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let saved = Saved::shared(lab, &TWO)?;
    let serve = Serve::start(lab, &saved.memory, &["--background-fill"])?;
    restores(lab, &saved, &THROUGH_PAGER)?;
    let sessions = serve.stop()?;
    let [session] = &sessions[..] else { anyhow::bail!("{} sessions, not one", sessions.len()) };
    ensure!(session.reason == Some(EndReason::Filled), "{session:?}");
    Ok(())
}

/// A guest that was restored can be saved and restored as any other.
pub(super) fn a_restored_guest_is_saved_and_restored_again(lab: &Lab) -> anyhow::Result<()> {
    let first = Saved::shared(lab, &TWO)?;
    let mut guest = first.restore(lab, &["on-demand"])?;
    guest.work(WORK / 4)?;
    let second = first.succeed(lab, guest)?;
    restores(lab, &second, &["on-demand"])
}

/// So that the checks of all the others are known to be able to fail.
pub(super) fn a_broken_byte_of_memory_is_found_by_the_guest(lab: &Lab) -> anyhow::Result<()> {
    let broken = Saved::shared(lab, &TWO)?.broken()?;
    let mut guest = broken.start(lab, &["on-demand"], "control")?;
    guest.any_beat()?;
    let verdict = guest.verdict()?;
    ensure!(!verdict.is_right, "the guest found nothing wrong with a broken byte");
    let is_it =
        |line: &String| line.contains("Still page 1024 ") && line.contains(" at byte 1232:");
    ensure!(verdict.wrong.iter().any(is_it), "it found something else: {:#?}", verdict.wrong);
    guest.terminate().map(|_| ())
}

/// Ten VMs from one snapshot, by one pager, at the same time.
pub(super) fn ten_restores_side_by_side(lab: &Lab) -> anyhow::Result<()> {
    const GUESTS: usize = 10;
    const SIZE: Size = Size { still: 512, moving: 256, ..SMALL };
    let saved = Saved::shared(lab, &SIZE)?;
    let serve = Serve::start(lab, &saved.memory, &[])?;
    let begin = Instant::now();
    let mut guests = (0..GUESTS)
        .map(|number| saved.start(lab, &THROUGH_PAGER, &format!("control-{number}")))
        .collect::<Result<Vec<_>, _>>()?;
    for guest in &mut guests {
        saved.goes_on(guest, begin)?;
    }
    // They are independent: one may end while the others run on.
    for mut guest in guests {
        guest.work(WORK / 8)?;
        guest.end_well()?;
    }
    let sessions = serve.stop()?;
    ensure!(sessions.len() == GUESTS, "{} sessions, not {GUESTS}", sessions.len());
    ensure!(sessions.iter().all(|session| session.pages_poisoned == 0), "{sessions:?}");
    Ok(())
}
