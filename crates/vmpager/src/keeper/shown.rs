//! What a keeper does for those who watch a daemon: it holds the socket where numbers
//! are shown, so that scrapers find it whatever becomes of workers, and counts these.
//! It answers nobody.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use tracing::{error, info};

use super::message::{Kind, send};
use crate::metrics::{Endpoint, EndpointError};

/// Where numbers are shown, and those of the keeper.
#[derive(Debug)]
pub(super) struct Shown {
    endpoint: Option<Endpoint>,
    socket: Option<OwnedFd>,
    takeovers: u64,
    /// Since when no worker serves.
    since: Option<Instant>,
    unserved: Duration,
}

impl Shown {
    pub(super) fn new(endpoint: Option<Endpoint>) -> Self {
        Self { endpoint, socket: None, takeovers: 0, since: None, unserved: Duration::ZERO }
    }

    pub(super) fn socket(&self) -> Option<&OwnedFd> {
        self.socket.as_ref()
    }

    /// Listens, unless it is likely that whoever is to be replaced does.
    pub(super) fn open(&mut self, replacing: bool) -> Result<(), EndpointError> {
        let Some(endpoint) = &self.endpoint else { return Ok(()) };
        if !(replacing && endpoint.is_taken()) {
            self.socket = Some(endpoint.listen()?);
            self.say();
        }
        Ok(())
    }

    fn say(&self) {
        if let (Some(endpoint), Some(socket)) = (&self.endpoint, &self.socket) {
            info!(at = %endpoint.reached_at(socket), "metrics are shown");
        }
    }

    /// Whoever is replaced has shown its numbers there, if it did.
    pub(super) fn take(&mut self, socket: Option<OwnedFd>) {
        let Some(endpoint) = self.endpoint.as_ref().filter(|_| self.socket.is_none()) else {
            return;
        };
        self.socket = socket.filter(|socket| endpoint.is_of(socket));
        match &self.socket {
            Some(_) => self.say(),
            None => error!(
                "metrics at {endpoint}: another process listens there; none are shown. Choose \
                 another place, and replace this daemon"
            ),
        }
    }

    /// A worker has ended, and another one will take over.
    pub(super) fn unserved(&mut self) {
        self.takeovers += 1;
        self.since.get_or_insert(Instant::now());
    }

    /// A worker serves.
    pub(super) fn served(&mut self) {
        self.unserved += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }

    /// Has a worker answer those who ask.
    pub(super) fn tell(&self, worker: impl AsFd) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let unserved = u64::try_from(self.unserved.as_nanos()).unwrap_or(u64::MAX);
        send(worker, Kind::Metrics, [self.takeovers, unserved, 0], &[socket.as_fd()])
    }

    pub(super) fn close(&self) {
        if let (Some(endpoint), Some(_)) = (&self.endpoint, &self.socket) {
            endpoint.unlisten();
        }
    }
}
