//! The thread that answers scrapers.
//!
//! ```text
//!   accept -> Asking --request--> Answering --all sent--> Leaving --> closed
//!                \__ no request, or no progress, in time: closed __/
//! ```
//!
//! One thread, which never blocks on a peer. When all places are taken, whoever has
//! been there longest makes way for whoever comes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags, accept_with, recv, send, shutdown};
use tracing::{error, warn};

use super::board::Board;
use super::request::{Asked, MAX_REQUEST, Page, answer, refusal, understand};
use super::text;
use crate::worker::{doorbell, ring};

/// The most connections at a time.
const MAX_PEERS: usize = 64;
/// How long a peer may take to ask, and to take its answer.
const TIME: Duration = Duration::from_secs(5);
/// How long a peer may take to hang up after its answer, so that what it still says
/// does not make its kernel throw the answer away.
const LEAVE: Duration = Duration::from_secs(1);
/// A snapshot so old is as good as a new one.
const FRESH: Duration = Duration::from_millis(250);
/// The pause after the system refused to accept.
const PAUSE: Duration = Duration::from_millis(100);
/// How much the kernel should prefer others to this thread.
const NICE: i32 = 10;

/// The thread that answers. Ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    stop: Arc<OwnedFd>,
}

impl Server {
    /// Answers whoever connects to `listener`, which does not block.
    ///
    /// # Errors
    ///
    /// If there is no descriptor or no thread to be had.
    pub(crate) fn start(listener: OwnedFd, board: Arc<Board>) -> io::Result<Self> {
        let stop = Arc::new(doorbell()?);
        let place = Place {
            listener,
            stop: stop.clone(),
            board,
            peers: Vec::new(),
            accept_at: None,
            seen: None,
        };
        std::thread::Builder::new().name("vmpager-metrics".into()).spawn(move || place.run())?;
        Ok(Self { stop })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        ring(&self.stop);
    }
}

/// Somebody who has connected.
struct Peer {
    socket: OwnedFd,
    state: State,
    until: Instant,
}

enum State {
    Asking(Vec<u8>),
    Answering { bytes: Vec<u8>, sent: usize },
    Leaving,
}

/// What was seen at a time, as text.
struct Seen {
    at: Instant,
    metrics: String,
    sessions: String,
}

struct Place {
    listener: OwnedFd,
    stop: Arc<OwnedFd>,
    board: Arc<Board>,
    /// Oldest first.
    peers: Vec<Peer>,
    accept_at: Option<Instant>,
    seen: Option<Seen>,
}

