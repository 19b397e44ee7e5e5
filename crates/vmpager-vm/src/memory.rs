//! Guest memory: one mapping of this process, shown to the guest as memslots.
//!
//! Byte `n` of the mapping is byte `n` of the memory file. A PC keeps the last
//! GiB below 4 GiB for devices, the local and the I/O APICs among them, so the
//! memory of a Linux guest goes on above it:
//!
//! ```text
//! mapping  0 ........ 3 GiB ........ N
//! gpa      0 ........ 3 GiB          .
//!                     4 GiB ........ N + 1 GiB
//! ```

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vmpager::Pager;
use vmpager::attach::{Asker, GuestRegion, RemoteInstaller};
use vmpager::core::Hva;
use vmpager_kvm::exit::{ExitMemory, Mechanism};
use vmpager_sys::memory::{Access, Mapping};
use vmpager_sys::uffd::Userfaultfd;

use crate::PAGE_SIZE;
use crate::bringer::{Bringer, Oracle};
use crate::device::to_usize;
use crate::error::VmError;
use crate::peer::Connection;
use crate::private::PrivateParts;
use crate::restore::{AsyncFaults, Delivery};

/// Where the memory below the devices ends.
pub(crate) const HOLE_START: u64 = 3 << 30;
/// Where memory goes on above them.
pub(crate) const HOLE_END: u64 = 4 << 30;

/// A contiguous range of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Memslot {
    /// Its first guest-physical address.
    pub(crate) gpa: u64,
    /// Where it starts in the mapping, and in the memory file.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
}

impl Memslot {
    /// All memory from gpa 0 on.
    pub(crate) fn flat(bytes: u64) -> Vec<Self> {
        vec![Self { gpa: 0, offset: 0, len: bytes }]
    }

    /// The same in two slots that touch, if pages of it can be private: so the guest
    /// converts ranges across slots.
    pub(crate) fn of_builtin(bytes: u64, can_be_private: bool) -> Vec<Self> {
        /// Not where a page table ends, nor where a huge page would.
        const FIRST: u64 = (2 << 20) + 3 * PAGE_SIZE;
        match bytes.checked_sub(FIRST).filter(|rest| can_be_private && *rest > 0) {
            Some(rest) => {
                let second = Self { gpa: FIRST, offset: FIRST, len: rest };
                Self::flat(FIRST).into_iter().chain([second]).collect()
            }
            None => Self::flat(bytes),
        }
    }

    /// Where a range of the mapping lies in the guest: in one slot or several.
    fn gpas(slots: &[Self], part: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        slots.iter().filter_map(move |slot| {
            let from = part.start.max(slot.offset);
            let to = part.end.min(slot.offset + slot.len);
            (from < to).then(|| slot.gpa + (from - slot.offset)..slot.gpa + (to - slot.offset))
        })
    }

    /// Memory around the hole for devices, as a PC has it.
    pub(crate) fn around_the_hole(bytes: u64) -> Vec<Self> {
        let mut slots = Self::flat(bytes.min(HOLE_START));
        if bytes > HOLE_START {
            slots.push(Self { gpa: HOLE_END, offset: HOLE_START, len: bytes - HOLE_START });
        }
        slots
    }
}

/// Guest memory, and what must live as long as it does.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) slots: Vec<Memslot>,
    /// What the mapping maps, if that is this VM's own.
    memfd: Option<OwnedFd>,
    /// What makes its missing pages exits of vCPUs, if they are. Nobody can
    /// touch it then before [`exits`](Self::exits).
    mechanism: Option<Mechanism>,
    /// Which of those exits the guest is told of, if vmpager plays its device.
    async_faults: Option<AsyncFaults>,
    /// How long mapping hot pages before the guest runs may take.
    map_ahead: Duration,
    /// What makes its pages private, if they can be.
    pub(crate) private: Option<PrivateParts>,
    // Dropped after the machine.
    served: Option<Served>,
}

/// What delivers missing pages as exits of vCPUs.
#[derive(Debug)]
pub(crate) struct Exits {
    pub(crate) memory: Arc<ExitMemory>,
    /// One for each vCPU.
    pub(crate) bringers: Vec<Bringer>,
}

