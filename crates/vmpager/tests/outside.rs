//! Those outside the pager's process: interrupted, gone and back again, and all of
//! them at once beside threads that install pages themselves.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use]
mod common;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use common::child;
use common::home::{home, memfd, view};
use common::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use vmpager::attach::{Page, QueueOwner, WaitError};
use vmpager::core::{ByteRange, Hva};
use vmpager::{Attached, Daemon, DaemonConfig, Installer, PageInstaller, Resolution};
use vmpager_sys::memory::Mapping;
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

/// A signal that nothing else here uses.
const SIGNAL: i32 = libc::SIGUSR1;

fn interrupt(thread: i32) {
    let process = rustix::process::getpid().as_raw_pid();
    // SAFETY: a signal that has a handler, to a thread of this process.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGNAL) };
}

/// Whatever the handler's flags: signal-hook sets `SA_RESTART`, after which the
/// kernel goes on with a wait that has no limit.
#[test]
fn a_signal_ends_a_wait_and_nothing_of_it_stays_queued() {
    begin!();
    child::alone(this_test!(), || {
        let ran = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(SIGNAL, ran.clone()).unwrap();
        for limit in [None, Some(Duration::from_secs(30))] {
            let owner = QueueOwner::new().unwrap();
            let (client, thread) = (owner.client().unwrap(), AtomicI32::new(0));
            ran.store(false, Ordering::Relaxed);
            std::thread::scope(|scope| {
                let waits = scope.spawn(|| {
                    thread.store(rustix::thread::gettid().as_raw_pid(), Ordering::Release);
                    client.wait(7, limit, || false)
                });
                eventually("it waits", || owner.has_faults() && !waits.is_finished());
                // It may not be asleep yet.
                eventually("it is interrupted", || {
                    interrupt(thread.load(Ordering::Acquire));
                    waits.is_finished()
                });
                let end = waits.join().unwrap();
                assert!(matches!(end, Err(WaitError::Interrupted)), "{limit:?}: {end:?}");
            });
            assert!(ran.load(Ordering::Relaxed));
            assert!(!owner.has_faults(), "{limit:?}: it left its fault behind");
            assert!(owner.reader(1).unwrap().take().is_none());
        }
    });
}

/// A reader dies with faults taken: whoever cleans up after it gives them to
/// another, and readers hear of it.
#[test]
fn what_a_dead_reader_had_taken_is_anothers() {
    let owner = QueueOwner::new().unwrap();
    let client = owner.client().unwrap();
    [7, 9].into_iter().for_each(|gfn| client.request(gfn).unwrap());
    let (dead, other) = (owner.reader(1).unwrap(), owner.reader(2).unwrap());
    assert_eq!([dead.take().unwrap().gfn, dead.take().unwrap().gfn], [7, 9]);
    assert!(other.take().is_none());
    owner.recover(Some(1));
    let mut fds = [PollFd::new(&other, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec::default())), Ok(1), "told");
    assert_eq!([other.take().unwrap().gfn, other.take().unwrap().gfn], [7, 9]);
}

#[test]
fn shared_memory_is_filled_and_stays_shared() {
    begin!();
    let home = home(256);
    let (attached, memory) = view(&home);
    home.pager.fill();
    assert!(home.pager.wait_filled(Duration::from_secs(10)));
    assert!(home.pager.wait_filled(Duration::ZERO), "it stays so");
    let (late, again) = view(&home);
    for at in 0..256 {
        assert_eq!(late.pages().page((at * PAGE) as u64), Some(Page::Present));
        assert_eq!(page(&again, at * PAGE), Holds::Source(at * PAGE));
    }
    assert_eq!(home.pager.stats().faults, 0);
    assert!(home.pager.stats().fill_ms.is_some());
    // It is served still: what is given back is zero, writers can be stopped.
    memory.remove(0..PAGE).unwrap();
    assert_eq!(page(&again, 0), Holds::Zero);
    assert_eq!(attached.pages().wait(0, None).unwrap(), Page::Present);
    home.pager.freeze().unwrap();
    home.pager.thaw().unwrap();
    memory.write_u64(PAGE, 5);
    assert_eq!(home.memory.read_u64(PAGE), 5);
}

/// A thread waits for a page by a connection that is replaced meanwhile.
#[test]
fn who_comes_again_gets_what_it_waited_for() {
    begin!();
    let home = home(64);
    home.source.hold(ByteRange::new(0, 64 * PAGE as u64));
    home.source.never_at_hand();
    let (mut attached, memory) = view(&home);
    let waits = std::thread::spawn(move || page(&memory, 9 * PAGE));
    eventually("it waits", || home.source.held() > 0);
    for _ in 0..3 {
        attached.reconnect(&home.path).unwrap();
        assert!(!waits.is_finished());
    }
    home.source.release();
    assert_eq!(waits.join().unwrap(), Holds::Source(9 * PAGE));
    assert_eq!(home.source.fetches(9), 1);
    let other = common::home::home(64);
    let error = attached.reconnect(&other.path).unwrap_err().to_string();
    assert!(error.contains("another memory"), "{error}");
}

