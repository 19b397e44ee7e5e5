//! One keeper hands over to another, of a newer version perhaps: all descriptors,
//! what VMMs connect to among them.
//!
//! ```text
//!   old keeper                                 new keeper
//!     | <---------------------- connects to the control socket
//!     | Hello {layout, fingerprint} -----------> |
//!     |    and the clean pages, if there are any |  starts its worker, which opens
//!     |                                          |  what it serves; goes no further if
//!     |                                          |  that is or reads something else
//!     | <------------------------------- Take -- |
//!     |  kills its worker                        |
//!     | Listener, Metrics, Peer, ..., Known ---> |
//!     | <------------------------------ Taken -- |  tells its worker
//!     |  ends                                    |
//! ```
//!
//! Killing a worker is as good as having it stop: what it was doing, the next one
//! finds. If the new keeper ends before it has said `Taken`, the old one starts a
//! worker again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, chmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use vmpager_sys::peer::Peer;

use super::message::{Kind, Message, receive, send};
use super::table::{Entry, Table};
use crate::daemon::beside;

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where the keeper that listens on `socket` is asked to hand over.
fn control_path(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".keeper");
    path.into()
}

fn unix_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Where another keeper may ask this one to hand over: this user's, or root's.
#[derive(Debug)]
pub(super) struct Control {
    listener: OwnedFd,
    path: PathBuf,
}

impl Control {
    /// Takes the place of whoever was asked there before, in one step: whoever asks
    /// meanwhile finds the one or the other.
    pub(super) fn open(socket: &Path) -> io::Result<Self> {
        let path = control_path(socket);
        // Short, for a socket's path has at most 107 bytes.
        let mut beside = beside(socket).into_os_string();
        beside.push("k");
        let listener = unix_socket()?;
        let _ = std::fs::remove_file(&beside);
        bind(&listener, &SocketAddrUnix::new(beside.as_os_str())?)?;
        let opened = chmod(&beside, Mode::RUSR | Mode::WUSR)
            .and_then(|()| listen(&listener, 4))
            .map_err(io::Error::from)
            .and_then(|()| std::fs::rename(&beside, &path));
        if let Err(error) = opened {
            let _ = std::fs::remove_file(&beside);
            return Err(error);
        }
        Ok(Self { listener, path })
    }

    pub(super) fn listener(&self) -> &OwnedFd {
        &self.listener
    }

    pub(super) fn close(&self) {
        let _ = std::fs::remove_file(&self.path);
    }

    /// Somebody asks. What is served, and how, is for them to judge.
    ///
    /// # Errors
    ///
    /// If it is another user, or says nothing of use.
    pub(super) fn answer(&self, served: [u64; 2], clean: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
        let asking = accept_with(&self.listener, SocketFlags::CLOEXEC)?;
        let Peer { uid, .. } = Peer::of(&asking)?;
        if uid != 0 && uid != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other(format!("user {uid} may not have it")));
        }
        send(&asking, Kind::Hello, [served[0], served[1], 0], clean)?;
        match await_message(&asking)?.kind {
            Kind::Take => Ok(asking),
            kind => Err(io::Error::other(format!("{kind:?} came, not Take"))),
        }
    }
}

/// Hands all there is over to the other end.
///
/// # Errors
///
/// If it does not confirm to have it.
pub(super) fn give(
    table: &Table,
    listener: impl AsFd,
    metrics: Option<&OwnedFd>,
    to: &OwnedFd,
) -> io::Result<()> {
    send(to, Kind::Listener, [0; 3], &[listener.as_fd()])?;
    if let Some(metrics) = metrics {
        send(to, Kind::Metrics, [0; 3], &[metrics.as_fd()])?;
    }
    for entry in table.entries().collect::<Vec<Entry>>() {
        table.tell(entry, to)?;
    }
    send(to, Kind::Known, [0; 3], &[])?;
    match await_message(to)?.kind {
        Kind::Taken => Ok(()),
        kind => Err(io::Error::other(format!("{kind:?} came, not Taken"))),
    }
}

/// The keeper of a socket, asked to hand over.
#[derive(Debug)]
pub(super) struct Predecessor {
    socket: OwnedFd,
    /// The layout and the fingerprint of what it serves.
    pub(super) served: [u64; 2],
    /// Its clean pages, if it has any ([`crate::clean`]).
    pub(super) clean: Vec<OwnedFd>,
}

impl Predecessor {
    pub(super) fn ask(socket: &Path) -> io::Result<Self> {
        let asked = unix_socket()?;
        connect(&asked, &SocketAddrUnix::new(control_path(socket))?)?;
        match await_message(&asked)? {
            Message { kind: Kind::Hello, args: [layout, fingerprint, _], fds } => {
                Ok(Self { socket: asked, served: [layout, fingerprint], clean: fds })
            }
            other => Err(io::Error::other(format!("{:?} came, not Hello", other.kind))),
        }
    }

    /// Receives all it has. Returns what VMMs connect to, and where it shows numbers,
    /// if it does. Until this is confirmed, it may want it back.
    pub(super) fn take(&self, table: &mut Table) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        send(&self.socket, Kind::Take, [0; 3], &[])?;
        let (mut listener, mut metrics) = (None, None);
        loop {
            let message = await_message(&self.socket)?;
            match message.kind {
                Kind::Listener => listener = message.fds.into_iter().next(),
                Kind::Metrics => metrics = message.fds.into_iter().next(),
                Kind::Known => break,
                _ => table.apply(message)?,
            }
        }
        let listener = listener.ok_or_else(|| io::Error::other("no socket came"))?;
        Ok((listener, metrics))
    }

    /// Says that all has come.
    pub(super) fn confirm(&self) -> io::Result<()> {
        send(&self.socket, Kind::Taken, [0; 3], &[])
    }
}

/// The next message, waited for.
pub(super) fn await_message(socket: &OwnedFd) -> io::Result<Message> {
    let patience = Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&patience))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => receive(socket)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()),
    }
}
