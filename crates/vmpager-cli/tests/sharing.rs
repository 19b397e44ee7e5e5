//! A microVM, a device back-end in a process of its own, and one `vmpager serve`
//! that brings the memory of both. vCPUs, threads of the VMM, the back-end and
//! the kernel on its behalf miss pages of the same memory; every byte is checked.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../vmpager/tests/common/child.rs"]
#[allow(dead_code, reason = "a part of it is used")]
mod child;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use child::TestChild;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use vmpager::Attached;
use vmpager_sys::memory::Mapping;
use vmpager_sys::uffd::{Features, Userfaultfd};
use vmpager_vm::{
    Cpu, Filling, OnRefusal, RestoreMemory, Snapshot, SnapshotPaths, Vm, VmConfig, Workload,
};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
const MEMORY: usize = 32 * MIB;
/// Pages of the guest's contents that the device writes to its disk.
const TO_DISK: std::ops::Range<usize> = MIB..16 * MIB;
/// Memory the guest does not use, which the device fills from its disk.
const FROM_DISK: std::ops::Range<usize> = 24 * MIB..31 * MIB;
/// Memory that nobody used before, which the VMM looks at.
const UNUSED: std::ops::Range<usize> = 20 * MIB..21 * MIB;
/// Where the device's queue lies in guest memory.
const QUEUE: usize = 31 * MIB;

/// A block device's queue, in guest memory: how many requests the driver has
/// made, how many the device has done, then the last of them, by address. A
/// request is a page of guest memory, to be written to the disk or filled from
/// it; it lies there at the same address.
struct Queue<'a>(&'a Mapping);

impl Queue<'_> {
    const LEN: u64 = 64;

    fn made(&self) -> u64 {
        self.0.read_u64(QUEUE)
    }

    fn done(&self) -> u64 {
        self.0.read_u64(QUEUE + 8)
    }

    fn set_done(&self, done: u64) {
        self.0.write_u64(QUEUE + 8, done);
    }

    fn at(n: u64) -> usize {
        QUEUE + PAGE + usize::try_from(n % Self::LEN).unwrap() * 8
    }

    fn make(&self, address: usize) {
        let n = self.made();
        self.0.write_u64(Self::at(n), address as u64);
        self.0.write_u64(QUEUE, n + 1);
    }

    fn request(&self, n: u64) -> usize {
        usize::try_from(self.0.read_u64(Self::at(n))).unwrap()
    }
}

/// The files of a test.
struct Place(PathBuf);

impl Place {
    fn socket(&self) -> PathBuf {
        self.0.join("pager.sock")
    }

    fn doors(&self) -> PathBuf {
        self.0.join("doors")
    }

    fn device(&self) -> PathBuf {
        self.0.join("device.sock")
    }

    fn disk(&self) -> PathBuf {
        self.0.join("disk")
    }

    fn snapshot(&self) -> SnapshotPaths {
        SnapshotPaths::in_dir(&self.0)
    }
}

