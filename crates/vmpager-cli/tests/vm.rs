//! `vmpager vm` as its user meets it. The guests are kernels of a few
//! instructions, so that these tests run on any KVM, one that emulates ring 0
//! included.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

const VMPAGER: &str = env!("CARGO_BIN_EXE_vmpager");

/// Machine code that prints `hi` on the serial port.
const SAY_HI: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'h', 0xee, // mov al, 'h'; out dx, al
    0xb0, b'i', 0xee, //
    0xb0, b'\n', 0xee,
];
/// Waits for a byte on the serial port.
const WAIT_FOR_KEY: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
    0xec, 0xa8, 0x01, // in al, dx; test al, 1
    0x74, 0xfb, // jz to the in
];
/// Prints the byte.
const ECHO: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xec, 0xee];
/// Sleep type 5, by ACPI.
const POWER_OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef];
const PVPANIC: &[u8] = &[0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee];
const RESET: &[u8] = &[0x66, 0xba, 0x64, 0x00, 0xb0, 0xfe, 0xee];
/// Should the guest go on.
const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];

/// An ELF kernel that runs this at 1 MiB.
fn kernel(dir: &TempDir, code: &[&[u8]]) -> String {
    let code = [code, &[HALT]].concat().concat();
    let mut image = vec![0; 64 + 56];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    image[16..20].copy_from_slice(&[2, 0, 62, 0]);
    let mut word = |at: usize, word: u64| image[at..at + 8].copy_from_slice(&word.to_le_bytes());
    word(24, 0x10_0000); // entry
    word(32, 64); // program headers
    word(54, 56 | 1 << 16); // of 56 bytes, 1
    word(64, 1); // to be loaded
    word(64 + 8, 64 + 56);
    word(64 + 24, 0x10_0000);
    word(64 + 32, code.len() as u64);
    word(64 + 40, code.len() as u64);
    image.extend(code);
    let path = dir.path().join("kernel");
    fs::write(&path, image).unwrap();
    path.to_string_lossy().into_owned()
}

fn has_kvm() -> bool {
    match fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
            false
        }
    }
}

fn start(args: &[&str]) -> Child {
    Command::new(VMPAGER)
        .arg("vm")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs a command to its end, without input.
fn vm(args: &[&str]) -> Output {
    let mut child = start(args);
    drop(child.stdin.take());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn error(args: &[&str]) -> String {
    let output = vm(args);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    text(&output.stderr)
}

#[test]
fn how_the_guest_ended_is_the_exit_status() {
    if !has_kvm() {
        return;
    }
    for (end, name, code) in
        [(POWER_OFF, "power-off", 0), (PVPANIC, "panic", 3), (RESET, "reset", 4)]
    {
        let dir = TempDir::new().unwrap();
        let kernel = kernel(&dir, &[SAY_HI, end]);
        let output = vm(&["run", "--kernel", &kernel, "--memory", "16M"]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert_eq!(text(&output.stdout), "hi\n", "only the console");
        assert!(text(&output.stderr).contains("1 vCPU, 16.00 MiB"), "{output:?}");

        let output = vm(&["run", "--kernel", &kernel, "--memory", "16M", "--vcpus", "2", "--json"]);
        assert_eq!(output.status.code(), Some(code));
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(summary["end"], name);
        assert_eq!(summary["vcpus"], 2);
        assert_eq!(summary["memory_bytes"], 16 << 20);
        let ms = |key: &str| summary[key].as_f64().unwrap();
        assert!(ms("made_ms") <= ms("first_instruction_ms"));
        assert!(ms("first_instruction_ms") <= ms("ran_ms"));
        assert_eq!(text(&output.stderr), "hi\n", "the console");
    }
}

#[test]
fn standard_input_reaches_the_guest() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let kernel = kernel(&dir, &[WAIT_FOR_KEY, ECHO, WAIT_FOR_KEY, ECHO, POWER_OFF]);
    let mut child = start(&["run", "--kernel", &kernel, "--memory", "16M"]);
    // No terminal: Ctrl-A x is for the guest.
    child.stdin.take().unwrap().write_all(b"\x01x").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"\x01x"[..]));
}

/// A VM with a control socket, whose guest ends when it gets a key.
struct Controlled {
    child: Child,
    socket: String,
    _dir: TempDir,
}

fn controlled() -> Controlled {
    let dir = TempDir::new().unwrap();
    let kernel = kernel(&dir, &[SAY_HI, WAIT_FOR_KEY, POWER_OFF]);
    let socket = dir.path().join("vm.sock").to_string_lossy().into_owned();
    let mut child = start(&["run", "--kernel", &kernel, "--memory", "16M", "--control", &socket]);
    let mut said = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hi\n", "it runs");
    Controlled { child, socket, _dir: dir }
}

impl Controlled {
    fn ask(&self, command: &str) -> String {
        let output = vm(&[command, "--control", &self.socket, "--json"]);
        assert!(output.status.success(), "{output:?}");
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&status["vcpus"], &status["memory_bytes"]), (&1.into(), &(16 << 20).into()));
        status["state"].as_str().unwrap().to_owned()
    }

    /// Sends bytes, and reads the line that comes back.
    fn send(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    }

    fn press_key(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    }

    fn end(mut self) -> Output {
        drop(self.child.stdin.take());
        let socket = self.socket.clone();
        let output = self.child.wait_with_output().unwrap();
        assert!(!Path::new(&socket).exists(), "the socket goes with the VM");
        output
    }
}

