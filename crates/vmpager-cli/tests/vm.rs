//! `vmpager vm` as its user meets it. The guests are kernels of a few
//! instructions, so that these tests run on any KVM, one that emulates ring 0
//! included.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "vm/profile.rs"]
mod profile;
#[path = "vm/usage.rs"]
mod usage;

use std::fs;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
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
/// Reads a byte, keeps it in memory at 2 MiB and in bl, and prints it.
const REMEMBER: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, 0xec, // mov dx, 0x3f8; in al, dx
    0xa2, 0x00, 0x00, 0x20, 0, 0, 0, 0, 0, // mov [0x200000], al
    0x88, 0xc3, 0xee, // mov bl, al; out dx, al
];
/// Prints the byte in memory, then that in bl.
const RECALL: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xa0, 0x00, 0x00, 0x20, 0, 0, 0, 0, 0, 0xee, // mov al, [0x200000]; out dx, al
    0x88, 0xd8, 0xee, // mov al, bl; out dx, al
];
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

fn has_userfaultfd() -> bool {
    let has = vmpager_sys::probe::host().userfaultfd.kernel_mode();
    if !has {
        vmpager_testing::skipped("no userfaultfd for kernel-mode faults");
    }
    has
}

fn start(args: &[&str]) -> Child {
    // A guest whose end does not come must not outlive its test.
    Command::new("timeout")
        .args(["60", VMPAGER, "vm"])
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

fn failure(args: &[&str]) -> String {
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

/// A VM with a control socket. Its guest has got a `k`; at the next key it says
/// what that was, and ends.
struct Controlled {
    child: Child,
    socket: String,
    dir: TempDir,
}

fn controlled() -> Controlled {
    let dir = TempDir::new().unwrap();
    let kernel = kernel(&dir, &[SAY_HI, WAIT_FOR_KEY, REMEMBER, WAIT_FOR_KEY, RECALL, POWER_OFF]);
    let socket = dir.path().join("vm.sock").to_string_lossy().into_owned();
    let child = start(&["run", "--kernel", &kernel, "--memory", "16M", "--control", &socket]);
    let mut vm = Controlled { child, socket, dir };
    vm.press(b'k');
    let mut said = [0; 4];
    vm.child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hi\nk", "it runs, and keeps the key");
    vm
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

    fn press(&mut self, key: u8) {
        self.child.stdin.as_mut().unwrap().write_all(&[key]).unwrap();
    }

    /// Saves it, and gives the arguments that name its files.
    fn snapshot(&self, more: &[&str]) -> [String; 4] {
        let path = |name: &str| self.dir.path().join(name).to_string_lossy().into_owned();
        let (state, memory) = (path("state"), path("memory"));
        let files = ["--state", &state, "--memory", &memory].map(str::to_owned);
        let files_given = files.iter().map(String::as_str);
        let args = ["snapshot", "--json", "--control", &self.socket].into_iter();
        let args: Vec<_> = args.chain(files_given).chain(more.iter().copied()).collect();
        let output = vm(&args);
        assert!(output.status.success(), "{output:?}");
        let saved: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(saved["state"], state.as_str());
        assert_eq!(saved["memory_bytes"], 16 << 20);
        assert_eq!(fs::metadata(&memory).unwrap().len(), 16 << 20);
        files
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
    vm.press(b'q');
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

/// Restores, presses a key, and waits for the end.
fn restore(files: &[String; 4], mode: &[&str]) -> Child {
    let files = files.iter().map(String::as_str);
    let args: Vec<_> = ["restore"].into_iter().chain(files).chain(mode.iter().copied()).collect();
    let mut child = start(&args);
    child.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    child
}

#[test]
fn a_saved_vm_runs_on_in_every_way_and_more_than_once() {
    if !has_kvm() {
        return;
    }
    let mut vm = controlled();
    let files = vm.snapshot(&[]);
    assert_eq!(vm.ask("status"), "running", "as before");
    vm.press(b'q');
    let output = vm.child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "kk".to_owned()));

    let mut modes = vec![&["--memory-mode", "eager"][..], &["--memory-mode", "mmap"]];
    let on_demand = ["--memory-mode", "on-demand", "--background-fill"];
    if has_userfaultfd() {
        modes.extend([&on_demand[..2], &on_demand[..], &["--delivery", "auto"]]);
    }
    // All at once.
    let restored: Vec<_> = modes.iter().map(|mode| restore(&files, mode)).collect();
    for (child, mode) in restored.into_iter().zip(modes) {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{mode:?}: {output:?}");
        // From memory, and from the register.
        assert_eq!(text(&output.stdout), "kk", "{mode:?}");
    }
    // And the files are what is looked at.
    let mut memory = fs::File::options().write(true).open(&files[3]).unwrap();
    memory.seek(SeekFrom::Start(2 << 20)).unwrap();
    memory.write_all(b"X").unwrap();
    let output = restore(&files, &["--memory-mode", "mmap"]).wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "Xk");
    let arguments: Vec<&str> =
        ["restore"].into_iter().chain(files.iter().map(String::as_str)).collect();
    let error = failure(&[&arguments, &["--delivery=auto", "--exit-mechanism=view"][..]].concat());
    assert!(error.contains("--exit-mechanism needs --delivery exit"), "{error}");
    for verified in
        [&["--memory-mode", "eager"][..], &["--memory-mode", "mmap", "--verify"], &["--verify"]]
    {
        let error = failure(&[&arguments, verified].concat());
        assert!(error.contains(&files[3]) && error.contains("0x200000 to 0x400000"), "{error}");
    }
    memory.seek(SeekFrom::Start(2 << 20)).unwrap();
    memory.write_all(b"k").unwrap();
    let output =
        restore(&files, &["--memory-mode", "mmap", "--verify"]).wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "kk");
}

