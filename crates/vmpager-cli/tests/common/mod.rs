//! A daemon with a VM, for those who watch daemons: the program itself, and a VM
//! whose memory is this process's.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

pub(crate) const VMPAGER: &str = env!("CARGO_BIN_EXE_vmpager");
pub(crate) const PAGE: usize = 4096;
pub(crate) const PAGES: usize = 256;

/// Longer than anything takes that does not hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Whether this machine has a userfaultfd for us; says so if not.
pub(crate) fn have_userfaultfd() -> bool {
    match Userfaultfd::open(Features::EVENT_REMOVE) {
        Ok(_) => true,
        Err(error) => {
            vmpager_testing::skipped(&error.to_string());
            false
        }
    }
}

pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A daemon.
pub(crate) struct Served {
    pub(crate) dir: TempDir,
    pub(crate) child: Child,
    /// What it serves, and how.
    what: Vec<OsString>,
}

impl Served {
    /// One that serves a file of so many pages, and shows its numbers.
    pub(crate) fn start(more: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        let bytes: Vec<u8> = (0..PAGES).flat_map(|page| vec![first_byte(page); PAGE]).collect();
        fs::write(at("memory"), bytes).unwrap();
        let mut what: Vec<OsString> = ["--prefetch", "off", "--metrics"].map(OsString::from).into();
        what.push(format!("unix:{}", at("metrics.sock").display()).into());
        what.extend(["--memory".into(), at("memory").into()]);
        Self::serving(dir, what, more)
    }

    /// One that serves what these options say.
    pub(crate) fn serving(dir: TempDir, what: Vec<OsString>, more: &[&str]) -> Self {
        let child = Self::spawn(&dir, &what, more);
        let served = Self { dir, child, what };
        eventually("a socket", || served.socket().exists());
        served
    }

    fn spawn(dir: &TempDir, what: &[OsString], more: &[&str]) -> Child {
        let at = |name: &str| dir.path().join(name);
        let log = fs::File::options().create(true).append(true).open(at("log")).unwrap();
        Command::new(VMPAGER)
            .args(["serve", "--json", "--socket"])
            .arg(at("pager.sock"))
            .args(what)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// Has another daemon take its place.
    pub(crate) fn replace(&mut self) {
        let new = Self::spawn(&self.dir, &self.what, &["--replace"]);
        let mut old = std::mem::replace(&mut self.child, new);
        assert!(old.wait().unwrap().success(), "{}", self.log());
    }

    /// Has another daemon, that serves this, try to take its place, which fails.
    pub(crate) fn refuse(&self, what: &[OsString]) {
        let other = Self::spawn(&self.dir, what, &["--replace"]).wait_with_output().unwrap();
        assert_eq!(other.status.code(), Some(1), "{}", self.log());
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("pager.sock")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("unix:{}", self.path("metrics.sock").display())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// The worker process.
    pub(crate) fn worker(&self) -> Option<u32> {
        let pid = self.child.id();
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        text.split_whitespace().next().map(|pid| pid.parse().unwrap())
    }

    /// Kills the worker process, and waits for the next one.
    pub(crate) fn kill_worker(&self) {
        eventually("a worker", || self.worker().is_some());
        let first = self.worker().unwrap();
        kill(first, Signal::KILL);
        eventually("another worker", || self.worker().is_some_and(|next| next != first));
    }

    /// Asks for a page; returns its contents.
    pub(crate) fn get(&self, page: &str) -> String {
        let (head, body) = self.ask(&format!("GET {page} HTTP/1.1\r\nHost: x\r\n\r\n"));
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        body
    }

    /// Sends a request; returns the answer's head and body.
    pub(crate) fn ask(&self, request: &str) -> (String, String) {
        ask(UnixStream::connect(self.path("metrics.sock")).unwrap(), request)
    }

    /// Stops it; returns what it printed.
    pub(crate) fn stop(mut self) -> Output {
        kill(self.child.id(), Signal::TERM);
        let mut stdout = Vec::new();
        self.child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        let output =
            Output { status: self.child.wait().unwrap(), stdout, stderr: self.log().into_bytes() };
        assert!(output.status.success(), "{}", self.log());
        assert!(!self.path("metrics.sock").exists(), "the endpoint is left behind");
        output
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        // The keeper's end ends the worker, which serves this process: it must not
        // be left without.
        if let Ok(None) = self.child.try_wait() {
            kill(self.child.id(), Signal::TERM);
            let _ = self.child.wait();
        }
    }
}

pub(crate) fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// A connection that waits, but not for ever.
pub(crate) trait Patient: Read + Write {
    fn be_patient(&self);
}

impl Patient for UnixStream {
    fn be_patient(&self) {
        self.set_read_timeout(Some(PATIENCE)).unwrap();
    }
}

impl Patient for TcpStream {
    fn be_patient(&self) {
        self.set_read_timeout(Some(PATIENCE)).unwrap();
    }
}

/// Sends a request; returns the answer's head and body.
pub(crate) fn ask(mut connection: impl Patient, request: &str) -> (String, String) {
    connection.be_patient();
    connection.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (format!("{head}\r\n"), body.to_owned())
}

/// What each byte of a page of the file is.
fn first_byte(page: usize) -> u8 {
    u8::try_from(page % 251 + 1).unwrap()
}

/// A VM whose memory is this process's, handed over as Firecracker does.
pub(crate) struct Guest {
    memory: Mapping,
    _socket: UnixStream,
    /// So that memory is not taken for zeroes should the daemon end.
    _uffd: OwnedFd,
}

impl Guest {
    pub(crate) fn connect(socket: &Path) -> Self {
        let uffd = Userfaultfd::open(Features::EVENT_REMOVE).unwrap();
        let memory = Mapping::for_pager(PAGES * PAGE).unwrap();
        // Lives as long as the registration: it is a field of the guest.
        let memory = std::sync::Arc::new(memory);
        uffd.register_missing(&GuestRange::of_mapping(&memory)).unwrap();
        let memory = std::sync::Arc::into_inner(memory).unwrap();
        let handshake = serde_json::json!([{
            "base_host_virt_addr": memory.hva(),
            "size": memory.len(),
            "offset": 0,
            "page_size": PAGE,
            "page_size_kib": PAGE,
        }]);
        let socket = UnixStream::connect(socket).unwrap();
        let uffd = uffd.duplicate().unwrap();
        send_with_fds(&socket, handshake.to_string().as_bytes(), &[uffd.as_fd()]).unwrap();
        Self { memory, _socket: socket, _uffd: uffd }
    }

    /// Gives pages back.
    pub(crate) fn give_back(&self, pages: std::ops::Range<usize>) {
        self.memory.discard(pages.start * PAGE..pages.end * PAGE).unwrap();
    }

    /// Touches a page that was given back.
    pub(crate) fn touch_zero(&self, page: usize) {
        let mut bytes = [1; PAGE];
        self.memory.read(page * PAGE, &mut bytes);
        assert_eq!(bytes, [0; PAGE], "page {page}");
    }

    /// Touches pages, and checks what they hold.
    pub(crate) fn touch(&self, pages: std::ops::Range<usize>) {
        for page in pages {
            let mut bytes = [0; PAGE];
            self.memory.read(page * PAGE, &mut bytes);
            assert_eq!(bytes, [first_byte(page); PAGE], "page {page}");
        }
    }
}