/// What a child does: `serve <held or not> <pages> <directory>`.
fn serve(task: &str) {
    let words: Vec<&str> = task.splitn(4, ' ').collect();
    let pages: usize = words[2].parse().unwrap();
    let source = faulty(pages);
    if words[1] == "held" {
        source.never_at_hand();
        source.hold(ByteRange::new(0, (pages * PAGE) as u64));
    }
    let directory = Path::new(words[3]);
    let mut config = DaemonConfig::new(directory.join("pager.sock"), source);
    config.attach = Some(directory.join("doors"));
    let daemon = Daemon::bind(config).unwrap();
    child::say("listening");
    daemon.run(&mut |_| {}).unwrap();
}

/// A VMM whose memory others may have.
struct Vmm {
    memfd: Arc<std::os::fd::OwnedFd>,
    memory: Arc<Mapping>,
    uffd: Userfaultfd,
}

impl Vmm {
    fn new(pages: usize) -> Self {
        let memfd = memfd(pages);
        let memory = Arc::new(Mapping::file_shared(memfd.as_fd(), pages * PAGE).unwrap());
        let uffd = Userfaultfd::open(Features::EVENT_REMOVE).unwrap();
        uffd.register_missing(&range(&memory)).unwrap();
        Self { memfd, memory, uffd }
    }

    fn hand_over(&self, directory: &Path) -> UnixStream {
        let region = json!([{
            "base_host_virt_addr": self.memory.hva(), "size": self.memory.len(), "offset": 0,
            "page_size": PAGE, "gpa_start": 0, "memfd": 0,
        }]);
        let socket = UnixStream::connect(directory.join("pager.sock")).unwrap();
        let fds = [self.uffd.as_fd(), self.memfd.as_fd()];
        send_with_fds(&socket, region.to_string().as_bytes(), &fds).unwrap();
        socket
    }
}

/// The daemon is killed with a fault of a back-end read and not answered.
#[test]
fn another_daemon_answers_what_a_killed_one_had_read() {
    if let Some(task) = child::task() {
        return serve(&task);
    }
    begin!();
    let dir = tempfile::tempdir().unwrap();
    let doors = dir.path().join("doors");
    std::fs::create_dir(&doors).unwrap();
    let door: PathBuf = doors.join(format!("{}.sock", std::process::id()));
    let test = this_test!();
    let start = |how: &str| {
        let task = format!("serve {how} 64 {}", dir.path().display());
        let daemon = child::spawn(test, &task);
        assert_eq!(daemon.hear(), "listening");
        daemon
    };
    let vmm = Vmm::new(64);
    let mut first = start("held");
    let _socket = vmm.hand_over(dir.path());
    eventually("there is a door", || door.exists());
    let mut attached = Attached::connect(&door).unwrap();
    let memory = attached.regions()[0].memory.clone();
    let waits = std::thread::spawn(move || page(&memory, 5 * PAGE));
    std::thread::sleep(Duration::from_millis(200));
    first.kill();
    first.wait();
    assert!(!waits.is_finished(), "it saw something");
    let _second = start("plain");
    let _socket = vmm.hand_over(dir.path());
    eventually("it takes part again", || attached.reconnect(&door).is_ok());
    assert_eq!(waits.join().unwrap(), Holds::Source(5 * PAGE));
    assert_is_source(&attached.regions()[0].memory, 0);
    assert_is_source(&vmm.memory, 0);
}

/// A frame of the door's protocol.
fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"VMPA\x01\0".to_vec();
    bytes.extend([kind, 0, u8::try_from(body.len()).unwrap(), 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(body);
    bytes
}

/// What is installed through a view must be there for all: a mapping of other
/// memory gets nothing.
#[test]
fn a_view_of_other_memory_is_refused_by_name() {
    begin!();
    let home = home(64);
    let other = Arc::new(Mapping::file_shared(memfd(64).as_fd(), 64 * PAGE).unwrap());
    let private = mapping(64);
    for memory in [&other, &private] {
        let uffd = Userfaultfd::open(Features::EVENT_REMOVE).unwrap();
        uffd.register_missing(&range(memory)).unwrap();
        let mut socket = UnixStream::connect(&home.path).unwrap();
        socket.write_all(&frame(1, &[])).unwrap();
        // What it offers: one region.
        socket.read_exact(&mut [0; 16 + 40]).unwrap();
        let view = frame(3, &memory.hva().to_le_bytes());
        send_with_fds(&socket, &view, &[uffd.as_fd()]).unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.contains("no shared mapping of the region of gpa 0x0"), "{answer}");
    }
    let (_attached, memory) = view(&home);
    assert_is_source(&memory, 0);
    assert_is_source(&home.memory, 0);
}