/// What the disk holds where nothing was written to it.
fn disk_word(address: usize) -> u64 {
    (address as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// The back-end: takes part in the VM's memory, and does what the queue asks.
fn back_end(place: &Place, vmm: &str) {
    let attached = Attached::connect(&place.doors().join(format!("{vmm}.sock"))).unwrap();
    let memory = attached.regions()[0].memory.clone();
    let disk = File::options().read(true).write(true).open(place.disk()).unwrap();
    let _ = fs::remove_file(place.device());
    let listener = UnixListener::bind(place.device()).unwrap();
    child::say("ready");
    let (mut driver, _) = listener.accept().unwrap();
    let queue = Queue(&memory);
    let mut kick = [0];
    while driver.read(&mut kick).unwrap() > 0 {
        while queue.done() < queue.made() {
            let address = queue.request(queue.done());
            if TO_DISK.contains(&address) {
                let mut bytes = [0; PAGE];
                memory.read(address, &mut bytes);
                disk.write_all_at(&bytes, address as u64).unwrap();
            } else {
                // By the kernel, straight into guest memory.
                memory.read_from_file(disk.as_fd(), address..address + PAGE).unwrap();
            }
            queue.set_done(queue.done() + 1);
        }
        driver.write_all(&[1]).unwrap();
    }
    child::say("done");
}

/// Comes to the device, which may be starting.
fn plug_in(place: &Place) -> UnixStream {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(place.device()) {
            Ok(socket) => return socket,
            Err(error) if Instant::now() > until => panic!("no device: {error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// The driver: has the device do all it can, and checks it. A back-end that
/// dies leaves its requests in the queue, and another one does them.
fn drive(memory: &Mapping, place: &Place) {
    let mut addresses: Vec<usize> = TO_DISK.chain(FROM_DISK).step_by(PAGE).collect();
    let last = addresses.len() - 1;
    (0..last).for_each(|i| addresses.swap(i, i + i * 7919 % (last - i)));
    let queue = Queue(memory);
    let mut device = plug_in(place);
    let (mut next, mut replaced) = (0, 0);
    while queue.done() < addresses.len() as u64 {
        while next < addresses.len() && queue.made() - queue.done() < Queue::LEN {
            queue.make(addresses[next]);
            next += 1;
        }
        let mut call = [0];
        let heard = device.write_all(&[1]).and_then(|()| device.read_exact(&mut call));
        if heard.is_err() {
            replaced += 1;
            device = plug_in(place);
        }
    }
    UNUSED.step_by(8).for_each(|address| assert_eq!(memory.read_u64(address), 0, "{address:#x}"));
    for address in FROM_DISK.step_by(8) {
        assert_eq!(memory.read_u64(address), disk_word(address), "{address:#x}");
    }
    child::say(&format!("driven {replaced}"));
}

/// The VMM: a guest that touches and verifies all its pages, while a thread
/// drives the device.
fn vmm(place: &Arc<Place>, cpu: &str, exits: bool) {
    let cpu = if cpu == "kvm" { Cpu::Kvm } else { Cpu::Threads };
    let snapshot = Snapshot::open(&place.snapshot()).unwrap();
    let exits = exits.then(|| place.doors());
    let memory =
        RestoreMemory::Shared { socket: place.socket(), exits, refused: OnRefusal::default() };
    let mut vm = Vm::restore(&snapshot, memory, cpu).unwrap();
    child::say("restored");
    wait_for_line();
    // A thread has its parent's name, which is this test's, if it has none.
    let driver = std::thread::Builder::new().name("driver".into()).spawn({
        let (memory, place) = (vm.memory().clone(), place.clone());
        move || drive(&memory, &place)
    });
    for (seed, write_every) in [(1, 3), (2, 0)] {
        let workload = Workload { seed, write_every, ..Workload::default() };
        let report = vm.run(&workload, Instant::now()).unwrap();
        assert_eq!(report.mismatches, 0, "{:?}", report.first_mismatch);
    }
    driver.unwrap().join().unwrap();
    assert_eq!(vm.verify_from_host().mismatches, 0);
    child::say(&format!("verified {:?}", vm.exit_stats()));
}

fn wait_for_line() {
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// What this process was started for, if it is a child.
fn run_task() -> bool {
    let Some(task) = child::task() else { return false };
    let words: Vec<&str> = task.splitn(4, ' ').collect();
    let place = Arc::new(Place(words[3].into()));
    match words[0] {
        "vmm" => vmm(&place, words[1], words[2] == "exits"),
        _ => back_end(&place, words[1]),
    }
    wait_for_line();
    true
}

/// A daemon, killed when dropped.
struct Daemon(Option<Child>);

impl Daemon {
    fn start(place: &Place) -> Self {
        fs::create_dir(place.doors()).unwrap();
        let daemon = Self::spawn(place, &[]);
        eventually("it listens", || place.socket().exists());
        daemon
    }

    fn spawn(place: &Place, more: &[&str]) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_vmpager"))
            .args(["serve", "--prefetch", "off", "--json", "--socket"])
            .args([place.socket().as_path(), "--memory".as_ref(), &place.snapshot().memory])
            .args(["--attach".as_ref(), place.doors().as_path()])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self(Some(child))
    }

    /// Another one takes its place.
    fn replace(mut self, place: &Place) -> Self {
        let next = Self::spawn(place, &["--replace"]);
        assert!(self.0.take().unwrap().wait().unwrap().success());
        next
    }

    /// Kills the process that serves, and waits until another one does: until it lets
    /// somebody take part.
    fn kill_worker(&self, door: &Path) {
        let id = self.0.as_ref().unwrap().id();
        let workers = || -> Vec<Pid> {
            let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
            let ids = children.split_whitespace().map(|id| id.parse().unwrap());
            ids.map(|id| Pid::from_raw(id).unwrap()).collect()
        };
        eventually("there is a worker", || !workers().is_empty());
        for worker in workers() {
            kill_process(worker, Signal::KILL).unwrap();
        }
        drop(Attached::connect(door).unwrap());
    }

    fn stop(mut self) -> Value {
        let child = self.0.take().unwrap();
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < until, "{what}: not after 20 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A snapshot of a guest with two vCPUs, and a disk.
fn prepare(cpu: Cpu) -> (TempDir, Place) {
    let dir = TempDir::new().unwrap();
    let place = Place(dir.path().into());
    let filling = Filling::Generated { seed: 5, bytes: Some(16 * MIB as u64) };
    let config =
        VmConfig { memory_bytes: MEMORY as u64, filling, cpu, vcpus: 2, ..VmConfig::default() };
    let mut vm = Vm::build(&config).unwrap();
    vm.prepare().unwrap();
    vm.snapshot(&place.snapshot()).unwrap();
    let disk: Vec<u8> = (0..MEMORY).step_by(8).flat_map(|at| disk_word(at).to_le_bytes()).collect();
    fs::write(place.disk(), disk).unwrap();
    (dir, place)
}

/// What happens to them again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    /// The back-end is killed, and another one takes its place.
    BackEnd,
    /// The process that serves is killed, or another daemon takes its place.
    Pager,
}

/// One run of all three.
fn run_all(test: &str, cpu: &str, exits: bool, trouble: Trouble) {
    let kind = if cpu == "kvm" { Cpu::Kvm } else { Cpu::Threads };
    let (_dir, place) = prepare(kind);
    let mut daemon = Daemon::start(&place);
    let path = place.0.display();
    let by = if exits { "exits" } else { "uffd" };
    let mut vmm = child::spawn(test, &format!("vmm {cpu} {by} {path}"));
    assert_eq!(vmm.hear(), "restored");
    let door = place.doors().join(format!("{}.sock", vmm.pid()));
    eventually("there is a door", || door.exists());
    let task = format!("back-end {} - {path}", vmm.pid());
    let start = || {
        let back_end = child::spawn(test, &task);
        assert_eq!(back_end.hear(), "ready");
        back_end
    };
    let mut back_end: TestChild = start();
    vmm.tell("go");
    for round in 0..3 {
        match trouble {
            Trouble::None => {}
            Trouble::BackEnd => {
                std::thread::sleep(Duration::from_millis(5 + 10 * round));
                back_end.kill();
                back_end = start();
            }
            Trouble::Pager if round == 1 => daemon = daemon.replace(&place),
            Trouble::Pager => daemon.kill_worker(&door),
        }
    }
    let driven = vmm.hear();
    println!("{cpu}, {by}, {trouble:?}: {driven}, {}", vmm.hear());
    assert_eq!(driven != "driven 0", trouble == Trouble::BackEnd, "{driven}");
    // One that came after the last request waits for a driver.
    assert!(trouble == Trouble::BackEnd || back_end.hear() == "done");
    vmm.kill();
    vmm.wait();
    // Every byte the device wrote to its disk is the snapshot's.
    let (disk, memory) = (fs::read(place.disk()).unwrap(), fs::read(place.snapshot().memory));
    assert!(disk[TO_DISK] == memory.unwrap()[TO_DISK]);
    eventually("the door is closed", || fs::read_dir(place.doors()).unwrap().next().is_none());
    let report = daemon.stop();
    // What a session counts begins anew with each process that serves.
    if trouble != Trouble::Pager {
        check(&report, exits);
    }
}

/// That all kinds of faults were one session's, each page brought once.
fn check(report: &Value, exits: bool) {
    let session = &report["sessions"][0];
    let count = |key: &str| session[key].as_u64().unwrap();
    let origins = ["vcpu", "vmm", "kernel", "attached", "queued"];
    let faults = origins.map(|origin| count(&format!("faults_{origin}")));
    println!("{origins:?}: {faults:?} of {}", count("faults"));
    assert_eq!(faults.iter().sum::<u64>(), count("faults"));
    let [vcpu, vmm, kernel, attached, queued] = faults;
    assert!(vmm >= 256 && attached > 100, "the driver's, and the back-end's");
    // Who is first at a page is chance: the back-end may be at most.
    match exits {
        // What vCPUs' threads miss beside their exits is KVM's own: with shadow paging
        // it walks the guest's page tables.
        true => {
            assert!(queued > 100 && vcpu == 0 && kernel < queued / 2);
            assert!(kernel > 0 || nested_paging());
        }
        false => assert!(vcpu > 100 && kernel == 0 && queued == 0),
    }
    assert!(count("pages_demand") + count("pages_zero") <= (MEMORY / PAGE) as u64);
    assert_eq!(count("bytes_read"), count("pages_demand") * PAGE as u64, "each read once");
    assert_eq!(count("pages_poisoned") + count("pages_removed"), 0);
}

/// Whether the processor walks a guest's page tables without KVM's help.
fn nested_paging() -> bool {
    let parameters = ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"];
    let on = |name| fs::read(format!("/sys/module/{name}")).is_ok_and(|is| b"Y1".contains(&is[0]));
    parameters.into_iter().any(on)
}

fn can_run(cpu: &str) -> bool {
    if let Err(error) = Userfaultfd::open(Features::EVENT_REMOVE) {
        vmpager_testing::skipped(&error.to_string());
        return false;
    }
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    if let (Err(error), "kvm") = (kvm, cpu) {
        vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
        return false;
    }
    true
}

#[test]
fn vcpus_the_vmm_and_a_back_end_share_one_pager() {
    if run_task() {
        return;
    }
    for cpu in ["kvm", "threads"].into_iter().filter(|cpu| can_run(cpu)) {
        run_all("vcpus_the_vmm_and_a_back_end_share_one_pager", cpu, false, Trouble::None);
    }
}

#[test]
fn exits_of_vcpus_ask_the_same_pager() {
    if run_task() {
        return;
    }
    if can_run("kvm") {
        run_all("exits_of_vcpus_ask_the_same_pager", "kvm", true, Trouble::None);
    }
}

#[test]
fn a_back_end_killed_in_the_middle_is_replaced_and_harms_nobody() {
    if run_task() {
        return;
    }
    let test = "a_back_end_killed_in_the_middle_is_replaced_and_harms_nobody";
    for cpu in ["kvm", "threads"].into_iter().filter(|cpu| can_run(cpu)) {
        run_all(test, cpu, false, Trouble::BackEnd);
    }
}

#[test]
fn a_pager_killed_or_replaced_in_the_middle_goes_on_with_all_of_them() {
    if run_task() {
        return;
    }
    let test = "a_pager_killed_or_replaced_in_the_middle_goes_on_with_all_of_them";
    for (cpu, exits) in [("kvm", true), ("threads", false)] {
        if can_run(cpu) {
            run_all(test, cpu, exits, Trouble::Pager);
        }
    }
}

/// A VMM as Firecracker is one: private memory, of which it passes the
/// userfaultfd alone.
#[test]
fn private_memory_is_refused_by_name() {
    if !can_run("threads") {
        return;
    }
    let (_dir, place) = prepare(Cpu::Threads);
    let daemon = Daemon::start(&place);
    let snapshot = Snapshot::open(&place.snapshot()).unwrap();
    let memory = RestoreMemory::OnDemand {
        socket: place.socket(),
        huge_pages: false,
        refused: OnRefusal::default(),
    };
    let vm = Vm::restore(&snapshot, memory, Cpu::Threads).unwrap();
    let door = place.doors().join(format!("{}.sock", std::process::id()));
    eventually("there is a door", || door.exists());
    let why = Attached::connect(&door).unwrap_err().to_string();
    assert!(why.contains("no other process can map") && why.contains("memfds"), "{why}");
    assert_eq!(vm.verify_from_host().mismatches, 0, "served all the same");
    drop((vm, daemon));
}

#[test]
fn a_directory_of_doors_that_is_none_is_refused() {
    let dir = TempDir::new().unwrap();
    let memory = dir.path().join("memory");
    fs::write(&memory, [1; PAGE]).unwrap();
    let serve = |attach: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_vmpager"))
            .args(["serve", "--socket"])
            .args([&dir.path().join("sock"), Path::new("--memory"), &memory])
            .args([Path::new("--attach"), attach])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(serve(&dir.path().join("none")).contains("create it first"));
    assert!(serve(&memory).contains("is no directory"));
}
