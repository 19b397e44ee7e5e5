//! Private guest memory on this machine's KVM: in a guest_memfd where that has
//! memory attributes, else in place.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use common::{MEMORY, config};
use tempfile::TempDir;
use vmpager::NeighbourPolicy;
use vmpager::core::convert::{Kind, Request};
use vmpager_kvm::private::Cause;
use vmpager_vm::{
    ConvertReport, ConvertWorkload, ConvertedContents, Cpu, Delivery, ExitMechanism, Filling,
    InProcess, PrivateBackend, PrivateConfig, RestoreMemory, SnapshotPaths, Vm, VmConfig, VmError,
    Workload,
};

/// A VM with private memory; `None` without KVM.
fn build(backend: PrivateBackend, contents: ConvertedContents, vcpus: u64) -> Option<Vm> {
    let private = Some(PrivateConfig { backend, contents });
    match Vm::build(&VmConfig { private, vcpus, ..config(Cpu::Kvm) }) {
        Ok(vm) => {
            eprintln!("private memory: {}", vm.private().map_or("none", |p| p.backend()));
            Some(vm)
        }
        Err(VmError::NoKvm(error)) => {
            vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn convert(vm: &mut Vm, conversions: u64, seed: u64) -> ConvertReport {
    let workload = ConvertWorkload { conversions, seed, ..ConvertWorkload::default() };
    let report = vm.convert(&workload).unwrap();
    assert_eq!((report.mismatches, report.host_mismatches), (0, 0), "{report:?}");
    report
}

fn work(vm: &mut Vm) {
    let report = vm.run(&Workload::default(), Instant::now()).unwrap();
    assert_eq!((report.mismatches, report.pages), (0, vm.content_pages()), "{report:?}");
    assert_eq!(vm.verify_from_host().mismatches, 0);
}

#[test]
fn every_byte_is_right_after_conversions_by_several_vcpus() {
    for contents in [ConvertedContents::Zero, ConvertedContents::Preserve] {
        let backend = match contents {
            ConvertedContents::Zero => PrivateBackend::Auto,
            ConvertedContents::Preserve => PrivateBackend::InPlace,
        };
        let Some(mut vm) = build(backend, contents, 3) else { return };
        let first = convert(&mut vm, 60, 1);
        let second = convert(&mut vm, 60, 2);
        assert_eq!(second.conversions, 180);
        assert!(first.private_pages > 0 && second.host_pages > 0, "{first:?} {second:?}");
        let stats = vm.private().unwrap().stats();
        assert_eq!((stats.explicit, stats.undone, stats.stands, stats.refused), (360, 0, 0, 0));
        // The checksums the guest has now are those of what it filled.
        vm.prepare().unwrap();
        work(&mut vm);
    }
}

/// Nobody's part of a page shows what it held before, or another's; and what the rules
/// say of the pages' kinds afterwards is so.
#[test]
fn every_byte_is_right_after_vcpus_converted_the_same_pages() {
    for (backend, contents) in [
        (PrivateBackend::Auto, ConvertedContents::Zero),
        (PrivateBackend::InPlace, ConvertedContents::Zero),
        (PrivateBackend::InPlace, ConvertedContents::Preserve),
    ] {
        let Some(mut vm) = build(backend, contents, 3) else { return };
        // On a busy machine they may do so one after the other, for a while.
        for seed in 1.. {
            let workload = ConvertWorkload { conversions: 40, seed, ..ConvertWorkload::default() };
            let report = vm.race(&workload).unwrap();
            assert_eq!((report.mismatches, report.host_mismatches), (0, 0), "{report:?}");
            assert!(report.conversions == 120 && report.host_pages > 0, "{report:?}");
            let stats = vm.private().unwrap().stats();
            assert_eq!((stats.undone, stats.stands, stats.refused), (0, 0, 0), "{stats:?}");
            if stats.waited > 0 {
                break;
            }
            assert!(seed < 200, "no conversion ever waited for another: {stats:?}");
        }
        convert(&mut vm, 60, 1);
        vm.prepare().unwrap();
        work(&mut vm);
    }
}

#[test]
fn a_byte_written_amid_a_race_is_found() {
    let Some(mut vm) = build(PrivateBackend::InPlace, ConvertedContents::Preserve, 2) else {
        return;
    };
    let memory = vm.memory().clone();
    // The last page of memory is too far; the last of the race is converted by nobody.
    let guard = memory.len() - usize::try_from(vm.content_pages() * 4096).unwrap() + (4 << 20) - 8;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                memory.write_u64(guard, 12);
                std::thread::yield_now();
            }
        });
        let workload = ConvertWorkload { conversions: 40, ..ConvertWorkload::default() };
        let found = (0..100).find(|_| {
            let report = vm.race(&workload);
            report.is_ok_and(|report| report.mismatches > 0 && report.host_mismatches > 0)
        });
        is_over.store(true, Ordering::SeqCst);
        assert!(found.is_some(), "nobody saw it");
    });
}

