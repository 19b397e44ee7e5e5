//! Pages of a profile, in place before the guest runs, are mapped for it by KVM where that
//! can; its bytes are right in any case.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{MEMORY, config, cpus, snapshot};
use vmpager::store::image::MemoryInput;
use vmpager::store::profile::{Profile, Touch};
use vmpager_sys::uffd::{Features, Userfaultfd};
use vmpager_vm::{
    Cpu, Delivery, ExitMechanism, InProcess, RestoreMemory, Snapshot, Vm, VmConfig, Workload,
};

/// A profile of all pages.
fn profile(snapshot: &Snapshot) -> Arc<Profile> {
    let memory = MemoryInput::raw(&snapshot.paths().memory).unwrap();
    let mut profile = Profile::new(memory.identity().unwrap());
    let pages = u32::try_from(MEMORY / 4096).unwrap();
    let touches: Vec<Touch> = (0..pages).map(|page| Touch { page, at_us: page }).collect();
    profile.add_session(&touches);
    Arc::new(profile)
}

fn until_in_place(vm: &Vm) {
    let until = Instant::now() + Duration::from_secs(60);
    let pager = vm.pager().unwrap();
    while pager.hot_in_place().iter().map(|(_, len)| len).sum::<u64>() < MEMORY {
        assert!(Instant::now() < until, "{:?}", pager.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_guest_is_right_whose_hot_pages_were_mapped_ahead() {
    if let Err(error) = Userfaultfd::open(Features::EVENT_REMOVE) {
        return vmpager_testing::skipped(&error.to_string());
    }
    for cpu in cpus() {
        let (_dir, snapshot) = snapshot(&VmConfig { vcpus: 2, ..config(cpu) });
        let profile = Some(profile(&snapshot));
        for delivery in [Delivery::Userfaultfd, Delivery::Exit(ExitMechanism::View)] {
            if cpu == Cpu::Threads && delivery != Delivery::Userfaultfd {
                continue; // they do not exit
            }
            let map_ahead = Duration::from_secs(60);
            let profile = profile.clone();
            let how = InProcess { profile, map_ahead, delivery, ..InProcess::default() };
            let mut vm = Vm::restore(&snapshot, RestoreMemory::InProcess(how), cpu).unwrap();
            assert_eq!(vm.mapped_ahead(), None, "before it runs");
            until_in_place(&vm);
            // Once, however often it runs.
            let workload = Workload { write_every: 3, ..Workload::default() };
            let mapped = [0, 1].map(|_| {
                assert_eq!(vm.run(&workload, Instant::now()).unwrap().mismatches, 0);
                vm.mapped_ahead()
            });
            assert_eq!(vm.verify_from_host().mismatches, 0);
            assert_eq!(mapped[0], mapped[1]);
            let can = vmpager_kvm::probe::kvm().is_ok_and(|kvm| kvm.pre_fault_memory);
            assert_eq!(mapped[0].is_some(), can && cpu == Cpu::Kvm, "{mapped:?}");
            match mapped[0] {
                Some(mapped) => assert_eq!((mapped.pages, mapped.left), (MEMORY / 4096, 0)),
                None => vmpager_testing::skipped("nothing here maps pages ahead"),
            }
        }
    }
}
