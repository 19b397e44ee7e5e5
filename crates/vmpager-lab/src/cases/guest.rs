//! A Linux guest in a `vmpager vm` process, by what it prints.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::Lab;
use super::beat::{Beat, Verdict};
use crate::cpus::guest_command;

/// How long a guest may be silent. An emulated machine that runs several of
/// them at once takes its time.
pub(super) const PATIENCE: Duration = Duration::from_secs(40);

/// How long a page may take that the guest misses, on a machine that does much else.
/// Before it gives its verdict it touches all.
const MISSED: Duration = Duration::from_millis(10);

/// How long the load may take to begin: a distribution's kernel as guest, in the
/// emulator, takes its time.
const BOOTING: Duration = Duration::from_secs(150);

/// Lines of the console to show when something goes wrong.
const SHOWN: usize = 40;

/// What a guest's kernel never says while all is well.
const TROUBLE: [&str; 7] = [
    "BUG:",
    "Oops",
    "WARNING:",
    "detected stall",
    "soft lockup",
    "blocked for more than",
    "general protection fault",
];

/// How much of a guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) vcpus: usize,
    /// Its memory with a small kernel; see [`memory_mib`](Self::memory_mib).
    pub(super) least_mib: usize,
    /// Pages that never change.
    pub(super) still: usize,
    /// Threads that go through these.
    pub(super) readers: usize,
    /// Pages that each writer goes through; there is a writer for each vCPU.
    pub(super) moving: usize,
}

/// From this size on a kernel's file is a distribution's.
const LARGE_KERNEL: u64 = 10 << 20;

/// How much more memory such a kernel takes for itself.
const LARGE_KERNEL_MIB: usize = 64;

impl Size {
    /// How much memory a guest of this size has, in MiB, with the lab's kernel.
    pub(super) fn memory_mib(&self, lab: &Lab) -> anyhow::Result<usize> {
        let kernel = fs::metadata(&lab.kernel).with_context(|| lab.kernel.display().to_string())?;
        let more = if kernel.len() < LARGE_KERNEL { 0 } else { LARGE_KERNEL_MIB };
        Ok(self.least_mib + more)
    }
}

/// Memory enough for a small kernel, its init and the load.
pub(super) const SMALL: Size =
    Size { vcpus: 1, least_mib: 64, still: 2048, readers: 1, moving: 512 };

/// The same with two vCPUs.
pub(super) const TWO: Size = Size { vcpus: 2, ..SMALL };

/// A guest that runs. Killed when dropped.
#[derive(Debug)]
pub(super) struct Guest {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    console: Vec<String>,
    control: PathBuf,
    /// Where the program's own summary comes, if it was asked for one.
    summary: Option<ChildStdout>,
    /// How long it may say nothing of what is waited for.
    patience: Duration,
}

