//! Processes that mean harm connect to `vmpager serve`, while it serves a VM that
//! checks every byte it reads.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[macro_use]
mod vms;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{ErrorKind, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::Gid;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Resource, Rlimit, Signal, Uid, getrlimit, setrlimit};
use vmpager::refusal;
use vmpager_sys::peer::{recv_with_fds, send_with_fds};
use vmpager_sys::uffd::Features;
use vms::child::{self, TestChild};
use vms::{
    PAGE, Place, Running, Serving, VMPAGER, Vm, descriptors, eventually, have_userfaultfd,
    newcomer_is_served, run_if_newcomer, signal, watchdog,
};

/// What a child does to the daemon of a socket.
type Attack = fn(&Path);

const ATTACKS: &[(&str, Attack)] = &[
    ("10,000 connections", flood),
    ("half messages", half_messages),
    ("253 descriptors", many_descriptors),
    ("100 MiB", endless_message),
    ("byte by byte", byte_by_byte),
    ("events of memory nobody handed over", bogus_events),
    ("memory that is not there", bogus_memory),
];

const ATTACK: &str = "attack ";

/// Runs the attack this process was started for, if it was; then returns true.
fn run_if_attacker() -> bool {
    let Some(task) = child::task() else { return false };
    let Some((name, socket)) = task.strip_prefix(ATTACK).and_then(|task| task.split_once('@'))
    else {
        return false;
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    // By another user's account: one user's processes share what the kernel lets be on
    // its way, and can kill each other anyway. (The effective user stays.)
    if rustix::process::geteuid().is_root() {
        let (other, root) = (Uid::from_raw(65534), Uid::ROOT);
        rustix::thread::set_thread_res_uid(other, root, root).unwrap();
    }
    let (_, attack) = ATTACKS.iter().find(|(known, _)| *known == name).unwrap();
    attack(Path::new(socket));
    child::say("done");
    true
}

fn attacker(test: &str, name: &str, socket: &Path) -> TestChild {
    child::spawn(test, &format!("{ATTACK}{name}@{}", socket.display()))
}

/// Whatever came of it: it may be refused at any time.
fn may_fail<T, E>(_: Result<T, E>) {}

fn connect(socket: &Path) -> Option<UnixStream> {
    UnixStream::connect(socket).ok()
}

/// Stays while the test has a look.
fn hold<T>(what: T) {
    child::say("at it");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    drop(what);
}

fn flood(socket: &Path) {
    let most = getrlimit(Resource::Nofile).current.unwrap_or(20_000).saturating_sub(64);
    let mut held = VecDeque::new();
    for _ in 0..10_000 {
        held.extend(connect(socket));
        if held.len() as u64 > most {
            held.pop_front();
        }
    }
    hold(held);
}

fn half_messages(socket: &Path) {
    let vm = Vm::new(64);
    let message = vm.handshake();
    let all: Vec<_> = (0..800).filter_map(|_| connect(socket)).collect();
    for (at, socket) in all.iter().enumerate() {
        let part = &message.as_bytes()[..1 + at % (message.len() - 1)];
        may_fail(send_with_fds(socket, part, &[vm.uffd.as_fd()]));
    }
    hold((all, vm));
}

/// As many as the kernel lets go in one message.
const MOST_DESCRIPTORS: usize = 253;

fn many_descriptors(socket: &Path) {
    let vm = Vm::new(64);
    let message = vm.handshake();
    let fds: Vec<BorrowedFd<'_>> = vec![vm.uffd.as_fd(); MOST_DESCRIPTORS];
    let mut held = Vec::new();
    for _ in 0..64 {
        let Some(socket) = connect(socket) else { continue };
        for piece in message.as_bytes().chunks(16) {
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            may_fail(sendmsg(&socket, &[IoSlice::new(piece)], &mut ancillary, flags));
        }
        held.push(socket);
    }
    hold((held, vm));
}

fn endless_message(socket: &Path) {
    for _ in 0..20 {
        let Some(socket) = connect(socket) else { continue };
        let element = b"[{\"base_host_virt_addr\":4096,".repeat(1000);
        let mut sent = 0;
        while sent < 100 << 20 {
            match send_with_fds(&socket, &element, &[]) {
                Ok(count) => sent += count,
                Err(_) => break,
            }
        }
        assert!(sent < 100 << 20, "all of it was taken");
    }
    hold(());
}

fn byte_by_byte(socket: &Path) {
    let vm = Vm::new(64);
    let all: Vec<_> = (0..100).filter_map(|_| connect(socket)).collect();
    for byte in vm.handshake().as_bytes().iter().take(40) {
        for socket in &all {
            may_fail(send_with_fds(socket, &[*byte], &[]));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    hold(all);
}

/// Its userfaultfd tells of memory that it never handed over: faults there, and all
/// that can become of it.
fn bogus_events(socket: &Path) {
    for round in 0..20 {
        let features = Features::EVENT_REMOVE.union(Features(1 << 1 | 1 << 2 | 1 << 6));
        let vm = Vm::with(64, features);
        let other = Vm::with(64, features);
        let Some(connected) = connect(socket) else { continue };
        // One memory's addresses, and the other one's userfaultfd.
        may_fail(send_with_fds(&connected, vm.handshake().as_bytes(), &[other.uffd.as_fd()]));
        let memory = other.memory.clone();
        std::thread::spawn(move || memory.read_u64(round * PAGE));
        let memory = other.memory.clone();
        std::thread::spawn(move || memory.discard(0..32 * PAGE));
        let memory = vm.memory.clone();
        std::thread::spawn(move || memory.discard(0..32 * PAGE));
        std::thread::sleep(Duration::from_millis(10));
    }
    hold(());
}

/// It hands over addresses where there is nothing, and memory that goes away.
fn bogus_memory(socket: &Path) {
    let mut held = Vec::new();
    for round in 0..20 {
        let Some(connected) = connect(socket) else { continue };
        let vm = Vm::new(64);
        let hva = [4096, 1 << 46, (1 << 47) - 64 * 4096, vm.memory.hva() + 4096][round % 4];
        let message = vm.handshake().replace(&vm.memory.hva().to_string(), &hva.to_string());
        may_fail(send_with_fds(&connected, message.as_bytes(), &[vm.uffd.as_fd()]));
        if round % 2 == 0 {
            // Its memory is unmapped.
            held.push((connected, None));
        } else {
            held.push((connected, Some(vm)));
        }
    }
    hold(held);
}

/// A daemon for VMs of so many pages, and a VM that runs.
fn besieged(place: &Place, program: &[&str], args: &[&str]) -> (Serving, Running) {
    let more = [&["--partial", "--handshake-timeout", "1"], args].concat();
    let serving = place.serve_by(program, &more);
    let victim = Running::start(&place.socket(), place.pages);
    (serving, victim)
}

#[test]
fn whoever_attacks_a_running_vm_is_served_and_so_is_a_new_one() {
    if !have_userfaultfd() || run_if_attacker() || run_if_newcomer() {
        return;
    }
    let _dog = watchdog(this_test!());
    for fill in [&[][..], &["--background-fill"]] {
        let place = Place::new(4096);
        let (serving, victim) = besieged(&place, &[VMPAGER], fill);
        let (keeper, worker) = (serving.keeper(), serving.worker());
        let before = [keeper, worker].map(descriptors);
        for (name, _) in ATTACKS {
            println!("{name}");
            let mut attacker = attacker(this_test!(), name, &place.socket());
            assert_eq!(attacker.hear(), "at it");
            victim.goes_on();
            // While it is at it, and once it has gone.
            newcomer_is_served(this_test!(), &place.socket(), 256);
            attacker.kill();
            attacker.wait();
            victim.goes_on();
            eventually("the daemon has let go of it", || {
                [keeper, worker].map(descriptors).iter().zip(before).all(|(now, was)| *now <= was)
            });
        }
        newcomer_is_served(this_test!(), &place.socket(), 256);
        victim.stop();
        assert_eq!(serving.worker(), worker, "it never died: {}", place.log());
        let log = place.log();
        assert!(log.contains("as many as one process may have"), "{log}");
        serving.stop();
    }
}

/// A daemon that may have few descriptors, and processes that make it hold all they
/// can: those it has are served, and new ones once there is room again.
#[test]
fn a_daemon_without_descriptors_left_serves_those_it_has() {
    if !have_userfaultfd() || run_if_attacker() || run_if_newcomer() {
        return;
    }
    let _dog = watchdog(this_test!());
    let place = Place::new(4096);
    let shell = ["sh", "-c", "ulimit -n 100; exec \"$0\" \"$@\"", VMPAGER];
    let (serving, victim) = besieged(&place, &shell, &["--workers", "1"]);
    for name in ["253 descriptors", "half messages"] {
        println!("{name}");
        let mut attacker = attacker(this_test!(), name, &place.socket());
        // Not all of its connections are accepted, so it may wait.
        attacker.hear_within(Duration::from_secs(2));
        victim.goes_on();
        attacker.kill();
        attacker.wait();
        newcomer_is_served(this_test!(), &place.socket(), 256);
        victim.goes_on();
    }
    place.expect_log(&["no room for more connections", "LimitNOFILE"]);
    victim.stop();
    serving.stop();
}

/// Who somebody is to be, and whether they are to be let in.
struct Who {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    admitted: bool,
}

const WHO: &str = "who ";

/// Becomes somebody else and connects, if this process was started to; then returns
/// true.
fn run_if_somebody() -> bool {
    let Some(task) = child::task() else { return false };
    let Some(task) = task.strip_prefix(WHO) else { return false };
    let mut words = task.split('@');
    let numbers = words.next().unwrap().split(' ').map(|number| number.parse::<u32>().unwrap());
    let numbers: Vec<u32> = numbers.collect();
    let socket = PathBuf::from(words.next().unwrap());
    let vm = Vm::new(64);
    let (uid, gid) = (Uid::from_raw(numbers[0]), Gid::from_raw(numbers[1]));
    let groups: Vec<Gid> = numbers[2..].iter().copied().map(Gid::from_raw).collect();
    rustix::thread::set_thread_groups(&groups).unwrap();
    rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
    child::say(&connects(&vm, &socket));
    // Served, it must not miss its pages now.
    std::mem::forget(vm);
    true
}

fn connects(vm: &Vm, socket: &Path) -> String {
    let socket = match UnixStream::connect(socket) {
        Ok(socket) => socket,
        Err(error) => return format!("cannot connect: {error}"),
    };
    match send_with_fds(&socket, vm.handshake().as_bytes(), &[vm.uffd.as_fd()]) {
        // Refused before it has said anything.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        sent => {
            sent.unwrap();
        }
    }
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    match refusal::wait(&socket) {
        Ok(Some(_)) => "refused".into(),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            vm.check_all();
            "served".into()
        }
        other => format!("neither refused nor served: {other:?}"),
    }
}

#[test]
fn who_may_hand_over_memory_is_decided_by_who_they_are() {
    if !have_userfaultfd() || run_if_somebody() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        vmpager_testing::skipped("only root can become others");
        return;
    }
    let _dog = watchdog(this_test!());
    let place = Place::new(64);
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let args = ["--allow-uid", "12345", "--allow-uid", "12346", "--allow-gid", "23456"];
    let serving = place.serve(&args);
    let victim = Running::start(&place.socket(), 64);
    let who =
        |uid, gid, groups: &[u32], admitted| Who { uid, gid, groups: groups.into(), admitted };
    for who in [
        who(0, 0, &[], true),
        who(12345, 1, &[], true),
        who(12346, 1, &[], true),
        who(12347, 23456, &[], true),
        who(12348, 1, &[2, 23456], true),
        who(12349, 1, &[2, 12345], false),
        // Not the attackers of the other test: how many descriptors are on their way is
        // counted by user.
        who(12350, 65534, &[], false),
    ] {
        // Often, for what is a race not to go unseen.
        for _ in 0..10 {
            let numbers = [who.uid, who.gid].into_iter().chain(who.groups.iter().copied());
            let numbers: Vec<String> = numbers.map(|number| number.to_string()).collect();
            let task = format!("{WHO}{}@{}", numbers.join(" "), place.socket().display());
            let child = child::spawn(this_test!(), &task);
            let said = child.hear();
            if said.starts_with("cannot connect") {
                vmpager_testing::skipped(&format!("others cannot reach {:?}: {said}", place.dir));
                return;
            }
            let pid = format!("peer_pid={}", child.pid());
            assert_eq!(said, if who.admitted { "served" } else { "refused" }, "{}", who.uid);
            if !who.admitted && who.uid == 12349 {
                let (user, remedy) = (format!("peer_uid={}", who.uid), "--allow-uid 12349");
                place.expect_log(&["refused", &pid, &user, remedy, "--allow-gid"]);
            }
            if who.admitted {
                break;
            }
            victim.goes_on();
        }
    }
    victim.stop();
    serving.stop();
}

