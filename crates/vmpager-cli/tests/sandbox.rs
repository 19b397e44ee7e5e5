//! What `vmpager serve` gives up: the worker's rights and system calls, and what it
//! does without root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use]
mod vms;

use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{DumpableBehavior, Resource, Signal};
use vms::{
    Place, Running, Serving, VMPAGER, child, children, eventually, have_userfaultfd, signal,
    watchdog,
};

/// A field of a thread's status.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
}

/// The status of each thread of a process.
fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap()).collect()
}

/// To read and write files of others, to lock memory, to look at others, and to pass
/// descriptors.
const KEPT: u64 = 1 << 1 | 1 << 2 | 1 << 14 | 1 << 19 | 1 << 24;
const SYS_NICE: u64 = 1 << 23;

#[test]
fn every_thread_of_a_worker_is_confined() {
    let place = Place::new(64);
    for (args, seccomp, kept) in [
        (&[][..], "2", KEPT),
        (&["--collapse"], "2", KEPT | SYS_NICE),
        (&["--no-seccomp"], "0", KEPT),
    ] {
        let serving = place.serve(args);
        let ours = field(&threads(serving.keeper())[0], "CapEff:");
        let ours = u64::from_str_radix(&ours, 16).unwrap();
        let all = threads(serving.worker());
        assert!(all.len() > 1, "it has threads that serve");
        for status in all {
            assert_eq!(field(&status, "Seccomp:"), seccomp, "{args:?}");
            assert_eq!(field(&status, "NoNewPrivs:"), "1");
            for set in ["CapEff:", "CapPrm:"] {
                let has = u64::from_str_radix(&field(&status, set), 16).unwrap();
                assert_eq!(has, ours & kept, "{args:?}, {set}");
            }
            assert_eq!(field(&status, "CapInh:"), "0000000000000000");
        }
        serving.stop();
    }
}

type Call = fn() -> io::Result<()>;

/// What a worker cannot do, and could before.
fn forbidden() -> Vec<(&'static str, Call)> {
    vec![
        ("another process", || Command::new("true").spawn()?.wait().map(drop)),
        // Where it can be done, another program goes on, which says nothing.
        ("another program", || Err(Command::new("true").exec())),
        ("signals to others", || {
            let parent = rustix::process::getppid().unwrap();
            Ok(rustix::process::kill_process(parent, Signal::CONT)?)
        }),
        ("other sockets", || {
            let family = AddressFamily::UNSPEC;
            Ok(rustix::net::socket(family, SocketType::SEQPACKET, None).map(drop)?)
        }),
        ("limits", || {
            let limits = rustix::process::getrlimit(Resource::Core);
            Ok(rustix::process::setrlimit(Resource::Core, limits)?)
        }),
        ("the state of this process", || {
            Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?)
        }),
        ("another root", || Ok(rustix::process::chroot("/")?)),
        ("code", || {
            use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
            let all = ProtFlags::READ | ProtFlags::WRITE | ProtFlags::EXEC;
            // SAFETY: a new mapping, which nobody uses.
            unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, all, MapFlags::PRIVATE) }?;
            Ok(())
        }),
    ]
}

#[test]
fn forbidden_calls_are_refused() {
    if let Some(task) = child::task() {
        let (filtered, index) = task.split_once(' ').unwrap();
        if filtered == "true" {
            vmpager::sandbox::filter_calls().unwrap();
        }
        let (what, call) = forbidden()[index.parse::<usize>().unwrap()];
        let done = call();
        // What it may still do.
        std::thread::spawn(|| fs::read("/proc/self/status").unwrap()).join().unwrap();
        child::say(&match done {
            Ok(()) => "done".into(),
            Err(error) if error.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
                "refused".into()
            }
            Err(error) => format!("{what}: {error}"),
        });
        return;
    }
    for (index, (what, _)) in forbidden().iter().enumerate() {
        let mut filtered = child::spawn(this_test!(), &format!("true {index}"));
        assert_eq!(filtered.hear(), "refused", "{what}");
        assert!(filtered.wait().success(), "{what}");
        // It is the filter that refuses.
        let mut free = child::spawn(this_test!(), &format!("false {index}"));
        let said = free.hear_within(std::time::Duration::from_secs(5));
        assert_ne!(said.as_deref(), Some("refused"), "{what}");
        free.wait();
    }
}

const NOBODY: u32 = 65534;

/// The daemon as a user without rights: it opens no userfaultfd of its own, and takes
/// over from a killed worker as ever.
#[test]
fn a_user_without_rights_can_serve() {
    if !have_userfaultfd() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        vmpager_testing::skipped("only root can start it as another user");
        return;
    }
    let _dog = watchdog(this_test!());
    let place = Place::new(1024);
    chown(place.dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let mut command = place.command(&[VMPAGER], &["--socket-mode", "600"]);
    let child = match command.uid(NOBODY).gid(NOBODY).spawn() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            vmpager_testing::skipped(&format!("others cannot run {VMPAGER}: {error}"));
            return;
        }
        child => child.unwrap(),
    };
    let serving = Serving { child };
    eventually("the socket", || place.socket().exists());
    let worker = serving.worker();
    for status in threads(worker) {
        assert_eq!(field(&status, "CapEff:"), "0000000000000000");
        assert_eq!(field(&status, "Uid:"), "65534\t65534\t65534\t65534");
    }
    let vm = Running::start(&place.socket(), place.pages);
    signal(worker, Signal::KILL);
    eventually("another worker", || {
        children(serving.keeper()).first().is_some_and(|pid| *pid != worker)
    });
    vm.goes_on();
    vm.stop();
    serving.stop();
}
