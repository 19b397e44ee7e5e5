//! `vmpager serve --share-clean`: VMs that share the pages of an image, with workers
//! killed and daemons replaced under them, guests on KVM, and what is left to a VM whose
//! daemon ends.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../vmpager/tests/common/clean_vm.rs"]
#[allow(dead_code, reason = "a part of it is used")]
mod clean_vm;
mod common;

use std::ffi::OsString;
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use clean_vm::{CleanVm, Must, have_minor_faults};
use common::{PAGE, Served, VMPAGER, have_userfaultfd};
use serde_json::Value;
use tempfile::TempDir;
use vmpager_store::image::{MemoryInput, PackOptions};
use vmpager_sys::memory::Mapping;
use vmpager_vm::{
    Cpu, Filling, OnRefusal, RestoreMemory, Snapshot, SnapshotPaths, Vm, VmConfig, Workload,
};

const PAGES: usize = 2048;
const MIB: u64 = 1 << 20;

/// What a page of the image holds.
fn page(number: usize) -> [u8; PAGE] {
    let word = if number % 7 == 3 { 0 } else { number as u64 + 1 };
    let bytes: Vec<u8> = std::iter::repeat_n(word.to_le_bytes(), PAGE / 8).flatten().collect();
    bytes.try_into().unwrap()
}

/// A daemon that shares the pages of an image.
fn of_pages() -> Served {
    let dir = TempDir::new().unwrap();
    let bytes: Vec<u8> = (0..PAGES).flat_map(page).collect();
    fs::write(dir.path().join("mem"), bytes).unwrap();
    sharing(dir)
}

/// Packs the memory file in the directory, and shares the pages of the image.
fn sharing(dir: TempDir) -> Served {
    let input = MemoryInput::raw(dir.path().join("mem")).unwrap();
    let go_on = &mut |_| ControlFlow::Continue(());
    PackOptions::default().pack(&input, &dir.path().join("image"), go_on).unwrap();
    let what = [image(&dir), vec!["--share-clean".into()]].concat();
    Served::serving(dir, what, &[])
}

fn image(dir: &TempDir) -> Vec<OsString> {
    vec!["--image".into(), dir.path().join("image").into()]
}

/// Stops it; returns what it printed.
fn report_of(daemon: Served) -> Value {
    serde_json::from_slice(&daemon.stop().stdout).unwrap()
}

