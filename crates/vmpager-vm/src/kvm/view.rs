//! Guest memory as `vm-memory` sees it, for the loaders of rust-vmm.

use std::sync::Arc;

use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize, MemoryRegionAddress, VolatileSlice,
};
use vmpager_sys::memory::Mapping;

use crate::device::to_usize;
use crate::error::VmError;
use crate::memory::{GuestMemory, Memslot};

/// All memslots of a guest.
pub(crate) type GuestView = GuestRegionCollection<SlotView>;

/// A memslot by guest-physical addresses. Keeps the memory mapped.
#[derive(Debug)]
pub(crate) struct SlotView {
    mapping: Arc<Mapping>,
    slot: Memslot,
}

/// Guest memory as a `vm_memory::GuestMemory`.
pub(crate) fn view(memory: &GuestMemory) -> Result<GuestView, VmError> {
    let regions = memory
        .slots
        .iter()
        .map(|slot| SlotView { mapping: memory.mapping.clone(), slot: *slot })
        .collect();
    GuestRegionCollection::from_regions(regions).map_err(|error| VmError::Memory {
        bytes: memory.mapping.len() as u64,
        error: std::io::Error::other(error),
    })
}

impl GuestMemoryRegion for SlotView {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.slot.len
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.slot.gpa)
    }

    fn bitmap(&self) {}

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> AccessResult<VolatileSlice<'_, ()>> {
        let end = offset.0.checked_add(count as u64).filter(|end| *end <= self.slot.len);
        let end_in_mapping = end.and_then(|end| end.checked_add(self.slot.offset));
        if end_in_mapping.is_none_or(|end| end > self.mapping.len() as u64) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let start = self.mapping.hva() as *mut u8;
        // SAFETY: the range was found to end inside the mapping, which is one
        // object and shorter than isize::MAX.
        let start = unsafe { start.add(to_usize(self.slot.offset + offset.0)) };
        // SAFETY: `count` bytes from `start` are inside the mapping, which the
        // region, borrowed by the slice, keeps; and a slice of vm-memory is
        // accessed by volatile copies only, as guest memory must be.
        Ok(unsafe { VolatileSlice::new(start, count) })
    }
}

impl GuestMemoryRegionBytes for SlotView {}