/// Who brings absent pages.
#[derive(Debug)]
pub(crate) enum Served {
    /// A thread of this process.
    InProcess(Box<Pager>),
    /// The vCPUs' threads, from a mapped file.
    ByOracle(Oracle),
    /// A pager at the other end of a socket. It takes the end of the connection
    /// for the end of the VM, and the end of the descriptor would turn absent
    /// pages into zeroes: dropped in this order.
    ByPeer {
        /// Where its vCPUs ask for pages, if missing ones are exits of theirs.
        door: Option<PathBuf>,
        _connection: Connection,
        _uffd: Userfaultfd,
    },
}

impl Served {
    /// The same, with vCPUs that ask for pages at that door of the peer's.
    pub(crate) fn asked_at(mut self, at: Option<PathBuf>) -> Self {
        if let Self::ByPeer { door, .. } = &mut self {
            *door = at;
        }
        self
    }
}

impl GuestMemory {
    pub(crate) fn new(mapping: Arc<Mapping>, slots: Vec<Memslot>) -> Self {
        Self {
            mapping,
            slots,
            memfd: None,
            mechanism: None,
            async_faults: None,
            map_ahead: Duration::ZERO,
            private: None,
            served: None,
        }
    }

    /// The same, of a memfd or guest_memfd of which `parts` has the host's view.
    pub(crate) fn protected(mut self, memfd: Option<OwnedFd>, parts: PrivateParts) -> Self {
        (self.memfd, self.private) = (memfd, Some(parts));
        self
    }

    /// Sees to it that the host's view shows a page as it is.
    pub(crate) fn bring(&self, offset: usize) {
        if self.served.is_some() {
            self.mapping.read_u64(offset);
        }
    }

    /// The ranges of its file that have memory.
    pub(crate) fn resident(&self) -> io::Result<Vec<Range<u64>>> {
        let memfd = self.memfd.as_ref();
        memfd.map_or(Ok(Vec::new()), |f| data_ranges(f.as_fd(), self.mapping.len() as u64))
    }

    /// The mapping by which the host looks at it. Private pages may be missing.
    pub(crate) fn host_view(&self) -> &Mapping {
        self.private.as_ref().map_or(&self.mapping, |parts| &parts.view)
    }

    /// The same, its absent pages brought by somebody.
    pub(crate) fn served(mut self, by: Served) -> Self {
        self.served = Some(by);
        self
    }

    /// Decides about memory that nobody could access so far, whose vCPUs' faults
    /// are delivered so.
    pub(crate) fn delivered_by(mut self, delivery: Delivery) -> io::Result<Self> {
        match delivery {
            Delivery::Userfaultfd => self.mapping.allow(Access::ReadWrite)?,
            Delivery::Exit(mechanism) => self.mechanism = Some(mechanism),
        }
        Ok(self)
    }

    /// The same, its guest told of faults, if these are exits.
    pub(crate) fn with_async_faults(mut self, which: Option<AsyncFaults>) -> Self {
        self.async_faults = which;
        self
    }

    /// Which faults the guest is told of, if vmpager plays its device.
    pub(crate) fn async_faults(&self) -> Option<AsyncFaults> {
        self.mechanism.and(self.async_faults)
    }

    /// The same, its hot pages that are in place mapped before the guest runs, within
    /// that time.
    pub(crate) fn mapped_ahead(mut self, within: Duration) -> Self {
        self.map_ahead = within;
        self
    }

    /// How long mapping pages before the guest runs may take, if that is wanted and KVM
    /// can map pages that are in place.
    pub(crate) fn map_ahead(&self) -> Option<Duration> {
        let attributes = self.mechanism == Some(Mechanism::Attributes);
        let can = self.private.is_none() && !attributes;
        Some(self.map_ahead).filter(|within| can && !within.is_zero())
    }

    /// Guest-physical addresses of the pages that a profile names and that are in place,
    /// in the profile's order.
    pub(crate) fn hot_in_place(&self) -> Vec<Range<u64>> {
        let parts = self.pager().map(Pager::hot_in_place).unwrap_or_default();
        let offsets = parts.into_iter().map(|(hva, len)| {
            let offset = hva.0 - self.mapping.hva();
            offset..offset + len
        });
        offsets.flat_map(|part| Memslot::gpas(&self.slots, part)).collect()
    }

    /// What makes missing pages exits of vCPUs, if they are.
    pub(crate) fn mechanism(&self) -> Option<Mechanism> {
        self.mechanism
    }

