//! Pages of a profile that KVM maps before the guest runs.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use vmpager::core::Hva;
use vmpager::store::image::MemoryInput;
use vmpager::store::profile::{Profile, Touch};
use vmpager_kvm::probe;
use vmpager_vm::{
    Cpu, Delivery, ExitMechanism, InProcess, MappedAhead, RestoreMemory, Snapshot, SnapshotPaths,
    Vm, VmConfig, Workload,
};

use super::Lab;
use super::guest::{PATIENCE, TWO};
use super::restore::work_and_compare;
use super::saved::Saved;
use crate::cpus::run_guests_here;

const MEMORY: u64 = 8 << 20;

const PROFILE: &str = "hot.vmprof";

/// More than it takes: what is tested is what comes of it.
const LONG: Duration = Duration::from_secs(60);

/// The built-in guest, which touches every page and checks its bytes, with all of its
/// memory in the profile and in place when it is let run: it takes a fault for each page,
/// or next to none.
pub(super) fn pages_mapped_ahead_are_no_faults(lab: &Lab) -> anyhow::Result<()> {
    run_guests_here(lab)?;
    let config = VmConfig { memory_bytes: MEMORY, cpu: Cpu::Kvm, vcpus: 2, ..VmConfig::default() };
    let mut vm = Vm::build(&config)?;
    vm.prepare()?;
    let snapshot = vm.snapshot(&SnapshotPaths::in_dir("."))?;
    drop(vm);
    let pages = MEMORY / 4096;
    let profile = Arc::new(profile(&snapshot.paths().memory, 1)?);
    let run = |map_ahead, delivery| restored(&snapshot, &profile, map_ahead, delivery);
    let (none, faults) = run(Duration::ZERO, Delivery::Userfaultfd)?;
    println!("{pages} pages: {faults} faults with none mapped ahead");
    ensure!(none.is_none(), "mapped unasked: {none:?}");
    for delivery in [Delivery::Userfaultfd, Delivery::Exit(ExitMechanism::View)] {
        let (mapped, left) = run(LONG, delivery)?;
        if !probe::kvm()?.pre_fault_memory {
            ensure!(mapped.is_none(), "mapped by a KVM that cannot: {mapped:?}");
            println!("this KVM maps nothing ahead: {left} faults");
            continue;
        }
        let mapped = mapped.context("nothing was mapped ahead")?;
        println!("{delivery:?}: {left} faults, {mapped:?}");
        ensure!((mapped.pages, mapped.refused, mapped.left) == (pages, 0, 0), "{mapped:?}");
        // One for each page that the guest touches, all but few of its memory.
        ensure!(faults >= pages * 3 / 4 && left * 20 < faults, "{left} of {faults} faults");
    }
    if probe::kvm()?.exact_memory_faults() {
        let (mapped, _) = run(LONG, Delivery::Exit(ExitMechanism::Attributes))?;
        ensure!(mapped.is_none(), "KVM was asked to map what it refuses: {mapped:?}");
    }
    Ok(())
}

/// What was mapped ahead, and how many stage-2 faults there were after that.
fn restored(
    snapshot: &Snapshot,
    profile: &Arc<Profile>,
    map_ahead: Duration,
    delivery: Delivery,
) -> anyhow::Result<(Option<MappedAhead>, u64)> {
    let profile = Some(Arc::clone(profile));
    let how = InProcess { profile, map_ahead, delivery, ..InProcess::default() };
    let mut vm = Vm::restore(snapshot, RestoreMemory::InProcess(how), Cpu::Kvm)?;
    let pager = vm.pager().context("no pager")?;
    let until = Instant::now() + PATIENCE;
    loop {
        let hot: u64 = pager.hot_in_place().iter().map(|(_, len): &(Hva, u64)| len).sum();
        if hot == MEMORY {
            break;
        }
        ensure!(Instant::now() < until, "{hot} bytes are in place after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    let report = vm.run(&Workload { write_every: 3, ..Workload::default() }, Instant::now())?;
    ensure!(report.mismatches == 0, "{report:?}");
    let host = vm.verify_from_host();
    ensure!(host.mismatches == 0, "{host:?}");
    let faults = vm.stage2_faults().context("KVM does not tell how many faults there were")?;
    Ok((vm.mapped_ahead(), faults))
}

/// A Linux guest under load, of whose memory the profile has the half: whatever of that is
/// in place when the guest is let run is mapped, the rest comes while it runs, and then
/// what the profile lacks.
pub(super) fn restored_with_a_profile_and_fill_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let saved = Saved::shared(lab, &TWO)?;
    fs::write(PROFILE, profile(&saved.memory, 2)?.encode()).context("writing a profile")?;
    let mode = ["on-demand", "--background-fill", "--profile", PROFILE, "--json"];
    let mut guest = saved.restore(lab, &mode)?;
    work_and_compare(lab, &saved, &mut guest)?;
    let summary = guest.end_summed_up()?;
    let (mapped, faults) = (&summary["mapped_ahead"], &summary["stage2_faults"]);
    println!("{mapped}, {faults} faults after that");
    let wanted = probe::kvm()?.pre_fault_memory;
    ensure!(mapped.is_object() == wanted, "{summary}");
    ensure!(!wanted || mapped["refused"] == 0, "{summary}");
    ensure!(faults.as_u64().is_some_and(|faults| faults > 0), "{summary}");
    Ok(())
}

/// A profile that has one in `parts` pieces of 256 KiB of a memory.
fn profile(memory: &Path, parts: u32) -> anyhow::Result<Profile> {
    let identity = MemoryInput::raw(memory)?.identity()?;
    let pages = u32::try_from(identity.memory_bytes() / 4096)?;
    let mut profile = Profile::new(identity);
    let touched = (0..pages).filter(|page| page / 64 % parts == 0);
    let touches: Vec<Touch> = touched.map(|page| Touch { page, at_us: page }).collect();
    profile.add_session(&touches);
    Ok(profile)
}
