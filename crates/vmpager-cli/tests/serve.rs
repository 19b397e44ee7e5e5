//! `vmpager serve` as its user meets it: what it says, how it ends, what it
//! leaves behind.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use vmpager::refusal;

const VMPAGER: &str = env!("CARGO_BIN_EXE_vmpager");

fn vmpager(args: &[&str]) -> Output {
    Command::new(VMPAGER).args(args).stdin(Stdio::null()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn memory_file(dir: &TempDir, len: usize) -> String {
    let path = dir.path().join("memory");
    fs::write(&path, vec![7; len]).unwrap();
    path.to_string_lossy().into_owned()
}

fn in_dir(dir: &TempDir, name: &str) -> String {
    dir.path().join(name).to_string_lossy().into_owned()
}

/// Starts a daemon and waits until it listens.
fn serve(socket: &str, memory: &str, more: &[&str]) -> Child {
    let child = Command::new(VMPAGER)
        .args(["serve", "--socket", socket, "--memory", memory])
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while !Path::new(socket).exists() {
        assert!(Instant::now() < until, "{socket} did not appear");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

fn terminate(child: Child) -> Output {
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn wrong_usage_exits_with_2_and_help_teaches() {
    assert_eq!(vmpager(&["serve"]).status.code(), Some(2));
    assert_eq!(vmpager(&["nonsense"]).status.code(), Some(2));
    for command in [
        &["serve"][..],
        &["demo"],
        &["doctor"],
        &["bench", "fault"],
        &["bench", "restore"],
        &["bench", "sessions"],
    ] {
        let output = vmpager(&[command, &["--help"]].concat());
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && help.contains("Example"), "{command:?}: {help}");
        assert!(help.contains("--json"), "{command:?} has no --json");
    }
}

#[test]
fn what_cannot_be_served_is_refused_by_name_and_remedy() {
    let dir = TempDir::new().unwrap();
    let socket = in_dir(&dir, "pager.sock");
    let good = memory_file(&dir, 8192);
    let odd = in_dir(&dir, "odd");
    fs::write(&odd, [0; 5000]).unwrap();
    let empty = in_dir(&dir, "empty");
    fs::write(&empty, []).unwrap();
    let missing_dir = in_dir(&dir, "no/such/pager.sock");
    let not_a_socket = in_dir(&dir, "file");
    fs::write(&not_a_socket, "precious").unwrap();
    let absent = in_dir(&dir, "absent");
    let directory = dir.path().to_string_lossy().into_owned();
    for (socket, memory, words) in [
        (&socket, &absent, vec!["absent", "No such file"]),
        (&socket, &directory, vec!["regular file"]),
        (&socket, &odd, vec!["odd", "5000", "4096"]),
        (&socket, &empty, vec!["empty"]),
        (&missing_dir, &good, vec!["no/such", "does not exist", "create"]),
        (&not_a_socket, &good, vec!["no socket", "another path"]),
    ] {
        let output = vmpager(&["serve", "--socket", socket, "--memory", memory]);
        assert_eq!(output.status.code(), Some(1));
        let text = stderr(&output);
        for word in words {
            assert!(text.contains(word), "{text:?} does not say {word:?}");
        }
    }
    assert_eq!(fs::read(&not_a_socket).unwrap(), b"precious");
}

#[test]
fn limits_that_cannot_be_kept_are_refused() {
    let dir = TempDir::new().unwrap();
    let (socket, memory) = (in_dir(&dir, "pager.sock"), memory_file(&dir, 8192));
    let serve = |more: &[&str]| {
        vmpager(&[&["serve", "--socket", &socket, "--memory", &memory], more].concat())
    };
    let output = serve(&["--max-sessions", "4000000000"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("descriptors") && text.contains("ulimit -n"), "{text}");
    for more in [["--max-sessions", "0"], ["--bandwidth", "0"], ["--max-reads", "0"]] {
        assert_eq!(serve(&more).status.code(), Some(2), "{more:?}");
    }
}

#[test]
fn sigterm_ends_it_with_a_report_and_no_socket_left() {
    let dir = TempDir::new().unwrap();
    let socket = in_dir(&dir, "pager.sock");
    let metrics = in_dir(&dir, "metrics.json");
    let memory = memory_file(&dir, 8192);
    let child = serve(&socket, &memory, &["--json", "--metrics-json", &metrics]);
    let output = terminate(child);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["active"], 0);
    assert_eq!(report["sessions"], Value::Array(Vec::new()));
    assert!(!Path::new(&socket).exists());
    let metrics: Value = serde_json::from_slice(&fs::read(metrics).unwrap()).unwrap();
    assert_eq!(metrics["ended"], 0);
}

#[test]
fn a_taken_socket_is_refused_and_a_stale_one_replaced() {
    let dir = TempDir::new().unwrap();
    let socket = in_dir(&dir, "pager.sock");
    let memory = memory_file(&dir, 8192);
    let mut first = serve(&socket, &memory, &[]);
    let second = vmpager(&["serve", "--socket", &socket, "--memory", &memory]);
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("another process listens"), "{}", stderr(&second));

    first.kill().unwrap();
    first.wait().unwrap();
    assert!(Path::new(&socket).exists(), "SIGKILL leaves the socket behind");
    let third = Command::new(VMPAGER)
        .args(["serve", "--socket", &socket, "--memory", &memory])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < until, "the stale socket was not replaced");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(terminate(third).status.success());
}

#[test]
fn a_peer_that_talks_nonsense_is_named_in_the_log() {
    let dir = TempDir::new().unwrap();
    let socket = in_dir(&dir, "pager.sock");
    let child = serve(&socket, &memory_file(&dir, 8192), &[]);
    let mut peer = UnixStream::connect(&socket).unwrap();
    peer.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    // The daemon says why, and hangs up on it.
    let mut said = String::new();
    std::io::Read::read_to_string(&mut peer, &mut said).unwrap();
    assert!(said.starts_with("refused: ") && said.contains("not a JSON array"), "{said}");
    let output = terminate(child);
    let log = stderr(&output);
    assert!(log.contains("refused") && log.contains("not a JSON array"), "{log}");
    assert!(log.contains(&format!("peer_pid={}", std::process::id())), "{log}");
}

#[test]
fn completions_are_printed_and_a_closed_pipe_is_no_error() {
    let output = vmpager(&["completions", "bash"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("_vmpager"));

    let mut child = Command::new(VMPAGER)
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
}

/// The processes that a process has started.
fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < until, "{what}: not after 10 s");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

#[test]
fn a_killed_worker_is_replaced_and_its_keeper_ends_as_told() {
    let dir = TempDir::new().unwrap();
    let socket = in_dir(&dir, "pager.sock");
    let memory = memory_file(&dir, 8192);
    let child = serve(&socket, &memory, &[]);
    let [first] = children(child.id())[..] else { panic!("one worker") };
    // Its successor serves the file that was there first.
    fs::remove_file(&memory).unwrap();
    kill(first);
    eventually("another worker", || {
        !children(child.id()).is_empty() && children(child.id()) != [first]
    });
    let output = terminate(child);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("the worker process ended (signal: 9"), "{text}");
    // The first may have been killed before it said so, too.
    assert!(text.contains("ready"), "{text}");
    assert!(!Path::new(&socket).exists());
}

#[test]
fn without_its_keeper_a_worker_that_serves_nobody_ends() {
    let dir = TempDir::new().unwrap();
    let socket = in_dir(&dir, "pager.sock");
    let mut child = serve(&socket, &memory_file(&dir, 8192), &[]);
    let [worker] = children(child.id())[..] else { panic!("one worker") };
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("the worker has ended", || {
        let status = fs::read_to_string(format!("/proc/{worker}/stat"));
        status.map_or(true, |status| status.contains(") Z "))
    });
    assert!(UnixStream::connect(&socket).is_err(), "nobody listens");
}

#[test]
fn a_daemon_is_replaced_by_one_that_serves_the_same() {
    let dir = TempDir::new().unwrap();
    let socket = in_dir(&dir, "pager.sock");
    let memory = memory_file(&dir, 8192);
    let other = in_dir(&dir, "other");
    fs::write(&other, [7; 8192]).unwrap();
    let replacing = ["serve", "--replace", "--socket", &socket, "--memory"];
    let output = vmpager(&[&replacing[..], &[&memory]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is a daemon of this user running there?"));

    let old = serve(&socket, &memory, &[]);
    let output = vmpager(&[&replacing[..], &[&other]].concat());
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("another source; nothing was taken"), "{text}");

    // A VM that has connected, and said nothing yet.
    let vm = UnixStream::connect(&socket).unwrap();
    let new = Command::new(VMPAGER)
        .args(replacing)
        .arg(&memory)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = old.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(Path::new(&socket).exists(), "VMs find the new one where the old one was");
    (&vm).write_all(b"nonsense").unwrap();
    vm.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let refused = matches!(refusal::wait(&vm), Ok(Some(_)));
    let output = terminate(new);
    assert!(refused, "the new one refuses it");
    assert!(output.status.success(), "{}", stderr(&output));
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "no sockets are left: {left:?}");
}