    /// Opens memory whose missing pages are exits of that VM's vCPUs, none of
    /// which has run. `None` if they are no exits, or if nothing is missing any
    /// more.
    pub(crate) fn exits(&self, vm: &Arc<VmFd>, vcpus: u64) -> Result<Option<Exits>, VmError> {
        let Some(mechanism) = self.mechanism else { return Ok(None) };
        let Some(bringers) = self.bringers(vcpus)? else {
            self.mapping
                .allow(Access::ReadWrite)
                .map_err(|error| VmError::Memory { bytes: self.mapping.len() as u64, error })?;
            return Ok(None);
        };
        let slots = self.ranges();
        let memory = Arc::new(ExitMemory::new(mechanism, vm, self.mapping.clone(), slots)?);
        Ok(Some(Exits { memory, bringers }))
    }

    /// One for each vCPU; `None` if there is nothing left to bring.
    fn bringers(&self, vcpus: u64) -> Result<Option<Vec<Bringer>>, VmError> {
        let each = 0..vcpus;
        Ok(match &self.served {
            Some(Served::InProcess(pager)) => each
                .map(|_| Ok(pager.installer()?.map(Bringer::Pager)))
                .collect::<Result<_, VmError>>()?,
            Some(Served::ByOracle(oracle)) => {
                Some(each.map(|_| Bringer::Oracle(oracle.clone())).collect())
            }
            Some(Served::ByPeer { door: Some(door), .. }) => {
                let installer = self.remote_installer(door)?;
                Some(each.map(|_| Bringer::Remote(installer.clone())).collect())
            }
            Some(Served::ByPeer { door: None, .. }) | None => None,
        })
    }

    /// Asks at a pager's door.
    fn remote_installer(&self, door: &Path) -> Result<RemoteInstaller, VmError> {
        let asker = Arc::new(Asker::connect(door)?);
        let region = |slot: &Memslot| GuestRegion {
            hva: Hva(self.mapping.hva() + slot.offset),
            gpa: slot.gpa,
            len: slot.len,
        };
        Ok(RemoteInstaller::new(asker, self.slots.iter().map(region).collect()))
    }

    /// The pager in this process, if there is one.
    pub(crate) fn pager(&self) -> Option<&Pager> {
        match &self.served {
            Some(Served::InProcess(pager)) => Some(pager),
            Some(Served::ByOracle(_) | Served::ByPeer { .. }) | None => None,
        }
    }

    /// Fresh memory around the hole for devices, from a memfd of its own.
    pub(crate) fn memfd(bytes: u64, huge_pages: bool) -> Result<Self, VmError> {
        check_size(bytes, if huge_pages { 2 << 20 } else { PAGE_SIZE })?;
        let (mapping, memfd) = map_memfd(bytes, huge_pages).map_err(|error| {
            if huge_pages {
                VmError::HugePages { bytes, error }
            } else {
                VmError::Memory { bytes, error }
            }
        })?;
        let memory = Self::new(Arc::new(mapping), Memslot::around_the_hole(bytes));
        Ok(Self { memfd: Some(memfd), ..memory })
    }

    /// The ranges outside which all bytes are zero. To look at a page of a memfd
    /// is to make it, so that whoever reads all of memory reads these.
    pub(crate) fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let end = self.mapping.len() as u64;
        match &self.memfd {
            // What is still to be brought is no data yet.
            Some(memfd) if self.served.is_none() => data_ranges(memfd.as_fd(), end),
            _ => Ok(std::iter::once(0..end).collect()),
        }
    }
}

/// The parts of a file's first `end` bytes that are no holes.
pub(crate) fn data_ranges(file: BorrowedFd<'_>, end: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?.min(end);
        ranges.push(start..at);
    }
    Ok(ranges)
}

fn check_size(bytes: u64, page: u64) -> Result<(), VmError> {
    if bytes == 0 || !bytes.is_multiple_of(page) || usize::try_from(bytes).is_err() {
        return Err(VmError::Config {
            field: "memory size",
            value: bytes,
            remedy: if page == PAGE_SIZE {
                "use a multiple of the page size, 4096 bytes"
            } else {
                "use a multiple of the huge page size, 2 MiB"
            },
        });
    }
    Ok(())
}