#[test]
fn ranges_that_make_no_sense_are_einval_and_change_nothing() {
    let Some(mut vm) = build(PrivateBackend::Auto, ConvertedContents::Zero, 1) else { return };
    vm.prepare().unwrap();
    let private = vm.private().unwrap();
    let end = u64::try_from(vm.memory().len()).unwrap();
    let device = 32 << 30;
    for (gpa, pages, flags) in [
        (1, 1, 16),
        (0, 0, 16),
        (end, 1, 16),
        (end - 4096, 2, 0),
        (device, 1, 16),
        (u64::MAX - 4095, 1, 16),
        (0, u64::MAX, 16),
        (0, 1, 16 | 64),
    ] {
        let told = private.hypercall(&[gpa, pages, flags, 0, 0, 0]);
        assert_eq!(told.cast_signed(), -22, "{gpa:#x} {pages:#x} {flags:#x}");
    }
    assert_eq!(private.private_ranges(), []);
    assert_eq!(private.stats().refused, 8);
    assert_eq!(vm.verify_from_host().mismatches, 0);
}

/// Both kinds come back, eagerly and lazily, each page of its kind and with its
/// bytes, while the guest goes on converting.
#[test]
fn a_saved_vm_has_each_page_of_its_kind_again() {
    let Some(mut vm) = build(PrivateBackend::InPlace, ConvertedContents::Zero, 2) else { return };
    convert(&mut vm, 80, 3);
    vm.prepare().unwrap();
    let dir = TempDir::new().unwrap();
    let snapshot = vm.snapshot(&SnapshotPaths::in_dir(dir.path())).unwrap();
    let saved = vm.private().unwrap().private_ranges();
    assert!(!saved.is_empty());
    let lazily = |background_fill| {
        RestoreMemory::InProcess(InProcess {
            background_fill,
            collapse: background_fill,
            ..InProcess::default()
        })
    };
    for (number, from) in
        [RestoreMemory::Eager, lazily(false), lazily(true)].into_iter().enumerate()
    {
        let mut checked = Vm::restore(&snapshot, from.clone(), Cpu::Kvm).unwrap();
        assert_eq!(checked.private().unwrap().private_ranges(), saved);
        work(&mut checked);

        // Conversions race lazy installs and the fill.
        let mut restored = Vm::restore(&snapshot, from, Cpu::Kvm).unwrap();
        restored.holds_as(&vm);
        convert(&mut restored, 80, 10 + number as u64);
        restored.prepare().unwrap();
        work(&mut restored);

        // And so does saving it again, while much is missing.
        let again = TempDir::new().unwrap();
        let again = restored.snapshot(&SnapshotPaths::in_dir(again.path())).unwrap();
        let ranges = restored.private().unwrap().private_ranges();
        drop(restored);
        let mut last = Vm::restore(&again, RestoreMemory::Eager, Cpu::Kvm).unwrap();
        assert_eq!(last.private().unwrap().private_ranges(), ranges);
        work(&mut last);
    }
}

