//! The VMM's side: asking a daemon for its clean pages before handing memory over.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::refusal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use vmpager_sys::memfd;
use vmpager_sys::peer::{recv_with_fds, send_with_fds};

/// How long a daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer there is.
const MAX_ANSWER: usize = 2048;

/// What a VMM sends to be given the clean pages: an object, where a handshake is an array.
#[derive(Debug, Serialize)]
struct Question {
    clean_pages: bool,
}

/// What a daemon answers, with the memfd.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// The memfd's length in bytes.
    pub(crate) clean_pages: u64,
}

/// Clean pages to be mapped privately: byte `n` is byte `n` of the source.
#[derive(Debug)]
pub struct Offered {
    /// The memfd, which can only be read.
    pub memfd: OwnedFd,
    /// Its length in bytes, which nobody can change.
    pub len: u64,
}

/// Asks the daemon at the other end for its clean pages. The handshake, whose regions say
/// `"clean_pages": true`, follows on the same connection.
///
/// # Errors
///
/// If it has none, does not answer, or answers something else.
pub fn ask(socket: &UnixStream) -> io::Result<Offered> {
    let question = serde_json::to_vec(&Question { clean_pages: true })?;
    if send_with_fds(socket, &question, &[])? != question.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let until = Instant::now() + PATIENCE;
    let (mut answer, mut fds) = (Vec::new(), Vec::new());
    while !answer.ends_with(b"\n") {
        let mut bytes = [0; MAX_ANSWER];
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        if poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left))? == 0 {
            let why = format!("no clean pages after {PATIENCE:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        match recv_with_fds(socket, &mut bytes, &mut fds) {
            Ok(0) => return Err(refused("it closed the connection")),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(refused("it closed the connection"));
            }
            Ok(count) if answer.len() + count <= MAX_ANSWER => {
                answer.extend_from_slice(&bytes[..count]);
            }
            Ok(_) => return Err(refused("its answer is too long")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    if let Some(why) = refusal::wait(&*answer).ok().flatten() {
        return Err(refused(&why));
    }
    let answer: Answer = serde_json::from_slice(&answer)?;
    let memfd = fds.into_iter().next().ok_or_else(|| refused("no descriptor came"))?;
    let len = memfd::sealed_len(std::os::fd::AsFd::as_fd(&memfd))?;
    if len != answer.clean_pages {
        return Err(refused("what came has another length than it says"));
    }
    Ok(Offered { memfd, len })
}

fn refused(how: &str) -> io::Error {
    let why = format!("the pager offers no clean pages ({how}): start it with --share-clean");
    io::Error::new(io::ErrorKind::ConnectionRefused, why)
}
