//! Missing pages as exits of the vCPU: the built-in guest runs on a write-only
//! view, and its own threads install what it misses.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Instant;

use common::{config, cpus, restore_and_run, snapshot};
use vmpager_vm::{Cpu, Delivery, ExitMechanism, InProcess, RestoreMemory, Vm, VmConfig, Workload};

fn have_kvm() -> bool {
    cpus().contains(&Cpu::Kvm)
}

fn by_exits(background_fill: bool) -> RestoreMemory {
    RestoreMemory::InProcess(InProcess {
        background_fill,
        delivery: Delivery::Exit(ExitMechanism::View),
        ..InProcess::default()
    })
}

#[test]
fn a_guest_runs_on_pages_its_own_threads_install() {
    if !have_kvm() {
        return;
    }
    let has_irqchip = vmpager_kvm::probe::kvm().is_ok_and(|kvm| kvm.irqchip);
    for (vcpus, lapic) in [(1, false), (2, false), (1, true), (2, true)] {
        if lapic && !has_irqchip {
            vmpager_testing::skipped("KVM has no interrupt controllers");
            continue;
        }
        let (_dir, snapshot) = snapshot(&VmConfig { vcpus, lapic, ..config(Cpu::Kvm) });
        for write_every in [0, 1, 3] {
            let workload = Workload { write_every, seed: write_every, ..Workload::default() };
            let (vm, report) =
                restore_and_run(&snapshot, by_exits(false), Cpu::Kvm, &workload).unwrap();
            assert_eq!((report.mismatches, vm.verify_from_host().mismatches), (0, 0));
            let stats = vm.exit_stats().unwrap();
            println!("{vcpus} vCPUs, a write in {write_every}: {stats:?}");
            assert!(stats.installed >= vm.content_pages() * 9 / 10, "{stats:?}");
            assert!(stats.fallbacks * 100 <= stats.exits, "{stats:?}");
        }
    }
}

#[test]
fn the_fill_beside_it_and_its_end_are_no_matter() {
    if !have_kvm() {
        return;
    }
    let (_dir, snapshot) = snapshot(&VmConfig { vcpus: 2, ..config(Cpu::Kvm) });
    for seed in 0..4 {
        let workload = Workload { write_every: 2, seed, ..Workload::default() };
        let (vm, report) = restore_and_run(&snapshot, by_exits(true), Cpu::Kvm, &workload).unwrap();
        assert_eq!((report.mismatches, vm.verify_from_host().mismatches), (0, 0));
        // None if the fill was done before the vCPUs were made.
        if let Some(stats) = vm.exit_stats() {
            println!("{stats:?}");
            assert!(stats.fallbacks <= 1 + stats.exits / 300, "{stats:?}");
        }
    }
}

/// Told that nothing will be missing, the delivery leaves every page to the
/// userfaultfd: slow, and right.
#[test]
fn the_fallback_brings_every_page() {
    if !have_kvm() {
        return;
    }
    for vcpus in [1, 2] {
        let (_dir, snapshot) = snapshot(&VmConfig { vcpus, ..config(Cpu::Kvm) });
        let mut vm = Vm::restore(&snapshot, by_exits(false), Cpu::Kvm).unwrap();
        let workload = Workload { touches: Some(300), write_every: 3, ..Workload::default() };
        vm.foretell(&workload, false).unwrap();
        let report = vm.run(&workload, Instant::now()).unwrap();
        assert_eq!((report.mismatches, vm.verify_from_host().mismatches), (0, 0));
        let stats = vm.exit_stats().unwrap();
        println!("{vcpus} vCPUs: {stats:?}");
        assert!(stats.installed == 0 && stats.fallbacks > 0, "{stats:?}");
    }
}

/// What is foretold is brought without looking at the guest.
#[test]
fn foretold_pages_are_brought_in_turn() {
    if !have_kvm() {
        return;
    }
    let (_dir, snapshot) = snapshot(&VmConfig { vcpus: 2, ..config(Cpu::Kvm) });
    let mut vm = Vm::restore(&snapshot, by_exits(false), Cpu::Kvm).unwrap();
    let workload = Workload::default();
    vm.bring_fixed();
    vm.foretell(&workload, true).unwrap();
    let report = vm.run(&workload, Instant::now()).unwrap();
    assert_eq!((report.mismatches, vm.verify_from_host().mismatches), (0, 0));
    let stats = vm.exit_stats().unwrap();
    // The worker brought some as neighbours of what was fixed.
    assert!(stats.installed * 10 >= report.pages * 9 && stats.fallbacks == 0, "{stats:?}");
}

/// The benchmark's oracle: the same bytes, and no more exits than there are pages.
#[test]
fn an_oracle_brings_every_page() {
    if !have_kvm() {
        return;
    }
    let has_attributes = vmpager_kvm::probe::kvm().is_ok_and(|kvm| kvm.exact_memory_faults());
    let mechanisms = [ExitMechanism::View, ExitMechanism::Attributes];
    for mechanism in &mechanisms[..if has_attributes { 2 } else { 1 }] {
        let (_dir, snapshot) = snapshot(&VmConfig { vcpus: 2, ..config(Cpu::Kvm) });
        let memory = RestoreMemory::Oracle(*mechanism);
        let mut vm = Vm::restore(&snapshot, memory, Cpu::Kvm).unwrap();
        let workload = Workload { write_every: 3, ..Workload::default() };
        vm.foretell(&workload, true).unwrap();
        let report = vm.run(&workload, Instant::now()).unwrap();
        assert_eq!((report.mismatches, vm.verify_from_host().mismatches), (0, 0));
        let stats = vm.exit_stats().unwrap();
        println!("{mechanism:?}: {stats:?}");
        assert_eq!((stats.installed, stats.fallbacks), (report.pages, 0), "{stats:?}");
    }
}

/// Exits by attributes, or a refusal that says what is missing.
#[test]
fn attributes_bring_every_page_or_are_refused() {
    if !have_kvm() {
        return;
    }
    let (_dir, snapshot) = snapshot(&VmConfig { vcpus: 2, ..config(Cpu::Kvm) });
    let delivery = Delivery::Exit(ExitMechanism::Attributes);
    let memory = RestoreMemory::InProcess(InProcess { delivery, ..InProcess::default() });
    let workload = Workload { write_every: 3, ..Workload::default() };
    let restored = restore_and_run(&snapshot, memory, Cpu::Kvm, &workload);
    if !vmpager_kvm::probe::kvm().is_ok_and(|kvm| kvm.exact_memory_faults()) {
        let error = restored.unwrap_err().to_string();
        for word in ["software-protected VMs", "CONFIG_KVM_SW_PROTECTED_VM", "write-only view"] {
            assert!(error.contains(word), "{error}");
        }
        return;
    }
    let (vm, report) = restored.unwrap();
    assert_eq!((report.mismatches, vm.verify_from_host().mismatches), (0, 0));
    let stats = vm.exit_stats().unwrap();
    println!("{stats:?}");
    assert!(stats.installed >= vm.content_pages() * 9 / 10, "{stats:?}");
    assert!(stats.fallbacks == 0, "{stats:?}");
    let ends = stats.cleared + stats.overtaken + stats.reentered + stats.waited;
    assert_eq!(stats.exits + stats.asked_again, ends, "{stats:?}");
}
