//! The process at the other end of a unix socket: its descriptors, its
//! identity, its end.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The most descriptors taken from one message; the kernel closes the rest.
pub const MAX_DESCRIPTORS: usize = 16;

/// What a descriptor is, as `/proc/self/fd` names it: a path, or something
/// like `anon_inode:[userfaultfd]`.
pub fn fd_kind(fd: BorrowedFd<'_>) -> String {
    match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(target) => target.to_string_lossy().into_owned(),
        Err(error) => format!("unknown ({error})"),
    }
}

/// How `/proc/self/fd` names a userfaultfd.
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

/// Whether a descriptor is a userfaultfd.
pub fn is_userfaultfd(fd: BorrowedFd<'_>) -> bool {
    fd_kind(fd) == USERFAULTFD
}

/// Sends bytes and descriptors in one message.
///
/// # Errors
///
/// If the peer is gone or the message does not fit the socket.
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?)
}

/// Receives bytes, and appends the descriptors that came with them. Returns
/// the number of bytes; 0 is the end of the stream.
///
/// # Errors
///
/// `WouldBlock` if nothing is there, or what the system says.
pub fn recv_with_fds(
    socket: impl AsFd,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    Ok(receive(socket.as_fd(), into, fds, RecvFlags::empty())?.0)
}

/// The same, but leaves everything where it is: whoever holds the socket after
/// this process can receive it once more. Goes on where the last look ended,
/// once [`look_from`] has said where to begin.
///
/// # Errors
///
/// As [`recv_with_fds`]; EMFILE if there were descriptors of which this process could
/// not take all, having too many.
pub fn look_with_fds(
    socket: impl AsFd,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let before = fds.len();
    let (bytes, truncated) = receive(socket.as_fd(), into, fds, RecvFlags::PEEK)?;
    if truncated && fds.len() - before < MAX_DESCRIPTORS {
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok(bytes)
}

/// Returns the number of bytes, and whether there were more descriptors than were
/// taken.
fn receive(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    flags: RecvFlags,
) -> io::Result<(usize, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(into)], &mut ancillary, flags) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok((received.bytes, received.flags.contains(ReturnFlags::CTRUNC)))
}

/// Sets how far from the start of what was ever sent the next look begins
/// (`SO_PEEK_OFF`), provided nothing was received but by looking.
///
/// # Errors
///
/// If the kernel cannot do that for this socket.
pub fn look_from(socket: BorrowedFd<'_>, offset: u32) -> io::Result<()> {
    let offset = libc::c_int::try_from(offset).map_err(io::Error::other)?;
    let len: libc::socklen_t = 4; // of an int
    // SAFETY: the option reads one int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            len,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Who is at the other end of a socket.
#[derive(Debug)]
pub struct Peer {
    /// Its process id, for messages; only `pidfd` identifies it.
    pub pid: i32,
    /// The user it ran as when it connected.
    pub uid: u32,
    /// The process, pinned: readable once it has exited.
    pub pidfd: Option<OwnedFd>,
}

impl Peer {
    /// Asks the socket. SO_PEERPIDFD (Linux 6.5) cannot name a recycled pid; the pid
    /// of SO_PEERCRED can, if the peer has exited by now, and is opened only where the
    /// kernel has nothing better.
    ///
    /// # Errors
    ///
    /// If the socket is not connected.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let cred = rustix::net::sockopt::socket_peercred(&socket)?;
        let pidfd = match peer_pidfd(socket.as_fd()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                pidfd_open(cred.pid, PidfdFlags::empty()).map_err(io::Error::from)
            }
            // It may have exited: then nobody else is taken for it.
            asked => asked,
        };
        let pidfd = pidfd.ok();
        Ok(Self { pid: Pid::as_raw(Some(cred.pid)), uid: cred.uid.as_raw(), pidfd })
    }
}

/// The groups of the process at the other end of a socket when it connected: its
/// own, then those it was a member of.
///
/// # Errors
///
/// If the socket is not connected.
pub fn groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let own = rustix::net::sockopt::socket_peercred(&socket)?.gid.as_raw();
    let mut groups = vec![0_u32; 64];
    loop {
        let mut len = libc::socklen_t::try_from(groups.len() * 4).map_err(io::Error::other)?;
        // SAFETY: the option writes at most `len` bytes, for which `groups` has space.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let needed = usize::try_from(len).map_err(io::Error::other)? / 4;
        let error = io::Error::last_os_error();
        if result == 0 {
            groups.truncate(needed);
            groups.insert(0, own);
            return Ok(groups);
        }
        if error.raw_os_error() != Some(libc::ERANGE) || needed <= groups.len() {
            return Err(error);
        }
        groups.resize(needed, 0);
    }
}

/// Ends a connection, whoever else holds this end of it open. What was sent and not
/// received is dropped first, descriptors included: the kernel would call its loss a
/// reset, where the other end is to see the end.
///
/// # Errors
///
/// If the socket is no longer connected.
pub fn end(socket: impl AsFd) -> io::Result<()> {
    rustix::net::shutdown(&socket, rustix::net::Shutdown::Both)?;
    // No more comes now.
    let mut dropped = [0_u8; 16 * 1024];
    loop {
        match rustix::net::recv(&socket, dropped.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether the process of a pidfd has exited.
pub fn has_exited(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// A pidfd of this process.
///
/// # Errors
///
/// If no descriptor is left.
pub fn own_pidfd() -> io::Result<OwnedFd> {
    Ok(pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?)
}

fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: libc::c_int = -1;
    let mut len: libc::socklen_t = 4; // of an int
    // SAFETY: the option writes one int, for which there is space.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if result != 0 || fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: on success the kernel returns a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether another process still holds a userfaultfd: if it does, our end
/// freezes its faulting threads; if not, they would read zeroes.
pub fn holds_userfaultfd(pid: i32) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .any(|target| target.as_os_str() == USERFAULTFD)
}
