//! What is shared at a door: descriptors of a memory, of its page map and of its
//! fault queue, and the way to the worker that serves it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tracing::debug;
use vmpager_core::{MapSlot, PageMap, Slot, SlotSet};
use vmpager_sys::memfd::{is_mapped_at, read_only};
use vmpager_sys::peer::is_userfaultfd;
use vmpager_sys::shared::SharedWords;
use vmpager_sys::uffd::Userfaultfd;

use super::door::{PAGER, Stage};
use super::protocol::{MAX_MEMFDS, MAX_REGIONS, Region, view_slots};
use super::queue::{FaultReader, QueueOwner};
use crate::daemon::DaemonError;
use crate::reads::MemoryId;
use crate::served::{View, ViewId};
use crate::worker::{Command, Sharing, Teller};

/// Where a region of a pager's memory lies, for those who shall map it too.
#[derive(Clone, Debug)]
pub struct SharedRegion {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// The memfd, sealed against shrinking, of which the region is a shared
    /// mapping.
    pub memfd: Arc<OwnedFd>,
    /// Where the region starts in it, in bytes.
    pub offset: u64,
}

/// Why a memory could not be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// Not as many regions as the pager has.
    #[error("{given} regions are described; the pager has {served}")]
    Regions {
        /// How many were described.
        given: usize,
        /// How many there are.
        served: usize,
    },
    /// Too much for the protocol.
    #[error("{what}: {count}, but the most that can be shared is {most}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// A region cannot be shared.
    #[error("region {index}: {problem}")]
    Region {
        /// Its place in the order given.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The memory is served no longer, or shared already.
    #[error("the memory cannot be shared: {0}")]
    Memory(String),
    /// The socket cannot be had.
    #[error(transparent)]
    Socket(#[from] DaemonError),
    /// Descriptors or memory could not be had.
    #[error("sharing the memory: {0}")]
    Io(#[from] io::Error),
}

/// What is shared, as a door hands it out.
#[derive(Debug)]
pub(crate) struct Wares {
    pub(super) queue: Arc<QueueOwner>,
    pub(super) memory: MemoryId,
    pub(super) worker: Teller,
    slots: Vec<Slot>,
    source_len: u64,
    pub(super) regions: Vec<Region>,
    pub(super) memfds: Vec<Arc<OwnedFd>>,
    pub(super) map: OwnedFd,
}

/// The memory to be shared, as its pager knows it.
#[derive(Debug)]
pub(crate) struct Stock<'a> {
    pub(crate) memory: MemoryId,
    pub(crate) worker: Teller,
    /// In the order of the regions.
    pub(crate) slots: &'a [Slot],
    pub(crate) source_len: u64,
    pub(crate) map: &'a PageMap<SharedWords>,
}

impl Wares {
    /// What is to be handed out of a memory whose regions lie there, with this fault
    /// queue; and the worker's end of that.
    pub(crate) fn new(
        stock: &Stock<'_>,
        shared: &[SharedRegion],
        queue: QueueOwner,
    ) -> Result<(Self, FaultReader, Vec<MapSlot>), ShareError> {
        let (regions, memfds) = describe(stock.slots, shared)?;
        let table = table(&regions);
        stock.map.describe(&table);
        let queue = Arc::new(queue);
        let reader = queue.reader(PAGER)?;
        let wares = Self {
            queue,
            memory: stock.memory,
            worker: stock.worker.clone(),
            slots: stock.slots.to_vec(),
            source_len: stock.source_len,
            regions,
            memfds,
            map: read_only(stock.map.storage().memfd())?,
        };
        Ok((wares, reader, table))
    }
}

/// The regions as the protocol has them, and their distinct memfds.
fn describe(
    slots: &[Slot],
    shared: &[SharedRegion],
) -> Result<(Vec<Region>, Vec<Arc<OwnedFd>>), ShareError> {
    if slots.len() != shared.len() {
        return Err(ShareError::Regions { given: shared.len(), served: slots.len() });
    }
    if slots.len() > MAX_REGIONS {
        let (what, count) = ("regions", slots.len());
        return Err(ShareError::TooMany { what, count, most: MAX_REGIONS });
    }
    let mut memfds: Vec<Arc<OwnedFd>> = Vec::new();
    let mut regions = Vec::new();
    for (index, (slot, region)) in slots.iter().zip(shared).enumerate() {
        let wrong = |problem: String| ShareError::Region { index, problem };
        let len = vmpager_sys::memfd::sealed_len(region.memfd.as_fd());
        let len = len.map_err(|error| wrong(error.to_string()))?;
        if region.offset.checked_add(slot.len).is_none_or(|end| end > len) {
            return Err(wrong(format!(
                "offset {:#x} plus size {:#x} is beyond its memfd, which has {len:#x} bytes",
                region.offset, slot.len
            )));
        }
        for (field, value) in [("gpa", region.gpa), ("offset", region.offset)] {
            if value % slot.page_size.bytes() != 0 {
                return Err(wrong(format!("{field} {value:#x} is not aligned to its pages")));
            }
        }
        if slot.page_size.bytes() != 4096 {
            return Err(wrong("huge pages of hugetlb cannot be shared; use 4 KiB pages".into()));
        }
        let same = |fd: &Arc<OwnedFd>| vmpager_sys::memfd::is_same(fd, &region.memfd);
        let known = memfds.iter().position(|fd| same(fd).unwrap_or(false));
        let at = known.unwrap_or(memfds.len());
        if at == memfds.len() {
            memfds.push(region.memfd.clone());
        }
        let memfd = u32::try_from(at).unwrap_or(u32::MAX);
        let (gpa, offset, page_size) = (region.gpa, region.offset, slot.page_size.bytes());
        regions.push(Region { gpa, len: slot.len, memfd, offset, page_size });
    }
    match memfds.len() {
        0..=MAX_MEMFDS => Ok((regions, memfds)),
        count => Err(ShareError::TooMany { what: "memfds", count, most: MAX_MEMFDS }),
    }
}

/// The regions as the page map's slot table has them.
fn table(regions: &[Region]) -> Vec<MapSlot> {
    let mut first_page = 0;
    let slot = |region: &Region| {
        let pages = region.len / region.page_size;
        let slot = MapSlot { gpa: region.gpa, first_page, pages, page_size: region.page_size };
        first_page += pages;
        slot
    };
    regions.iter().map(slot).collect()
}

impl Wares {
    pub(super) fn add_view(
        &self,
        id: ViewId,
        pid: i32,
        addresses: &[u64],
        fds: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let slots = view_slots(&self.slots, addresses).ok_or_else(|| {
            format!("{} addresses for {} regions", addresses.len(), self.slots.len())
        })?;
        let slots = SlotSet::new(&slots, self.source_len).map_err(|error| error.to_string())?;
        let [uffd] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| {
            format!("{} descriptors came; one userfaultfd is expected", fds.len())
        })?;
        if !is_userfaultfd(uffd.as_fd()) {
            return Err("the descriptor is no userfaultfd".into());
        }
        let uffd = Userfaultfd::adopt(uffd).map_err(|error| error.to_string())?;
        let is_seen = self.see(pid, addresses)?;
        let view = Box::new(View::new(id, uffd, slots, is_seen)?);
        let (to, done) = crossbeam_channel::bounded(1);
        self.worker.tell(Command::Sharing(self.memory, Sharing::AddView(view, to)));
        done.recv().unwrap_or_else(|_| Err("the pager has ended".into()))
    }

    /// Looks whether a process maps the memory at these addresses, and refuses it
    /// if not: it would never find there what is installed. False if its mappings
    /// are not for this user to see. What it maps later is up to it, as all else
    /// is that it does to this memory.
    fn see(&self, pid: i32, addresses: &[u64]) -> Result<bool, String> {
        for (region, hva) in self.regions.iter().zip(addresses) {
            let memfd = usize::try_from(region.memfd).ok().and_then(|at| self.memfds.get(at));
            let Some(memfd) = memfd else { return Ok(false) };
            match is_mapped_at(memfd.as_fd(), region.offset, pid, *hva, region.len) {
                Ok(true) => {}
                Ok(false) => {
                    return Err(format!(
                        "process {pid} has no shared mapping of the region of gpa {:#x} at \
                         {hva:#x}: map its memfd there, MAP_SHARED, before asking",
                        region.gpa
                    ));
                }
                Err(error) => {
                    debug!(pid, "its mappings cannot be seen: {error}");
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// A process that took part is gone.
    pub(super) fn left(&self, stage: Stage) {
        let reader = match stage {
            Stage::Serving(view) => {
                self.worker.tell(Command::Sharing(self.memory, Sharing::RemoveView(view)));
                None
            }
            Stage::Reading(reader) => Some(reader),
            Stage::Connected | Stage::Offered | Stage::Asking => None,
        };
        self.queue.recover(reader);
    }
}
