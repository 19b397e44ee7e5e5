//! `vmpager top` as its user meets it: on a terminal, its keys pressed and its screen
//! read; and for machines.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Guest, PATIENCE, Served, VMPAGER, eventually, have_userfaultfd, kill};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;

const ROWS: u16 = 12;
const COLUMNS: u16 = 160;

/// The program on a terminal of its own.
struct Terminal {
    child: Child,
    keys: File,
    tty: File,
    before: String,
    screen: Arc<Mutex<vt100::Parser>>,
    /// Reads what is drawn, until the other end of `closed` is.
    reader: JoinHandle<()>,
    closed: UnixStream,
}

impl Terminal {
    fn start(args: &[&str]) -> Self {
        Self::start_by(&["setsid", "--ctty"], args)
    }

    /// The same, started by another program: the terminal may be one that does not
    /// control it.
    fn start_by(by: &[&str], args: &[&str]) -> Self {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let size = Winsize { ws_row: ROWS, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&user, size).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap().into_string().unwrap();
        let tty = File::options().read(true).write(true).open(name).unwrap();
        let before = format!("{:?}", tcgetattr(&tty).unwrap());
        let child = Command::new(by[0])
            .args(&by[1..])
            .args([VMPAGER, "top"])
            .args(args)
            .env("TERM", "xterm-256color")
            .stdin(tty.try_clone().unwrap())
            .stdout(tty.try_clone().unwrap())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let keys = File::from(user);
        let (rows, columns) = (NonZero::new(ROWS).unwrap(), NonZero::new(COLUMNS).unwrap());
        let screen = Arc::new(Mutex::new(vt100::Parser::new(rows, columns, 0)));
        let (closed, ends) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn({
            let (screen, mut output) = (screen.clone(), keys.try_clone().unwrap());
            move || {
                let mut bytes = [0; 4096];
                loop {
                    let mut fds =
                        [PollFd::new(&output, PollFlags::IN), PollFd::new(&ends, PollFlags::IN)];
                    poll(&mut fds, None).unwrap();
                    if !fds[1].revents().is_empty() {
                        return;
                    }
                    let Ok(count @ 1..) = output.read(&mut bytes) else { return };
                    screen.lock().unwrap().process(&bytes[..count]);
                }
            }
        });
        Self { child, keys, tty, before, screen, reader, closed }
    }

    fn lines(&self) -> Vec<String> {
        let screen = self.screen.lock().unwrap();
        let rows = screen.screen().rows(0, COLUMNS);
        rows.map(|row| row.trim_end().to_owned()).collect()
    }

