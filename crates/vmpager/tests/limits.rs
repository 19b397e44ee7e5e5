//! Many VMs and one pager: whose turn it is, what each may take, who is not admitted.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::daemon::Running;
use common::peer::{Dialect, Memory, PeerPlan};
use common::{Holds, PAGE, eventually, faulty, numbered, page};
use vmpager::NeighbourPolicy;
use vmpager::core::{ByteRange, PageSource};
use vmpager::core::{PageData, PageReader, Priority, ReadId, ReadRequest, SourceError};
use vmpager::{DaemonConfig, EndReason, SessionLimits};
use vmpager_store::MemorySource;

/// A numbered source that remembers in which order it was read, and whose last page
/// keeps the reader until the gate is opened.
#[derive(Debug)]
struct Gated {
    inner: Arc<MemorySource>,
    gate: u64,
    open: Mutex<bool>,
    opened: Condvar,
    /// The pages read, in order.
    order: Mutex<Vec<u64>>,
}

impl Gated {
    fn new(pages: usize) -> Arc<Self> {
        Arc::new(Self {
            inner: numbered(pages),
            gate: pages as u64 - 1,
            open: Mutex::new(false),
            opened: Condvar::new(),
            order: Mutex::new(Vec::new()),
        })
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn order(&self) -> Vec<u64> {
        self.order.lock().unwrap().clone()
    }
}

impl PageSource for Gated {
    fn name(&self) -> Arc<str> {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn fingerprint(&self) -> u64 {
        self.inner.fingerprint()
    }

    fn visit_zero_ranges(&self, _: &mut dyn FnMut(ByteRange)) {}

    fn open_reader(self: Arc<Self>) -> Result<Box<dyn PageReader>, SourceError> {
        let inner = self.inner.clone().open_reader()?;
        Ok(Box::new(GatedReader { inner, source: self }))
    }
}

#[derive(Debug)]
struct GatedReader {
    inner: Box<dyn PageReader>,
    source: Arc<Gated>,
}

impl PageReader for GatedReader {
    fn try_read(&mut self, range: ByteRange) -> Result<Option<PageData<'_>>, SourceError> {
        let pages = range.start / PAGE as u64..range.end() / PAGE as u64;
        let at_gate = pages.contains(&self.source.gate);
        self.source.order.lock().unwrap().extend(pages);
        if at_gate {
            let open = self.source.open.lock().unwrap();
            drop(self.source.opened.wait_while(open, |open| !*open).unwrap());
        }
        self.inner.try_read(range)
    }

    fn submit(&mut self, request: ReadRequest) {
        self.inner.submit(request);
    }

    fn promote(&mut self, id: ReadId, to: Priority) {
        self.inner.promote(id, to);
    }

    fn complete(&mut self, done: &mut dyn FnMut(ReadId, Result<PageData<'_>, SourceError>)) {
        self.inner.complete(done);
    }

    fn ready_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.ready_fd()
    }
}

/// A VM in this process.
struct Vm {
    memory: Arc<Memory>,
    _socket: UnixStream,
}

impl Vm {
    /// Hands over so many pages, from one of the source on.
    fn new(daemon: &Running, first: usize, pages: usize) -> Self {
        let memory = Memory::at(first * PAGE, &[pages], PAGE);
        let socket = daemon.connect();
        memory.hand_over(&socket, Dialect::V1_12);
        daemon.expect_started();
        Self { memory: Arc::new(memory), _socket: socket }
    }

    /// A thread that touches a page and looks at what it holds.
    fn touch(&self, at: usize) -> JoinHandle<()> {
        let memory = self.memory.clone();
        std::thread::spawn(move || assert_eq!(memory.page(0, at), memory.expected(0, at)))
    }

