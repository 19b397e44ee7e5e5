//! Guest memory whose missing pages are exits.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmpager_core::{Hva, PageInstaller};
use vmpager_sys::memory::{Access, Mapping};

use crate::candidates::{Absent, GuestView};

/// A memslot: guest-physical addresses, and where they are in the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpaRange {
    /// The first guest-physical address.
    pub gpa: u64,
    /// Where it is in the mapping, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A write-only view of guest memory, and the gpas it is shown at.
#[derive(Debug)]
pub struct ExitMemory {
    mapping: Arc<Mapping>,
    slots: Vec<GpaRange>,
    protection: Mutex<Protection>,
}

#[derive(Debug)]
struct Protection {
    /// vCPUs that run an instruction with the view readable.
    readers: u32,
    /// No page is missing any more: readable for good.
    complete: bool,
}

impl ExitMemory {
    /// A view of a mapping that is registered with a userfaultfd by now, and
    /// was [`inaccessible`](Mapping::inaccessible) until then: KVM's workers
    /// touch memory even while no vCPU runs.
    ///
    /// # Errors
    ///
    /// If the kernel refuses to change the mapping's protection.
    pub fn new(mapping: Arc<Mapping>, slots: Vec<GpaRange>) -> io::Result<Self> {
        mapping.allow(Access::Write)?;
        let protection = Mutex::new(Protection { readers: 0, complete: false });
        Ok(Self { mapping, slots, protection })
    }

    /// The address in this process of a gpa.
    pub fn hva(&self, gpa: u64) -> Option<Hva> {
        self.offset(gpa).map(|offset| Hva(self.mapping.hva() + offset))
    }

    fn offset(&self, gpa: u64) -> Option<u64> {
        let within = |slot: &&GpaRange| (slot.gpa..slot.gpa + slot.len).contains(&gpa);
        self.slots.iter().find(within).map(|slot| slot.offset + (gpa - slot.gpa))
    }

    /// No page is missing any more: faults need no exit.
    pub(super) fn stop_exits(&self) -> io::Result<()> {
        let mut protection = self.protection.lock().unwrap_or_else(PoisonError::into_inner);
        if !protection.complete {
            self.mapping.allow(Access::ReadWrite)?;
            protection.complete = true;
        }
        Ok(())
    }

    /// Makes the view readable until the answer is dropped.
    pub(super) fn readable(&self) -> io::Result<Readable<'_>> {
        let mut protection = self.protection.lock().unwrap_or_else(PoisonError::into_inner);
        if protection.readers == 0 && !protection.complete {
            self.mapping.allow(Access::ReadWrite)?;
        }
        protection.readers += 1;
        Ok(Readable(self))
    }
}

/// The view is readable while this lives.
#[derive(Debug)]
pub(super) struct Readable<'a>(&'a ExitMemory);

impl Drop for Readable<'_> {
    fn drop(&mut self) {
        let mut protection = self.0.protection.lock().unwrap_or_else(PoisonError::into_inner);
        protection.readers -= 1;
        if protection.readers == 0 && !protection.complete {
            // Left readable, faults only take the way over the userfaultfd.
            let _ = self.0.mapping.allow(Access::Write);
        }
    }
}

/// Guest memory as far as it is in place.
pub(super) struct PresentPages<'a, I> {
    pub(super) installer: &'a I,
    pub(super) memory: &'a ExitMemory,
}

impl<I: PageInstaller> GuestView for PresentPages<'_, I> {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), Absent> {
        let offset = self.memory.offset(gpa).ok_or(Absent::NoMemory)?;
        if !self.installer.is_present(Hva(self.memory.mapping.hva() + offset)) {
            return Err(Absent::Missing);
        }
        let offset = usize::try_from(offset).map_err(|_| Absent::NoMemory)?;
        self.memory.mapping.read(offset, bytes);
        Ok(())
    }

    fn is_missing(&self, gpa: u64) -> bool {
        self.memory.hva(gpa).is_some_and(|hva| !self.installer.is_present(hva))
    }
}