/// Private pages that nobody wrote are holes of the memory file, are restored without
/// a byte read, and read as zeroes, whatever they are converted to.
#[test]
fn private_pages_that_were_never_written_cost_no_byte() {
    let private = Some(PrivateConfig { backend: PrivateBackend::InPlace, ..Default::default() });
    let filling = Filling::Generated { seed: 3, bytes: Some(4 << 20) };
    let config = VmConfig { private, filling, ..config(Cpu::Kvm) };
    let mut vm = match Vm::build(&config) {
        Err(VmError::NoKvm(error)) => {
            return vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
        }
        vm => vm.unwrap(),
    };
    vm.prepare().unwrap();
    // Beyond contents, 1 MiB before the end of memory.
    let (never, end) = (MEMORY - (4 << 20)..MEMORY - (1 << 20), MEMORY - (1 << 20));
    let convert = |vm: &Vm, gpa: u64, len: u64, to| {
        vm.private().unwrap().convert(&Request { gpa, len, to }, Cause::Host).unwrap();
    };
    convert(&vm, never.start, never.end - never.start, Kind::Private);
    // One of them was.
    let written = usize::try_from(end - 4096).unwrap();
    vm.memory().write_u64(written + 8, 5);
    let dir = TempDir::new().unwrap();
    let snapshot = vm.snapshot(&SnapshotPaths::in_dir(dir.path())).unwrap();
    let stored = std::fs::metadata(&snapshot.paths().memory).unwrap().blocks() * 512;
    assert!(stored < 6 << 20, "{stored} bytes for 4 MiB of contents and a page");

    for neighbours in [NeighbourPolicy::Off, NeighbourPolicy::default()] {
        let lazily = RestoreMemory::InProcess(InProcess { neighbours, ..InProcess::default() });
        let restored = Vm::restore(&snapshot, lazily, Cpu::Kvm).unwrap();
        assert_eq!(restored.private().unwrap().private_ranges(), std::slice::from_ref(&never));
        let (memory, pager) = (restored.memory().clone(), restored.pager().unwrap());
        let read = |gpa: u64| memory.read_u64(usize::try_from(gpa).unwrap());
        let before = pager.stats();
        let touched: Vec<u64> = (never.start..end - (1 << 20)).step_by(64 << 10).collect();
        assert!(touched.iter().all(|gpa| read(*gpa) == 0));
        let after = pager.stats();
        assert_eq!(after.bytes_read, before.bytes_read, "zeroes were read");
        assert!(after.pages_zero - before.pages_zero >= touched.len() as u64, "{after:?}");
        assert_eq!(memory.read_u64(written + 8), 5);
        // Touched or not, they are zeroes of the other kind, and again of this.
        for to in [Kind::Shared, Kind::Private] {
            convert(&restored, never.start, 1 << 20, to);
            assert!((never.start..end - 4096).step_by(4096).all(|gpa| read(gpa) == 0));
        }
        assert_eq!(restored.private().unwrap().private_ranges(), std::slice::from_ref(&never));
        assert_eq!(memory.read_u64(written + 8), 5);
        assert_eq!(pager.stats().pages_poisoned, 0);
    }
}

/// Pages that nobody has touched since they were restored are converted like any others:
/// those that lost their contents do not get them from the snapshot any more, and those
/// that keep them do.
#[test]
fn pages_converted_before_they_came_are_as_the_policy_says() {
    for contents in [ConvertedContents::Zero, ConvertedContents::Preserve] {
        let Some(mut vm) = build(PrivateBackend::InPlace, contents, 1) else { return };
        vm.prepare().unwrap();
        let dir = TempDir::new().unwrap();
        let snapshot = vm.snapshot(&SnapshotPaths::in_dir(dir.path())).unwrap();
        let first = MEMORY - vm.content_pages() * 4096;
        let word = |vm: &Vm, gpa: u64| vm.memory().read_u64(usize::try_from(gpa).unwrap() + 8);
        let saved: Vec<u64> = (first..MEMORY).step_by(4096).map(|gpa| word(&vm, gpa)).collect();
        let zeroes = saved.iter().filter(|word| **word == 0).count();
        assert!(zeroes < saved.len() / 2, "{zeroes} pages have nothing to lose");
        for background_fill in [false, true] {
            let neighbours = NeighbourPolicy::Off;
            let lazily = InProcess { background_fill, neighbours, ..InProcess::default() };
            let from = RestoreMemory::InProcess(lazily);
            let restored = Vm::restore(&snapshot, from, Cpu::Kvm).unwrap();
            let private = restored.private().unwrap();
            let convert = |gpa, len, to| {
                private.convert(&Request { gpa, len, to }, Cause::Host).unwrap();
            };
            // Of each 64 pages 32 become private, and 16 of these shared again.
            let groups = || (first..MEMORY - (64 << 12)).step_by(64 << 12);
            groups().for_each(|gpa| convert(gpa, 32 << 12, Kind::Private));
            groups().for_each(|gpa| convert(gpa, 16 << 12, Kind::Shared));
            let groups_end = first + groups().count() as u64 * (64 << 12);
            for (gpa, saved) in (first..MEMORY).step_by(4096).zip(&saved) {
                let was_converted = gpa < groups_end && (gpa - first) / 4096 % 64 < 32;
                let is_lost = was_converted && contents == ConvertedContents::Zero;
                let expected = if is_lost { 0 } else { *saved };
                let how = format!("gpa {gpa:#x}, {contents:?}, fill {background_fill}");
                assert_eq!(word(&restored, gpa), expected, "{how}");
            }
        }
    }
}

