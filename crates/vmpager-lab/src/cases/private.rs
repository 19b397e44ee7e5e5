//! Private guest memory: the built-in guest converts pages to and fro, and every
//! byte of them is checked, in the guest and by the host.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use vmpager_kvm::private::ConversionStats;
use vmpager_kvm::probe;
use vmpager_vm::{
    ConvertWorkload, ConvertedContents, Cpu, InProcess, PrivateBackend, PrivateConfig,
    RestoreMemory, Snapshot, SnapshotPaths, Vm, VmConfig, VmError, Workload,
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

/// All vCPUs convert the same pages: nobody sees what was, or another's.
pub(super) fn vcpus_convert_the_same_pages(lab: &Lab) -> anyhow::Result<()> {
    run_guests_here(lab)?;
    // vCPUs that take turns prove little: until one has waited for another.
    races(PrivateBackend::Auto, ConvertedContents::Zero, |stats| stats.waited > 0)?;
    if best_backend()? == "guest_memfd" {
        for contents in [ConvertedContents::Zero, ConvertedContents::Preserve] {
            // Each asks by hypercalls, and accesses ask again for what others converted.
            races(PrivateBackend::ByAddress, contents, |stats| stats.implicit > 0)?;
        }
    }
    Ok(())
}

fn races(
    backend: PrivateBackend,
    contents: ConvertedContents,
    have_met: fn(&ConversionStats) -> bool,
) -> anyhow::Result<()> {
    let mut vm = vm_with(PrivateConfig { backend, contents }, VCPUS)?;
    for seed in 1..200 {
        let mut workload = ConvertWorkload { conversions: 8, seed, ..ConvertWorkload::default() };
        if backend == PrivateBackend::ByAddress {
            // Each page that another converts is a fault.
            workload.sizes.retain(|pages| *pages <= 64);
        }
        let report = vm.race(&workload)?;
        ensure!((report.mismatches, report.host_mismatches) == (0, 0), "{report:?}");
        let stats = vm.private().context("private memory")?.stats();
        ensure!((stats.undone, stats.stands, stats.refused) == (0, 0, 0), "{stats:?}");
        if have_met(&stats) {
            println!("{backend:?}, {contents:?}: {report:?}, {stats:?}");
            return Ok(());
        }
    }
    bail!("{backend:?}, {contents:?}: no vCPU ever met another")
}

fn refused(backend: PrivateBackend, reason: &str) -> anyhow::Result<()> {
    let told = small_vm(backend).err().with_context(|| format!("{backend:?} was made"))?;
    ensure!(told.to_string().contains(reason), "{told}");
    Ok(())
}

fn small_vm(backend: PrivateBackend) -> anyhow::Result<Vm> {
    vm_with(PrivateConfig { backend, ..PrivateConfig::default() }, 2)
}

fn vm_with(private: PrivateConfig, vcpus: u64) -> anyhow::Result<Vm> {
    let (memory_bytes, cpu, private) = (16 << 20, Cpu::Kvm, Some(private));
    Ok(Vm::build(&VmConfig { memory_bytes, cpu, vcpus, private, ..VmConfig::default() })?)
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
        if backend == PrivateBackend::InPlace {
            cannot_be_filled(&snapshot)?;
        }
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

/// Private pages of a snapshot do not come back in a guest_memfd that the host cannot
/// write.
fn cannot_be_filled(snapshot: &Snapshot) -> anyhow::Result<()> {
    let reason = match best_backend()? {
        "guest_memfd" => "KVM refuses GUEST_MEMFD_FLAG_INIT_SHARED",
        _ => "no software-protected VMs",
    };
    let lazily = RestoreMemory::InProcess(InProcess::default());
    for memory in [RestoreMemory::Eager, lazily] {
        let restored = Vm::restore_with(snapshot, memory, Cpu::Kvm, PrivateBackend::GuestMemfd);
        let told = restored.err().context("private pages were restored")?.to_string();
        ensure!(told.contains(reason), "{told}");
    }
    Ok(())
}

/// Only that all ways are measured: times mean little here.
pub(super) fn bench_convert_measures_every_way(lab: &Lab) -> anyhow::Result<()> {
    let sizes = [4 << 10, 64 << 10];
    let mut command = guest_command(lab, &lab.vmpager);
    command.args(["bench", "convert", "--json", "--sizes", "4K,64K"]);
    command.args(["--conversions", "2", "--rounds", "1", "--faults", "20"]);
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {error}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).context("its report")?;
    let rows = |key: &str| report[key].as_array().with_context(|| format!("no {key}: {report}"));
    let (rows, never) = (rows("rows")?, rows("never_converting")?);
    let mut ways = vec![("memory in place", "hypercall")];
    if best_backend()? == "guest_memfd" {
        ways.insert(0, ("guest_memfd", "hypercall"));
        ways.extend([("by address", "hypercall"), ("by address", "access")]);
    }
    let rows_of = |(by, asked)| sizes.map(|bytes| (by, asked, bytes));
    let wanted: Vec<_> = ways.iter().copied().flat_map(rows_of).collect();
    let found: Vec<_> = rows
        .iter()
        .map(|row| {
            let text = |key: &str| row[key].as_str().unwrap_or_default();
            (text("backend"), text("asked_by"), row["bytes"].as_u64().unwrap_or_default())
        })
        .collect();
    ensure!(found == wanted, "{found:?}");
    let is_measured = |row: &Value, keys: &[&str]| {
        keys.iter().all(|key| row[key].as_f64().is_some_and(|number| number > 0.0))
    };
    let times = ["conversion_us", "bare_us", "ratio_bare", "others_p99_us", "ratio_others"];
    ensure!(rows.iter().all(|row| is_measured(row, &times)), "{rows:?}");
    let backends: BTreeSet<&str> = ways.iter().map(|(by, _)| *by).collect();
    let named: BTreeSet<&str> = never.iter().filter_map(|row| row["backend"].as_str()).collect();
    ensure!(named == backends && never.len() == named.len(), "{never:?}");
    let rates = ["kfaults_s", "plain_memfd_kfaults_s", "plain_anonymous_kfaults_s"];
    ensure!(never.iter().all(|row| is_measured(row, &rates)), "{never:?}");
    Ok(())
}

fn save(vm: &mut Vm) -> anyhow::Result<Snapshot> {
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
