//! What a keeper and its worker tell each other: messages of four words, with
//! descriptors, on a unix socket that keeps their borders. Both ends are this
//! program, perhaps in two versions.
//!
//! ```text
//!   keeper                                   worker
//!     | Sources {fds} ------------------------> |  opens what it serves
//!     | <----------------- Ready {layout, print} |
//!     | Metrics {takeovers, unserved} {fd} ----> |  if numbers are shown
//!     | Peer {peer, memories so far} {fds} ----> |  \  all that is known, then
//!     | Door, Guest, Memory {peer, memory} ----> |   } whoever comes
//!     | Known ---------------------------------> |  /
//!     | <--------- Keep {peer, memory} {3 fds} -- |  before it is served
//!     | <---- Door, Guest, Shut, Left {peer, .. } |  as other processes come and go
//!     | <--------- Drop {peer, memory} ---------- |
//!     | <--------- Forget {peer} ---------------- |
//!     | Stop ----------------------------------> |
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmpager_sys::peer::{look_with_fds, recv_with_fds, send_with_fds};

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Kind {
    /// The descriptors of what is served, in the order the keeper was given them.
    Sources = 1,
    /// A process has connected: `[peer, memories kept so far, who]`, its socket
    /// and, if there is one, its pidfd.
    Peer = 2,
    /// A memory of a peer: `[peer, memory]`, userfaultfd, page map, record.
    Memory = 3,
    /// All that was known has been told.
    Known = 4,
    /// End.
    Stop = 5,
    /// The socket where numbers are shown: `[workers replaced so far, nanoseconds
    /// without one that served]`.
    Metrics = 6,
    /// Where other processes come to take part in a memory: `[peer, memory, number in
    /// its name]`, socket, fault queue, the queue's eventfd. Told before the memory.
    Door = 7,
    /// A process that takes part: `[peer, memory, guest]`, the socket it came by; in
    /// `guest`, [`Guest`](super::Guest) says what it is.
    Guest = 8,
    /// The worker can take over: `[layout, fingerprint of what it serves]`.
    Ready = 16,
    /// Keep this memory: as `Memory`.
    Keep = 17,
    /// Keep it no longer: `[peer, memory]`.
    Drop = 18,
    /// Nothing more is to be kept of this peer: `[peer]`.
    Forget = 19,
    /// A process takes part no longer: as `Guest`, without the socket.
    Left = 20,
    /// A memory has no door, nor guests: `[peer, memory]`.
    Shut = 21,
    /// A keeper of this protocol: `[layout, fingerprint]`, as its worker's.
    Hello = 32,
    /// Hand over all there is.
    Take = 33,
    /// What VMMs connect to.
    Listener = 34,
    /// It has been taken.
    Taken = 35,
}

const KINDS: [Kind; 18] = [
    Kind::Sources,
    Kind::Peer,
    Kind::Memory,
    Kind::Known,
    Kind::Stop,
    Kind::Metrics,
    Kind::Door,
    Kind::Guest,
    Kind::Ready,
    Kind::Keep,
    Kind::Drop,
    Kind::Forget,
    Kind::Left,
    Kind::Shut,
    Kind::Hello,
    Kind::Take,
    Kind::Listener,
    Kind::Taken,
];

/// A message that has come.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) kind: Kind,
    pub(crate) args: [u64; 3],
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// The three descriptors of a memory (userfaultfd, page map, record) or of a door
    /// (socket, fault queue, eventfd).
    pub(crate) fn three(self) -> io::Result<[OwnedFd; 3]> {
        let kind = self.kind;
        self.fds.try_into().map_err(|fds: Vec<OwnedFd>| {
            invalid(format!("{kind:?} came with {} descriptors, not with 3", fds.len()))
        })
    }
}

/// A process that takes part in a memory, as one word: its number among those that
/// came by the memory's door and, in the low byte, among the readers of the fault
/// queue, if it is one (0 is the pager's own).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) id: u64,
    pub(crate) reader: u64,
}

impl Guest {
    pub(crate) fn word(self) -> u64 {
        self.id << 8 | self.reader & 0xff
    }

    pub(crate) fn of(word: u64) -> Self {
        Self { id: word >> 8, reader: word & 0xff }
    }
}

const BYTES: usize = 32;

/// Two ends of a connection.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends a message. Waits for room only if the socket is a blocking one.
pub(crate) fn send(
    socket: impl AsFd,
    kind: Kind,
    args: [u64; 3],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let [a, b, c] = args;
    let words = [kind as u64, a, b, c].map(u64::to_le_bytes);
    send_with_fds(socket, words.as_flattened(), fds).map(drop)
}

/// The next message; None at the end, `WouldBlock` if there is none yet.
pub(crate) fn receive(socket: impl AsFd) -> io::Result<Option<Message>> {
    message(|bytes, fds| recv_with_fds(&socket, bytes, fds))
}

/// The same, but leaves the message where it is.
pub(super) fn look(socket: impl AsFd) -> io::Result<Option<Message>> {
    message(|bytes, fds| look_with_fds(&socket, bytes, fds))
}

fn message(
    from: impl Fn(&mut [u8], &mut Vec<OwnedFd>) -> io::Result<usize>,
) -> io::Result<Option<Message>> {
    let mut bytes = [0; BYTES];
    let mut fds = Vec::new();
    let count = loop {
        match from(&mut bytes, &mut fds) {
            // The other end died with messages unread. Said once, before the
            // messages that it had sent.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            result => break result?,
        }
    };
    match count {
        0 => return Ok(None),
        BYTES => {}
        _ => return Err(invalid(format!("a message of {count} bytes"))),
    }
    let (words, _) = bytes.as_chunks::<8>();
    let word = |i: usize| words.get(i).map_or(0, |word| u64::from_le_bytes(*word));
    let kind = KINDS.into_iter().find(|kind| *kind as u64 == word(0));
    let kind = kind.ok_or_else(|| invalid(format!("a message of kind {}", word(0))))?;
    Ok(Some(Message { kind, args: [word(1), word(2), word(3)], fds }))
}

fn invalid(what: String) -> io::Error {
    let what = format!("{what}; is the other end of another version?");
    io::Error::new(io::ErrorKind::InvalidData, what)
}
