//! The pager beside VMMs: sessions, from the handshake to their end.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[macro_use]
mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::daemon::{Running, Seen};
use common::peer::{Dialect, Memory, PeerPlan};
use common::{
    HUGE, Holds, PAGE, assert_idle, child, eventually, faulty, huge_pool, numbered, page_by_kernel,
};
use vmpager::core::{ByteRange, PageSource};
use vmpager::{Daemon, DaemonConfig, EndReason};
use vmpager_store::RawFile;

#[test]
fn what_each_release_sends_is_served() {
    begin!();
    let pages = [33, 64, 1];
    let daemon = Running::start(numbered(98), |_| {});
    for dialect in Dialect::ALL {
        let plan = PeerPlan { dialect, ..PeerPlan::new(&daemon.socket, &pages) };
        let mut peer = plan.spawn(this_test!());
        assert_eq!(daemon.expect_started(), (peer.child.pid(), 98 * PAGE as u64));
        for (region, count) in pages.into_iter().enumerate() {
            for page in (0..count).rev() {
                peer.expect_source(region, page);
            }
        }
        assert!(peer.child.wait().success());
        let summary = daemon.expect_ended();
        assert_eq!(summary.reason, Some(EndReason::PeerExited), "{dialect:?}");
        assert_eq!((summary.regions, summary.pages_missing), (3, 0), "{summary:?}");
        assert_eq!(summary.peer_pid, peer.child.pid());
    }
    assert!(daemon.stop().is_empty());
}

#[test]
fn a_filled_session_ends_and_its_peer_lives_on() {
    begin!();
    let daemon = Running::start(numbered(3000), |c| c.options.background_fill = true);
    for dialect in [Dialect::V1_11, Dialect::V1_12] {
        let plan = PeerPlan { dialect, ..PeerPlan::new(&daemon.socket, &[1000, 2000]) };
        let mut peer = plan.spawn(this_test!());
        daemon.expect_started();
        let summary = daemon.expect_ended();
        assert_eq!(summary.reason, Some(EndReason::Filled));
        assert_eq!(summary.bytes_read, 3000 * PAGE as u64);
        for at in 0..1000 {
            peer.expect_source(0, at);
            peer.expect_source(1, 2 * at);
        }
        // No longer served: given back pages are the peer's own.
        assert_eq!(peer.child.ask("discard 0 3 5"), "done");
        assert_eq!(peer.read(0, 4), "Zero");
    }
    assert!(daemon.stop().is_empty());
}

#[test]
fn hugetlb_memory_of_a_peer_is_served() {
    begin!();
    let Some(_pool) = huge_pool(4) else { return };
    let pages = 3 * HUGE / PAGE;
    let daemon = Running::start(numbered(pages), |_| {});
    let plan = PeerPlan { page_size: HUGE, ..PeerPlan::new(&daemon.socket, &[2, 1]) };
    let mut peer = plan.spawn(this_test!());
    for at in (0..HUGE / PAGE).step_by(37) {
        peer.expect_source(1, at);
        peer.expect_source(0, HUGE / PAGE + at);
    }
    peer.child.kill();
    daemon.expect_started();
    assert_eq!(daemon.expect_ended().pages_demand, 2);
}

#[test]
fn further_memory_on_the_same_connection_joins_the_session() {
    begin!();
    let daemon = Running::start(numbered(96), |c| c.partial = true);
    let mut peer = PeerPlan::new(&daemon.socket, &[32]).spawn(this_test!());
    peer.expect_source(0, 31);
    assert_eq!(peer.child.ask("more 64"), "done");
    peer.expect_source(1, 63);
    peer.expect_source(0, 0);
    assert_eq!(daemon.expect_started().1, 32 * PAGE as u64);
    assert_eq!(daemon.expect_started().1, 64 * PAGE as u64);
    peer.child.kill();
    let summary = daemon.expect_ended();
    assert_eq!(summary.memory_bytes, 96 * PAGE as u64, "one end for both");
    assert_eq!(summary.faults, 3);
    assert_eq!(summary.reason, Some(EndReason::PeerExited));
    assert!(daemon.stop().is_empty());
}

