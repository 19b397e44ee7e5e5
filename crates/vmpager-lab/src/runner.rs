//! Runs tests one after the other, each in a process of its own, which may
//! neither hang nor leave anything running.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, test_kill_process_group};

use crate::cases::{self, Case, Lab};
use crate::report::{Outcome, Report};

/// How often a running test is looked at.
const TICK: Duration = Duration::from_millis(50);

/// How long a test's processes may take to go once they were told to.
const LEAVING: Duration = Duration::from_secs(2);

/// The exit status of a test that lost a guest.
pub(crate) const GUEST_LOST: u8 = 3;

/// Runs the tests with these names.
pub(crate) fn run(lab: &Lab, names: &[String], report: &mut Report) -> anyhow::Result<()> {
    report.plan(names.len());
    // In the emulated machine nothing may be skipped.
    let why_not = if lab.direct { cases::why_no_linux() } else { None };
    for name in names {
        report.begin(name);
        if let Some(why) = &why_not {
            report.text(why);
            report.end(name, Outcome::Skipped, Duration::ZERO);
            continue;
        }
        let begin = Instant::now();
        let outcome = cases::named(name).and_then(|case| run_one(lab, case, report));
        let outcome = outcome.unwrap_or_else(|error| {
            report.text(&format!("{error:#}"));
            Outcome::Failed
        });
        report.end(name, outcome, begin.elapsed());
    }
    report.over();
    Ok(())
}

fn run_one(lab: &Lab, case: &Case, report: &mut Report) -> anyhow::Result<Outcome> {
    let scratch = lab.scratch.join(case.name);
    fs::create_dir(&scratch).with_context(|| format!("making {}", scratch.display()))?;
    let mut child = Command::new("/proc/self/exe")
        .arg("test")
        .args(lab.arguments())
        .arg(case.name)
        .current_dir(&scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own: all of it can be ended, and found.
        .process_group(0)
        .spawn()
        .context("starting the test")?;
    let group = Pid::from_child(&child);
    let (sender, lines) = channel();
    read(child.stdout.take(), sender.clone());
    read(child.stderr.take(), sender);
    let status = wait(&mut child, &lines, case.limit, report)?;
    let hung = status.is_none();
    // In a test that hung they are no news.
    let left_over = end_group(group) && !hung;
    if hung {
        let _ = child.wait();
        report.text(&format!("it hung: ended after {} s", case.limit.as_secs()));
    }
    while let Ok(line) = lines.recv_timeout(TICK) {
        report.text(&line);
    }
    if left_over {
        report.text("it left processes running");
    }
    // What it left there takes memory that the next test needs.
    fs::remove_dir_all(&scratch).with_context(|| format!("removing {}", scratch.display()))?;
    Ok(match status {
        Some(status) if status.success() && !left_over => Outcome::Passed,
        Some(status) if status.code() == Some(GUEST_LOST.into()) => Outcome::Lost,
        Some(status) => {
            if status.code().is_none() {
                report.text(&format!("it was killed: {status}"));
            }
            Outcome::Failed
        }
        None => Outcome::Lost,
    })
}

/// Sends on every line of a stream.
fn read(stream: Option<impl Read + Send + 'static>, to: Sender<String>) {
    let Some(stream) = stream else { return };
    thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut bytes = Vec::new();
        while stream.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            if to.send(String::from_utf8_lossy(&bytes).trim_end().to_owned()).is_err() {
                return;
            }
            bytes.clear();
        }
    });
}

/// Waits for the test to end; `None` if it did not in time.
fn wait(
    child: &mut Child,
    lines: &Receiver<String>,
    limit: Duration,
    report: &mut Report,
) -> anyhow::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        match lines.recv_timeout(TICK) {
            Ok(line) => report.text(&line),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
        }
        if let Some(status) = child.try_wait().context("waiting for the test")? {
            return Ok(Some(status));
        }
        if Instant::now() > deadline {
            return Ok(None);
        }
    }
}

/// Ends what is left of a test; whether there was anything.
fn end_group(group: Pid) -> bool {
    let begin = Instant::now();
    let mut found = false;
    loop {
        if rustix::process::getpid().is_init() {
            // Orphans are ours, and stay in the group until somebody waits.
            while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        }
        if test_kill_process_group(group).is_err() || begin.elapsed() > LEAVING {
            return found;
        }
        // What was just killed by the test may need a moment to go.
        if begin.elapsed() > LEAVING / 4 {
            found = true;
            let _ = kill_process_group(group, Signal::KILL);
        }
        thread::sleep(TICK);
    }
}
