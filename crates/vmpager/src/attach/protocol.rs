//! What is said on the socket of a [`Door`](super::Door): frames, and limits on
//! everything in them. `docs/sharing.md` has the bytes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vmpager_core::Slot;
use vmpager_core::page_map::MAX_SLOTS;
use vmpager_sys::peer::{MAX_DESCRIPTORS, look_with_fds, recv_with_fds, send_with_fds};

/// What a frame begins with: `b"VMPA"`.
const MAGIC: u32 = u32::from_le_bytes(*b"VMPA");
/// The version of the protocol.
pub(super) const VERSION: u16 = 1;
const HEADER: usize = 16;
/// The longest body: that of [`Frame::Memory`] with all its regions.
const MAX_BODY: usize = 8 + MAX_SLOTS * REGION;
const REGION: usize = 40;
/// The most regions of one memory that may be shared.
pub(super) const MAX_REGIONS: usize = MAX_SLOTS;
/// The most memfds they may lie in: three descriptors are spoken for.
pub(super) const MAX_MEMFDS: usize = MAX_DESCRIPTORS - 3;

/// Why a frame was not understood.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// It does not begin as a frame does.
    #[error("a message begins with {0:#010x}, not with \"VMPA\"")]
    Magic(u32),
    /// Another version.
    #[error("a message of version {0}; this program speaks version {VERSION}")]
    Version(u16),
    /// No frame is that long.
    #[error("a message of kind {kind} with {len} bytes; the most is {MAX_BODY}")]
    TooLong {
        /// Its kind.
        kind: u16,
        /// Its length.
        len: u32,
    },
    /// A kind, or a length, that is none.
    #[error("a message of kind {kind} with {len} bytes, which is none of version {VERSION}")]
    Kind {
        /// Its kind.
        kind: u16,
        /// Its length.
        len: usize,
    },
    /// More descriptors than any frame has.
    #[error("more than {MAX_DESCRIPTORS} descriptors came with one message")]
    Descriptors,
}

/// A region as the socket describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Which of the memfds it lies in.
    pub memfd: u32,
    /// Where in it.
    pub offset: u64,
    /// Its page size in bytes.
    pub page_size: u64,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// From a peer: let me take part.
    Hello,
    /// The answer. Descriptors: page map, fault queue, its eventfd, memfds.
    Memory(Vec<Region>),
    /// From a peer: here are my mappings of the regions, in their order.
    /// Descriptor: the userfaultfd they are registered with.
    View(Vec<u64>),
    /// The answer: their faults are served.
    Serving,
    /// From a peer: I shall resolve faults.
    Reader,
    /// The answer: under this number.
    ReaderId(u32),
    /// The end: why.
    Refused(String),
    /// From a peer: I shall ask by the queue alone.
    Asks,
}

impl Frame {
    fn kind(&self) -> u16 {
        match self {
            Self::Hello => 1,
            Self::Memory(_) => 2,
            Self::View(_) => 3,
            Self::Serving => 4,
            Self::Reader => 5,
            Self::ReaderId(_) => 6,
            Self::Refused(_) => 7,
            Self::Asks => 8,
        }
    }

    fn body(&self) -> Vec<u8> {
        let mut body = Vec::new();
        match self {
            Self::Hello | Self::Serving | Self::Reader | Self::Asks => {}
            Self::ReaderId(id) => body.extend(id.to_le_bytes()),
            Self::Refused(why) => {
                body.extend(why.bytes().take(MAX_BODY));
            }
            Self::View(addresses) => {
                addresses.iter().for_each(|hva| body.extend(hva.to_le_bytes()));
            }
            Self::Memory(regions) => {
                for region in regions {
                    body.extend(region.gpa.to_le_bytes());
                    body.extend(region.len.to_le_bytes());
                    body.extend(region.offset.to_le_bytes());
                    body.extend(region.page_size.to_le_bytes());
                    body.extend(u64::from(region.memfd).to_le_bytes());
                }
            }
        }
        body
    }

    /// Its bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let body = self.body();
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.kind().to_le_bytes());
        // At most MAX_BODY.
        bytes.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes
    }

    /// The first frame in `bytes` and its length; None if it is not whole.
    fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, FrameError> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
        let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, ..] = *header;
        let magic = u32::from_le_bytes([m0, m1, m2, m3]);
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        let version = u16::from_le_bytes([v0, v1]);
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let kind = u16::from_le_bytes([k0, k1]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let size = usize::try_from(len).ok().filter(|size| *size <= MAX_BODY);
        let size = size.ok_or(FrameError::TooLong { kind, len })?;
        let Some(body) = rest.get(..size) else { return Ok(None) };
        let frame = Self::parse(kind, body).ok_or(FrameError::Kind { kind, len: size })?;
        Ok(Some((frame, HEADER + size)))
    }

    fn parse(kind: u16, body: &[u8]) -> Option<Self> {
        let (words, rest) = body.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        match kind {
            1 => body.is_empty().then_some(Self::Hello),
            2 => {
                let (regions, left) = words.as_chunks::<{ REGION / 8 }>();
                let regions = regions.iter().map(|&[gpa, len, offset, page_size, memfd]| {
                    let memfd = u32::try_from(memfd).ok()?;
                    Some(Region { gpa, len, memfd, offset, page_size })
                });
                let regions: Option<Vec<Region>> = regions.collect();
                regions.filter(|_| left.is_empty() && rest.is_empty()).map(Self::Memory)
            }
            3 => rest.is_empty().then_some(Self::View(words)),
            4 => body.is_empty().then_some(Self::Serving),
            5 => body.is_empty().then_some(Self::Reader),
            6 => Some(Self::ReaderId(u32::from_le_bytes(body.try_into().ok()?))),
            7 => Some(Self::Refused(String::from_utf8_lossy(body).into_owned())),
            8 => body.is_empty().then_some(Self::Asks),
            _ => None,
        }
    }
}

