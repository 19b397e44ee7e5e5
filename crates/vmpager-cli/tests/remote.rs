//! Images at servers as their user meets them: `serve` and `image` with URLs, against
//! nginx where there is one, and a server that does what it is told to.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use vmpager_testing::http::{Fault, Server};
use vmpager_vm::{Filling, SnapshotPaths, Vm, VmConfig};

const VMPAGER: &str = env!("CARGO_BIN_EXE_vmpager");
const LIMIT: Duration = Duration::from_secs(60);

/// A directory with the snapshot of a small built-in guest, packed.
struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        let dir = Self(TempDir::new().unwrap());
        let filling = Filling::Generated { seed: 1, bytes: None };
        let config = VmConfig { memory_bytes: 16 << 20, filling, ..VmConfig::default() };
        let mut vm = Vm::build(&config).unwrap();
        vm.prepare().unwrap();
        vm.snapshot(&dir.snapshot()).unwrap();
        dir.done(&["image", "pack", &dir.mem(), "image"]);
        dir
    }

    fn snapshot(&self) -> SnapshotPaths {
        SnapshotPaths::in_dir(self.0.path())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn mem(&self) -> String {
        self.snapshot().memory.to_string_lossy().into_owned()
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(VMPAGER);
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null()).output().unwrap()
    }

    fn done(&self, args: &[&str]) -> Output {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        output
    }

    fn serve(&self, image: &str, more: &[&str]) -> Child {
        let child = Command::new(VMPAGER)
            .args(["serve", "--socket", "sock", "--json", "--image", image])
            .args(more)
            .current_dir(self.0.path())
            .env("VMPAGER_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for("the socket", || self.path("sock").exists());
        child
    }

    /// A guest that touches so many pages over the socket, and verifies each.
    fn guest(&self, touches: &str) -> Child {
        let state = self.snapshot().state;
        Command::new(VMPAGER)
            .args(["vm-process", "--restore", "pager", "--socket", "sock", "--cpu", "threads"])
            .args(["--state", &state.to_string_lossy(), "--memory", &self.mem()])
            .args(["--touches", touches, "--seed", "5", "--started-ns", "1"])
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// One session; what the daemon says of servers.
    fn session(&self, image: &str, more: &[&str]) -> Value {
        let pager = self.serve(image, &[&["--once", "--background-fill"], more].concat());
        verified(self.guest("2000"), "2000");
        remote(pager)
    }
}

fn verified(guest: Child, touches: &str) {
    let output = guest.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(outcome["mismatches"], 0, "{outcome}");
    assert_eq!(outcome["pages"].to_string(), touches, "{outcome}");
}

fn remote(pager: Child) -> Value {
    let output = pager.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["remote"].clone()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn wait_for(what: &str, is: impl Fn() -> bool) {
    let until = Instant::now() + LIMIT;
    while !is() {
        assert!(Instant::now() < until, "{what} did not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn put(server: &Server, dir: &Dir) -> String {
    server.put("image", fs::read(dir.path("image")).unwrap(), Some("\"1\""));
    server.url("image")
}

#[test]
fn a_restarted_daemon_fetches_nothing_that_is_in_its_cache() {
    let (dir, server) = (Dir::new(), Server::new());
    let url = put(&server, &dir);
    let cache = ["--cache", "cache", "--cache-size", "1G"];
    let first = dir.session(&url, &cache);
    let count = |numbers: &Value, what: &str| numbers[what].as_u64().unwrap();
    assert!(count(&first, "frames_fetched") > 50, "{first}");
    let second = dir.session(&url, &cache);
    assert!(count(&second, "frames_cached") > 50, "{second}");
    // The daemon may have ended before the last of it was written.
    let not_kept = count(&first, "frames_fetched") - count(&first, "frames_stored");
    assert!(count(&second, "frames_fetched") <= not_kept, "{first}, then {second}");
}

#[test]
fn a_worker_that_is_killed_is_replaced_while_its_server_fails() {
    let (dir, server) = (Dir::new(), Server::new());
    let url = put(&server, &dir);
    server.latency(Duration::from_millis(5));
    let pager = dir.serve(&url, &["--prefetch", "off"]);
    let guest = dir.guest("3000");
    let keeper = pager.id();
    let worker = || {
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"));
        children.unwrap().split_whitespace().next().and_then(|pid| pid.parse::<i32>().ok())
    };
    for round in 0..3 {
        let asked = server.requests().len();
        // Opening it takes two; then it is serving.
        wait_for("a fault", || server.requests().len() > asked + 4);
        let killed = worker().unwrap();
        kill_process(Pid::from_raw(killed).unwrap(), Signal::KILL).unwrap();
        server.script(move |request| (request.number % 7 == round).then_some(Fault::Close));
        wait_for("another worker", || worker().is_some_and(|pid| pid != killed));
    }
    verified(guest, "3000");
    kill_process(Pid::from_child(&pager), Signal::TERM).unwrap();
    assert!(remote(pager)["frames_fetched"].as_u64().unwrap() > 0);
}

#[test]
fn servers_that_cannot_serve_images_are_refused_with_a_remedy() {
    let (dir, server) = (Dir::new(), Server::new());
    let url = put(&server, &dir);
    for (fault, says) in [
        (Fault::IgnoreRange, "ignores ranges"),
        (Fault::Status(403, None), "signed"),
        (Fault::Status(404, None), "no such object"),
    ] {
        server.script(move |_| Some(fault.clone()));
        for command in [
            &["image", "inspect", &url][..],
            &["image", "verify", &url],
            &["image", "unpack", &url, "out"],
            &["serve", "--socket", "sock", "--image", &url],
        ] {
            let output = dir.run(command);
            assert_eq!(output.status.code(), Some(1), "{command:?}");
            assert!(stderr(&output).contains(says), "{command:?}: {}", stderr(&output));
        }
    }
    let usage = dir.run(&["serve", "--socket", "s", "--image", &url, "--cache-size", "1G"]);
    assert_eq!(usage.status.code(), Some(2));
}

/// nginx, serving a directory on loopback.
struct Nginx {
    process: Child,
    port: u16,
}

impl Nginx {
    /// Starts it, if this machine has it.
    fn start(dir: &Dir) -> Option<Self> {
        let program = ["/usr/sbin/nginx", "/usr/bin/nginx", "/usr/local/sbin/nginx"]
            .into_iter()
            .find(|path| Path::new(path).exists())?;
        let port = {
            let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            free.local_addr().unwrap().port()
        };
        let home = dir.path("nginx");
        fs::create_dir_all(home.join("temp")).unwrap();
        let shown = home.display();
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {shown}/temp/{kind};"))
            .concat();
        let root = dir.0.path().display();
        let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
        let config = format!(
            "daemon off; {user} master_process off; pid {shown}/pid; error_log {shown}/errors;\n\
             events {{}}\n\
             http {{ access_log {shown}/access; {temporary}\n\
             server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
        );
        fs::write(home.join("nginx.conf"), config).unwrap();
        let process = Command::new(program)
            .args(["-p", &home.to_string_lossy(), "-c", "nginx.conf"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let nginx = Self { process, port };
        wait_for("nginx", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        Some(nginx)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn nginx_serves_images_to_every_command() {
    let dir = Dir::new();
    let Some(nginx) = Nginx::start(&dir) else {
        vmpager_testing::skipped("no nginx (Debian: nginx-light)");
        return;
    };
    let url = format!("http://127.0.0.1:{}/image", nginx.port);
    let inspected: Value =
        serde_json::from_slice(&dir.done(&["image", "inspect", &url, "--json"]).stdout).unwrap();
    assert_eq!(inspected["memory_bytes"], 16 << 20, "{inspected}");
    dir.done(&["image", "verify", &url]);
    dir.done(&["image", "unpack", &url, "out"]);
    assert!(fs::read(dir.path("out")).unwrap() == fs::read(dir.mem()).unwrap());
    let seen = dir.session(&url, &[]);
    assert!(seen["frames_fetched"].as_u64().unwrap() > 50, "{seen}");
    let access = fs::read_to_string(dir.path("nginx/access")).unwrap();
    assert!(access.lines().all(|line| line.contains("\" 206 ")), "{access}");

    // The image is replaced by another one: what was there is not made up.
    let pager = dir.serve(&url, &["--prefetch", "off"]);
    fs::write(dir.path("new"), vec![7; 1 << 20]).unwrap();
    fs::rename(dir.path("new"), dir.path("image")).unwrap();
    let output = dir.guest("2000").wait_with_output().unwrap();
    assert!(!output.status.success(), "a guest without its memory went on");
    kill_process(Pid::from_child(&pager), Signal::TERM).unwrap();
    let log = stderr(&pager.wait_with_output().unwrap());
    assert!(log.contains("modified while being served"), "{log}");
}
