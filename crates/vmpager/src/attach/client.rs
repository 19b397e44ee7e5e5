//! The side of the process that takes part.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmpager_core::MapError;
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::uffd::{Features, OpenError, Userfaultfd};

use super::asker::RemotePages;
use super::offer::{Offer, answer, unexpected};
use super::protocol::{Frame, ReceiveError, Region};
use super::queue::FaultReader;

/// Why a process could not take part.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Nobody listens there.
    #[error("connecting to {path}: {error}; is the pager running, and has it opened a door there?")]
    Connect {
        /// Where.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The pager refused, and said why.
    #[error("the pager refused: {0}")]
    Refused(String),
    /// The pager does not answer, or not as the protocol has it.
    #[error("the pager's answer: {0}")]
    Answer(String),
    /// No userfaultfd could be had.
    #[error(transparent)]
    Userfaultfd(#[from] OpenError),
    /// The page map cannot be read.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Memory could not be mapped or registered.
    #[error("{what}: {error}")]
    Memory {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        error: io::Error,
    },
}

impl From<ReceiveError> for AttachError {
    fn from(error: ReceiveError) -> Self {
        Self::Answer(error.to_string())
    }
}

/// A region of guest memory, mapped into this process.
#[derive(Clone, Debug)]
pub struct AttachedRegion {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Where it is.
    pub memory: Arc<Mapping>,
}

/// A process's part in a memory that a pager serves.
///
/// Touching memory of its [`regions`](Self::regions) waits for pages that are
/// missing, as it does in the VMM. If the pager ends first, such a touch waits
/// until this process ends: watch [`pager`](Self::pager).
///
/// # What it must not do
///
/// `MADV_DONTNEED` of a region is taken for giving its pages back: those that
/// were missing read as zeroes from then on, in every process.
#[derive(Debug)]
pub struct Attached {
    regions: Vec<AttachedRegion>,
    memfds: Vec<OwnedFd>,
    /// The regions as the pager described them.
    layout: Vec<Region>,
    pages: RemotePages,
    link: Arc<Link>,
}

/// What has the memory served: without it, missing pages would be zeroes.
#[derive(Debug)]
struct Link {
    socket: UnixStream,
    uffd: Arc<Userfaultfd>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.regions.iter().any(|region| Arc::strong_count(&region.memory) > 1) {
            // Somebody goes on using the memory, and is served as long as the
            // process lives.
            std::mem::forget(self.link.clone());
        }
    }
}

impl Attached {
    /// Takes part in the memory of the pager that listens at `path`: maps it,
    /// and has its faults served.
    ///
    /// # Errors
    ///
    /// If there is no pager, it refuses, or this user may have no userfaultfd.
    pub fn connect(path: &Path) -> Result<Self, AttachError> {
        let mut offer = Offer::ask(path)?;
        let uffd = Arc::new(Userfaultfd::open(Features::EVENT_REMOVE)?);
        let mut mapped = Vec::with_capacity(offer.regions.len());
        for region in &offer.regions {
            let memfd = usize::try_from(region.memfd).ok().and_then(|at| offer.memfds.get(at));
            let memfd = memfd.ok_or_else(|| answer("a region without a memfd"))?;
            let memory = map_region(memfd.as_fd(), region)?;
            uffd.register_missing(&GuestRange::of_mapping(&memory))
                .map_err(|error| AttachError::Memory { what: "registering guest memory", error })?;
            mapped.push(AttachedRegion { gpa: region.gpa, memory });
        }
        let (pages, link) = join(&mut offer, &mapped, uffd)?;
        let Offer { regions: layout, memfds, .. } = offer;
        Ok(Self { regions: mapped, memfds, layout, pages, link })
    }

    /// Takes part once more, after the pager has ended: with another one that
    /// serves the same memory, at `path`. Whoever waited for a page all the
    /// while is served.
    ///
    /// # Errors
    ///
    /// If there is no pager, it refuses, or the memory is another.
    pub fn reconnect(&mut self, path: &Path) -> Result<(), AttachError> {
        let mut offer = Offer::ask(path)?;
        let is_same = |(a, b)| vmpager_sys::memfd::is_same(a, b).unwrap_or(false);
        if offer.regions != self.layout
            || offer.memfds.len() != self.memfds.len()
            || !offer.memfds.iter().zip(&self.memfds).all(is_same)
        {
            return Err(answer("it serves another memory than the one mapped here"));
        }
        let (pages, link) = join(&mut offer, &self.regions, self.link.uffd.clone())?;
        (self.pages, self.link) = (pages, link);
        Ok(())
    }

    /// The memory.
    pub fn regions(&self) -> &[AttachedRegion] {
        &self.regions
    }

    /// What is known of its pages, and how to ask for them without touching them.
    pub fn pages(&self) -> &RemotePages {
        &self.pages
    }

    /// Readable once the pager has ended: no page will come any more.
    pub fn pager(&self) -> BorrowedFd<'_> {
        self.link.socket.as_fd()
    }
}

impl FaultReader {
    /// Helps the pager that listens at `path` to resolve queued faults, or
    /// takes their place. The connection tells the pager when this process
    /// dies: keep it as long as the reader.
    ///
    /// # Errors
    ///
    /// If there is no pager or it refuses.
    pub fn connect(path: &Path) -> Result<(Self, UnixStream), AttachError> {
        let mut offer = Offer::ask(path)?;
        let id = match offer.accept(&Frame::Reader, &[])? {
            Frame::ReaderId(id) => id.into(),
            other => return Err(unexpected(other)),
        };
        let Offer { socket, queue, bell, .. } = offer;
        let reader = Self::open(queue, bell, id)
            .map_err(|error| AttachError::Memory { what: "mapping the fault queue", error })?;
        Ok((reader, socket))
    }
}

/// Has the pager serve memory that is mapped and registered.
fn join(
    offer: &mut Offer,
    regions: &[AttachedRegion],
    uffd: Arc<Userfaultfd>,
) -> Result<(RemotePages, Arc<Link>), AttachError> {
    let pages = RemotePages::open(offer)?;
    let addresses = regions.iter().map(|region| region.memory.hva()).collect();
    match offer.accept(&Frame::View(addresses), &[uffd.as_fd()])? {
        Frame::Serving => {}
        other => return Err(unexpected(other)),
    }
    let socket = offer.socket.try_clone();
    let socket =
        socket.map_err(|error| AttachError::Memory { what: "keeping the connection", error })?;
    Ok((pages, Arc::new(Link { socket, uffd })))
}

fn map_region(memfd: BorrowedFd<'_>, region: &Region) -> Result<Arc<Mapping>, AttachError> {
    let memory = |error| AttachError::Memory { what: "mapping guest memory", error };
    let end = region.offset.checked_add(region.len);
    let len = vmpager_sys::memfd::sealed_len(memfd).map_err(memory)?;
    if end.is_none_or(|end| end > len) {
        return Err(answer("a region beyond the end of its memfd"));
    }
    let len = usize::try_from(region.len).map_err(|e| memory(io::Error::other(e)))?;
    Ok(Arc::new(Mapping::file_shared_at(memfd, region.offset, len).map_err(memory)?))
}
