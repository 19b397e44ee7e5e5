//! `vmpager serve` under a service manager, which this test plays: a socket for
//! notifications, a store of descriptors, and the same program started again with what
//! is in there. A VM checks every byte while keepers die.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use]
mod vms;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::Signal;
use vmpager_sys::peer::{fd_kind, recv_with_fds};
use vms::{
    Place, Running, Serving, VMPAGER, eventually, have_userfaultfd, newcomer_is_served,
    run_if_newcomer, signal, watchdog,
};

/// What the manager knows of its service.
#[derive(Debug, Default)]
struct Known {
    /// In the order in which they came.
    store: Vec<(String, OwnedFd)>,
    /// All that was said beside what concerns the store.
    said: Vec<String>,
}

/// A service manager as systemd is one, as far as the protocols go.
#[derive(Debug)]
struct Manager {
    place: Place,
    known: Arc<Mutex<Known>>,
    /// A socket that it lends.
    socket: Option<UnixListener>,
}

impl Manager {
    fn new(pages: usize) -> Self {
        let place = Place::new(pages);
        let notified = UnixDatagram::bind(place.path("notify")).unwrap();
        let known = Arc::new(Mutex::new(Known::default()));
        std::thread::spawn({
            let known = known.clone();
            move || listen(&notified, &known)
        });
        Self { place, known, socket: None }
    }

    /// Starts the service with all that is stored.
    fn start(&self, args: &[&str]) -> Serving {
        self.settle();
        self.known.lock().unwrap().said.clear();
        // The service's number is known when it has been started.
        let shell = ["sh", "-c", "export LISTEN_PID=$$; exec \"$0\" \"$@\"", VMPAGER];
        let mut command = self.place.command(&shell, args);
        command.env("NOTIFY_SOCKET", self.place.path("notify"));
        self.give(&mut command);
        let serving = Serving { child: command.spawn().unwrap() };
        eventually("it is ready", || self.has_said("READY=1"));
        serving
    }

