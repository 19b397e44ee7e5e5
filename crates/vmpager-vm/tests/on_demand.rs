//! Memory on demand: the handshake as a pager sees it, and a guest that runs
//! on pages a pager installs one by one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use common::{MEMORY, config, cpus, restore_and_run, snapshot};
use rustix::event::{PollFd, PollFlags, poll};
use vmpager_sys::peer::recv_with_fds;
use vmpager_sys::uffd::{Features, Message, Messages, Stop, Userfaultfd};
use vmpager_vm::{Cpu, OnRefusal, RestoreMemory, Vm, VmError, Workload};

/// What the pager was told, and what it did.
struct Served {
    handshake: serde_json::Value,
    descriptors: usize,
    features: Features,
    installs: u64,
    /// Faults that were writes.
    writes: u64,
}

/// A pager as small as can be: poll, read, copy, until the VM hangs up.
fn spawn_pager(socket: &Path, memory_file: PathBuf, page: u64) -> JoinHandle<Served> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let (handshake, uffd, descriptors) = receive(&stream);
        let base = handshake[0]["base_host_virt_addr"].as_u64().unwrap();
        let file = File::open(memory_file).unwrap();
        let mut bytes = vec![0; usize::try_from(page).unwrap()];
        let mut messages = Messages::new();
        let (mut installs, mut writes) = (0, 0);
        loop {
            let mut fds = [PollFd::new(&uffd, PollFlags::IN), PollFd::new(&stream, PollFlags::IN)];
            poll(&mut fds, None).unwrap();
            let is_closed = !fds[1].revents().is_empty();
            uffd.read(&mut messages).unwrap();
            for message in messages.drain() {
                let Message::Fault { address, flags, .. } = message else { panic!("{message:?}") };
                let address = address / page * page;
                writes += flags & 1; // UFFD_PAGEFAULT_FLAG_WRITE
                file.read_exact_at(&mut bytes, address - base).unwrap();
                let installed = uffd.copy(address, bytes.as_ptr() as usize, page);
                match installed.stop {
                    None => installs += 1,
                    Some(Stop::Present) => {
                        uffd.wake(address, page).unwrap();
                    }
                    Some(stop) => panic!("{stop:?}"),
                }
            }
            if is_closed {
                return Served {
                    handshake,
                    descriptors,
                    features: uffd.features(),
                    installs,
                    writes,
                };
            }
        }
    })
}

fn receive(stream: &UnixStream) -> (serde_json::Value, Userfaultfd, usize) {
    let mut buffer = [0; 4096];
    let mut fds = Vec::new();
    poll(&mut [PollFd::new(&stream, PollFlags::IN)], None).unwrap();
    // One message has it all.
    let n = recv_with_fds(stream.as_fd(), &mut buffer, &mut fds).unwrap();
    let handshake = serde_json::from_slice(&buffer[..n]).unwrap();
    let descriptors = fds.len();
    (handshake, Userfaultfd::adopt(fds.remove(0)).unwrap(), descriptors)
}

fn can_open_userfaultfd() -> bool {
    match Userfaultfd::open(Features::EVENT_REMOVE) {
        Ok(_) => true,
        Err(error) => {
            vmpager_testing::skipped(&format!("{error}"));
            false
        }
    }
}

fn on_demand(socket: PathBuf, huge_pages: bool) -> RestoreMemory {
    RestoreMemory::OnDemand { socket, huge_pages, refused: OnRefusal::default() }
}

