//! Private guest memory: the built-in guest converts pages to and fro, and every
//! byte of them is checked, in the guest and by the host.

use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::Value;
use vmpager_kvm::probe;
use vmpager_vm::{
    ConvertWorkload, Cpu, InProcess, PrivateBackend, PrivateConfig, RestoreMemory, SnapshotPaths,
    Vm, VmConfig, VmError, Workload,
};

use super::Lab;
use crate::cpus::{guest_command, run_guests_here};

const VCPUS: u64 = 3;
/// Conversions of each vCPU, of 4 KiB to 2 MiB + 4 KiB.
const CONVERSIONS: u64 = 200;
/// Conversions of each vCPU, of up to 64 KiB.
const SMALL_CONVERSIONS: u64 = 1000;
/// Has another number of those.
const SETTING: &str = "VMPAGER_LAB_TEST_CONVERSIONS";

/// Without attributes private pages are kept in place, which tests less.
fn best_backend() -> anyhow::Result<&'static str> {
    let exact = probe::kvm()?.exact_memory_faults();
    Ok(if exact { "guest_memfd" } else { "memory in place" })
}

pub(super) fn pages_are_converted_to_and_fro(lab: &Lab) -> anyhow::Result<()> {
    let report = converts(lab, "auto", CONVERSIONS, &[])?;
    let wanted = best_backend()?;
    ensure!(report["backend"] == wanted, "not by {wanted}: {report}");
    let small = match std::env::var(SETTING) {
        Ok(number) => number.parse().with_context(|| format!("{SETTING}={number}"))?,
        Err(_) => SMALL_CONVERSIONS,
    };
    converts(lab, "auto", small, &["--most-pages", "16"])?;
    Ok(())
}

pub(super) fn pages_are_converted_in_place(lab: &Lab) -> anyhow::Result<()> {
    converts(lab, "in-place", CONVERSIONS / 2, &[])?;
    converts(lab, "in-place", CONVERSIONS / 2, &["--preserve"])?;
    in_a_mapped_guest_memfd(lab)
}

/// Where a guest_memfd can be mapped by the host, private pages can be in place there,
/// and come back eagerly; elsewhere it is said why not.
fn in_a_mapped_guest_memfd(lab: &Lab) -> anyhow::Result<()> {
    let backend = PrivateBackend::MappedGuestMemfd;
    let flags = probe::GUEST_MEMFD_MMAP | probe::GUEST_MEMFD_INIT_SHARED;
    if probe::kvm()?.guest_memfd_flags & flags != flags {
        return refused(backend, "no guest_memfd that the host can map");
    }
    converts(lab, "mapped-guest-memfd", CONVERSIONS / 8, &[])?;
    let mut vm = small_vm(backend)?;
    convert(&mut vm, 20, 3)?;
    let snapshot = save(&mut vm)?;
    let ranges = vm.private().map(|private| private.private_ranges());
    ensure!(ranges.as_ref().is_some_and(|ranges| !ranges.is_empty()), "none is private");
    let lazily = RestoreMemory::InProcess(InProcess::default());
    let told = Vm::restore_with(&snapshot, lazily, Cpu::Kvm, backend).err();
    let told = told.context("restored lazily")?.to_string();
    ensure!(told.contains("no userfaultfd is told"), "{told}");
    let mut restored = Vm::restore_with(&snapshot, RestoreMemory::Eager, Cpu::Kvm, backend)?;
    let now = restored.private().map(|private| private.private_ranges());
    ensure!(now == ranges, "{now:?} are private, not {ranges:?}");
    is_right(&mut restored)
}

fn refused(backend: PrivateBackend, reason: &str) -> anyhow::Result<()> {
    let told = small_vm(backend).err().with_context(|| format!("{backend:?} was made"))?;
    ensure!(told.to_string().contains(reason), "{told}");
    Ok(())
}

fn small_vm(backend: PrivateBackend) -> anyhow::Result<Vm> {
    let private = Some(PrivateConfig { backend, ..PrivateConfig::default() });
    let config = VmConfig {
        memory_bytes: 16 << 20,
        cpu: Cpu::Kvm,
        vcpus: 2,
        private,
        ..VmConfig::default()
    };
    Ok(Vm::build(&config)?)
}