    /// Waits until so many faults are pending that nobody has read.
    fn wait_for_pending(&self, count: usize) {
        let path = format!("/proc/self/fdinfo/{}", self.memory.uffd.as_raw_fd());
        let line = format!("pending:\t{count}\n");
        eventually("faults that are pending", || {
            fs::read_to_string(&path).unwrap().contains(&line)
        });
    }
}

fn one_worker(config: &mut DaemonConfig) {
    config.workers = 1;
    config.partial = true;
    config.options.neighbours = NeighbourPolicy::Off;
}

/// One VM has 64 threads that wait, the other one: served in turns, that one waits for
/// a turn; served one after the other, for all 64.
#[test]
fn a_vm_with_many_threads_does_not_starve_another() {
    begin!();
    for (faults_per_turn, before) in [(16, 16), (usize::MAX, 64)] {
        let source = Gated::new(66);
        let daemon = Running::start(source.clone(), |config| {
            one_worker(config);
            config.faults_per_turn = faults_per_turn;
        });
        let (hog, meek) = (Vm::new(&daemon, 0, 64), Vm::new(&daemon, 64, 1));
        let gate = Vm::new(&daemon, 65, 1);
        let mut threads = vec![gate.touch(0)];
        eventually("the worker is at the gate", || source.order() == [65]);
        threads.extend((0..64).map(|at| hog.touch(at)));
        hog.wait_for_pending(64);
        threads.push(meek.touch(0));
        meek.wait_for_pending(1);
        source.open();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let order = source.order();
        let waited = order.iter().position(|page| *page == 64).unwrap() - 1;
        println!("{faults_per_turn} a turn: {waited} faults of the other VM came first");
        assert_eq!(waited, before, "{faults_per_turn} a turn: {order:?}");
        daemon.stop();
    }
}

/// The kernel does not say when a fault came. What it waited while the worker was busy
/// with another VM is a stall all the same.
#[test]
fn a_stall_includes_the_wait_for_a_busy_worker() {
    begin!();
    const HELD: Duration = Duration::from_millis(100);
    let source = Gated::new(3);
    let daemon = Running::start(source.clone(), one_worker);
    let (vm, gate) = (Vm::new(&daemon, 0, 2), Vm::new(&daemon, 2, 1));
    let mut threads = vec![gate.touch(0)];
    eventually("the worker is at the gate", || source.order() == [2]);
    threads.push(vm.touch(0));
    vm.wait_for_pending(1);
    std::thread::sleep(HELD);
    source.open();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let ended = daemon.stop();
    let summary = ended.iter().find(|ended| ended.memory_bytes == 2 * PAGE as u64).unwrap();
    assert!(summary.stall_max_us >= 1e6 * HELD.as_secs_f64(), "{summary:?}");
}

/// Two VMs that are filled get pages in turns.
#[test]
fn a_fill_does_not_keep_another_from_beginning() {
    begin!();
    const PAGES: usize = 8192;
    let source = Gated::new(2 * PAGES + 1);
    let daemon = Running::start(source.clone(), |config| {
        one_worker(config);
        config.options.background_fill = true;
    });
    let _gate = Vm::new(&daemon, 2 * PAGES, 1);
    eventually("the worker is at the gate", || !source.order().is_empty());
    let _vms = [Vm::new(&daemon, 0, PAGES), Vm::new(&daemon, PAGES, PAGES)];
    source.open();
    (0..3).for_each(|_| assert_eq!(daemon.expect_ended().reason, Some(EndReason::Filled)));
    let mut done = [0, 0];
    let mut seen = HashSet::new();
    for page in source.order().into_iter().filter(|page| seen.insert(*page)) {
        if let Some(done) = done.get_mut(usize::try_from(page).unwrap() / PAGES) {
            *done += 1;
        }
        if done.contains(&PAGES) {
            break;
        }
    }
    let [first, second] = done;
    println!("when the first was filled: {first} and {second} pages");
    assert!(first.min(second) > PAGES / 8, "{first} and {second} pages");
    daemon.stop();
}

/// However many threads of a VM wait for storage, only so many of its reads are in
/// front of another VM's.
#[test]
fn reads_in_flight_are_limited_for_each_vm() {
    begin!();
    const THREADS: usize = 48;
    for (limit, in_flight) in [(4, 4), (SessionLimits::default().reads, THREADS)] {
        let source = faulty(THREADS + 3);
        source.hold(ByteRange::new(0, source.len()));
        let daemon = Running::start(source.clone(), |config| {
            one_worker(config);
            config.options.limits.reads = limit;
        });
        let (hog, meek) = (Vm::new(&daemon, 0, THREADS), Vm::new(&daemon, THREADS, 3));
        let mut threads: Vec<_> = (0..THREADS).map(|at| hog.touch(at)).collect();
        eventually("its reads are in flight", || source.held() >= in_flight);
        hog.wait_for_pending(0);
        // One after the other: each comes in a later turn than what was read before.
        for at in 0..3 {
            threads.push(meek.touch(at));
            eventually("the other VM's read is in flight", || source.held() > in_flight + at);
        }
        assert_eq!(source.held(), in_flight + 3, "a limit of {limit}");
        source.release();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        daemon.stop();
    }
}

const MIB: usize = 256;

/// 16 MiB at 8 MiB/s, of which a tenth of a second's worth comes at once.
#[test]
fn a_fill_keeps_to_its_bandwidth() {
    begin!();
    let daemon = Running::start(numbered(16 * MIB), |config| {
        config.options.background_fill = true;
        config.options.limits.bandwidth = Some(8 << 20);
    });
    let vm = Vm::new(&daemon, 0, 16 * MIB);
    // Whoever waits does not wait for the fill.
    vm.touch(16 * MIB - 1).join().unwrap();
    let summary = daemon.expect_ended();
    assert_eq!(summary.reason, Some(EndReason::Filled));
    assert!(summary.fill_ms.unwrap() > 1500.0, "{summary:?}");
    vm.memory.assert_is_source();
    daemon.stop();
}

/// 3 MiB at 2 MiB/s: all of it comes, and no sooner.
#[test]
fn demand_alone_keeps_to_the_bandwidth_and_is_never_dropped() {
    begin!();
    let daemon = Running::start(numbered(3 * MIB), |config| {
        config.options.limits.bandwidth = Some(2 << 20);
        config.options.neighbours = NeighbourPolicy::Off;
    });
    let vm = Vm::new(&daemon, 0, 3 * MIB);
    let since = Instant::now();
    let each = 3 * MIB / 4;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let memory = &vm.memory;
            scope.spawn(move || {
                for at in thread * each..(thread + 1) * each {
                    assert_eq!(memory.page(0, at), memory.expected(0, at));
                }
            });
        }
    });
    assert!(since.elapsed() > Duration::from_millis(1200), "{:?}", since.elapsed());
    // Four wait at a time, for some 500 pages a second: that is in the stalls, too.
    let [summary] = &daemon.stop()[..] else { panic!("one session") };
    assert!(summary.stall_p50_us > 1000.0, "{summary:?}");
}

