//! A daemon to test: in this process, watched and listened to; or in one that
//! can be killed.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;
use vmpager::daemon::DaemonEvent;
use vmpager::{Daemon, DaemonConfig, DaemonError, SessionSummary};
use vmpager_core::PageSource;

use super::child::{self, TestChild};
use super::log::{self, Log};
use super::numbered;

/// What happened in a daemon.
#[derive(Clone, Debug)]
pub(crate) enum Seen {
    Started { peer_pid: i32, memory_bytes: u64 },
    Ended(Box<SessionSummary>),
}

/// A daemon that serves on a thread of this process.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) socket: PathBuf,
    /// What its control thread logs.
    pub(crate) log: Log,
    /// What all workers of this process log.
    pub(crate) workers_log: Log,
    stopper: UnixStream,
    seen: Receiver<Seen>,
    thread: Option<JoinHandle<Result<(), DaemonError>>>,
    _dir: TempDir,
}

impl Running {
    pub(crate) fn start(
        source: Arc<dyn PageSource>,
        change: impl FnOnce(&mut DaemonConfig),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("pager.sock");
        let mut config = DaemonConfig::new(&socket, source);
        config.stop_timeout = Duration::from_millis(200);
        change(&mut config);
        let workers_log = log::everywhere();
        let log = Log::default();
        let daemon = Daemon::bind(config).unwrap();
        let stopper = daemon.stopper().unwrap();
        let (tell, seen) = channel();
        let thread = std::thread::spawn({
            let log = log.clone();
            move || {
                tracing::subscriber::with_default(log, || {
                    daemon.run(&mut |event| {
                        let event = match event {
                            DaemonEvent::SessionStarted { peer_pid, memory_bytes, .. } => {
                                Seen::Started { peer_pid, memory_bytes }
                            }
                            DaemonEvent::SessionEnded(summary) => {
                                Seen::Ended(Box::new(summary.clone()))
                            }
                        };
                        let _ = tell.send(event);
                    })
                })
            }
        });
        let thread = Some(thread);
        Self { socket, log, workers_log, stopper, seen, thread, _dir: dir }
    }

    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    pub(crate) fn next(&self) -> Seen {
        self.next_within(Duration::from_secs(10)).expect("something happens in the daemon")
    }

    pub(crate) fn next_within(&self, limit: Duration) -> Option<Seen> {
        match self.seen.recv_timeout(limit) {
            Ok(seen) => Some(seen),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the daemon has ended"),
        }
    }

    pub(crate) fn expect_started(&self) -> (i32, u64) {
        match self.next() {
            Seen::Started { peer_pid, memory_bytes } => (peer_pid, memory_bytes),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn expect_ended(&self) -> SessionSummary {
        match self.next() {
            Seen::Ended(summary) => *summary,
            other => panic!("{other:?}"),
        }
    }

    /// Stops it; it must end without an error. Returns how the sessions that
    /// were left ended.
    pub(crate) fn stop(mut self) -> Vec<SessionSummary> {
        self.end();
        let seen = self.seen.try_iter();
        seen.filter_map(|seen| match seen {
            Seen::Ended(summary) => Some(*summary),
            Seen::Started { .. } => None,
        })
        .collect()
    }

    fn end(&mut self) {
        use std::io::Write;
        let Some(thread) = self.thread.take() else { return };
        // It may have stopped by itself.
        let _ = self.stopper.write_all(b"x");
        let result = thread.join();
        if !std::thread::panicking() {
            result.unwrap().unwrap();
            assert!(!self.socket.exists(), "the socket is left behind");
        }
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait(mut self) {
        let thread = self.thread.take().unwrap();
        thread.join().unwrap().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts a daemon in a process of its own, for a numbered source of so many
/// pages. The test that calls this has to call [`run_if_daemon`] first.
pub(crate) fn spawn(test: &str, socket: &Path, pages: usize) -> TestChild {
    let task = format!("daemon {pages} {}", socket.display());
    let child = child::spawn(test, &task);
    assert_eq!(child.hear(), "listening");
    child
}

/// Runs the daemon this process was started as, if it was; then returns true.
pub(crate) fn run_if_daemon() -> bool {
    let Some(task) = child::task() else { return false };
    let Some(task) = task.strip_prefix("daemon ") else { return false };
    let (pages, socket) = task.split_once(' ').unwrap();
    let daemon = Daemon::bind(DaemonConfig::new(socket, numbered(pages.parse().unwrap())));
    let daemon = daemon.unwrap();
    child::say("listening");
    daemon.run(&mut |_| {}).unwrap();
    true
}
