//! The guest computes what the host does, finds what is wrong, and survives a
//! snapshot.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{MEMORY, SEED, config, cpus, restore_and_run, snapshot};
use vmpager_sys::memory::Mapping;
use vmpager_vm::{
    Contents, Cpu, CpuKind, Filling, Kind, Order, PAGE_BYTES, RestoreMemory, Snapshot, Vm,
    VmConfig, VmError, Workload,
};

#[test]
fn a_prepared_guest_finds_nothing_wrong_and_neither_does_the_host() {
    for cpu in cpus() {
        let mut vm = Vm::build(&config(cpu)).unwrap();
        vm.prepare().unwrap();
        for write_every in [0, 1, 3] {
            let workload = Workload { write_every, ..Workload::default() };
            let report = vm.run(&workload, Instant::now()).unwrap();
            assert_eq!((report.mismatches, report.first_mismatch), (0, None), "{cpu:?}");
            assert_eq!(report.pages, vm.content_pages());
            assert_eq!(report.stalls.in_order().len() as u64, report.pages);
            assert!(report.workload > Duration::ZERO);
        }
        // The guest's table is what the host computes from the generator.
        let host = vm.verify_from_host();
        assert_eq!((host.mismatches, host.first_mismatch), (0, None), "{cpu:?}");
        assert!(host.pages > vm.content_pages());
    }
}

#[test]
fn an_unprepared_guest_is_neither_run_nor_saved() {
    let mut vm = Vm::build(&config(Cpu::Threads)).unwrap();
    let run = vm.run(&Workload::default(), Instant::now());
    assert!(matches!(run, Err(VmError::NotPrepared)));
}

#[test]
fn the_host_finds_what_changed_in_contents_table_and_code() {
    for page in [3, MEMORY / 4096 - 1] {
        let mut vm = Vm::build(&config(Cpu::Threads)).unwrap();
        vm.prepare().unwrap();
        let at = usize::try_from(page).unwrap() * PAGE_BYTES + 8;
        vm.memory().write_u64(at, !vm.memory().read_u64(at));
        let host = vm.verify_from_host();
        assert_eq!((host.mismatches, host.first_mismatch), (1, Some(page)));
    }
}

#[test]
fn eager_and_mapped_memory_restore_the_guest() {
    for cpu in cpus() {
        let (_dir, snapshot) = snapshot(&config(cpu));
        for memory in [RestoreMemory::Eager, RestoreMemory::Mmap] {
            for order in [Order::Random, Order::Sequential] {
                let workload = Workload { order, touches: Some(1000), write_every: 4, seed: 5 };
                let (vm, report) =
                    restore_and_run(&snapshot, memory.clone(), cpu, &workload).unwrap();
                assert_eq!((report.pages, report.mismatches), (1000, 0), "{cpu:?} {memory:?}");
                assert_eq!(vm.verify_from_host().mismatches, 0, "{cpu:?} {memory:?}");
            }
        }
    }
}

#[test]
fn rounds_follow_each_other_and_a_restored_guest_can_be_saved_again() {
    for cpu in cpus() {
        let (dir, first) = snapshot(&config(cpu));
        let (mut vm, _) =
            restore_and_run(&first, RestoreMemory::Mmap, cpu, &Workload::default()).unwrap();
        let second = vm.snapshot(first.paths()).unwrap();
        // The file the guest still maps was replaced, not written to.
        assert_eq!(vm.run(&Workload::default(), Instant::now()).unwrap().mismatches, 0);
        let (_, report) =
            restore_and_run(&second, RestoreMemory::Eager, cpu, &Workload::default()).unwrap();
        assert_eq!(report.mismatches, 0, "{cpu:?}");
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 2, "no temporary files: {left:?}");
    }
}

#[test]
fn snapshots_move_between_kinds_of_vcpu() {
    let cpus = cpus();
    for saved in &cpus {
        let (_dir, snapshot) = snapshot(&config(*saved));
        for restored in &cpus {
            let (vm, report) =
                restore_and_run(&snapshot, RestoreMemory::Eager, *restored, &Workload::default())
                    .unwrap();
            assert_eq!(report.mismatches, 0, "{saved:?} to {restored:?}");
            assert_eq!(vm.cpu() == CpuKind::Threads, *restored == Cpu::Threads);
        }
    }
}

#[test]
fn a_flipped_byte_is_reported_as_exactly_its_page() {
    for cpu in cpus() {
        let (_dir, snapshot) = snapshot(&config(cpu));
        let contents = Contents::new(SEED);
        for kind in [Kind::Zero, Kind::Text] {
            // Pages past the guest's own structures.
            let page = (1000..MEMORY / 4096).find(|p| contents.kind(*p) == kind).unwrap();
            let file =
                File::options().read(true).write(true).open(&snapshot.paths().memory).unwrap();
            let at = page * 4096 + 1234;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            // Which nobody reads ahead, as an eager restore would.
            let (vm, report) =
                restore_and_run(&snapshot, RestoreMemory::Mmap, cpu, &Workload::default()).unwrap();
            assert_eq!((report.mismatches, report.first_mismatch), (1, Some(page)));
            let host = vm.verify_from_host();
            assert_eq!((host.mismatches, host.first_mismatch), (1, Some(page)));
            file.write_all_at(&byte, at).unwrap();
        }
    }
}

