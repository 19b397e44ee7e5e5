//! What a pager says to a process that comes to its door.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::client::AttachError;
use super::protocol::{Frame, Inbox, Region, send};

/// How long the pager may take to answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// What the pager offers.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) socket: UnixStream,
    inbox: Inbox,
    pub(super) regions: Vec<Region>,
    pub(super) map: OwnedFd,
    pub(super) queue: OwnedFd,
    pub(super) bell: OwnedFd,
    pub(super) memfds: Vec<OwnedFd>,
}

impl Offer {
    /// Asks at a door.
    pub(super) fn ask(path: &Path) -> Result<Self, AttachError> {
        let socket = UnixStream::connect(path)
            .map_err(|error| AttachError::Connect { path: path.into(), error })?;
        let mut inbox = Inbox::default();
        tell(&socket, &Frame::Hello, &[])?;
        let (regions, fds) = match receive(&socket, &mut inbox)? {
            (Frame::Memory(regions), fds) => (regions, fds),
            (other, _) => return Err(unexpected(other)),
        };
        let mut fds = fds.into_iter();
        let (Some(map), Some(queue), Some(bell)) = (fds.next(), fds.next(), fds.next()) else {
            return Err(answer("fewer than three descriptors"));
        };
        let memfds = fds.collect();
        Ok(Self { socket, inbox, regions, map, queue, bell, memfds })
    }

    /// Says how this process will take part, and returns what the pager says to
    /// that.
    pub(super) fn accept(
        &mut self,
        frame: &Frame,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Frame, AttachError> {
        tell(&self.socket, frame, fds)?;
        Ok(receive(&self.socket, &mut self.inbox)?.0)
    }
}

fn tell(socket: &UnixStream, frame: &Frame, fds: &[BorrowedFd<'_>]) -> Result<(), AttachError> {
    match send(socket, frame, fds) {
        // It may have said why it hung up.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(answer(&error.to_string())),
        _ => Ok(()),
    }
}

/// The pager's next frame.
fn receive(socket: &UnixStream, inbox: &mut Inbox) -> Result<(Frame, Vec<OwnedFd>), AttachError> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(frame) = inbox.receive(socket)? {
            return Ok(frame);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(answer("none came in time"));
        }
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(answer(&io::Error::from(error).to_string())),
        }
    }
}

pub(super) fn answer(problem: &str) -> AttachError {
    AttachError::Answer(problem.into())
}

pub(super) fn unexpected(frame: Frame) -> AttachError {
    match frame {
        Frame::Refused(why) => AttachError::Refused(why),
        other => answer(&format!("{other:?}, which was not asked for")),
    }
}