#[test]
fn trap_15_a_peer_killed_amid_a_fault_ends_its_session_and_no_other() {
    begin!();
    let source = faulty(256);
    source.hold(ByteRange::new(200 * 4096, 4096));
    let daemon = Running::start(source.clone(), |c| c.workers = 1);
    let mut other = PeerPlan::new(&daemon.socket, &[256]).spawn(this_test!());
    daemon.expect_started();
    // The socket says nothing of the end of those who hung up long ago.
    for (round, dialect) in [Dialect::V1_11, Dialect::V1_12].into_iter().enumerate() {
        for keeps_userfaultfd in [false, true] {
            let plan = PeerPlan::new(&daemon.socket, &[256]);
            let plan = PeerPlan { dialect, keeps_userfaultfd, ..plan };
            let mut peer = plan.spawn(this_test!());
            let (pid, _) = daemon.expect_started();
            peer.expect_source(0, 7);
            peer.start_reading(0, 200);
            assert!(peer.is_stuck_for(Duration::from_millis(50)));
            peer.child.kill();
            let since = Instant::now();
            let summary = daemon.expect_ended();
            assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
            assert_eq!(summary.peer_pid, pid);
            assert_eq!(summary.reason, Some(EndReason::PeerExited));
            assert_eq!(summary.pages_missing, 255);
            other.expect_source(0, 30 + round);
        }
    }
    // The reads of the dead end late, and harm nobody.
    source.release();
    other.expect_source(0, 200);
    assert_eq!(daemon.stop().len(), 1);
}

#[test]
fn part_of_a_file_is_served_if_that_is_allowed() {
    begin!();
    let daemon = Running::start(numbered(128), |c| c.partial = true);
    let mut peer = PeerPlan::new(&daemon.socket, &[100]).spawn(this_test!());
    peer.expect_source(0, 99);
    peer.child.kill();
    daemon.stop();
}