/// A daemon that serves a file beside it, and its socket.
fn daemon(memory: &str, more: &[&str]) -> (Child, String) {
    let pager = Path::new(memory).with_file_name("pager.sock").to_string_lossy().into_owned();
    let daemon = Command::new(VMPAGER)
        .args([&["serve", "--socket", &pager, "--memory", memory], more].concat())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while !Path::new(&pager).exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
    (daemon, pager)
}

/// Its threads would wait for memory for ever.
#[test]
fn a_vm_that_a_daemon_refuses_ends_and_says_why() {
    if !has_kvm() || !has_userfaultfd() {
        return;
    }
    let vm = controlled();
    let files = vm.snapshot(&["--stop"]);
    let (mut daemon, pager) = daemon(&files[3], &["--max-memory", "1M"]);
    let args = ["restore", "--pager", &pager].into_iter();
    let error = failure(&args.chain(files.iter().map(String::as_str)).collect::<Vec<_>>());
    assert!(error.contains(&pager) && error.contains("(--max-memory)"), "{error}");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    vm.end();
}

#[test]
fn a_daemon_brings_the_memory_of_a_restored_vm() {
    if !has_kvm() || !has_userfaultfd() {
        return;
    }
    let vm = controlled();
    let files = vm.snapshot(&["--stop"]);
    let (mut daemon, pager) = daemon(&files[3], &["--once"]);
    let output = restore(&files, &["--pager", &pager]).wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "kk".to_owned()));
    assert!(daemon.wait().unwrap().success());
    let output = vm.child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "it was to stop: {output:?}");
}

