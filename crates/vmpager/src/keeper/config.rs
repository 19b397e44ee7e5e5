//! What a keeper is told, and how it ends.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use crate::clean;
use crate::daemon::{Access, DaemonError};
use crate::metrics::{Endpoint, EndpointError};

/// What a keeper needs to know.
#[derive(Debug)]
pub struct KeeperConfig {
    /// Where VMMs connect.
    pub socket: PathBuf,
    /// Which of them may.
    pub access: Access,
    /// The files that are served: a worker is given their descriptors, so that it opens
    /// the same ones whatever has become of their names.
    pub sources: Vec<(PathBuf, OwnedFd)>,
    /// Starts a worker, which finds the keeper at its standard input.
    pub worker: Command,
    /// The most peers connected at a time; a quarter of them of one process.
    pub max_connections: usize,
    /// The pause before a worker is started again that did not live for
    /// [`settled`](Self::settled); it doubles with each further one.
    pub first_pause: Duration,
    /// The longest pause.
    pub max_pause: Duration,
    /// A worker that lived so long is started again at once.
    pub settled: Duration,
    /// Take over from the keeper that has the socket.
    pub replace: bool,
    /// Where numbers are shown.
    pub metrics: Option<Endpoint>,
    /// What a service manager gave this process, by name
    /// ([`listen_fds`](vmpager_sys::inherited::listen_fds)): the socket, and what an
    /// earlier keeper left.
    pub inherited: Vec<(OwnedFd, String)>,
}

impl KeeperConfig {
    /// The defaults.
    pub fn new(socket: impl Into<PathBuf>, worker: Command) -> Self {
        Self {
            socket: socket.into(),
            access: Access::default(),
            sources: Vec::new(),
            worker,
            max_connections: 4096,
            first_pause: Duration::from_millis(10),
            max_pause: Duration::from_secs(5),
            settled: Duration::from_secs(1),
            replace: false,
            metrics: None,
            inherited: Vec::new(),
        }
    }

    /// Has clean pages held for the workers: [`clean::files`] at the end of `sources`.
    ///
    /// # Errors
    ///
    /// If the kernel has no memory or descriptor left.
    pub fn hold_clean_pages(&mut self) -> io::Result<()> {
        let names = clean::NAMES.map(PathBuf::from);
        self.sources.extend(names.into_iter().zip(clean::files()?));
        Ok(())
    }

    /// The files of the clean pages, if it holds any.
    pub(super) fn clean_pages(&self) -> impl Iterator<Item = &(PathBuf, OwnedFd)> {
        self.sources.iter().filter(|(path, _)| is_clean_pages(path))
    }

    pub(super) fn clean_pages_mut(&mut self) -> impl Iterator<Item = &mut (PathBuf, OwnedFd)> {
        self.sources.iter_mut().filter(|(path, _)| is_clean_pages(path))
    }
}

fn is_clean_pages(path: &Path) -> bool {
    clean::NAMES.iter().any(|name| path == Path::new(name))
}

/// Why a keeper ended.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The socket cannot be had.
    #[error(transparent)]
    Socket(#[from] DaemonError),
    /// There is nobody to take over from, or nothing that can be taken over.
    #[error("replacing the daemon of {socket}: {problem}")]
    Replace {
        /// The socket.
        socket: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// Numbers cannot be shown where they should be.
    #[error(transparent)]
    Metrics(#[from] EndpointError),
    /// A system call that should not fail did.
    #[error("the keeper: {0}")]
    Io(#[from] io::Error),
}

/// How a keeper ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeeperEnd {
    /// Its worker ended so, and no other one was started.
    Worker(ExitStatus),
    /// Another keeper has all it had.
    Replaced,
    /// A service manager has all it had, for the next keeper.
    Left,
}