#[test]
fn the_socket_replaces_what_a_dead_daemon_left_and_nothing_else() {
    begin!();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pager.sock");
    let bind = |path: &Path| Daemon::bind(DaemonConfig::new(path, numbered(4)));
    let refusal = |path: &Path| bind(path).unwrap_err().to_string();

    let first = bind(&path).unwrap();
    let error = refusal(&path);
    assert!(error.contains("another process listens") && error.contains("pager.sock"), "{error}");
    UnixStream::connect(&path).expect("the first is unharmed");
    drop(first);

    // Dropped without running, it leaves its socket: nobody listens there.
    assert!(path.exists());
    drop(bind(&path).unwrap());

    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    let error = refusal(&path);
    assert!(error.contains("no socket") && error.contains("choose another path"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");

    let error = refusal(&dir.path().join("nowhere/pager.sock"));
    assert!(error.contains("nowhere does not exist; create it first"), "{error}");
    let error = refusal(&dir.path().join("x".repeat(200)));
    assert!(error.contains("at most 107 bytes"), "{error}");
    let error = refusal(dir.path());
    assert!(error.contains("no socket"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside");
}

#[test]
fn hundreds_of_connections_are_served() {
    begin!();
    let daemon = Running::start(numbered(16), |_| {});
    let memory: Vec<(Memory, UnixStream)> = (0..300)
        .map(|_| {
            let (memory, socket) = (Memory::new(&[8, 8], PAGE), daemon.connect());
            memory.hand_over(&socket, Dialect::V1_12);
            (memory, socket)
        })
        .collect();
    std::thread::scope(|scope| {
        for part in memory.chunks(75) {
            scope.spawn(move || part.iter().for_each(|(memory, _)| memory.assert_is_source()));
        }
    });
    (0..300).for_each(|_| assert!(matches!(daemon.next(), Seen::Started { .. })));
    let ended = daemon.stop();
    assert_eq!(ended.len(), 300);
    for summary in ended {
        assert_eq!(summary.reason, Some(EndReason::Stopped));
        assert_eq!(summary.pages_missing, 0);
    }
}

#[test]
fn too_many_connections_wait_and_are_served_in_their_turn() {
    begin!();
    let daemon = Running::start(numbered(16), |c| c.max_connections = 4);
    let idle: Vec<UnixStream> = (0..4).map(|_| daemon.connect()).collect();
    let memory = Memory::new(&[16], PAGE);
    let socket = daemon.connect();
    memory.hand_over(&socket, Dialect::V1_12);
    assert!(daemon.next_within(Duration::from_millis(400)).is_none(), "one too many");
    drop(idle);
    daemon.expect_started();
    memory.assert_is_source();
    daemon.stop();
}

#[test]
fn without_descriptors_left_a_daemon_waits_and_then_goes_on() {
    begin!();
    child::alone(this_test!(), || {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let daemon = Running::start(numbered(16), |_| {});
        let memory = Memory::new(&[16], PAGE);
        let before = getrlimit(Resource::Nofile);
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
        // Room for this end of a few connections, not for theirs.
        let limit = Rlimit { current: Some(fds + 8), maximum: before.maximum };
        setrlimit(Resource::Nofile, limit).unwrap();
        let mut sockets = Vec::new();
        while let Ok(socket) = UnixStream::connect(&daemon.socket) {
            sockets.push(socket);
        }
        assert_idle("no descriptor left");
        setrlimit(Resource::Nofile, before).unwrap();
        sockets.clear();
        let socket = daemon.connect();
        memory.hand_over(&socket, Dialect::V1_12);
        memory.assert_is_source();
        daemon.stop();
    });
}

#[test]
fn trap_13_a_file_cut_short_or_changed_while_served_is_an_error_and_no_zeroes() {
    begin!();
    for cut in [true, false] {
        let file = tempfile::Builder::new().tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::write(file.path(), numbered(512).bytes()).unwrap();
        let source = RawFile::open(file.path()).unwrap();
        let name = source.name();
        let daemon = Running::start(source, |_| {});
        let memory = Memory::new(&[512], PAGE);
        let socket = daemon.connect();
        memory.hand_over(&socket, Dialect::V1_12);
        assert_eq!(memory.page(0, 400), memory.expected(0, 400));
        if cut {
            file.as_file().set_len(256 * PAGE as u64).unwrap();
        } else {
            file.as_file().write_all(&[0xff; 4096]).unwrap();
        }
        // A change may go unnoticed for some milliseconds.
        std::thread::sleep(Duration::from_millis(30));
        let region = &memory.regions[0].0;
        for at in 300..400 {
            match page_by_kernel(region, at * PAGE) {
                Ok(holds) => assert_eq!(holds, memory.expected(0, at), "page {at}"),
                Err(_) => continue,
            }
        }
        assert!(page_by_kernel(region, 511 * PAGE).is_err());
        let words: &[&str] = if cut { &["truncated"] } else { &["modified"] };
        let words = [words, &["ERROR", "poisoned", &name]].concat();
        daemon.workers_log.wait_for(0, &words);
        assert_eq!(memory.page(0, 400), memory.expected(0, 400), "what was there stays");
        daemon.stop();
    }
}

#[test]
fn trap_7_stopped_with_pages_missing_a_peer_freezes_or_gets_sigbus() {
    begin!();
    use std::os::unix::process::ExitStatusExt;
    for dialect in [Dialect::V1_11, Dialect::V1_12] {
        let daemon = Running::start(numbered(700), |_| {});
        let plan = PeerPlan { dialect, ..PeerPlan::new(&daemon.socket, &[500, 200]) };
        let mut holds = plan.spawn(this_test!());
        let mut holds_not =
            PeerPlan { keeps_userfaultfd: false, ..plan.clone() }.spawn(this_test!());
        for peer in [&mut holds, &mut holds_not] {
            peer.expect_source(0, 400);
        }
        let log = daemon.log.clone();
        let ended = daemon.stop();
        assert_eq!(ended.len(), 2);
        for summary in &ended {
            assert_eq!(summary.reason, Some(EndReason::Stopped));
            assert_eq!(summary.pages_missing, 699);
        }
        assert!(log.has(&["WARN", "will stall", "pages_missing=699"]));
        for peer in [&mut holds, &mut holds_not] {
            peer.expect_source(0, 400);
        }
        holds.start_reading(1, 100);
        assert!(holds.is_stuck_for(Duration::from_millis(300)), "it saw something");
        holds_not.start_reading(1, 100);
        assert!(holds_not.is_stuck_for(Duration::from_millis(300)), "it saw something");
        let status = holds_not.child.wait();
        assert_eq!(status.signal(), Some(rustix::process::Signal::BUS.as_raw()), "{status}");
    }
}

#[test]
fn a_stop_waits_for_reads_in_flight_but_not_for_ever() {
    begin!();
    for stuck in [false, true] {
        let source = faulty(64);
        let page = ByteRange::new(5 * 4096, 4096);
        if stuck {
            source.hold(page);
        } else {
            source.delay(page, Duration::from_millis(300));
        }
        let daemon = Running::start(source, |c| c.stop_timeout = Duration::from_secs(1));
        let mut peer = PeerPlan::new(&daemon.socket, &[64]).spawn(this_test!());
        daemon.expect_started();
        peer.start_reading(0, 5);
        assert!(peer.is_stuck_for(Duration::from_millis(50)));
        let since = Instant::now();
        daemon.stop();
        let took = since.elapsed();
        if stuck {
            assert!(took < Duration::from_secs(3), "{took:?}");
            assert!(peer.is_stuck_for(Duration::from_millis(100)), "it saw something");
        } else {
            assert!(took < Duration::from_millis(900), "{took:?}");
            assert_eq!(peer.child.hear(), "expected");
        }
    }
}

#[test]
fn once_means_until_the_first_session_has_ended() {
    begin!();
    let daemon = Running::start(numbered(64), |c| c.once = true);
    // Somebody who never sends a handshake is no session.
    drop(daemon.connect());
    daemon.log.wait_for(0, &["without a handshake"]);
    let mut peer = PeerPlan::new(&daemon.socket, &[64]).spawn(this_test!());
    peer.expect_source(0, 1);
    peer.child.kill();
    daemon.wait();
}

#[test]
fn an_idle_daemon_uses_no_cpu() {
    begin!();
    child::alone(this_test!(), || {
        let source = faulty(1024);
        source.hold(ByteRange::new(1000 * 4096, 4096));
        let daemon = Running::start(source.clone(), |_| {});
        let mut sessions = Vec::new();
        for _ in 0..10 {
            let (memory, socket) = (Memory::new(&[1024], PAGE), daemon.connect());
            memory.hand_over(&socket, Dialect::V1_12);
            for at in 0..300 {
                assert_eq!(memory.page(0, at), memory.expected(0, at));
            }
            sessions.push((Arc::new(memory), socket));
        }
        assert_idle("ten sessions, nobody touches anything");
        let memory = sessions[0].0.clone();
        let waiter = std::thread::spawn(move || memory.page(0, 1000));
        eventually("the read is held", || source.held() == 1);
        assert_idle("somebody waits for the source");
        source.release();
        waiter.join().unwrap();
        daemon.stop();
    });
}

#[test]
fn a_busy_peer_does_not_starve_the_others() {
    begin!();
    let daemon = Running::start(numbered(4096), |c| c.workers = 1);
    let mut good = PeerPlan::new(&daemon.socket, &[4096]).spawn(this_test!());
    // Removes pages and touches them as fast as it can.
    let noisy = Memory::new(&[4096], PAGE);
    let socket = daemon.connect();
    noisy.hand_over(&socket, Dialect::V1_12);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let removals = scope.spawn(|| {
            let region = &noisy.regions[0].0;
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let at = count * 7 % 4096 * PAGE;
                region.discard(at..at + PAGE).unwrap();
                assert_eq!(common::page(region, at), Holds::Zero);
                count += 1;
            }
            count
        });
        let mut worst = Duration::ZERO;
        for at in (0..4096).step_by(16) {
            let since = Instant::now();
            good.child.tell(&format!("read 0 {at}"));
            let answer = good.child.hear_within(Duration::from_secs(5));
            worst = worst.max(since.elapsed());
            if answer.as_deref() != Some("expected") {
                stop.store(true, Ordering::Relaxed);
                panic!("{answer:?}");
            }
        }
        stop.store(true, Ordering::Relaxed);
        let removals = removals.join().unwrap();
        println!("the longest wait was {worst:?}, amid {removals} removals");
        assert!(worst < Duration::from_millis(250), "{worst:?}");
    });
    daemon.stop();
}
