//! Workers are killed, and daemons replace each other, while other processes take part
//! in a VM's memory: nobody comes again, nobody waits for ever, and every byte is right.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::child::{self, TestChild};
use common::kept::{Kept, Plan, run_if_worker};
use common::{Holds, PAGE, Random, page, watchdog};
use serde::{Deserialize, Serialize};
use vmpager::attach::{Asker, AttachError, Attached, FaultReader, Page, RemotePages};
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

/// Pages of the VM, and of each thread that works on them; what is left over is for
/// those who only read.
const PAGES: usize = 1024;
const EACH: usize = 128;

/// A thread that uses pages nobody else changes, and so knows what they must hold.
struct User<'a> {
    memory: Arc<Mapping>,
    /// By which it asks for some of them, without touching them.
    asks: Option<&'a RemotePages>,
    first: usize,
    known: Vec<Holds>,
    random: Random,
}

impl<'a> User<'a> {
    fn new(memory: &Arc<Mapping>, asks: Option<&'a RemotePages>, part: usize) -> Self {
        let first = part * EACH;
        let known = (first..first + EACH).map(|at| Holds::Source(at * PAGE)).collect();
        let random = Random::new(part as u64 + u64::from(std::process::id()));
        Self { memory: memory.clone(), asks, first, known, random }
    }

    fn check(&self, at: usize) {
        let page_at = self.first + at;
        assert_eq!(page(&self.memory, page_at * PAGE), self.known[at], "page {page_at}");
    }

    fn act(&mut self) {
        let at = self.random.below(EACH);
        let page_at = self.first + at;
        match (self.random.below(10), self.asks) {
            (0 | 1, _) => {
                let count = (1 + self.random.below(8)).min(EACH - at);
                self.memory.remove(page_at * PAGE..(page_at + count) * PAGE).unwrap();
                self.known[at..at + count].fill(Holds::Zero);
                // At once, for a lost removal to be seen.
                self.check(at + count - 1);
            }
            (2, _) => {
                let word = (self.random.below(1 << 40) as u64) << 16 | 0xabcd;
                let bytes = [word.to_le_bytes(); PAGE / 8];
                self.memory.write(page_at * PAGE, bytes.as_flattened());
                self.known[at] = Holds::Word(word);
            }
            (3..6, Some(pages)) => {
                let gpa = (page_at * PAGE) as u64;
                // Interrupted or full, it is asked once more.
                while pages.wait(gpa, Some(PATIENCE)).unwrap() != Page::Present {}
                self.check(at);
            }
            _ => self.check(at),
        }
    }

    fn work(mut self, until: impl Fn() -> bool) {
        while !until() {
            self.act();
        }
        (0..EACH).for_each(|at| self.check(at));
    }
}

/// What a process does: its part of the pages, and where it finds the others.
#[derive(Debug, Serialize, Deserialize)]
enum Task {
    /// Hands memory over and uses two parts of it, one by asking at its door.
    Vm { socket: PathBuf, doors: PathBuf },
    /// Takes part in it, and uses two.
    BackEnd { door: PathBuf, part: usize },
    /// Takes faults from the queue, and keeps them.
    Hoard { door: PathBuf },
}

impl Task {
    fn spawn(&self, test: &str) -> TestChild {
        child::spawn(test, &format!("part {}", serde_json::to_string(self).unwrap()))
    }

    fn run(&self) {
        match self {
            Self::Vm { socket, doors } => vm(socket, doors),
            Self::BackEnd { door, part } => {
                let attached = again(|| Attached::connect(door));
                use_parts(&attached.regions()[0].memory, attached.pages(), *part);
            }
            Self::Hoard { door } => {
                let (reader, _socket) = again(|| FaultReader::connect(door));
                child::say("ready");
                while reader.take().is_none() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                child::say("taken");
                wait_for_line();
            }
        }
    }
}

/// Until it works: the worker may be killed in the middle of it.
fn again<T>(mut connect: impl FnMut() -> Result<T, AttachError>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        match connect() {
            Ok(it) => return it,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
    }
}

