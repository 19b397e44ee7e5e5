//! Many VMs that share the pages they have not written to: each sees its own bytes, and
//! all of them; each page is read once, and takes memory once.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use]
mod common;

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use common::clean_vm::{CleanVm, have_minor_faults, numbered as source};
use common::daemon::Running;
use common::peer::{Dialect, Memory};
use common::{PAGE, faulty};
use rustix::fs::{Mode, OFlags};
use vmpager::clean::{CleanPages, ask, files};
use vmpager::core::{ByteRange, PageSource};
use vmpager_store::FaultySource;
use vmpager_sys::memory::Mapping;
use vmpager_sys::peer::send_with_fds;

const PAGES: usize = 2048;

fn start(source: &Arc<FaultySource>, fill: bool) -> (Running, Arc<CleanPages>) {
    let source: Arc<dyn PageSource> = source.clone();
    let clean = Arc::new(CleanPages::open(files().unwrap(), &*source).unwrap());
    let daemon = Running::start(source, |config| {
        config.clean = Some(clean.clone());
        config.options.background_fill = fill;
        config.workers = 2;
    });
    (daemon, clean)
}

/// What mappings of memfds of that name take of memory, each page once, in bytes.
fn proportional(name: &str) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (mut within, mut kib) = (false, 0);
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap();
        match line.strip_prefix("Pss:") {
            Some(pss) if within => {
                kib += pss.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
            }
            _ if !first.ends_with(':') => within = line.contains(name),
            _ => {}
        }
    }
    kib * 1024
}

/// Twelve VMs at once look, write and give back, each as its own dice have it: whatever
/// one of them sees is what it wrote, or what the source has, every byte. Then all is
/// looked at: memory is taken by one copy and by what was written.
#[test]
fn each_vm_has_its_own_bytes_and_all_have_one_copy_of_the_others() {
    begin!();
    if !have_minor_faults() {
        return;
    }
    const VMS: usize = 12;
    for fill in [false, true] {
        let source_of_all = faulty(PAGES);
        // Some pages are at hand, others are read in the background.
        source_of_all
            .delay(ByteRange::new(0, (PAGES * PAGE / 4) as u64), Duration::from_micros(50));
        let (daemon, clean) = start(&source_of_all, fill);
        let vms: Vec<CleanVm> = std::thread::scope(|scope| {
            let socket = &daemon.socket;
            let vms = (1..=VMS as u64).map(|seed| {
                scope.spawn(move || {
                    let mut vm = CleanVm::connect(socket, seed * 0x9e37_79b9);
                    (0..3000).for_each(|_| vm.step(20, source));
                    vm.check_all(source);
                    vm
                })
            });
            let vms: Vec<_> = vms.collect();
            vms.into_iter().map(|vm| vm.join().unwrap()).collect()
        });
        // What others did meanwhile has changed nothing.
        vms.iter().for_each(|vm| vm.check_all(source));
        let memfd = Mapping::file_read_only(vms[0].memfd().as_fd(), PAGES * PAGE).unwrap();
        let all = (0..PAGES).map(|page| {
            let mut bytes = [0; PAGE];
            memfd.read(page * PAGE, &mut bytes);
            bytes == source(page)
        });
        assert!(all.into_iter().all(|right| right), "a VM has written to what all share");
        drop(memfd);
        assert_eq!(clean.count(), PAGES as u64);
        assert!(source_of_all.all_fetches().iter().all(|count| *count > 0));
        let (took, copies) = (proportional("vmpager-clean-pages"), (VMS * PAGES * PAGE) as u64);
        println!("{VMS} VMs take {took:#x} bytes of {copies:#x}");
        assert!(took * 10 < copies * 4, "{took:#x} bytes, and copies take {copies:#x}");
        drop(vms);
        daemon.stop();
    }
}

/// With one worker, no page is read twice.
#[test]
fn a_page_is_read_once_however_many_vms_want_it() {
    begin!();
    if !have_minor_faults() {
        return;
    }
    let of_all = faulty(PAGES);
    let all: Arc<dyn PageSource> = of_all.clone();
    let clean = Arc::new(CleanPages::open(files().unwrap(), &*all).unwrap());
    let daemon = Running::start(all, |config| {
        config.clean = Some(clean.clone());
        config.workers = 1;
    });
    for seed in 1..6 {
        let mut vm = CleanVm::connect(&daemon.socket, seed * 0x9e37_79b9);
        (0..500).for_each(|_| vm.step(20, source));
        vm.check_all(source);
    }
    // One whose memory is its own is served from the same copy.
    let memory = Memory::new(&[PAGES], PAGE);
    let socket = daemon.connect();
    memory.hand_over(&socket, Dialect::V1_12);
    memory.assert_is_source();
    assert_eq!(of_all.all_fetches(), vec![1; PAGES]);
}