/// One test at a time: a daemon that ends looks whether the process of its VM, which is
/// this one, has a userfaultfd left.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Workers are killed one after another, and daemons take over from each other, while
/// VMs look, write and give back: no byte is wrong, before and after. Who would take
/// over and does not share is refused.
#[test]
fn workers_die_and_daemons_are_replaced_under_vms_that_share_pages() {
    let _alone = alone();
    if !have_userfaultfd() || !have_minor_faults() {
        return;
    }
    let mut daemon = of_pages();
    let (done, socket) = (AtomicBool::new(false), daemon.socket());
    std::thread::scope(|scope| {
        for seed in 1..5 {
            let (done, socket) = (&done, &socket);
            scope.spawn(move || {
                let mut vm = CleanVm::connect(socket, seed * 0x9e37_79b9);
                while !done.load(Ordering::Relaxed) {
                    (0..100).for_each(|_| vm.step(10, page));
                }
                vm.check_all(page);
            });
        }
        for round in 0..12 {
            match round % 4 {
                3 => daemon.replace(),
                _ => daemon.kill_worker(),
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    daemon.refuse(&image(&daemon.dir));
    assert!(daemon.log().contains("Give --share-clean"), "{}", daemon.log());
    // Whoever comes now finds what was decoded, and all else.
    CleanVm::connect(&daemon.socket(), 99).check_all(page);
    let report = report_of(daemon);
    // All but those that are zero, which lie nowhere.
    let zero = (0..PAGES).filter(|number| number % 7 == 3).count();
    assert_eq!(report["clean_pages"], PAGES - zero, "{report:#}");
}

/// A VM that keeps no copy of its userfaultfd, as its daemon ends: what was given back
/// reads zero, though the memory that it is a mapping of has other bytes there; what had
/// not come is poisoned, and what had come stays.
#[test]
fn a_daemon_that_ends_leaves_no_byte_that_is_not_the_vms() {
    let _alone = alone();
    if !have_userfaultfd() || !have_minor_faults() {
        return;
    }
    let daemon = of_pages();
    let mut vm = CleanVm::connect(&daemon.socket(), 1);
    (0..512).for_each(|number| vm.check(number, page(number)));
    vm.memory.write_u64(PAGE, 7);
    vm.must[1] = Must::Own(7);
    vm.memory.discard(64 * PAGE..128 * PAGE).unwrap();
    vm.must[64..128].fill(Must::Zero(0));
    // Its event was read by the time that this one was answered.
    vm.check(70, page(70));
    vm.let_go_of_userfaultfd();
    daemon.stop();
    (0..512).for_each(|number| vm.check(number, page(number)));
    let lost = (512..PAGES).filter(|number| is_poisoned(&vm.memory, *number)).count();
    assert!(lost > PAGES / 2, "{lost} pages are poisoned");
    let others = (512..PAGES).filter(|number| !is_poisoned(&vm.memory, *number));
    others.for_each(|number| vm.check(number, page(number)));
}

/// Whether a page cannot be looked at.
fn is_poisoned(memory: &Mapping, number: usize) -> bool {
    let own = File::open("/proc/self/mem").unwrap();
    own.read_exact_at(&mut [0], memory.hva() + (number * PAGE) as u64).is_err()
}

/// Four guests that all have the same memory, at the same time: each verifies every page
/// and writes to some, then the host verifies what they have.
#[test]
fn guests_share_the_memory_of_one_image() {
    let _alone = alone();
    if !have_userfaultfd() || !have_minor_faults() {
        return;
    }
    let has_kvm = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !has_kvm {
        vmpager_testing::skipped("no /dev/kvm");
    }
    let cpus = [Cpu::Threads].into_iter().chain(has_kvm.then_some(Cpu::Kvm));
    for cpu in cpus {
        let dir = TempDir::new().unwrap();
        let paths =
            SnapshotPaths { state: dir.path().join("state"), memory: dir.path().join("mem") };
        let filling = Filling::Generated { seed: 5, bytes: Some(12 * MIB) };
        let config = VmConfig { memory_bytes: 16 * MIB, filling, cpu, ..VmConfig::default() };
        let mut vm = Vm::build(&config).unwrap();
        vm.prepare().unwrap();
        vm.snapshot(&paths).unwrap();
        drop(vm);
        let bytes = fs::read(&paths.memory).unwrap();
        let pages = bytes.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count();
        let daemon = sharing(dir);
        std::thread::scope(|scope| {
            for seed in 1..=4 {
                let (paths, socket) = (&paths, daemon.socket());
                scope.spawn(move || {
                    let snapshot = Snapshot::open(paths).unwrap();
                    let memory =
                        RestoreMemory::CleanShared { socket, refused: OnRefusal::default() };
                    let mut vm = Vm::restore(&snapshot, memory, cpu).unwrap();
                    let workload = Workload { seed, write_every: 5, ..Workload::default() };
                    for _ in 0..2 {
                        let report = vm.run(&workload, Instant::now()).unwrap();
                        assert_eq!(report.mismatches, 0, "{:?}", report.first_mismatch);
                    }
                    assert_eq!(vm.verify_from_host().mismatches, 0);
                });
            }
        });
        let report = report_of(daemon);
        assert_eq!(report["clean_pages"], pages, "{cpu:?}: {report:#}");
    }
}

/// The benchmark counts the memory of both kinds of VMs.
#[test]
fn the_memory_of_many_vms_is_measured() {
    let _alone = alone();
    if !have_userfaultfd() || !have_minor_faults() {
        return;
    }
    let bench = ["bench", "fanout", "--vms", "8", "--memory", "16M", "--json"];
    let output = Command::new(VMPAGER).args(bench).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(
        (rows[0]["mode"].as_str(), rows[1]["mode"].as_str()),
        (Some("copies"), Some("shared"))
    );
    assert_eq!((&rows[0]["clean_pages"], &rows[1]["clean_pages"]), (&Value::Null, &4096.into()));
    let ratio = rows[1]["ratio_copies"].as_f64().unwrap();
    assert!((0.1..0.6).contains(&ratio), "{report:#}");
}