    /// Gives the service its descriptors, from number 3 on, and their names.
    fn give(&self, command: &mut Command) {
        let known = self.known.lock().unwrap();
        let lent = self.socket.iter().map(|socket| ("vmpager.socket", socket.as_fd()));
        let stored = known.store.iter().map(|(name, fd)| (name.as_str(), fd.as_fd()));
        let (names, fds): (Vec<&str>, Vec<_>) = lent.chain(stored).unzip();
        // Above all numbers they shall have.
        let above = 1000;
        let high: Vec<OwnedFd> =
            fds.iter().map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, above).unwrap()).collect();
        assert!(high.len() < 900);
        if high.is_empty() {
            return;
        }
        command.env("LISTEN_FDS", high.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        let place = move || {
            for (fd, number) in high.iter().zip(3..) {
                // SAFETY: dup2 takes any numbers; this process is about to become
                // another program, none of whose descriptors this replaces.
                if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: between fork and exec it makes system calls, and nothing else.
        unsafe { command.pre_exec(place) };
    }

    /// Waits until all that was sent so far is known.
    fn settle(&self) {
        let mark = format!("MARK={:?}", std::time::Instant::now());
        let socket = UnixDatagram::unbound().unwrap();
        socket.send_to(mark.as_bytes(), self.place.path("notify")).unwrap();
        eventually("all is known", || self.has_said(&mark));
    }

    fn has_said(&self, what: &str) -> bool {
        self.known.lock().unwrap().said.iter().any(|said| said == what)
    }

    /// How many descriptors are stored whose name begins so.
    fn stored(&self, kind: &str) -> usize {
        let known = self.known.lock().unwrap();
        known.store.iter().filter(|(name, _)| name.split('.').next() == Some(kind)).count()
    }

    fn socket(&self) -> PathBuf {
        self.place.socket()
    }

    /// Kills everything of the service, as systemd does before it starts it again.
    fn kill(&self, mut serving: Serving) {
        let workers = vms::children(serving.keeper());
        signal(serving.keeper(), Signal::KILL);
        serving.child.wait().unwrap();
        vms::kill_all(&workers);
    }
}

/// Does what is said by the service.
fn listen(notified: &UnixDatagram, known: &Mutex<Known>) {
    loop {
        let mut bytes = [0; 4096];
        let mut fds = Vec::new();
        let count = match recv_with_fds(notified, &mut bytes, &mut fds) {
            Ok(count) => count,
            Err(_) => {
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
        };
        let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
        let fields: BTreeMap<&str, &str> =
            text.lines().filter_map(|line| line.split_once('=')).collect();
        let mut known = known.lock().unwrap();
        let name = fields.get("FDNAME").copied().unwrap_or_default();
        if fields.contains_key("FDSTOREREMOVE") {
            known.store.retain(|(stored, _)| stored != name);
        } else if fields.contains_key("FDSTORE") {
            // systemd lets go of what hangs up otherwise, and takes such names alone.
            assert_eq!(fields.get("FDPOLL"), Some(&"0"), "{text}");
            assert!(!name.is_empty() && name.len() <= 255 && !name.contains(':'), "{name}");
            known.store.extend(fds.into_iter().map(|fd| (name.to_owned(), fd)));
        } else {
            known.said.extend(text.lines().map(str::to_owned));
        }
    }
}

/// Keepers are killed, with their workers or without, and leave what they have by
/// order: the VMs go on, and every byte is right.
#[test]
fn keepers_that_die_lose_nothing() {
    if !have_userfaultfd() || run_if_newcomer() {
        return;
    }
    let _dog = watchdog(this_test!());
    for lent in [false, true] {
        let mut manager = Manager::new(8192);
        if lent {
            manager.socket = Some(UnixListener::bind(manager.socket()).unwrap());
        }
        let mut serving = manager.start(&["--partial"]);
        // One that keeps its socket, and one that has nothing said yet.
        let vm = Running::start(&manager.socket(), 8192);
        let silent = UnixStream::connect(manager.socket()).unwrap();
        // One that was accepted, and is not stored yet, may be lost.
        eventually("both are stored", || manager.stored("p") == 2 && manager.stored("r") == 1);
        for round in 0..9 {
            match round % 3 {
                // The worker alone, first: another one is at work, or about to be.
                0 => {
                    signal(serving.worker(), Signal::KILL);
                    manager.kill(serving);
                }
                // The keeper alone: its worker lives on.
                1 => {
                    signal(serving.keeper(), Signal::KILL);
                    serving.child.wait().unwrap();
                }
                // A restart.
                _ => {
                    signal(serving.keeper(), Signal::USR2);
                    assert!(serving.child.wait().unwrap().success());
                    manager.settle();
                    assert!(manager.has_said("STOPPING=1"));
                    // Whoever comes meanwhile waits.
                    assert!(manager.socket().exists());
                }
            }
            serving = manager.start(&["--partial"]);
            vm.goes_on();
            newcomer_is_served(this_test!(), &manager.socket(), 64);
        }
        // The silent one may speak now.
        let late = vms::Vm::new(64);
        late.hand_over(&silent);
        late.check_all();
        vm.stop();
        assert_eq!(manager.place.log().matches("session ended: failed").count(), 0);
        serving.stop();
        manager.settle();
        assert!(manager.has_said("STOPPING=1"));
        assert_eq!(manager.socket().exists(), lent, "a lent socket is its owner's to remove");
    }
}

/// What is stored is what there is: a VM that ends takes its descriptors with it, and
/// its handshake is not taken for another memory by those who come later.
#[test]
fn what_has_ended_is_stored_no_longer() {
    if !have_userfaultfd() || run_if_newcomer() {
        return;
    }
    let _dog = watchdog(this_test!());
    let manager = Manager::new(64);
    let serving = manager.start(&["--background-fill"]);
    // All of it is brought, then it ends; the VMM stays.
    let vm = vms::Vm::new(64);
    let connection = UnixStream::connect(manager.socket()).unwrap();
    vm.hand_over(&connection);
    manager.place.expect_log(&["session ended"]);
    eventually("its memory is let go of", || {
        ["p", "i", "u", "m", "r"].map(|kind| manager.stored(kind)) == [1, 1, 0, 0, 1]
    });
    manager.kill(serving);
    let serving = manager.start(&["--background-fill"]);
    // Another memory of it is the second.
    let more = vms::Vm::new(64);
    more.hand_over(&connection);
    more.check_all();
    vm.check_all();
    manager.kill(serving);
    let serving = manager.start(&["--background-fill"]);
    drop((connection, vm, more));
    newcomer_is_served(this_test!(), &manager.socket(), 64);
    eventually("both are forgotten", || manager.stored("p") == 0 && manager.stored("i") == 0);
    let kinds = manager.known.lock().unwrap();
    let kinds: Vec<String> = kinds.store.iter().map(|(_, fd)| fd_kind(fd.as_fd())).collect();
    assert!(!kinds.iter().any(|kind| kind.contains("userfaultfd")), "{kinds:?}");
    assert_eq!(manager.place.log().matches("refused").count(), 0, "{}", manager.place.log());
    serving.stop();
}

/// VMs go on with the file they began with, whatever has its name by now.
#[test]
fn files_that_are_served_are_stored() {
    if !have_userfaultfd() {
        return;
    }
    let _dog = watchdog(this_test!());
    let manager = Manager::new(1024);
    let serving = manager.start(&[]);
    let vm = Running::start(&manager.socket(), 1024);
    eventually("the memory is stored", || manager.stored("r") == 1 && manager.stored("s") == 1);
    let memory = manager.place.path("memory");
    std::fs::remove_file(&memory).unwrap();
    std::fs::write(&memory, [7; 4096]).unwrap();
    manager.kill(serving);
    let serving = manager.start(&[]);
    vm.goes_on();
    vm.stop();
    serving.stop();
}

/// The manager hears from a keeper as often as it wants to.
#[test]
fn the_watchdog_is_fed() {
    let manager = Manager::new(1);
    let mut command = manager.place.command(&[VMPAGER], &[]);
    command.env("NOTIFY_SOCKET", manager.place.path("notify")).env("WATCHDOG_USEC", "20000");
    let serving = Serving { child: command.spawn().unwrap() };
    let fed = || {
        let known = manager.known.lock().unwrap();
        known.said.iter().filter(|said| *said == "WATCHDOG=1").count()
    };
    eventually("it is fed", || fed() > 5);
    serving.stop();
}