/// Works on two parts of the pages until told to stop, then looks at all that nobody
/// changes.
fn use_parts(memory: &Arc<Mapping>, pages: &RemotePages, part: usize) {
    let stop = AtomicBool::new(false);
    child::say("ready");
    std::thread::scope(|scope| {
        for (part, asks) in [(part, None), (part + 1, Some(pages))] {
            let user = User::new(memory, asks, part);
            let stop = &stop;
            scope.spawn(move || user.work(|| stop.load(Ordering::Relaxed)));
        }
        wait_for_line();
        stop.store(true, Ordering::Relaxed);
    });
    for at in 6 * EACH..PAGES {
        assert_eq!(page(memory, at * PAGE), Holds::Source(at * PAGE), "page {at}");
    }
    child::say("done");
    wait_for_line();
}

fn vm(socket: &Path, doors: &Path) {
    let memfd = vmpager_sys::memfd::sealed("guest", (PAGES * PAGE) as u64).unwrap();
    let memory = Arc::new(Mapping::file_shared(memfd.as_fd(), PAGES * PAGE).unwrap());
    let uffd = Userfaultfd::open(Features::EVENT_REMOVE).unwrap();
    uffd.register_missing(&GuestRange::of_mapping(&memory)).unwrap();
    let regions = serde_json::json!([{
        "base_host_virt_addr": memory.hva(), "size": memory.len(), "offset": 0,
        "page_size": PAGE, "gpa_start": 0, "memfd": 0,
    }]);
    let socket = UnixStream::connect(socket).unwrap();
    let uffd_fd = uffd.duplicate().unwrap();
    let fds = [uffd_fd.as_fd(), memfd.as_fd()];
    send_with_fds(&socket, regions.to_string().as_bytes(), &fds).unwrap();
    let door = doors.join(format!("{}.sock", std::process::id()));
    let asker = again(|| Asker::connect(&door));
    use_parts(&memory, asker.pages(), 0);
}

/// For a machine with much else to do, on which workers are killed all the time.
const PATIENCE: Duration = Duration::from_secs(100);

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn hears(child: &TestChild, line: &str) {
    assert_eq!(child.hear_within(PATIENCE).as_deref(), Some(line));
}