/// Conversions go on while the VM is saved: each page comes back as it was before its
/// conversion, or after it, kind and contents.
#[test]
fn a_vm_saved_amid_conversions_is_that_of_one_moment() {
    const PAGES: u64 = 256;
    const WORD: u64 = 0x0123_4567_89ab_cdef;
    let Some(mut vm) = build(PrivateBackend::InPlace, ConvertedContents::Zero, 1) else { return };
    vm.prepare().unwrap();
    let (private, memory) = (vm.private().unwrap().clone(), vm.memory().clone());
    let first = u64::try_from(memory.len()).unwrap() - PAGES * 4096;
    let pages = || (0..PAGES).map(|page| first + page * 4096);
    let at = |gpa: u64| usize::try_from(gpa).unwrap();
    let convert = |gpa, len, to| private.convert(&Request { gpa, len, to }, Cause::Host).unwrap();
    for _ in 0..3 {
        convert(first, PAGES * 4096, Kind::Private);
        pages().for_each(|gpa| memory.write_u64(at(gpa), WORD));
        let dir = TempDir::new().unwrap();
        let paths = SnapshotPaths::in_dir(dir.path());
        let snapshot = std::thread::scope(|scope| {
            scope.spawn(|| pages().for_each(|gpa| convert(gpa, 4096, Kind::Shared)));
            vm.snapshot(&paths).unwrap()
        });
        assert_eq!(private.private_ranges(), [], "all are converted in the end");
        let restored = Vm::restore(&snapshot, RestoreMemory::Eager, Cpu::Kvm).unwrap();
        let kinds = restored.private().unwrap();
        for gpa in pages() {
            let expected = if kinds.kind(gpa) == Some(Kind::Private) { WORD } else { 0 };
            assert_eq!(restored.memory().read_u64(at(gpa)), expected, "gpa {gpa:#x}");
        }
    }
}

#[test]
fn what_cannot_be_private_is_refused_with_the_reason() {
    let Some(mut vm) = build(PrivateBackend::InPlace, ConvertedContents::Zero, 1) else { return };
    convert(&mut vm, 20, 5);
    vm.prepare().unwrap();
    let dir = TempDir::new().unwrap();
    let snapshot = vm.snapshot(&SnapshotPaths::in_dir(dir.path())).unwrap();
    let by_exits = |mechanism| {
        RestoreMemory::InProcess(InProcess {
            delivery: Delivery::Exit(mechanism),
            ..InProcess::default()
        })
    };
    for (from, cpu, reason) in [
        (RestoreMemory::Mmap, Cpu::Kvm, "mapped snapshot"),
        (by_exits(ExitMechanism::View), Cpu::Kvm, "no exits"),
        (by_exits(ExitMechanism::Attributes), Cpu::Kvm, "no exits"),
        (RestoreMemory::Eager, Cpu::Threads, "host threads"),
    ] {
        let error = Vm::restore(&snapshot, from, cpu).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    let eager = RestoreMemory::Eager;
    let refused = Vm::restore_with(&snapshot, eager, Cpu::Kvm, PrivateBackend::GuestMemfd);
    let error = refused.unwrap_err().to_string();
    // Without attributes the first reason is that there are none.
    assert!(
        error.contains("the host cannot write it") || error.contains("no software-protected"),
        "{error}"
    );
    let preserving = build_error(PrivateBackend::GuestMemfd, ConvertedContents::Preserve);
    assert!(
        preserving.contains("cannot preserve") || preserving.contains("no software-protected"),
        "{preserving}"
    );
    let mut ordinary = Vm::build(&config(Cpu::Kvm)).unwrap();
    let error = ordinary.convert(&ConvertWorkload::default()).unwrap_err().to_string();
    assert!(error.contains("cannot be private"), "{error}");
}

fn build_error(backend: PrivateBackend, contents: ConvertedContents) -> String {
    let private = Some(PrivateConfig { backend, contents });
    Vm::build(&VmConfig { private, ..config(Cpu::Kvm) }).unwrap_err().to_string()
}

/// A wrong byte in a private page is found by the guest, in a shared one by both:
/// or these tests would prove nothing.
#[test]
fn a_wrong_byte_is_found() {
    let Some(mut vm) = build(PrivateBackend::InPlace, ConvertedContents::Preserve, 1) else {
        return;
    };
    convert(&mut vm, 200, 6);
    let private = vm.private().unwrap().clone();
    let is_private = |gpa| private.kind(gpa) == Some(Kind::Private);
    let some_page = private.private_ranges()[0].start;
    let page = usize::try_from(some_page).unwrap();
    let word = vm.memory().read_u64(page + 8);
    vm.memory().write_u64(page + 8, word ^ 1 << 40);
    assert!(is_private(some_page));
    // The same conversions meet every page again.
    let workload = ConvertWorkload { conversions: 200, seed: 6, ..ConvertWorkload::default() };
    let report = vm.convert(&workload).unwrap();
    assert!(report.mismatches > 0, "{report:?}");
    assert_eq!(report.first_mismatch, Some(some_page / 4096));
}
