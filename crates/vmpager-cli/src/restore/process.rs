//! Processes of this same program, never left behind.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// A running process; killed if it is dropped before its end.
#[derive(Debug)]
pub(super) struct Running {
    child: Option<Child>,
}

/// How long a process may take to be ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// Starts this program with other arguments. What it prints is kept, its
/// warnings and errors are shown.
pub(super) fn vmpager(args: &[PathBuf]) -> anyhow::Result<Running> {
    let program = std::env::current_exe().context("finding this program")?;
    let child = Command::new(program)
        .args(args)
        .env("VMPAGER_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting this program again")?;
    Ok(Running { child: Some(child) })
}

impl Running {
    /// Waits until a socket exists, or the process ends.
    pub(super) fn wait_for(&mut self, socket: &Path) -> anyhow::Result<()> {
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
    pub(super) fn output(mut self) -> anyhow::Result<String> {
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