#[test]
fn several_vcpus_share_the_pages() {
    for cpu in cpus() {
        let (_dir, snapshot) = snapshot(&VmConfig { vcpus: 3, ..config(cpu) });
        assert_eq!(snapshot.vcpus(), 3);
        let (vm, report) =
            restore_and_run(&snapshot, RestoreMemory::Mmap, cpu, &Workload::default()).unwrap();
        assert_eq!((report.pages, report.mismatches), (vm.content_pages(), 0), "{cpu:?}");
        assert_eq!(vm.verify_from_host().mismatches, 0);
    }
}

#[test]
fn memory_prepared_by_the_caller_must_have_the_right_size() {
    let (_dir, snapshot) = snapshot(&config(Cpu::Threads));
    let small = Arc::new(Mapping::anonymous(1 << 20).unwrap());
    let error = Vm::restore(&snapshot, RestoreMemory::Prepared(small), Cpu::Threads).unwrap_err();
    assert!(error.to_string().contains("1048576"), "{error}");
}

/// Memory that is not the guest's stops it: the error says where and how.
#[test]
fn a_guest_without_its_code_stops_with_a_named_exit() {
    if !cpus().contains(&Cpu::Kvm) {
        return;
    }
    let (_dir, snapshot) = snapshot(&config(Cpu::Kvm));
    let len = usize::try_from(snapshot.memory_bytes()).unwrap();
    let zeroes = Arc::new(Mapping::anonymous(len).unwrap());
    let memory = RestoreMemory::Prepared(zeroes);
    let error = restore_and_run(&snapshot, memory, Cpu::Kvm, &Workload::default()).unwrap_err();
    let VmError::Exit { vcpu: 0, exit, rip } = &error else { panic!("{error}") };
    assert!(!exit.is_empty() && *rip > 0, "{error}");
    assert!(error.to_string().contains(&format!("{rip:#x}")), "{error}");
}

#[test]
fn zero_pages_are_holes_in_the_memory_file() {
    let (_dir, snapshot) = snapshot(&config(Cpu::Threads));
    let metadata = std::fs::metadata(&snapshot.paths().memory).unwrap();
    assert_eq!(metadata.len(), MEMORY);
    let allocated = metadata.blocks() * 512;
    assert!(allocated < MEMORY * 9 / 10, "{allocated} of {MEMORY}");
    assert!(Snapshot::open(snapshot.paths()).is_ok());
}

#[test]
fn memory_without_contents_stays_absent_and_a_hole() {
    for cpu in cpus() {
        let filling = Filling::Generated { seed: SEED, bytes: Some(1 << 20) };
        let memory_bytes = 1 << 30;
        let (_dir, snapshot) = snapshot(&VmConfig { memory_bytes, filling, ..config(cpu) });
        let file = fs::metadata(&snapshot.paths().memory).unwrap();
        assert_eq!(file.len(), memory_bytes);
        assert!(file.blocks() * 512 < 4 << 20, "{} blocks", file.blocks());
        let (vm, report) =
            restore_and_run(&snapshot, RestoreMemory::Mmap, cpu, &Workload::default()).unwrap();
        assert_eq!((report.pages, report.mismatches), (256, 0));
        assert_eq!(vm.verify_from_host().mismatches, 0);
    }
}

#[test]
fn contents_can_come_from_another_guests_memory() {
    for cpu in cpus() {
        let (_dir, other) = snapshot(&config(Cpu::Threads));
        let path = other.paths().memory.clone();
        let filling = Filling::File(path.clone());
        let tight = VmConfig { filling: filling.clone(), ..config(cpu) };
        let error = Vm::build(&tight).unwrap_err().to_string();
        assert!(error.contains("pages of contents 4096"), "{error}");

        let roomy = VmConfig { memory_bytes: 2 * MEMORY, filling, ..config(cpu) };
        let (_dir, snapshot) = snapshot(&roomy);
        let (vm, report) =
            restore_and_run(&snapshot, RestoreMemory::Mmap, cpu, &Workload::default()).unwrap();
        assert_eq!((report.pages, report.mismatches), (4096, 0));
        assert_eq!(vm.verify_from_host().mismatches, 0);
        let copied = fs::read(&path).unwrap();
        let all = fs::read(&snapshot.paths().memory).unwrap();
        assert!(all.windows(copied.len()).step_by(4096).any(|part| part == copied));
    }
}