/// A VM too many is refused, whatever it does then, and nobody else notices. It never
/// reads zeroes.
#[test]
fn vms_are_admitted_up_to_a_number() {
    begin!();
    let daemon = Running::start(numbered(64), |config| config.max_sessions = 2);
    let pages = [64];
    let plan = PeerPlan::new(&daemon.socket, &pages);
    let mut peers = [plan.spawn(this_test!()), plan.spawn(this_test!())];
    for _ in &peers {
        daemon.expect_started();
    }
    peers.iter_mut().for_each(|peer| peer.expect_source(0, 0));
    let mut refused = Vec::new();
    for keeps_userfaultfd in [true, false] {
        let from = daemon.log.len();
        let plan = PeerPlan { keeps_userfaultfd, ..plan.clone() };
        let mut peer = plan.spawn(this_test!());
        let pid = format!("peer_pid={}", peer.child.pid());
        daemon.log.wait_for(from, &["ERROR", "refused: 2 VMs are served", "--max-sessions", &pid]);
        peer.start_reading(0, 1);
        refused.push(peer);
    }
    for at in 1..64 {
        peers.iter_mut().for_each(|peer| peer.expect_source(0, at));
    }
    for peer in &refused {
        assert!(peer.is_stuck_for(Duration::from_millis(50)), "it is held");
    }
    let [first, second] = &mut peers;
    first.child.kill();
    assert_eq!(daemon.expect_ended().reason, Some(EndReason::PeerExited));
    let mut next = plan.spawn(this_test!());
    daemon.expect_started();
    next.expect_source(0, 5);
    assert_eq!(second.child.ask("discard 0 3 4"), "done");
    assert_eq!(second.read(0, 3), "Zero");
    refused.iter_mut().for_each(|peer| peer.child.kill());
    daemon.stop();
}

#[test]
fn memory_of_each_vm_is_limited_in_all_it_hands_over() {
    begin!();
    let daemon = Running::start(numbered(64), |config| {
        config.partial = true;
        config.max_memory = 40 * PAGE as u64;
    });
    let from = daemon.log.len();
    let pages = [41];
    let too_large = PeerPlan::new(&daemon.socket, &pages).spawn(this_test!());
    daemon.log.wait_for(from, &["refused", "0x29000 bytes", "0x28000", "--max-memory"]);
    let pages = [32];
    let mut peer = PeerPlan::new(&daemon.socket, &pages).spawn(this_test!());
    daemon.expect_started();
    peer.expect_source(0, 31);
    assert_eq!(peer.child.ask("more 8"), "done");
    daemon.expect_started();
    peer.expect_source(1, 7);
    let from = daemon.log.len();
    assert_eq!(peer.child.ask("more 1"), "done");
    daemon.log.wait_for(from, &["refused", "--max-memory"]);
    // What it had is served all the same.
    peer.expect_source(0, 0);
    peer.expect_source(1, 0);
    drop(too_large);
    daemon.stop();
}

/// The contents of a page are all that tells served memory from other memory.
#[test]
fn pages_of_vms_side_by_side_are_their_own() {
    begin!();
    let daemon = Running::start(numbered(256), one_worker);
    let vms: Vec<Vm> = (0..32).map(|at| Vm::new(&daemon, at * 8, 8)).collect();
    let threads: Vec<_> = vms.iter().flat_map(|vm| (0..8).map(|at| vm.touch(at))).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    for (number, vm) in vms.iter().enumerate() {
        let (mapping, _) = &vm.memory.regions[0];
        assert_eq!(page(mapping, 0), Holds::Source(number * 8 * PAGE));
    }
    daemon.stop();
}
