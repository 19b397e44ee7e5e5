//! A packed snapshot, those who serve it from elsewhere, and the program that reads it
//! there.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use vmpager_testing::http::Server;
use vmpager_testing::secure::Identity;
use vmpager_vm::{Filling, SnapshotPaths, Vm, VmConfig};

pub(crate) const VMPAGER: &str = env!("CARGO_BIN_EXE_vmpager");
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A directory with the snapshot of a small built-in guest, packed.
pub(crate) struct Dir {
    dir: TempDir,
    /// What the environment of programs says besides.
    pub(crate) env: Vec<(&'static str, String)>,
}

impl Dir {
    pub(crate) fn new() -> Self {
        let dir = Self { dir: TempDir::new().unwrap(), env: Vec::new() };
        let filling = Filling::Generated { seed: 1, bytes: None };
        let config = VmConfig { memory_bytes: 16 << 20, filling, ..VmConfig::default() };
        let mut vm = Vm::build(&config).unwrap();
        vm.prepare().unwrap();
        vm.snapshot(&dir.snapshot()).unwrap();
        dir.done(&["image", "pack", &dir.mem(), "image"]);
        dir
    }

    pub(crate) fn snapshot(&self) -> SnapshotPaths {
        SnapshotPaths::in_dir(self.dir.path())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn mem(&self) -> String {
        self.snapshot().memory.to_string_lossy().into_owned()
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.vmpager().args(args).output().unwrap()
    }

    fn vmpager(&self) -> Command {
        let mut command = Command::new(VMPAGER);
        command.current_dir(self.dir.path()).envs(self.env.iter().cloned()).stdin(Stdio::null());
        command
    }

    pub(crate) fn done(&self, args: &[&str]) -> Output {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        output
    }

    pub(crate) fn serve(&self, image: &str, more: &[&str]) -> Child {
        let child = self
            .vmpager()
            .args(["serve", "--socket", "sock", "--json", "--image", image])
            .args(more)
            .env("VMPAGER_LOG", "warn")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for("the socket", || self.path("sock").exists());
        child
    }

    /// A guest that touches so many pages over the socket, and verifies each.
    pub(crate) fn guest(&self, touches: &str) -> Child {
        let state = self.snapshot().state;
        self.vmpager()
            .args(["vm-process", "--restore", "pager", "--socket", "sock", "--cpu", "threads"])
            .args(["--state", &state.to_string_lossy(), "--memory", &self.mem()])
            .args(["--touches", touches, "--seed", "5", "--started-ns", "1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// One session; what the daemon says of servers.
    pub(crate) fn session(&self, image: &str, more: &[&str]) -> Value {
        let pager = self.serve(image, &[&["--once", "--background-fill"], more].concat());
        verified(self.guest("2000"), "2000");
        remote(pager)
    }
}

pub(crate) fn verified(guest: Child, touches: &str) {
    let output = guest.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(outcome["mismatches"], 0, "{outcome}");
    assert_eq!(outcome["pages"].to_string(), touches, "{outcome}");
}

pub(crate) fn remote(pager: Child) -> Value {
    let output = pager.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["remote"].clone()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn wait_for(what: &str, is: impl Fn() -> bool) {
    let until = Instant::now() + LIMIT;
    while !is() {
        assert!(Instant::now() < until, "{what} did not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A port that nobody has.
pub(crate) fn free_port() -> u16 {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    free.local_addr().unwrap().port()
}

/// nginx, serving a directory on loopback.
pub(crate) struct Nginx {
    process: Child,
    pub(crate) port: u16,
}

impl Nginx {
    /// Starts it, if this machine has it; with TLS, if it has something to show.
    pub(crate) fn start(dir: &Dir, identity: Option<&Identity>) -> Option<Self> {
        let program = ["/usr/sbin/nginx", "/usr/bin/nginx", "/usr/local/sbin/nginx"]
            .into_iter()
            .find(|path| Path::new(path).exists())?;
        let port = free_port();
        let home = dir.path("nginx");
        fs::create_dir_all(home.join("temp")).unwrap();
        let shown = home.display();
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {shown}/temp/{kind};"))
            .concat();
        let tls = match identity {
            None => String::new(),
            Some(identity) => {
                fs::write(home.join("cert"), &identity.certificate).unwrap();
                fs::write(home.join("key"), &identity.key).unwrap();
                format!(" ssl; ssl_certificate {shown}/cert; ssl_certificate_key {shown}/key")
            }
        };
        let root = dir.path("");
        let root = root.display();
        let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
        let config = format!(
            "daemon off; {user} master_process off; pid {shown}/pid; error_log {shown}/errors;\n\
             events {{}}\n\
             http {{ access_log {shown}/access; {temporary}\n\
             server {{ listen 127.0.0.1:{port}{tls}; root {root}; }} }}\n"
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

pub(crate) fn put(server: &Server, dir: &Dir) -> String {
    server.put("image", fs::read(dir.path("image")).unwrap(), Some("\"1\""));
    server.url("image")
}