fn wait_for_line() {
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Runs what this process was started for, if it was; then returns true.
fn run_if_task() -> bool {
    let Some(task) = child::task() else { return false };
    let Some(task) = task.strip_prefix("part ") else { return false };
    serde_json::from_str::<Task>(task).unwrap().run();
    true
}

fn is_child() -> bool {
    !common::have_userfaultfd() || run_if_worker() || run_if_task()
}

/// A VM, a back-end that is there from the start, and one that comes in the middle,
/// while `trouble` goes on in between.
fn take_part(test: &str, kept: &mut Kept, mut trouble: impl FnMut(&mut Kept)) {
    let vm = Task::Vm { socket: kept.socket.clone(), doors: kept.doors() };
    let mut vm = vm.spawn(test);
    let door = kept.doors().join(format!("{}.sock", vm.pid()));
    eventually("there is a door", || door.exists());
    let back_end = |part| Task::BackEnd { door: door.clone(), part }.spawn(test);
    let mut first = back_end(2);
    hears(&vm, "ready");
    hears(&first, "ready");
    trouble(kept);
    let mut second = back_end(4);
    hears(&second, "ready");
    trouble(kept);
    for process in [&mut vm, &mut first, &mut second] {
        process.tell("stop");
    }
    for process in [&vm, &first, &second] {
        hears(process, "done");
    }
    for mut process in [first, second, vm] {
        process.tell("end");
        assert!(process.wait().success());
    }
    eventually("the door is closed", || !door.exists());
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn those_who_take_part_outlive_workers_killed_at_random() {
    if is_child() {
        return;
    }
    let kills = number("VMPAGER_KILLS", 60);
    let _dog = watchdog(this_test!(), Duration::from_secs(300 + kills as u64));
    for slow_us in [None, Some(300)] {
        let plan = Plan {
            pages: PAGES,
            slow_us,
            kill_within_ms: Some(number("VMPAGER_MS", 40) as u64),
            attach: true,
            ..Plan::default()
        };
        let mut kept = Kept::start(this_test!(), &plan);
        let mut rounds = 0;
        while kept.kills() < kills.div_ceil(2) {
            take_part(this_test!(), &mut kept, |kept| {
                let enough = kept.kills() + 4;
                eventually("workers are killed", || kept.kills() >= enough);
            });
            rounds += 1;
        }
        println!("{} kills in {rounds} rounds, slow: {slow_us:?}", kept.kills());
        kept.stop();
    }
}

#[test]
fn those_who_take_part_outlive_daemons() {
    if is_child() {
        return;
    }
    let replaces = number("VMPAGER_REPLACES", 8);
    let _dog = watchdog(this_test!(), Duration::from_secs(300 + replaces as u64));
    let plan = Plan { pages: PAGES, slow_us: Some(300), attach: true, ..Plan::default() };
    let mut kept = Kept::start(this_test!(), &plan);
    let test = this_test!();
    take_part(test, &mut kept, |kept| {
        (0..replaces.div_ceil(2)).for_each(|_| kept.replace(test, &plan));
    });
    kept.stop();
}

/// A daemon that is told of no directory for doors has none, and says so by hanging up.
#[test]
fn a_daemon_without_doors_lets_those_go_who_took_part() {
    if is_child() {
        return;
    }
    let _dog = watchdog(this_test!(), Duration::from_secs(300));
    let plan = Plan { pages: PAGES, attach: true, ..Plan::default() };
    let mut kept = Kept::start(this_test!(), &plan);
    let vm = Task::Vm { socket: kept.socket.clone(), doors: kept.doors() };
    let vm = vm.spawn(this_test!());
    hears(&vm, "ready");
    let door = kept.doors().join(format!("{}.sock", vm.pid()));
    let attached = Attached::connect(&door).unwrap();
    let hung_up = || {
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
            attached.pager(),
            rustix::event::PollFlags::IN,
        )];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).unwrap() > 0
    };
    kept.replace(this_test!(), &plan);
    std::thread::sleep(Duration::from_millis(20));
    assert!(!hung_up(), "served on");
    kept.replace(this_test!(), &Plan { attach: false, ..plan });
    eventually("it hangs up", hung_up);
    eventually("the door is closed", || !door.exists());
    drop(vm);
    kept.stop();
}

/// What a reader had taken that died while nobody served is not lost.
#[test]
fn a_reader_that_dies_after_the_worker_keeps_nothing() {
    if is_child() {
        return;
    }
    let _dog = watchdog(this_test!(), Duration::from_secs(300));
    let plan = Plan { pages: PAGES, slow_us: Some(100), attach: true, ..Plan::default() };
    let mut kept = Kept::start(this_test!(), &plan);
    let test = this_test!();
    take_part(test, &mut kept, |kept| {
        let name = std::fs::read_dir(kept.doors()).unwrap().next().unwrap().unwrap();
        let hoard = Task::Hoard { door: name.path() }.spawn(test);
        hears(&hoard, "ready");
        hears(&hoard, "taken");
        kept.replace(test, &plan);
        drop(hoard);
    });
    kept.stop();
}

/// Where a worker takes note of what a view gave back, and of who takes part.
#[cfg(feature = "kill-points")]
#[test]
fn workers_killed_where_views_are_served_lose_nothing() {
    if is_child() {
        return;
    }
    let _dog = watchdog(this_test!(), Duration::from_secs(300));
    let points = [
        ("view read", 1),
        ("view read", 4),
        ("view applied", 1),
        ("view applied", 4),
        ("door kept", 1),
        ("guest answered", 1),
        ("guest answered", 3),
    ];
    for (point, first) in points {
        let point_and_first = Some((point.to_owned(), first));
        let plan = Plan { pages: PAGES, point: point_and_first, attach: true, ..Plan::default() };
        let mut kept = Kept::start(this_test!(), &plan);
        take_part(this_test!(), &mut kept, |_| std::thread::sleep(Duration::from_millis(50)));
        println!("{point}, {first}: {} started", kept.starts());
        assert!(kept.starts() > 1, "{point}");
        kept.stop();
    }
}