/// A guest stands still, or is gone. Nothing of it was found to be wrong, so it may
/// be the emulator that lost it (`docs/lab.md`).
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct GuestLost(String);

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Guest {
    /// Boots one, and waits until its load runs.
    pub(super) fn boot(lab: &Lab, size: &Size) -> anyhow::Result<Self> {
        Self::boot_with(lab, size, &[])
    }

    /// As [`boot`](Self::boot), with more options for `vm run`.
    pub(super) fn boot_with(lab: &Lab, size: &Size, more: &[&str]) -> anyhow::Result<Self> {
        let Size { vcpus, still, readers, moving, .. } = size;
        let memory_mib = size.memory_mib(lab)?;
        // No huge pages: pages are to stay where they are.
        let cmdline = format!(
            "console=ttyS0 quiet mitigations=off transparent_hugepage=never lab.load={vcpus} \
             lab.still={still} lab.readers={readers} lab.moving={moving}"
        );
        let mut command = guest_command(lab, &lab.vmpager);
        command.args(["vm", "run"]).arg("--kernel").arg(&lab.kernel);
        command.arg("--initrd").arg(&lab.initrd).args(["--cmdline", &cmdline]);
        command.args(["--memory", &format!("{memory_mib}M"), "--vcpus", &vcpus.to_string()]);
        let mut guest = Self::start(command.args(more), "control")?.patient(size);
        guest.find_within(BOOTING, "its load to start", |line| {
            line.contains("load: ready").then_some(())
        })?;
        Ok(guest)
    }

    /// How many CPUs the guest's kernel uses, as it said when its load began.
    pub(super) fn cpus(&self) -> anyhow::Result<u64> {
        let said = self.console.iter().find_map(|line| line.split_once("load: ready"));
        let cpus = said.and_then(|(_, words)| words.split_once("cpus=")?.1.trim().parse().ok());
        cpus.with_context(|| format!("it did not say how many CPUs it has{}", self.tail()))
    }

    /// Starts a `vmpager vm` process with a control socket in this directory.
    pub(super) fn start(command: &mut Command, name: &str) -> anyhow::Result<Self> {
        let control = PathBuf::from(format!("{name}.sock"));
        command.arg("--control").arg(&control);
        // With a summary on standard output, the console is on standard error;
        // else what the program says comes with the test's own lines.
        let is_summed_up = command.get_args().any(|arg| arg == "--json");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(if is_summed_up { Stdio::piped() } else { Stdio::inherit() })
            .spawn()
            .with_context(|| format!("running {command:?}"))?;
        let stdin = child.stdin.take().context("its standard input")?;
        let stdout = child.stdout.take().context("its standard output")?;
        let (console, summary): (Box<dyn Read + Send>, _) = match child.stderr.take() {
            Some(stderr) => (Box::new(stderr), Some(stdout)),
            None => (Box::new(stdout), None),
        };
        let (sender, lines) = channel();
        thread::spawn(move || {
            let mut console = BufReader::new(console);
            let mut bytes = Vec::new();
            while console.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
                if sender.send(String::from_utf8_lossy(&bytes).trim_end().to_owned()).is_err() {
                    return;
                }
                bytes.clear();
            }
        });
        let console = Vec::new();
        Ok(Self { child, stdin, lines, console, control, summary, patience: PATIENCE })
    }

    /// Leaves it the time to miss each page of a load of this size.
    pub(super) fn patient(mut self, size: &Size) -> Self {
        let pages = u32::try_from(size.still).unwrap_or(u32::MAX);
        self.patience = PATIENCE + MISSED.saturating_mul(pages);
        self
    }

    /// Waits for a line of the console from which `find` makes something.
    pub(super) fn find<T>(
        &mut self,
        what: &str,
        find: impl Fn(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        self.find_within(self.patience, what, find)
    }

    fn find_within<T>(
        &mut self,
        patience: Duration,
        what: &str,
        find: impl Fn(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next_line(left)? {
                Some(line) => {
                    if let Some(found) = find(&line) {
                        return Ok(found);
                    }
                }
                None => bail!(self.lost(&format!("waiting for {what}: nothing in {patience:?}"))),
            }
        }
    }

    /// The next line; `None` if there is none in time.
    fn next_line(&mut self, timeout: Duration) -> anyhow::Result<Option<String>> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => {
                self.console.push(line.clone());
                if TROUBLE.iter().any(|word| line.contains(word)) {
                    // The rest of what it has to say.
                    thread::sleep(Duration::from_secs(1));
                    self.console.extend(self.lines.try_iter());
                    bail!(self.lost("the guest's kernel is in trouble"));
                }
                Ok(Some(line))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait().context("waiting for the VM's process")?;
                bail!(self.lost(&format!("the VM ended ({status})")))
            }
        }
    }

    fn lost(&self, why: &str) -> GuestLost {
        GuestLost(format!("{why}{}", self.tail()))
    }

    /// The latest lines of the console, for errors.
    fn tail(&self) -> String {
        let from = self.console.len().saturating_sub(SHOWN);
        let lines: String =
            self.console[from..].iter().map(|line| format!("\n  guest| {line}")).collect();
        if lines.is_empty() { "; it printed nothing".into() } else { lines }
    }

    /// The next of the lines that tell how far the load is. The guest must have
    /// found nothing wrong.
    pub(super) fn beat(&mut self) -> anyhow::Result<Beat> {
        let beat = self.any_beat()?;
        ensure!(beat.wrong == 0, "the guest found {} things wrong{}", beat.wrong, self.tail());
        Ok(beat)
    }

    /// As [`beat`](Self::beat), whatever the guest found.
    pub(super) fn any_beat(&mut self) -> anyhow::Result<Beat> {
        self.find("the load to go on", Beat::parse)
    }

    /// Waits until all parts of the load have done so much more than now.
    pub(super) fn work(&mut self, more: u64) -> anyhow::Result<Beat> {
        let begin = self.beat()?;
        let deadline = Instant::now() + 2 * self.patience;
        loop {
            let beat = self.beat()?;
            if beat.has_done(more, &begin) {
                return Ok(beat);
            }
            ensure!(Instant::now() < deadline, self.lost("the load stands still"));
        }
    }

    /// Types a line on the guest's console.
    pub(super) fn say(&mut self, command: &str) -> anyhow::Result<()> {
        let said = self.stdin.write_all(format!("{command}\n").as_bytes());
        let said = said.and_then(|()| self.stdin.flush());
        said.map_err(|error| self.lost(&format!("the guest's console: {error}")).into())
    }

    /// Ends the load; what the guest says of it.
    pub(super) fn verdict(&mut self) -> anyhow::Result<Verdict> {
        self.say("stop")?;
        let mut verdict = self.find("a verdict", Verdict::parse)?;
        let wrong = self.console.iter().filter(|line| line.contains("load: wrong: "));
        verdict.wrong.extend(wrong.cloned());
        Ok(verdict)
    }

    /// Ends the load, in which nothing may have been wrong, and the guest.
    pub(super) fn end_well(mut self) -> anyhow::Result<()> {
        self.end()
    }

    /// As [`end_well`](Self::end_well); what a `vmpager vm` with `--json` says of
    /// the run.
    pub(super) fn end_summed_up(mut self) -> anyhow::Result<Value> {
        self.end()?;
        let summary = self.summary.take().context("the VM runs without --json")?;
        serde_json::from_reader(summary).context("the summary of the run")
    }

    fn end(&mut self) -> anyhow::Result<()> {
        let verdict = self.verdict()?;
        ensure!(verdict.is_right, "the guest's verdict: {:#?}{}", verdict.wrong, self.tail());
        self.say("poweroff")?;
        let status = self.wait()?;
        ensure!(status.code() == Some(0), "after power-off the VM ended with {status}");
        Ok(())
    }

    /// Waits for the process to end. What its guest prints then may be trouble:
    /// that is for the exit status to tell.
    pub(super) fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.console.extend(self.lines.try_iter());
            if let Some(status) = self.child.try_wait().context("waiting for the VM's process")? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, self.lost("the VM does not end"));
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has it save itself, and end if `stop` is set.
    pub(super) fn snapshot(
        &mut self,
        lab: &Lab,
        state: &Path,
        memory: &Path,
        stop: bool,
    ) -> anyhow::Result<()> {
        let mut command = Command::new(&lab.vmpager);
        command.args(["vm", "snapshot", "--control"]).arg(&self.control);
        command.arg("--state").arg(state).arg("--memory").arg(memory);
        if stop {
            command.arg("--stop");
        }
        let output = command.output().with_context(|| format!("running {command:?}"))?;
        if !output.status.success() {
            // It may have ended.
            let ended = self.child.try_wait().context("waiting for the VM's process")?;
            self.console.extend(self.lines.try_iter());
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("{command:?}: {error}; the VM's status: {ended:?}{}", self.tail());
        }
        Ok(())
    }

    /// The last complete beat of a VM that has ended.
    pub(super) fn last_beat(&mut self) -> anyhow::Result<Beat> {
        self.console.extend(self.lines.iter());
        let beat = self.console.iter().rev().find_map(|line| Beat::parse(line));
        beat.with_context(|| format!("no beat{}", self.tail()))
    }

    /// Ends the process as a service manager would; it must obey.
    pub(super) fn terminate(mut self) -> anyhow::Result<ExitStatus> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).context("ending the VM")?;
        self.wait()
    }
}
