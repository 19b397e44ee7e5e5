//! The pager beside VMMs: peers that send what cannot be served, or nothing, or
//! change what they sent. Each is refused by name, and disturbs nobody.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::daemon::Running;
use common::peer::{Dialect, Memory, PeerPlan};
use common::{HUGE, PAGE, assert_idle, child, mapping, numbered, page_by_kernel, range};
use serde_json::{Value, json};
use vmpager::{EndReason, refusal};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

/// Something a peer does that cannot be served, and words the log must have.
type Hostile = (&'static str, Act, &'static [&'static str]);
type Act = fn(&UnixStream, &Memory);

fn send(socket: &UnixStream, memory: &Memory, message: &Value) {
    send_with_fds(socket, message.to_string().as_bytes(), &[memory.uffd.as_fd()]).unwrap();
}

/// The handshake with one field of its second region changed.
fn send_with(socket: &UnixStream, memory: &Memory, field: &str, value: Value) {
    let mut message = memory.json(Dialect::V1_10);
    message[1][field] = value;
    send(socket, memory, &message);
}

const HOSTILE: &[Hostile] = &[
    (
        "not JSON",
        |s, m| send_raw(s, m, b"GET / HTTP/1.1\r\n\r\n"),
        &["not a JSON array", "base_host_virt_addr"],
    ),
    (
        "another shape",
        |s, m| send(s, m, &json!({"mem": []})),
        &["not a JSON array", "an object that asks for nothing"],
    ),
    (
        "another element",
        |s, m| send(s, m, &json!(["x"])),
        &["not a JSON array", "invalid type: string"],
    ),
    (
        "a missing field",
        |s, m| send(s, m, &json!([{"size": 4096}])),
        &["missing field `base_host_virt_addr`"],
    ),
    ("a negative size", |s, m| send_with(s, m, "size", json!(-4096)), &["invalid value", "-4096"]),
    (
        "a size beyond 64 bits",
        |s, m| send_with(s, m, "size", json!(1e300)),
        &["invalid type: floating point"],
    ),
    ("no regions", |s, m| send(s, m, &json!([])), &["no memory regions"]),
    ("an empty region", |s, m| send_with(s, m, "size", json!(0)), &["region 1", "size is 0"]),
    (
        "a misaligned size",
        |s, m| send_with(s, m, "size", json!(4097)),
        &["region 1", "size 0x1001", "not a multiple", "0x1000"],
    ),
    (
        "a misaligned address",
        |s, m| send_with(s, m, "base_host_virt_addr", json!(0x7001)),
        &["region 1", "address 0x7001", "not a multiple"],
    ),
    (
        "a misaligned offset",
        |s, m| send_with(s, m, "offset", json!(3)),
        &["region 1", "offset 0x3", "not a multiple"],
    ),
    (
        "an offset beyond the file",
        |s, m| send_with(s, m, "offset", json!(1_u64 << 40)),
        &["region 1", "offset 0x10000000000", "beyond the source", "0x80000"],
    ),
    (
        "a region longer than the file",
        |s, m| send_with(s, m, "size", json!(1_u64 << 30)),
        &["region 1", "0x40000000", "beyond the source"],
    ),
    (
        "an offset that overflows",
        |s, m| send_with(s, m, "offset", json!(u64::MAX - 4095)),
        &["region 1", "offset 0xfffffffffffff000", "overflows"],
    ),
    (
        "an address that overflows",
        |s, m| send_with(s, m, "base_host_virt_addr", json!(u64::MAX - 4095)),
        &["region 1", "address 0xfffffffffffff000", "overflows"],
    ),
    (
        "the same source twice",
        |s, m| send_with(s, m, "offset", json!(0)),
        &["regions 0 and 1 overlap", "source"],
    ),
    (
        "the same addresses twice",
        |s, m| {
            let address = m.regions[0].0.hva();
            send_with(s, m, "base_host_virt_addr", json!(address));
        },
        &["overlap in host addresses"],
    ),
    (
        "less than the file",
        |s, m| {
            let mut message = m.json(Dialect::V1_10);
            message.as_array_mut().unwrap().pop();
            send(s, m, &message);
        },
        &["add up to 0x40000 bytes", "0x80000", "another VM's"],
    ),
    (
        "an unknown page size",
        |s, m| {
            let mut message = m.json(Dialect::V1_7);
            message[1]["page_size_kib"] = json!(4);
            send(s, m, &message);
        },
        &["region 1", "page_size_kib is 4", "4096 and 2097152"],
    ),
    (
        "contradicting page sizes",
        |s, m| send_with(s, m, "page_size", json!(HUGE)),
        &["region 1", "page_size is 2097152 but page_size_kib is 4096"],
    ),
    (
        "mixed page sizes, with a size that does not fit one",
        |s, m| {
            let mut message = m.json(Dialect::V1_7);
            message[1]["page_size_kib"] = json!(HUGE);
            send(s, m, &message);
        },
        &["region 1", "not a multiple of its page size 0x200000"],
    ),
    (
        "guest_memfd",
        |s, m| send_with(s, m, "is_guest_memfd", json!(true)),
        &["region 1", "is_guest_memfd is true", "without"],
    ),
    (
        "too many regions",
        |s, m| send(s, m, &json!(vec![json!({"base_host_virt_addr":0,"size":0,"offset":0}); 1025])),
        &["1025 memory regions", "at most 1024"],
    ),
    (
        "a descriptor that is no userfaultfd",
        |s, m| {
            let file = std::fs::File::open("/dev/null").unwrap();
            let message = m.json(Dialect::V1_10).to_string();
            send_with_fds(s, message.as_bytes(), &[file.as_fd()]).unwrap();
        },
        &["no userfaultfd but /dev/null"],
    ),
    ("a hundred MiB", |s, m| send_endlessly(s, m), &["longer than 65536 bytes"]),
    (
        "a message without end, a byte at a time",
        |s, m| {
            send_raw(s, m, b"[");
            // With a descriptor each: so the kernel keeps them apart.
            let null = std::fs::File::open("/dev/null").unwrap();
            while send_with_fds(s, b" ", &[null.as_fd()]).is_ok() {}
        },
        &["more than 64 descriptors"],
    ),
    (
        "nothing, and hangs up",
        |s, _| s.shutdown(std::net::Shutdown::Write).unwrap(),
        &["hung up", "without a handshake"],
    ),
    (
        "half a message, and hangs up",
        |s, m| {
            let message = m.json(Dialect::V1_10).to_string();
            send_raw(s, m, &message.as_bytes()[..message.len() / 2]);
            s.shutdown(std::net::Shutdown::Write).unwrap();
        },
        &["hung up", "before its handshake was complete"],
    ),
    (
        "no descriptor, and hangs up",
        |s, m| {
            send_with_fds(s, m.json(Dialect::V1_10).to_string().as_bytes(), &[]).unwrap();
            s.shutdown(std::net::Shutdown::Write).unwrap();
        },
        &["without a descriptor", "SCM_RIGHTS"],
    ),
    (
        "no descriptor, and waits",
        |s, m| {
            send_with_fds(s, m.json(Dialect::V1_10).to_string().as_bytes(), &[]).unwrap();
        },
        &["without a descriptor", "SCM_RIGHTS"],
    ),
    ("nothing at all", |_, _| {}, &["no complete handshake within 300ms"]),
    (
        "half a message, and waits",
        |s, m| send_raw(s, m, b"[{\"base_host_virt_addr\":4096,"),
        &["no complete handshake within 300ms"],
    ),
    (
        "white space for ever",
        |s, _| while send_with_fds(s, &[b' '; 4096], &[]).is_ok() {},
        &["longer than 65536 bytes"],
    ),
];

fn send_raw(socket: &UnixStream, memory: &Memory, bytes: &[u8]) {
    send_with_fds(socket, bytes, &[memory.uffd.as_fd()]).unwrap();
}

fn send_endlessly(socket: &UnixStream, memory: &Memory) {
    send_raw(socket, memory, b"[");
    let element = "{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0},".repeat(1000);
    let mut sent = 0;
    while sent < 100 << 20 {
        match send_with_fds(socket, element.as_bytes(), &[]) {
            Ok(count) => sent += count,
            // Nobody listens any more.
            Err(_) => return,
        }
    }
    panic!("all of it was taken");
}

#[test]
fn hostile_peers_are_refused_by_name_and_disturb_nobody() {
    begin!();
    let daemon = Running::start(numbered(128), |c| {
        c.handshake_timeout = Duration::from_millis(300);
    });
    let mut good = PeerPlan::new(&daemon.socket, &[128]).spawn(this_test!());
    daemon.expect_started();
    for (round, (what, act, words)) in HOSTILE.iter().enumerate() {
        println!("{what}");
        let from = daemon.log.len();
        let memory = Memory::new(&[64, 64], PAGE);
        let socket = daemon.connect();
        act(&socket, &memory);
        let line = daemon.log.wait_for(from, words);
        assert!(line.contains(&format!("peer_pid={}", std::process::id())), "{line}");
        assert_is_refused(&socket, what, words);
        // Afterwards as before, others are served.
        good.expect_source(0, round % 128);
    }
    good.child.kill();
    assert_eq!(daemon.expect_ended().reason, Some(EndReason::PeerExited));
    assert!(daemon.stop().is_empty(), "none of them became a session");
}

/// Waits until the other end is closed, and has said why.
fn assert_is_refused(socket: &UnixStream, what: &str, words: &[&str]) {
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let why = refusal::wait(socket).unwrap().expect(what);
    let mut words = words.iter().filter(|word| **word != "hung up");
    assert!(words.all(|word| why.contains(word)), "{what}: {why}");
    let mut socket = socket;
    match socket.read(&mut [0; 8]) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("{what}: the connection is still open: {other:?}"),
    }
}

#[test]
fn after_hostile_peers_a_daemon_is_idle_and_has_let_go_of_them() {
    begin!();
    child::alone(this_test!(), || {
        let daemon = Running::start(numbered(128), |c| {
            c.handshake_timeout = Duration::from_millis(50);
        });
        let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = fds();
        for (what, act, words) in HOSTILE {
            let from = daemon.log.len();
            let memory = Memory::new(&[64, 64], PAGE);
            let socket = daemon.connect();
            act(&socket, &memory);
            let words: Vec<&str> = words.iter().map(|w| w.trim_end_matches("300ms")).collect();
            daemon.log.wait_for(from, &words);
            drop(socket);
            println!("{what}: {} descriptors", fds());
        }
        assert_idle("the hostile have gone");
        // This process lives on, and might read zeroes: so the daemon may hold
        // each one's userfaultfd, its pidfd, and nothing else.
        let held = fds() - before;
        assert!(held <= 2 * HOSTILE.len(), "{held} descriptors");
        daemon.stop();
    });
}

#[test]
fn messages_in_any_pieces_are_understood() {
    begin!();
    let daemon = Running::start(numbered(128), |c| c.partial = true);
    let pieces: [Act; 4] = [
        // One byte at a time, the descriptor on the first.
        |socket, memory| {
            let message = memory.json(Dialect::V1_10).to_string();
            send_raw(socket, memory, &message.as_bytes()[..1]);
            for byte in &message.as_bytes()[1..] {
                send_with_fds(socket, &[*byte], &[]).unwrap();
            }
        },
        // White space before and after.
        |socket, memory| {
            let message = memory.json(Dialect::V1_10);
            send_raw(socket, memory, format!("\n\n {message:#}\n\n").as_bytes());
        },
        // The descriptor with the last byte.
        |socket, memory| {
            let message = memory.json(Dialect::V1_10).to_string();
            let (most, last) = message.as_bytes().split_at(message.len() - 1);
            send_with_fds(socket, most, &[]).unwrap();
            send_raw(socket, memory, last);
        },
        // With pauses.
        |socket, memory| {
            let message = memory.json(Dialect::Dev).to_string();
            for (i, piece) in message.as_bytes().chunks(60).enumerate() {
                let fd = memory.uffd.as_fd();
                let fds: &[BorrowedFd<'_>] = if i == 0 { &[fd] } else { &[] };
                send_with_fds(socket, piece, fds).unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
        },
    ];
    for (i, send) in pieces.iter().enumerate() {
        let memory = Memory::new(&[64, 64], PAGE);
        let socket = daemon.connect();
        send(&socket, &memory);
        assert_eq!(daemon.expect_started().1, 128 * PAGE as u64, "way {i}");
        memory.assert_is_source();
    }
    daemon.stop();
}

#[test]
fn two_messages_at_once_are_two_memories() {
    begin!();
    let daemon = Running::start(numbered(128), |c| {
        c.partial = true;
        c.handshake_timeout = Duration::from_millis(300);
    });
    // Each with its own descriptor.
    let memory = [Memory::at(0, &[64], PAGE), Memory::at(64 * PAGE, &[64], PAGE)];
    let socket = daemon.connect();
    memory.iter().for_each(|memory| memory.hand_over(&socket, Dialect::V1_12));
    memory.iter().for_each(Memory::assert_is_source);
    // Two in one, and two descriptors: only one can be told from the other.
    let more = [Memory::at(0, &[64], PAGE), Memory::at(64 * PAGE, &[64], PAGE)];
    let both = format!("{}{}", more[0].json(Dialect::V1_12), more[1].json(Dialect::V1_12));
    let second = daemon.connect();
    let fds = [more[0].uffd.as_fd(), more[1].uffd.as_fd()];
    send_with_fds(&second, both.as_bytes(), &fds).unwrap();
    more[0].assert_is_source();
    daemon.log.wait_for(0, &["further descriptor", "userfaultfd"]);
    daemon.log.wait_for(0, &["refused", "without a descriptor"]);
    memory.iter().for_each(Memory::assert_is_source);
    daemon.stop();
}

#[test]
fn of_two_descriptors_the_first_is_served() {
    begin!();
    let daemon = Running::start(numbered(64), |_| {});
    let memory = Memory::new(&[64], PAGE);
    let other = Memory::new(&[64], PAGE);
    let socket = daemon.connect();
    let message = memory.json(Dialect::V1_12).to_string();
    let null = std::fs::File::open("/dev/null").unwrap();
    let fds = [memory.uffd.as_fd(), other.uffd.as_fd(), null.as_fd()];
    send_with_fds(&socket, message.as_bytes(), &fds).unwrap();
    memory.assert_is_source();
    let line = daemon.log.wait_for(0, &["WARN", "further descriptor", "/dev/null"]);
    assert!(line.contains("not used"), "{line}");
    daemon.stop();
}

#[test]
fn trap_7_a_refused_peer_is_frozen_and_reads_no_zeroes() {
    begin!();
    let daemon = Running::start(numbered(128), |_| {});
    // It falls short of the file, and keeps no copy of its userfaultfd.
    for dialect in [Dialect::V1_11, Dialect::V1_12] {
        let plan = PeerPlan { dialect, ..PeerPlan::new(&daemon.socket, &[100]) };
        let mut peer = PeerPlan { keeps_userfaultfd: false, ..plan }.spawn(this_test!());
        daemon.log.wait_for(0, &["refused", "add up to", &peer.child.pid().to_string()]);
        peer.start_reading(0, 5);
        assert!(peer.is_stuck_for(Duration::from_millis(300)), "it saw something");
        peer.child.kill();
    }
    daemon.stop();
}

#[test]
fn trap_7_half_a_handshake_and_a_userfaultfd_do_not_end_in_zeroes() {
    begin!();
    let daemon = Running::start(numbered(64), |c| {
        c.handshake_timeout = Duration::from_millis(50);
    });
    for hangs_up in [true, false] {
        let from = daemon.log.len();
        let memory = Memory::new(&[64], PAGE);
        let socket = daemon.connect();
        send_raw(&socket, &memory, b"[{");
        let Memory { regions, uffd, .. } = memory;
        drop(uffd);
        if hangs_up {
            drop(socket);
            daemon.log.wait_for(from, &["before its handshake was complete"]);
        } else {
            daemon.log.wait_for(from, &["no complete handshake"]);
        }
        // The last userfaultfd is the daemon's; zeroes would come at once.
        let region = regions[0].0.clone();
        let reader = std::thread::spawn(move || page_by_kernel(&region, 0));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!reader.is_finished(), "{:?}", reader.join());
        // It ends when the daemon does.
    }
    daemon.stop();
}

#[test]
fn memory_that_cannot_be_served_any_more_is_not_let_go_of() {
    begin!();
    let daemon = Running::start(numbered(64), |_| {});
    let region = mapping(64);
    let remap = Features(1 << 2);
    let uffd = Userfaultfd::open(Features::EVENT_REMOVE.union(remap)).unwrap();
    uffd.register_missing(&range(&region)).unwrap();
    let memory = Memory {
        regions: vec![(region.clone(), 0)],
        page_size: PAGE,
        uffd: uffd.duplicate().unwrap(),
    };
    drop(uffd);
    let socket = daemon.connect();
    memory.hand_over(&socket, Dialect::V1_12);
    let Memory { uffd, .. } = memory;
    drop(uffd);
    daemon.expect_started();
    let target = mapping(64);
    let (from, to) = (region.hva() as *mut libc::c_void, target.hva() as *mut libc::c_void);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    // SAFETY: `to` is a mapping of that size which nobody reads but the thread
    // below.
    let moved = unsafe { libc::mremap(from, 64 * PAGE, 64 * PAGE, flags, to) };
    assert_eq!(moved, to);
    let summary = daemon.expect_ended();
    let Some(EndReason::Failed(why)) = summary.reason else { panic!("{summary:?}") };
    assert!(why.contains("moved") && why.contains("mremap"), "{why}");
    // The userfaultfd is the daemon's alone: if it were closed, zeroes would
    // come at once.
    let reader = std::thread::spawn(move || page_by_kernel(&target, 0));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!reader.is_finished(), "{:?}", reader.join());
    daemon.stop();
}

#[test]
fn a_userfaultfd_that_was_never_enabled_ends_in_an_error() {
    begin!();
    let daemon = Running::start(numbered(64), |_| {});
    let flags = rustix::mm::UserfaultfdFlags::CLOEXEC | rustix::mm::UserfaultfdFlags::NONBLOCK;
    // SAFETY: making one changes no memory.
    let Ok(uffd) = (unsafe { rustix::mm::userfaultfd(flags) }) else {
        vmpager_testing::skipped("no userfaultfd(2)");
        return;
    };
    let memory = Memory { uffd, ..Memory::new(&[64], PAGE) };
    let socket = daemon.connect();
    memory.hand_over(&socket, Dialect::V1_12);
    daemon.expect_started();
    let summary = daemon.expect_ended();
    let Some(EndReason::Failed(why)) = summary.reason else { panic!("{summary:?}") };
    assert!(why.contains("reading the userfaultfd"), "{why}");
    daemon.stop();
}

#[test]
fn a_userfaultfd_made_blocking_ends_its_session_and_stops_no_other() {
    begin!();
    let daemon = Running::start(numbered(64), |c| c.workers = 1);
    let mut good = PeerPlan::new(&daemon.socket, &[64]).spawn(this_test!());
    let memory = Memory::new(&[64], PAGE);
    let socket = daemon.connect();
    memory.hand_over(&socket, Dialect::V1_12);
    assert_eq!(memory.page(0, 3), memory.expected(0, 3));
    // Not while its worker polls.
    std::thread::sleep(Duration::from_millis(20));
    // The flag belongs to the description both share.
    let flags = rustix::fs::fcntl_getfl(&memory.uffd).unwrap();
    rustix::fs::fcntl_setfl(&memory.uffd, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    // It waits for ever, as this process keeps a copy of the userfaultfd.
    let region = memory.regions[0].0.clone();
    std::thread::spawn(move || common::page(&region, 5 * PAGE));
    for page in 0..64 {
        good.expect_source(0, page);
    }
    let started = [daemon.expect_started().0, daemon.expect_started().0];
    assert!(started.contains(&good.child.pid()));
    let summary = daemon.expect_ended();
    let Some(EndReason::Failed(why)) = summary.reason else { panic!("{summary:?}") };
    assert!(why.contains("blocking") && why.contains("O_NONBLOCK"), "{why}");
    good.child.kill();
    daemon.stop();
}