#[test]
fn a_vm_is_paused_resumed_and_ended_by_its_socket() {
    if !has_kvm() {
        return;
    }
    let mut vm = controlled();
    assert_eq!(vm.ask("status"), "running");
    for _ in 0..2 {
        assert_eq!(vm.ask("pause"), "paused");
    }
    vm.press_key();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.ask("status"), "paused", "it would have ended had it run");
    assert_eq!(vm.ask("resume"), "running");
    let output = vm.end();
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stderr).contains("switched itself off"), "{output:?}");

    let vm = controlled();
    assert_eq!(vm.ask("quit"), "ending");
    let output = vm.end();
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stderr).contains("ended by its user"), "{output:?}");
}

#[test]
fn bad_requests_are_answered_and_do_not_harm() {
    if !has_kvm() {
        return;
    }
    let vm = controlled();
    for (bytes, why) in [
        (&b"\n"[..], "not a request"),
        (b"{\"command\":\"explode\"}\n", "explode"),
        (b"{\"command\":\"quit\"", "without an end"),
        (&[0; 100], "without an end"),
    ] {
        let reply: Value = serde_json::from_str(&vm.send(bytes)).unwrap();
        let error = reply["error"].as_str().unwrap();
        assert!(error.contains(why), "{why}: {error}");
    }
    // Peers that say nothing, or leave.
    let silent = UnixStream::connect(&vm.socket).unwrap();
    drop(UnixStream::connect(&vm.socket).unwrap());
    let asked = Instant::now();
    assert_eq!(vm.ask("status"), "running");
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    drop(silent);
    vm.ask("quit");
    assert_eq!(vm.end().status.code(), Some(0));
}

#[test]
fn a_signal_ends_the_vm_in_order() {
    if !has_kvm() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let vm = controlled();
        kill_process(Pid::from_child(&vm.child), signal).unwrap();
        let output = vm.end();
        assert_eq!(output.status.code(), Some(0), "{signal:?}: {output:?}");
    }
}

#[test]
fn what_cannot_boot_is_refused_by_name_and_remedy() {
    let dir = TempDir::new().unwrap();
    let good = kernel(&dir, &[POWER_OFF]);
    let text = dir.path().join("text").to_string_lossy().into_owned();
    fs::write(&text, "no kernel").unwrap();
    let missing = dir.path().join("missing").to_string_lossy().into_owned();
    for (args, why) in [
        (&["--kernel", &missing][..], "missing: No such file"),
        (&["--kernel", &text], "text is no kernel to boot"),
        (&["--kernel", &good, "--initrd", &missing], "initrd"),
        (&["--kernel", &good, "--memory", "1M"], "more memory"),
        (&["--kernel", &good, "--memory", "1000000"], "multiple of the page size"),
        (&["--kernel", &good, "--memory", "0"], "memory size 0"),
        (&["--kernel", &good, "--vcpus", "0"], "use 1 to 8 vCPUs"),
        (&["--kernel", &good, "--vcpus", "9"], "vcpus 9"),
        (&["--kernel", &good, "--cmdline", &"x".repeat(5000)], "5000 bytes"),
        (&["--kernel", &good, "--control", "/no/such/dir/s"], "/no/such/dir does not exist"),
        (&["--kernel", &good, "--control", &text], "no socket"),
        (&["--guest", "builtin", "--memory", "1234567"], "memory_bytes 1234567"),
    ] {
        let error = error(&[&["run"], args].concat());
        assert!(error.starts_with("error: ") && error.contains(why), "{why}: {error}");
    }
    let error = error(&["status", "--control", &missing]);
    assert!(error.contains("is a VM running"), "{error}");
    // What a refused command was to leave behind is not there.
    let socket = dir.path().join("s").to_string_lossy().into_owned();
    vm(&["run", "--kernel", &missing, "--control", &socket]);
    assert!(!Path::new(&socket).exists());
}

#[test]
fn wrong_usage_exits_with_2_and_help_teaches() {
    for args in [
        &["run"][..],
        &["run", "--kernel", "k", "--guest", "builtin"],
        &["run", "--kernel", "k", "--memory", "lots"],
        &["status"],
        &["explode"],
    ] {
        assert_eq!(vm(args).status.code(), Some(2), "{args:?}");
    }
    for command in ["run", "pause", "resume", "status", "quit"] {
        let output = vm(&[command, "--help"]);
        let help = text(&output.stdout);
        assert!(output.status.success() && help.contains("Example"), "{command}: {help}");
        assert!(help.contains("--json"), "{command}");
    }
}

#[test]
fn the_built_in_guest_runs_too() {
    let output = vm(&["run", "--guest", "builtin", "--memory", "16M", "--vcpus", "2", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&summary["mismatches"], &summary["vcpus"]), (&0.into(), &2.into()));
    assert!(summary["pages"].as_u64().unwrap() > 4000);
}