#[test]
fn the_sockets_file_has_the_mode_and_the_group_asked_for() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new(1);
    let of = |args: &[&str]| {
        let serving = place.serve(args);
        let metadata = fs::metadata(place.socket()).unwrap();
        serving.stop();
        (metadata.mode() & 0o777, metadata.gid())
    };
    let own = rustix::process::getegid().as_raw();
    assert_eq!(of(&["--socket-mode", "640"]), (0o640, own));
    assert_eq!(of(&["--allow-uid", "1"]), (0o666, own));
    assert_eq!(of(&["--allow-uid", "1", "--socket-mode", "600"]), (0o600, own));
    if rustix::process::geteuid().is_root() {
        let group = ["--socket-group", "4242", "--socket-mode", "660"];
        assert_eq!(of(&group), (0o660, 4242));
    }
    for wrong in ["999", "7777", "rw"] {
        let output = Command::new(VMPAGER)
            .args(["serve", "--socket", "s", "--memory", "m", "--socket-mode", wrong])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
}

const CONNECTOR: &str = "connector ";
const HOLDER: &str = "holder ";

/// Connects, gives the connection to its parent and exits, if this process was started
/// to; or hands over memory on a connection that it is given. Then returns true.
fn run_if_connector_or_holder() -> bool {
    let Some(task) = child::task() else { return false };
    if let Some((to, socket)) = task.strip_prefix(CONNECTOR).and_then(|task| task.split_once('@')) {
        let parent = UnixStream::connect(to).unwrap();
        let connected = UnixStream::connect(socket).unwrap();
        send_with_fds(&parent, b"x", &[connected.as_fd()]).unwrap();
        return true;
    }
    let Some(from) = task.strip_prefix(HOLDER) else { return false };
    let connection = given(&UnixStream::connect(from).unwrap());
    let vm = Vm::new(64);
    vm.hand_over(&connection);
    vm.check_all();
    hold((vm, connection));
    true
}

