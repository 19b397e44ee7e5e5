//! Tests in processes of their own: the test binary started once more, for one
//! test, told what to do by its environment.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// The variable that says what a child does.
pub(crate) const TASK: &str = "VMPAGER_TEST_TASK";
/// What a line for the parent starts with; libtest prints lines of its own.
const MARK: &str = "child: ";

/// The task this process was started for, if it is a child.
pub(crate) fn task() -> Option<String> {
    std::env::var(TASK).ok()
}

/// Says something to the parent.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // A parent that has died will not miss it.
    let _ = writeln!(out, "\n{MARK}{line}").and_then(|()| out.flush());
}

/// A child, killed when dropped.
#[derive(Debug)]
pub(crate) struct TestChild {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

/// Starts the test of that name in a process of its own.
pub(crate) fn spawn(test: &str, task: &str) -> TestChild {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(TASK, task)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let (to, lines) = channel();
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            if let Some(said) = line.strip_prefix(MARK)
                && to.send(said.to_owned()).is_err()
            {
                return;
            }
        }
    });
    let stdin = child.stdin.take();
    TestChild { child, stdin, lines }
}

/// Runs a test in a process of its own, whose CPU time, threads and
/// descriptors no other test has a part in.
pub(crate) fn alone(test: &str, body: impl FnOnce()) {
    if task().is_some() {
        return body();
    }
    let mut child = spawn(test, "alone");
    let status = child.wait();
    assert!(status.success(), "{test} alone: {status}");
}

impl TestChild {
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Tells it something.
    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// What it says next. None if nothing within that time.
    pub(crate) fn hear_within(&self, limit: Duration) -> Option<String> {
        match self.lines.recv_timeout(limit) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                std::thread::sleep(limit.min(Duration::from_millis(10)));
                None
            }
        }
    }

    /// What it says next.
    pub(crate) fn hear(&self) -> String {
        self.hear_within(Duration::from_secs(20)).expect("the child says something")
    }

    /// Tells it something and returns its answer.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.hear()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Lets it end by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.stdin = None;
        self.child.wait().unwrap()
    }
}

impl Drop for TestChild {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