#[test]
fn the_guest_runs_on_pages_a_pager_installs() {
    if !can_open_userfaultfd() {
        return;
    }
    for cpu in cpus() {
        let (dir, snapshot) = snapshot(&config(cpu));
        let socket = dir.path().join("pager.sock");
        let pager = spawn_pager(&socket, snapshot.paths().memory.clone(), 4096);
        let memory = on_demand(socket, false);
        let workload = Workload { touches: Some(1000), write_every: 3, ..Workload::default() };
        let (vm, report) = restore_and_run(&snapshot, memory, cpu, &workload).unwrap();
        assert_eq!((report.pages, report.mismatches), (1000, 0), "{cpu:?}");
        assert!(report.stalls.p50() > 0);
        let hva = vm.memory().hva();
        // Every page is missed by somebody: the rest by the host.
        assert_eq!(vm.verify_from_host().mismatches, 0, "{cpu:?}");
        drop(vm);

        let served = pager.join().unwrap();
        assert_eq!(served.descriptors, 1);
        assert!(served.features.contains(Features::EVENT_REMOVE));
        let expected = serde_json::json!([{
            "base_host_virt_addr": hva, "size": MEMORY, "offset": 0,
            "page_size": 4096, "page_size_kib": 4096,
        }]);
        assert_eq!(served.handshake, expected);
        if cpu == Cpu::Kvm {
            // Every third touch, and the stack.
            assert!((333..340).contains(&served.writes), "{} writes", served.writes);
        }
        let all = MEMORY / 4096;
        // All but the stack, which only vCPUs use.
        assert!((all - 1..=all).contains(&served.installs), "{} of {all}", served.installs);
    }
}

#[test]
fn huge_pages_are_announced_as_such() {
    if !can_open_userfaultfd() {
        return;
    }
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .map_or(0, |text| text.trim().parse::<u64>().unwrap());
    if free < MEMORY >> 21 {
        vmpager_testing::skipped(&format!("{free} free hugetlb pages of 2 MiB"));
        return;
    }
    for cpu in cpus() {
        let (dir, snapshot) = snapshot(&config(cpu));
        let socket = dir.path().join("pager.sock");
        let pager = spawn_pager(&socket, snapshot.paths().memory.clone(), 2 << 20);
        let memory = on_demand(socket, true);
        let (vm, report) = restore_and_run(&snapshot, memory, cpu, &Workload::default()).unwrap();
        assert_eq!(report.mismatches, 0, "{cpu:?}");
        assert_eq!(vm.verify_from_host().mismatches, 0, "{cpu:?}");
        drop(vm);
        let served = pager.join().unwrap();
        assert_eq!(served.handshake[0]["page_size"], 2 << 20);
        assert_eq!(served.handshake[0]["page_size_kib"], 2 << 20);
        assert_eq!(served.installs, MEMORY >> 21);
    }
}

/// A pager that installs a neighbour's page is found out.
#[test]
fn a_pager_that_mixes_up_pages_is_caught() {
    if !can_open_userfaultfd() {
        return;
    }
    for cpu in cpus() {
        let (dir, snapshot) = snapshot(&config(cpu));
        let wrong = dir.path().join("shifted.raw");
        let bytes = std::fs::read(&snapshot.paths().memory).unwrap();
        let mut shifted = bytes.clone();
        // The last page but one is now the last one's.
        let at = bytes.len() - 2 * 4096;
        shifted.copy_within(at + 4096.., at);
        let is_different = shifted[at..at + 4096] != bytes[at..at + 4096];
        std::fs::write(&wrong, shifted).unwrap();
        let socket = dir.path().join("pager.sock");
        let pager = spawn_pager(&socket, wrong, 4096);
        let memory = on_demand(socket, false);
        let (vm, report) = restore_and_run(&snapshot, memory, cpu, &Workload::default()).unwrap();
        assert!(is_different, "pick another seed: the last two pages are equal");
        assert_eq!(
            (report.mismatches, report.first_mismatch),
            (1, Some(MEMORY / 4096 - 2)),
            "{cpu:?}"
        );
        drop(vm);
        pager.join().unwrap();
    }
}

#[test]
fn without_a_pager_the_restore_fails_and_names_the_socket() {
    if !can_open_userfaultfd() {
        return;
    }
    let (dir, snapshot) = snapshot(&config(Cpu::Threads));
    let socket = dir.path().join("nobody.sock");
    let memory = on_demand(socket, false);
    let started = std::time::Instant::now();
    let error = Vm::restore(&snapshot, memory, Cpu::Threads).unwrap_err();
    assert!(matches!(error, VmError::Handshake { .. }));
    assert!(error.to_string().contains("nobody.sock"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
}