impl Place {
    fn run(mut self) {
        // Of this thread alone, on Linux. It is no more than a courtesy.
        let _ = rustix::process::setpriority_process(None, NICE);
        loop {
            match self.wait() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    error!("metrics are shown no longer: {error}");
                    return;
                }
            }
            let now = Instant::now();
            self.peers.retain(|peer| peer.until > now);
            if self.accept_at.is_none_or(|at| at <= now) {
                self.accept_at = None;
                self.accept();
            }
            self.go_on();
        }
    }

    /// Waits until there is something to do. False if it is time to end.
    fn wait(&self) -> io::Result<bool> {
        let now = Instant::now();
        let listens = if self.accept_at.is_none() { PollFlags::IN } else { PollFlags::empty() };
        let mut fds =
            vec![PollFd::new(&self.stop, PollFlags::IN), PollFd::new(&self.listener, listens)];
        fds.extend(self.peers.iter().map(|peer| {
            let answering = matches!(peer.state, State::Answering { .. });
            PollFd::new(&peer.socket, if answering { PollFlags::OUT } else { PollFlags::IN })
        }));
        let due = self.peers.iter().map(|peer| peer.until).chain(self.accept_at).min();
        let timeout = due.map(|at| at.saturating_duration_since(now));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(fds.first().is_none_or(|stop| stop.revents().is_empty()))
    }

    /// Lets in whoever waits; at most as many as there are places, so that those
    /// who are in get their turn.
    fn accept(&mut self) {
        for _ in 0..MAX_PEERS {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.listener, flags) {
                Ok(socket) => {
                    if self.peers.len() == MAX_PEERS {
                        self.peers.remove(0);
                    }
                    let (state, until) = (State::Asking(Vec::new()), Instant::now() + TIME);
                    self.peers.push(Peer { socket, state, until });
                }
                Err(Errno::AGAIN) => return,
                // Whoever it was has gone again.
                Err(Errno::CONNABORTED | Errno::INTR | Errno::PROTO) => {}
                Err(error) => {
                    warn!("accepting a scraper: {error}; trying again shortly");
                    self.accept_at = Some(Instant::now() + PAUSE);
                    return;
                }
            }
        }
    }

    /// Does for every peer what can be done at once.
    fn go_on(&mut self) {
        let mut peers = std::mem::take(&mut self.peers);
        peers.retain_mut(|peer| {
            loop {
                match self.step(peer) {
                    Ok(true) => {}
                    Ok(false) => return true,
                    // It has hung up, or its connection is broken.
                    Err(_) => return false,
                }
            }
        });
        self.peers = peers;
    }

    /// One step with a peer. False if that has to do something first.
    fn step(&mut self, peer: &mut Peer) -> Result<bool, Errno> {
        let state = match &mut peer.state {
            State::Asking(request) => {
                if !receive(&peer.socket, request)? {
                    return Ok(false);
                }
                match understand(request) {
                    Asked::More => return Ok(true),
                    asked => State::Answering { bytes: self.answer(asked), sent: 0 },
                }
            }
            State::Answering { bytes, sent } => {
                let left = bytes.get(*sent..).unwrap_or_default();
                if !left.is_empty() {
                    match send(&peer.socket, left, SendFlags::NOSIGNAL) {
                        Ok(count) => *sent += count,
                        Err(Errno::AGAIN) => return Ok(false),
                        Err(error) => return Err(error),
                    }
                    return Ok(true);
                }
                shutdown(&peer.socket, Shutdown::Write)?;
                State::Leaving
            }
            State::Leaving => return receive(&peer.socket, &mut Vec::new()),
        };
        peer.until = Instant::now() + if matches!(state, State::Leaving) { LEAVE } else { TIME };
        peer.state = state;
        Ok(true)
    }

    fn answer(&mut self, asked: Asked) -> Vec<u8> {
        match asked {
            Asked::More => Vec::new(),
            Asked::Other(status, what) => refusal(status, what),
            Asked::Page(page, contents) => match self.see() {
                Ok(seen) => {
                    let body = match page {
                        Page::Metrics => &seen.metrics,
                        Page::Sessions => &seen.sessions,
                    };
                    answer(page, body, contents)
                }
                Err(error) => refusal("500 Internal Server Error", &error),
            },
        }
    }

    /// What there is now, or was a moment ago.
    fn see(&mut self) -> Result<&Seen, String> {
        let seen = match self.seen.take().filter(|seen| seen.at.elapsed() < FRESH) {
            Some(seen) => seen,
            None => {
                let snapshot = self.board.look();
                let page = serde_json::to_string(&snapshot.page());
                let sessions = page.map_err(|error| format!("showing the sessions: {error}"))?;
                let metrics = text::render(snapshot);
                let metrics = metrics.map_err(|error| format!("showing the metrics: {error}"))?;
                Seen { at: Instant::now(), metrics, sessions }
            }
        };
        Ok(self.seen.insert(seen))
    }
}

/// Receives what there is, once. False if there is nothing yet.
fn receive(socket: impl AsFd, into: &mut Vec<u8>) -> Result<bool, Errno> {
    let mut bytes = [0; MAX_REQUEST];
    let room = MAX_REQUEST.saturating_sub(into.len()).max(1);
    let space = bytes.get_mut(..room).unwrap_or_default();
    match recv(socket, &mut *space, RecvFlags::empty()) {
        Ok((0, _)) => Err(Errno::PIPE),
        Ok((count, _)) => {
            into.extend_from_slice(bytes.get(..count).unwrap_or_default());
            Ok(true)
        }
        Err(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error),
    }
}