/// Pages of a mapping that are in the page tables of this process.
fn mapped(memory: &Mapping) -> usize {
    let mut entries = vec![0; PAGES * 8];
    let file = File::open("/proc/self/pagemap").unwrap();
    file.read_exact_at(&mut entries, memory.hva() / PAGE as u64 * 8).unwrap();
    entries.chunks(8).filter(|entry| entry[7] >> 7 == 1).count()
}

/// The kernel takes pages out of a VM's mapping, and tells nobody: they come again, what
/// was written stays, and what was given back is zero.
#[test]
fn pages_that_the_kernel_takes_out_come_again() {
    begin!();
    if !have_minor_faults() {
        return;
    }
    for fill in [false, true] {
        let (daemon, _) = start(&faulty(PAGES), fill);
        let mut vm = CleanVm::connect(&daemon.socket, 11);
        let mut taken = 0;
        for _ in 0..4 {
            (0..1000).for_each(|_| vm.step(10, source));
            vm.check_all(source);
            let before = mapped(&vm.memory);
            vm.memory.page_out(0..PAGES * PAGE).unwrap();
            taken += before.saturating_sub(mapped(&vm.memory));
        }
        vm.check_all(source);
        (0..1000).for_each(|_| vm.step(10, source));
        vm.check_all(source);
        if taken < 100 {
            vmpager_testing::skipped("MADV_PAGEOUT takes nothing out");
            return;
        }
        let ended = daemon.stop();
        assert!(ended[0].faults_confirmed >= taken as u64 / 2, "{taken} of {:?}", ended[0]);
    }
}

/// A VM cannot write through what it was given; and the zeroes that it makes by looking
/// at pages which are not there yet are nobody's but its own to see.
#[test]
fn a_hostile_vm_cannot_change_what_others_see() {
    begin!();
    if !have_minor_faults() {
        return;
    }
    let (daemon, _) = start(&faulty(PAGES), false);
    let socket = daemon.connect();
    let offered = ask(&socket).unwrap();
    let memfd = &offered.memfd;
    assert!(Mapping::file_shared(memfd.as_fd(), PAGES * PAGE).is_err(), "mapped for writing");
    assert!(rustix::io::pwrite(memfd, b"x", 0).is_err(), "written to");
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    assert!(rustix::fs::fallocate(memfd, flags, 0, PAGE as u64).is_err(), "a hole");
    assert!(rustix::fs::ftruncate(memfd, 0).is_err(), "cut");
    assert_eq!(rustix::fs::fstat(memfd).unwrap().st_mode & 0o777, 0o400, "others may open it");
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(memfd));
    if !rustix::process::geteuid().is_root() {
        assert!(rustix::fs::open(path, flags, Mode::empty()).is_err(), "opened again");
    }
    // Not registered: every page is made, of zeroes.
    let hostile = Mapping::file_read_only(memfd.as_fd(), PAGES * PAGE).unwrap();
    assert!((0..PAGES).all(|page| hostile.read_u64(page * PAGE) == 0));
    let mut vm = CleanVm::connect(&daemon.socket, 77);
    (0..500).for_each(|_| vm.step(20, source));
    vm.check_all(source);
}

/// Who asks for what there is not, or twice, is told, or hears the end.
#[test]
fn questions_that_make_no_sense_are_refused() {
    begin!();
    let plain = Running::start(faulty(PAGES), |_| {});
    let error = ask(&plain.connect()).unwrap_err().to_string();
    assert!(error.contains("--share-clean"), "{error}");
    plain.log.wait_for(0, &["start the pager with --share-clean"]);
    plain.stop();
    let (daemon, _) = start(&faulty(PAGES), false);
    let refused = |socket: &mut UnixStream| {
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
    };
    let mut socket = daemon.connect();
    ask(&socket).unwrap();
    send_with_fds(&socket, br#"{"clean_pages":true}"#, &[]).unwrap();
    refused(&mut socket);
    daemon.log.wait_for(0, &["asked for clean pages twice"]);
    let mut socket = daemon.connect();
    send_with_fds(&socket, br#"{"clean_pages":false}"#, &[]).unwrap();
    refused(&mut socket);
    daemon.log.wait_for(0, &["asks for nothing"]);
    // Anonymous memory that is said to be made of clean pages, with a userfaultfd that
    // cannot serve these.
    let memory = Memory::new(&[PAGES], PAGE);
    let mut handshake = memory.json(Dialect::V1_12);
    handshake[0]["clean_pages"] = true.into();
    let mut socket = daemon.connect();
    send_with_fds(&socket, handshake.to_string().as_bytes(), &[memory.uffd.as_fd()]).unwrap();
    refused(&mut socket);
    daemon.log.wait_for(0, &["UFFD_FEATURE_MINOR_SHMEM"]);
    // Others are served as ever.
    let memory = Memory::new(&[PAGES], PAGE);
    let socket = daemon.connect();
    memory.hand_over(&socket, Dialect::V1_12);
    memory.assert_is_source();
}