#[test]
fn snapshots_that_cannot_be_restored_are_refused_by_name() {
    if !has_kvm() {
        return;
    }
    let vm = controlled();
    let [_, state, _, memory] = vm.snapshot(&[]);
    let good = fs::read(&state).unwrap();
    let (broken, short, missing) = (format!("{state}.b"), format!("{memory}.s"), "/no/such");
    fs::write(&short, [0; 4096]).unwrap();
    let refused = |state: &str, memory: &str, more: &[&str]| {
        failure(&[&["restore", "--state", state, "--memory", memory], more].concat())
    };
    for position in [0, good.len() / 2, good.len() - 2] {
        let mut bytes = good.clone();
        bytes[position] ^= 4;
        fs::write(&broken, &bytes).unwrap();
        let error = refused(&broken, &memory, &[]);
        assert!(error.contains(&broken), "{error}");
    }
    // The last byte is a newline, which nobody misses.
    fs::write(&broken, &good[..good.len() - 2]).unwrap();
    assert!(refused(&broken, &memory, &[]).contains(&broken));
    assert!(refused(missing, &memory, &[]).contains(missing));
    assert!(refused(&state, missing, &[]).contains(missing));
    let error = refused(&state, &short, &[]);
    assert!(error.contains(&short) && error.contains("4096"), "{error}");
    let eager = &["--memory-mode", "eager"][..];
    let error = refused(&state, &memory, &[eager, &["--pager", missing]].concat());
    assert!(error.contains("on-demand"), "{error}");
    // The VM that cannot be saved runs on.
    let nowhere = ["--state", "/no/such/dir/state", "--memory", "/no/such/dir/memory"];
    for stop in [&[][..], &["--stop"]] {
        let args = [&["snapshot", "--control", &vm.socket], &nowhere[..], stop].concat();
        assert!(failure(&args).contains("/no/such/dir/memory"));
        assert_eq!(vm.ask("status"), "running");
    }
    vm.ask("quit");
    vm.end();
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

/// Starts a VM on a terminal of its own; gives its two sides.
fn on_terminal(kernel: &str) -> (Child, fs::File, fs::File) {
    let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&user).unwrap();
    unlockpt(&user).unwrap();
    let name = ptsname(&user, Vec::new()).unwrap().into_string().unwrap();
    let terminal = fs::File::options().read(true).write(true).open(name).unwrap();
    let child = Command::new("setsid")
        .args(["--ctty", "timeout", "--foreground", "60", VMPAGER])
        .args(["vm", "run", "--memory", "16M", "--kernel", kernel])
        .stdin(terminal.try_clone().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (child, user.into(), terminal)
}

#[test]
fn the_terminal_is_the_guests_and_then_as_it_was() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    // Says hi, and what it gets; ends at the second key.
    let kernel = kernel(&dir, &[SAY_HI, WAIT_FOR_KEY, ECHO, WAIT_FOR_KEY, ECHO, POWER_OFF]);
    for (keys, signal, said, ended_by) in [
        // Ctrl-C and Ctrl-Z are keys like others.
        (&b"\x03\x1a"[..], None, "hi\n\x03\x1a", "switched itself off"),
        (b"\x01\x01x", None, "hi\n\x01x", "switched itself off"),
        (b"k\x01x", None, "hi\nk", "ended by its user"),
        (b"k", Some(Signal::TERM), "hi\nk", "ended by its user"),
    ] {
        let (mut child, mut user, terminal) = on_terminal(&kernel);
        let before = format!("{:?}", tcgetattr(&terminal).unwrap());
        let mut hi = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut hi).unwrap();
        let raw = tcgetattr(&terminal).unwrap();
        assert!(!raw.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO));
        let (first, rest) = keys.split_at(keys.len().min(1));
        user.write_all(first).unwrap();
        if let Some(signal) = signal {
            let mut key = [0];
            child.stdout.as_mut().unwrap().read_exact(&mut key).unwrap();
            assert_eq!(key, first);
            kill_process(Pid::from_child(&child), signal).unwrap();
        }
        user.write_all(rest).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{keys:?}: {output:?}");
        let all = text(&[&hi[..], &output.stdout].concat());
        let messages = text(&output.stderr);
        assert!(messages.contains("Ctrl-A x ends the VM"));
        match ended_by {
            "ended by its user" => assert!(said.starts_with(&all), "perhaps too late to echo"),
            _ => assert_eq!(all, said),
        }
        assert!(messages.contains(ended_by), "{keys:?}: {messages}");
        assert_eq!(format!("{:?}", tcgetattr(&terminal).unwrap()), before, "{keys:?}");
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
        let error = failure(&[&["run"], args].concat());
        assert!(error.starts_with("error: ") && error.contains(why), "{why}: {error}");
    }
    let error = failure(&["status", "--control", &missing]);
    assert!(error.contains("is a VM running"), "{error}");
    // What a refused command was to leave behind is not there.
    let socket = dir.path().join("s").to_string_lossy().into_owned();
    vm(&["run", "--kernel", &missing, "--control", &socket]);
    assert!(!Path::new(&socket).exists());
}

/// As another user, with a device of the usual permissions.
#[test]
fn a_user_who_may_not_use_kvm_is_told_how_he_may() {
    if !has_kvm() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        vmpager_testing::skipped("only root can become another user");
        return;
    }
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("vmpager");
    fs::copy(VMPAGER, &program).unwrap();
    let kernel = kernel(&dir, &[SAY_HI, POWER_OFF]);
    // The mount is this process's alone, and gone with it.
    let script = "set -e; mknod kvm c 10 232; chmod 660 kvm; mount --bind kvm /dev/kvm; \
        exec setpriv --reuid 65534 --regid 65534 --clear-groups ./vmpager vm run --kernel \"$1\"";
    let output = Command::new("timeout")
        .args(["60", "unshare", "--mount", "sh", "-c", script, "sh", &kernel])
        .current_dir(&dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = text(&output.stderr);
    if error.contains("unshare failed") || error.contains("mknod:") {
        vmpager_testing::skipped(&format!("no device of its own: {error}"));
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("/dev/kvm: Permission denied"), "{error}");
    assert!(error.contains("give this user access"), "{error}");
}

#[test]
fn the_built_in_guest_runs_too() {
    let output = vm(&["run", "--guest", "builtin", "--memory", "16M", "--vcpus", "2", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&summary["mismatches"], &summary["vcpus"]), (&0.into(), &2.into()));
    assert!(summary["pages"].as_u64().unwrap() > 4000);
}