/// One end of the socket: what has come of the next frame.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// What comes stays in the socket, for whoever has it after this process.
    looks: bool,
}

/// Why nothing more can come.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    #[error("the other end hung up")]
    HangUp,
}

impl Inbox {
    /// Of what is received or, if it `looks`, left where it is.
    pub(super) fn new(looks: bool) -> Self {
        Self { looks, ..Self::default() }
    }

    /// The next whole frame with the descriptors that have come so far; None if
    /// it has not arrived. Reads without waiting.
    pub(super) fn receive(
        &mut self,
        socket: impl AsFd,
    ) -> Result<Option<(Frame, Vec<OwnedFd>)>, ReceiveError> {
        loop {
            if let Some((frame, used)) = Frame::decode(&self.bytes)? {
                self.bytes.drain(..used);
                // Several frames may have come at once, and others have none.
                let fds = match frame {
                    Frame::Memory(_) | Frame::View(_) => std::mem::take(&mut self.fds),
                    _ => Vec::new(),
                };
                return Ok(Some((frame, fds)));
            }
            let mut bytes = [0; 4096];
            let receive = if self.looks { look_with_fds } else { recv_with_fds };
            match receive(&socket, &mut bytes, &mut self.fds) {
                Ok(0) => return Err(ReceiveError::HangUp),
                Ok(count) => self.bytes.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ReceiveError::HangUp);
                }
                Err(error) => return Err(error.into()),
            }
            if self.fds.len() > MAX_DESCRIPTORS {
                return Err(FrameError::Descriptors.into());
            }
        }
    }
}

/// Sends a frame. The socket's buffer holds any.
pub(super) fn send(socket: impl AsFd, frame: &Frame, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = frame.encode();
    match send_with_fds(socket, &bytes, fds)? {
        sent if sent == bytes.len() => Ok(()),
        sent => Err(io::Error::other(format!("{sent} of {} bytes were sent", bytes.len()))),
    }
}

/// The slots of a peer's view: the pager's, at other addresses.
pub(super) fn view_slots(slots: &[Slot], addresses: &[u64]) -> Option<Vec<Slot>> {
    let at = |(slot, hva): (&Slot, &u64)| Slot { hva: vmpager_core::Hva(*hva), ..*slot };
    (slots.len() == addresses.len()).then(|| slots.iter().zip(addresses).map(at).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<Frame> {
        let region = Region { gpa: 1 << 32, len: 1 << 30, memfd: 1, offset: 4096, page_size: 4096 };
        vec![
            Frame::Hello,
            Frame::Memory(vec![region; MAX_REGIONS]),
            Frame::Memory(Vec::new()),
            Frame::View(vec![1, u64::MAX]),
            Frame::Serving,
            Frame::Reader,
            Frame::ReaderId(63),
            Frame::Refused("no".into()),
            Frame::Asks,
        ]
    }

    #[test]
    fn frames_come_out_as_they_went_in() {
        for frame in frames() {
            let bytes = frame.encode();
            assert_eq!(Frame::decode(&bytes).expect("valid"), Some((frame, bytes.len())));
            for len in [0, 1, HEADER - 1, bytes.len() - 1] {
                assert_eq!(Frame::decode(&bytes[..len]).expect("a prefix is no error"), None);
            }
        }
    }

    #[test]
    fn what_is_no_frame_is_refused_by_name() {
        let spoilt = |at: usize, value: u8| {
            let mut bytes = Frame::Hello.encode();
            bytes[at] = value;
            bytes.extend([0; 64]);
            Frame::decode(&bytes).expect_err("spoilt").to_string()
        };
        assert!(spoilt(0, b'G').contains("not with \"VMPA\""));
        assert!(spoilt(4, 2).contains("version 2") && spoilt(4, 2).contains("version 1"));
        assert!(spoilt(6, 99).contains("kind 99"));
        assert!(spoilt(8, 1).contains("kind 1 with 1 bytes"));
        assert!(spoilt(10, 1).contains("the most is"));
    }
}
