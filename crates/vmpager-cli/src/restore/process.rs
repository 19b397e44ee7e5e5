//! Processes of this same program, never left behind.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// A running process; killed if it is dropped before its end.
#[derive(Debug)]
pub(crate) struct Running {
    child: Option<Child>,
}

/// How long a process may take to be ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// Starts this program with other arguments. What it prints is kept, its
/// warnings and errors are shown.
pub(crate) fn vmpager(args: &[PathBuf]) -> anyhow::Result<Running> {
    let child = program(args)?.stdin(Stdio::null()).spawn().context(STARTING)?;
    Ok(Running { child: Some(child) })
}

/// The same, with what is written there as its standard input, and what it prints to
/// be read there.
pub(crate) fn vmpager_to_talk_to(
    args: &[PathBuf],
) -> anyhow::Result<(Running, ChildStdin, BufReader<ChildStdout>)> {
    let mut child = program(args)?.stdin(Stdio::piped()).spawn().context(STARTING)?;
    let ends = child.stdin.take().zip(child.stdout.take());
    let running = Running { child: Some(child) };
    let (to, from) = ends.context("pipes to a process")?;
    Ok((running, to, BufReader::new(from)))
}

const STARTING: &str = "starting this program again";

fn program(args: &[PathBuf]) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new(program);
    command.args(args).env("VMPAGER_LOG", "warn").stdout(Stdio::piped());
    Ok(command)
}

impl Running {
    /// Its process id.
    pub(crate) fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Waits until a socket exists, or the process ends.
    pub(crate) fn wait_for(&mut self, socket: &Path) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        while !socket.exists() {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                bail!("the pager ended with {status} before it listened");
            }
            if Instant::now() > until {
                bail!("{} did not appear within {PATIENCE:?}", socket.display());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits for its end, and returns what it printed.
    pub(crate) fn output(mut self) -> anyhow::Result<String> {
        let mut child = self.child.take().context("a process is waited for once")?;
        let mut text = String::new();
        let read = child.stdout.take().map(|mut out| out.read_to_string(&mut text)).transpose();
        let status = child.wait()?;
        read?;
        if !status.success() {
            bail!("it ended with {status}");
        }
        Ok(text)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
