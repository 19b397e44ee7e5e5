//! Pagers for guests that are restored on demand.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmpager::core::PageSource;
use vmpager::daemon::DaemonEvent;
use vmpager::{Daemon, DaemonConfig, DaemonError, SessionSummary};

use super::Lab;

/// How long `serve` may take to listen, or to stop.
const PATIENCE: Duration = Duration::from_secs(20);

/// `vmpager serve` in a process of its own. Killed when dropped.
#[derive(Debug)]
pub(super) struct Serve {
    child: Child,
    socket: PathBuf,
}

impl Drop for Serve {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Serve {
    /// Starts it, and waits until it listens.
    pub(super) fn start(lab: &Lab, memory: &Path, more: &[&str]) -> anyhow::Result<Self> {
        let socket = PathBuf::from("pager.sock");
        let mut command = Command::new(&lab.vmpager);
        command.args(["serve", "--json", "--socket"]).arg(&socket);
        command.arg("--memory").arg(memory).args(more);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let serve = Self { child: child.context("running vmpager serve")?, socket };
        let begin = Instant::now();
        while !serve.socket.exists() {
            ensure!(begin.elapsed() < PATIENCE, "vmpager serve does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(serve)
    }

    /// Stops it; what it says of its sessions.
    pub(super) fn stop(mut self) -> anyhow::Result<Vec<SessionSummary>> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).context("stopping the pager")?;
        let mut report = Vec::new();
        let stdout = self.child.stdout.as_mut().context("its standard output")?;
        std::io::Read::read_to_end(stdout, &mut report).context("its report")?;
        let status = self.child.wait().context("waiting for the pager")?;
        ensure!(status.success(), "vmpager serve ended with {status}");
        let report: Value = serde_json::from_slice(&report).context("its report")?;
        serde_json::from_value(report["sessions"].clone()).context("its sessions")
    }
}

/// A daemon in this process, with a source of the test's own.
#[derive(Debug)]
pub(super) struct OwnDaemon {
    stopper: UnixStream,
    thread: JoinHandle<Result<Vec<SessionSummary>, DaemonError>>,
}

impl OwnDaemon {
    /// Starts it. It listens when this returns.
    pub(super) fn start(
        socket: &Path,
        source: Arc<dyn PageSource>,
        change: impl FnOnce(&mut DaemonConfig),
    ) -> anyhow::Result<Self> {
        let mut config = DaemonConfig::new(socket, source);
        change(&mut config);
        let daemon = Daemon::bind(config)?;
        let stopper = daemon.stopper().context("a way to stop the pager")?;
        let thread = thread::spawn(move || {
            let mut ended = Vec::new();
            daemon.run(&mut |event| {
                if let DaemonEvent::SessionEnded(summary) = event {
                    ended.push(summary.clone());
                }
            })?;
            Ok(ended)
        });
        Ok(Self { stopper, thread })
    }

    /// Stops it; what became of its sessions.
    pub(super) fn stop(mut self) -> anyhow::Result<Vec<SessionSummary>> {
        self.stopper.write_all(b"x").context("stopping the pager")?;
        let ended = self.thread.join().map_err(|_| anyhow::anyhow!("the pager panicked"))?;
        Ok(ended?)
    }
}