/// Every page, by the guest and by the host.
fn is_right(vm: &mut Vm) -> anyhow::Result<()> {
    let report = vm.run(&Workload::default(), Instant::now())?;
    ensure!(report.mismatches == 0, "{report:?}");
    let host = vm.verify_from_host();
    ensure!(host.mismatches == 0, "{host:?}");
    Ok(())
}

/// Accesses ask for conversions, page by page, from several vCPUs at once.
pub(super) fn pages_are_converted_by_accesses(lab: &Lab) -> anyhow::Result<()> {
    if best_backend()? != "guest_memfd" {
        return refused(PrivateBackend::ByAddress, "no software-protected VMs");
    }
    for more in [&["--most-pages", "16"][..], &["--most-pages", "64", "--preserve"]] {
        let report = converts(lab, "by-address", CONVERSIONS / 8, more)?;
        let number = |key: &str| report[key].as_u64().unwrap_or_default();
        let pages = number("to_private_pages") + number("to_shared_pages");
        // One for each page that was of the other kind, but for those that are the
        // guest's own from the start.
        let own = pages.checked_sub(number("implicit"));
        ensure!(number("implicit") > 0 && own.is_some_and(|own| own < 64), "{report}");
    }
    Ok(())
}

fn converts(lab: &Lab, place: &str, each: u64, more: &[&str]) -> anyhow::Result<Value> {
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

/// Conversions race the installs of a lazily restored VM, and its background fill.
/// In place, private pages come back as such; a guest_memfd's are shared first.
pub(super) fn restored_lazily_pages_are_converted(lab: &Lab) -> anyhow::Result<()> {
    run_guests_here(lab)?;
    let mut backends = vec![PrivateBackend::Auto, PrivateBackend::InPlace];
    if best_backend()? == "guest_memfd" {
        backends.push(PrivateBackend::ByAddress);
    }
    for backend in backends {
        let mut vm = small_vm(backend)?;
        convert(&mut vm, 40, 1)?;
        if vm.private().is_some_and(|private| !private.is_in_place()) {
            let refused = save(&mut vm).err().context("saved what the host cannot read")?;
            ensure!(refused.to_string().contains("guest_memfd"), "{refused}");
            vm.share_all()?;
        }
        let snapshot = save(&mut vm)?;
        let ranges = vm.private().map(|private| private.private_ranges());
        for background_fill in [false, true] {
            let lazily =
                RestoreMemory::InProcess(InProcess { background_fill, ..InProcess::default() });
            let mut restored = Vm::restore_with(&snapshot, lazily, Cpu::Kvm, backend)?;
            let now = restored.private().map(|private| private.private_ranges());
            ensure!(now == ranges, "{now:?} are private, not {ranges:?}");
            restored.holds_as(&vm);
            convert(&mut restored, 60, 2)?;
            restored.prepare()?;
            is_right(&mut restored)?;
            let by = restored.private().map_or("nothing", |private| private.backend());
            println!("{by}, fill {background_fill}: all pages are right");
        }
    }
    Ok(())
}

fn save(vm: &mut Vm) -> anyhow::Result<vmpager_vm::Snapshot> {
    vm.prepare()?;
    Ok(vm.snapshot(&SnapshotPaths::in_dir("."))?)
}

fn convert(vm: &mut Vm, conversions: u64, seed: u64) -> anyhow::Result<()> {
    // By accesses as well, where these can ask.
    for implicit in [false, true] {
        let mut workload =
            ConvertWorkload { conversions, seed, implicit, ..ConvertWorkload::default() };
        if implicit {
            // Each page is a fault.
            workload.sizes.retain(|pages| *pages <= 8);
        }
        match vm.convert(&workload) {
            Err(VmError::NotPrivate { .. }) if implicit => {}
            report => {
                let report = report?;
                ensure!((report.mismatches, report.host_mismatches) == (0, 0), "{report:?}");
            }
        }
    }
    Ok(())
}