fn map_memfd(bytes: u64, huge_pages: bool) -> io::Result<(Mapping, OwnedFd)> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let huge =
        if huge_pages { MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB } else { MemfdFlags::empty() };
    let memfd = rustix::fs::memfd_create("guest-memory", flags | huge)?;
    rustix::fs::ftruncate(&memfd, bytes)?;
    // Nobody who gets hold of it can take pages away under the guest.
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok((Mapping::file_shared(memfd.as_fd(), to_usize(bytes))?, memfd))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::kvm::view;

    const GIB: u64 = 1 << 30;

    #[test]
    fn slots_cover_the_mapping_once_and_leave_the_hole_free() {
        for bytes in [4096, GIB, HOLE_START - 4096, HOLE_START, HOLE_START + 4096, 16 * GIB] {
            let slots = Memslot::around_the_hole(bytes);
            let mut at = 0;
            for slot in &slots {
                assert_eq!(slot.offset, at, "{bytes:#x}");
                at += slot.len;
                let end = slot.gpa + slot.len;
                assert!(slot.len > 0 && (end <= HOLE_START || slot.gpa >= HOLE_END));
            }
            assert_eq!(at, bytes);
        }
    }

    #[test]
    fn a_range_of_the_mapping_lies_on_both_sides_of_the_hole() {
        let slots = Memslot::around_the_hole(4 * GIB);
        let gpas = |part| Memslot::gpas(&slots, part).map(|gpas| (gpas.start, gpas.end));
        let gpas = |part| gpas(part).collect::<Vec<_>>();
        assert_eq!(gpas(4096..8192), [(4096, 8192)]);
        assert_eq!(gpas(HOLE_START..HOLE_START + 4096), [(HOLE_END, HOLE_END + 4096)]);
        let both = [(HOLE_START - 4096, HOLE_START), (HOLE_END, HOLE_END + 8192)];
        assert_eq!(gpas(HOLE_START - 4096..HOLE_START + 8192), both);
        assert_eq!(gpas(4 * GIB..5 * GIB), []);
    }

    #[test]
    fn sizes_that_are_no_whole_pages_are_refused_by_value() {
        for (bytes, huge) in [(0, false), (4097, false), (4096, true)] {
            let error = GuestMemory::memfd(bytes, huge).unwrap_err().to_string();
            assert!(error.contains(&format!("memory size {bytes} ")), "{error}");
        }
    }

    #[test]
    fn looking_for_data_finds_what_was_written_and_makes_nothing() {
        let memory = GuestMemory::memfd(16 * GIB, false).unwrap();
        assert_eq!(memory.data().unwrap(), []);
        for offset in [4096, 5 * GIB, 16 * GIB - 8] {
            memory.mapping.write_u64(to_usize(offset), 1);
        }
        let page = |offset| offset..offset + 4096;
        let written = [page(4096), page(5 * GIB), page(16 * GIB - 4096)];
        assert_eq!(memory.data().unwrap(), written);
        assert_eq!(memory.data().unwrap(), written);
    }

    /// The same bytes by gpa, by offset, and through both slots.
    #[test]
    fn the_view_finds_what_the_mapping_has() {
        let bytes = HOLE_START + (2 << 20);
        let memory = GuestMemory::memfd(bytes, false).unwrap();
        let view = view(&memory).unwrap();
        for (gpa, offset) in
            [(8, 8), (HOLE_START - 8, HOLE_START - 8), (HOLE_END + 16, HOLE_START + 16)]
        {
            memory.mapping.write_u64(to_usize(offset), gpa | 1);
            assert_eq!(view.read_obj::<u64>(GuestAddress(gpa)).unwrap(), gpa | 1);
            view.write_obj(gpa | 2, GuestAddress(gpa)).unwrap();
            assert_eq!(memory.mapping.read_u64(to_usize(offset)), gpa | 2);
        }
        assert!(view.read_obj::<u64>(GuestAddress(HOLE_START)).is_err(), "the hole");
        assert!(view.read_obj::<u64>(GuestAddress(HOLE_START - 4)).is_err(), "into the hole");
        assert_eq!(view.last_addr().0, bytes + GIB - 1);
        drop(memory);
        assert_eq!(view.read_obj::<u64>(GuestAddress(8)).unwrap(), 8 | 2, "kept mapped");
    }
}