    /// Which row is shown inverted.
    fn inverted(&self) -> Option<u16> {
        let screen = self.screen.lock().unwrap();
        (0..ROWS).find(|row| screen.screen().cell(*row, 0).is_some_and(vt100::Cell::inverse))
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the screen is as it should be.
    fn expect(&self, what: &str, is: impl Fn(&[String]) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is(&self.lines()) {
            assert!(Instant::now() < until, "{what} is not on the screen: {:#?}", self.lines());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its window is closed. Returns how the program ended.
    fn close(self) -> ExitStatus {
        let Self { mut child, keys, tty, reader, closed, .. } = self;
        drop(closed);
        reader.join().unwrap();
        drop((keys, tty));
        let mut status = None;
        eventually("the end of the program", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// It has ended; the terminal is as it was.
    fn ended(mut self) -> Output {
        let status = self.child.wait().unwrap();
        assert_eq!(format!("{:?}", tcgetattr(&self.tty).unwrap()), self.before);
        eventually("the screen that was there before", || {
            let screen = self.screen.lock().unwrap();
            !screen.screen().alternate_screen() && !screen.screen().hide_cursor()
        });
        let mut stderr = Vec::new();
        self.child.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
        Output { status, stdout: Vec::new(), stderr }
    }
}

fn top(args: &[&str]) -> Output {
    Command::new(VMPAGER).arg("top").args(args).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn sessions_are_watched_selected_sorted_and_inspected_on_a_terminal() {
    if !have_userfaultfd() {
        return;
    }
    let served = Served::start(&[]);
    let guests = [(); 2].map(|()| Guest::connect(&served.path("pager.sock")));
    guests[0].touch(0..64);
    guests[1].touch(0..192);
    let mut terminal = Terminal::start(&["--metrics", &served.endpoint()]);

    // Once nothing has happened for an interval.
    let pid = std::process::id();
    let row = |session: u64, bar: &str| {
        format!(
            "{session}        {pid:<8} 1.00 MiB    {bar}   0         -         0 B          off"
        )
    };
    let (one, two) = (row(1, "██░░░░░░░░  25%"), row(2, "███████░░░  75%"));
    let title =
        "sessionv pid      memory      resident          faults/s  p99       bytes/s      fill";
    let keys = "up/down select  Enter more  s sort  r reverse  q quit";
    let mut expected = vec!["sessions 2 now, 0 ended, 0 refused  0 faults/s", title, &one, &two];
    expected.resize(usize::from(ROWS) - 2, "");
    expected.push(keys);
    terminal.expect("two sessions", |lines| lines[1..] == expected);
    let first = &terminal.lines()[0];
    assert!(first.contains("/memory  ") && first.ends_with("  takeovers 0"), "{first}");
    assert_eq!(terminal.inverted(), None);

    terminal.press("\x1b[B\x1b[B");
    eventually("the second is selected", || terminal.inverted() == Some(4));
    terminal.press("k");
    eventually("the first is selected", || terminal.inverted() == Some(3));
    terminal.press("\r");
    terminal.expect("more of it", |lines| {
        let all = lines.join("\n");
        all.contains("session 1 (Esc: back)") && all.contains("256.00 KiB of 1.00 MiB in place")
    });
    terminal.press("\x1b");
    terminal.expect("the table", |lines| lines[1..] == expected);
    terminal.press("sss");
    let by_faults = |lines: &[String]| lines[2].contains("faults/sv");
    terminal.expect("sorted by faults", by_faults);
    guests[1].touch(192..256);
    // Also if a slow machine has it take a look in the middle.
    terminal.expect("the second has it all", |lines| {
        lines[3..5].iter().any(|line| line.starts_with("2 ") && line.contains("██████████ 100%"))
    });
    terminal.press("sssr");
    terminal.expect("the last first", |lines| {
        lines[2].starts_with("session^") && lines[3].starts_with("2 ") && lines[4].starts_with("1 ")
    });

    served.kill_worker();
    terminal.expect("the takeover", |lines| {
        lines[0].ends_with("takeovers 1") && lines[1].starts_with("sessions 2 now")
    });
    terminal.press("q");
    let output = terminal.ended();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    served.stop();
}

/// Whether the kernel tells by a signal, or not at all.
#[test]
fn it_ends_when_its_terminal_goes() {
    if !have_userfaultfd() {
        return;
    }
    let served = Served::start(&[]);
    for by in [&["setsid", "--ctty"][..], &["setsid"], &["env", "--ignore-signal=HUP"]] {
        let mut terminal = Terminal::start_by(by, &["--metrics", &served.endpoint()]);
        terminal.expect("no session", |lines| lines[1].starts_with("sessions 0 now"));
        // It hears keys by now.
        terminal.press("s");
        let status = terminal.close();
        assert!(!status.success(), "{by:?}: {status}");
    }
    served.stop();
}

#[test]
fn a_terminal_is_given_back_however_it_ends() {
    if !have_userfaultfd() {
        return;
    }
    let served = Served::start(&[]);
    for how in ["\x03", "\x1b", "", "HUP"] {
        let mut terminal = Terminal::start(&["--metrics", &served.endpoint()]);
        terminal.expect("no session", |lines| lines[1].starts_with("sessions 0 now"));
        match how {
            "" => kill(terminal.child.id(), Signal::TERM),
            "HUP" => kill(terminal.child.id(), Signal::HUP),
            keys => terminal.press(keys),
        }
        assert!(terminal.ended().status.success(), "{how:?}");
    }
    // A daemon that ends is told of, and its user decides.
    let mut terminal = Terminal::start(&["--metrics", &served.endpoint()]);
    terminal.expect("no session", |lines| lines[1].starts_with("sessions 0 now"));
    served.stop();
    terminal
        .expect("that it is gone", |lines| lines[usize::from(ROWS) - 1].contains("metrics.sock"));
    terminal.press("q");
    assert!(terminal.ended().status.success());
}

#[test]
fn machines_get_a_table_or_an_object() {
    if !have_userfaultfd() {
        return;
    }
    let served = Served::start(&[]);
    let guest = Guest::connect(&served.path("pager.sock"));
    guest.touch(0..128);
    eventually("the session", || served.get("/sessions.json").contains("\"pages_demand\":128"));
    let output = top(&["--metrics", &served.endpoint(), "--once"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[2].starts_with("session  pid"), "{text}");
    assert!(lines[3].contains("█████░░░░░  50%   0         -"), "{text}");

    // The daemon's socket is enough to find its numbers where they lie beside it.
    std::fs::rename(served.path("metrics.sock"), served.path("pager.sock.metrics")).unwrap();
    let socket = served.path("pager.sock").display().to_string();
    let output = top(&["--socket", &socket, "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["sessions"][0]["pages_demand"], 128);
    assert_eq!(report["sessions"][0]["faults_per_s"], 0.0);
    assert!(report["interval_s"].as_f64().unwrap() >= 1.0, "{report}");
    std::fs::rename(served.path("pager.sock.metrics"), served.path("metrics.sock")).unwrap();
    served.stop();
}

#[test]
fn what_cannot_be_watched_is_told_by_name_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| format!("unix:{}", dir.path().join(name).display());
    // Somebody else's endpoint.
    let other = UnixListener::bind(dir.path().join("other")).unwrap();
    std::thread::spawn(move || {
        for stream in other.incoming() {
            let mut stream = stream.unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n<html>");
        }
    });
    for (args, code, words) in [
        (vec![], 2, vec!["--socket", "--metrics"]),
        (vec!["--metrics", "x"], 2, vec!["unix:PATH"]),
        (vec!["--metrics", "127.0.0.1:1"], 1, vec!["not a terminal", "--once", "--json"]),
        (vec!["--json", "--metrics", "127.0.0.1:1"], 1, vec!["127.0.0.1:1", "--metrics"]),
        (vec!["--once", "--socket", "/no/such"], 1, vec!["unix:/no/such.metrics"]),
        (vec!["--once", "--metrics", &at("other")], 1, vec!["other", "vmpager daemon"]),
    ] {
        let output = top(&args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        for word in words {
            let word = word.replace("not a terminal", "is none");
            assert!(text.contains(&word), "{args:?}: {text:?} does not say {word:?}");
        }
    }
    let help = String::from_utf8(top(&["--help"]).stdout).unwrap();
    assert!(
        help.contains("Example") && help.contains("--json") && help.contains("Enter"),
        "{help}"
    );
}