/// A connection that another process gives.
fn given(by: &UnixStream) -> UnixStream {
    let mut fds = Vec::new();
    eventually("a connection", || {
        may_fail(recv_with_fds(by, &mut [0], &mut fds));
        !fds.is_empty()
    });
    UnixStream::from(fds.remove(0))
}

/// A process that does nothing; ended when dropped.
struct Idle(std::process::Child);

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a process that has this number; None if the system will not do that.
fn with_pid(pid: i32) -> Option<Idle> {
    for _ in 0..2000 {
        let mut last = File::create("/proc/sys/kernel/ns_last_pid").ok()?;
        last.write_all((pid - 1).to_string().as_bytes()).ok()?;
        let mut sleep = Command::new("sleep");
        sleep.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let idle = Idle(sleep.spawn().unwrap());
        if idle.0.id() == pid.cast_unsigned() {
            return Some(idle);
        }
    }
    None
}

/// A peer exits, and its number becomes another process's: that one is not taken for
/// it. Its session ends when its memory does, whoever lives on under its number.
#[test]
fn a_recycled_pid_is_not_the_peer() {
    if !have_userfaultfd() || run_if_connector_or_holder() {
        return;
    }
    let _dog = watchdog(this_test!());
    let place = Place::new(64);
    let serving = place.serve(&[]);
    let victim = Running::start(&place.socket(), 64);
    let meeting = place.path("meeting");
    let listener = UnixListener::bind(&meeting).unwrap();
    for accepted_late in [false, true] {
        if accepted_late {
            signal(serving.keeper(), Signal::STOP);
        }
        let task = format!("{CONNECTOR}{}@{}", meeting.display(), place.socket().display());
        let mut peer = child::spawn(this_test!(), &task);
        let connection = given(&listener.accept().unwrap().0);
        let pid = peer.pid();
        peer.wait();
        let another = with_pid(pid);
        signal(serving.keeper(), Signal::CONT);
        let Some(mut another) = another else {
            vmpager_testing::skipped("pids cannot be chosen: /proc/sys/kernel/ns_last_pid");
            return;
        };
        let mut holder = child::spawn(this_test!(), &format!("{HOLDER}{}", meeting.display()));
        let to = listener.accept().unwrap().0;
        send_with_fds(&to, b"x", &[connection.as_fd()]).unwrap();
        drop(connection);
        assert_eq!(holder.hear(), "at it");
        holder.kill();
        place.expect_log(&["session ended: peer exited", &format!("peer_pid={pid} ")]);
        assert!(another.0.try_wait().unwrap().is_none(), "the other one lives");
        victim.goes_on();
    }
    victim.stop();
    serving.stop();
}