const PAGES: usize = 1024;
/// The last words of a page are written by so many threads.
const WRITERS: usize = 4;

/// That a page is the source's but for what was written to it.
fn check(memory: &Mapping, at: usize, brought_by: &str) {
    for i in 0..PAGE / 8 - WRITERS {
        let (word, address) = (memory.read_u64(at * PAGE + i * 8), at * PAGE + i * 8);
        assert_eq!(word, address as u64 + 1, "page {at}, word {i}, {brought_by}");
    }
}

/// Brings every page in an order of its own, checks it, and leaves its mark;
/// together with the others, as the fastest would bring all of them.
fn visit(
    memory: &Mapping,
    which: usize,
    together: &Barrier,
    mut bring: impl FnMut(usize),
    brought_by: &str,
) {
    let mut order: Vec<usize> = (0..PAGES).collect();
    let mut random = Random::new(which as u64 + 77);
    (1..PAGES).for_each(|i| order.swap(i, random.below(i + 1)));
    for (n, at) in order.into_iter().enumerate() {
        if n % 8 == 0 {
            together.wait();
        }
        bring(at);
        check(memory, at, brought_by);
        memory.write_u64((at + 1) * PAGE - 8 * (which + 1), mark(at, which));
    }
}

fn mark(at: usize, which: usize) -> u64 {
    0x4d41_524b_0000_0000 | (at << 8 | which) as u64
}

fn install(installer: &mut Installer, memory: &Mapping, at: usize) {
    let hva = Hva(memory.hva() + (at * PAGE) as u64);
    let until = Instant::now() + Duration::from_secs(30);
    while installer.resolve(hva) == Resolution::Waiting {
        assert!(installer.wait(hva, until), "page {at}");
    }
}

/// Threads that install pages, a view, one that asks by the queue, and freezes in
/// between: each page is installed once, and no write is lost.
fn all_at_once(cold: bool) {
    let home = home(PAGES);
    if cold {
        home.source.delay(ByteRange::new(0, 1 << 30), Duration::from_micros(100));
    }
    let (attached, seen) = view(&home);
    let (done, together) = (AtomicBool::new(false), Barrier::new(WRITERS));
    std::thread::scope(|scope| {
        let together = &together;
        let mut visitors = Vec::new();
        for which in 0..2 {
            let mut installer = home.pager.installer().unwrap().unwrap();
            let memory = &home.memory;
            visitors.push(scope.spawn(move || {
                let bring = |at| install(&mut installer, memory, at);
                visit(memory, which, together, bring, "an installer");
            }));
        }
        visitors.push(scope.spawn(|| visit(&seen, 2, together, |_| {}, "a touch")));
        visitors.push(scope.spawn(|| {
            let wait = |at: usize| {
                assert_eq!(attached.pages().wait((at * PAGE) as u64, None).unwrap(), Page::Present);
            };
            visit(&seen, 3, together, wait, "the queue");
        }));
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                home.pager.freeze().unwrap();
                // The last words of pages that were there when it began.
                let there: Vec<usize> = (0..PAGES)
                    .filter(|at| attached.pages().page((at * PAGE) as u64) == Some(Page::Present))
                    .collect();
                let marks = || -> Vec<u64> {
                    let words = there.iter().flat_map(|at| (1..=WRITERS).map(move |n| (at, n)));
                    words.map(|(at, n)| home.memory.read_u64((at + 1) * PAGE - 8 * n)).collect()
                };
                let before = marks();
                std::thread::sleep(Duration::from_millis(2));
                assert!(marks() == before, "somebody wrote to frozen memory");
                home.pager.thaw().unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let ends: Vec<_> = visitors.into_iter().map(|visitor| visitor.join()).collect();
        done.store(true, Ordering::Relaxed);
        ends.into_iter().for_each(|end| end.unwrap());
    });
    for at in 0..PAGES {
        check(&home.memory, at, "somebody");
        for which in 0..WRITERS {
            let word = home.memory.read_u64((at + 1) * PAGE - 8 * (which + 1));
            assert_eq!(word, mark(at, which), "page {at}: a write of {which} was lost");
        }
    }
    // What an installer had at hand when a freeze began, it leaves to the worker,
    // which looks for itself.
    let again = home.source.all_fetches().into_iter().filter(|n| *n != 1).collect::<Vec<_>>();
    assert!(again.len() < PAGES / 20 && again.iter().all(|n| *n == 2), "{again:?}");
    let stats = home.pager.stats();
    println!("cold {cold}: {stats:?}");
    assert_eq!(stats.pages_demand, PAGES as u64);
    // What is not at hand is the worker's to bring.
    assert!((stats.faults_exit > 0) != cold);
    assert!(stats.faults_attached > 0 && stats.faults_queued > 0);
}

#[test]
fn installers_views_the_queue_and_freezes_at_once() {
    begin!();
    for cold in [false, true] {
        all_at_once(cold);
    }
}
