//! Guest memory whose missing pages are exits.

use std::io;
use std::sync::Arc;

use kvm_bindings::KVM_X86_SW_PROTECTED_VM;
use kvm_ioctls::{Kvm, VmFd};
use vmpager_core::{Hva, PageInstaller};
use vmpager_sys::memory::{Access, Mapping};

use super::ExitError;
use super::attributes::{self, Attributes};
use super::view::{Readable, View};
use crate::candidates::{Absent, GuestView};

/// What makes accesses to missing pages exits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mechanism {
    /// A mapping without `PROT_READ`: on any KVM for x86, but an exit does not
    /// say which page is missing.
    #[default]
    View,
    /// An attribute of the missing pages, so that each exit has its page: in
    /// software-protected VMs, which Linux offers for development and testing
    /// (`KVM_X86_SW_PROTECTED_VM`).
    Attributes,
}

impl Mechanism {
    /// The type of VM it needs, for `KVM_CREATE_VM`.
    ///
    /// # Errors
    ///
    /// [`ExitError::Unavailable`] if this KVM has none.
    pub fn vm_type(self, kvm: &Kvm) -> Result<u64, ExitError> {
        match self {
            Self::View => Ok(0),
            Self::Attributes => match attributes::lacks(kvm) {
                Some(lacks) => Err(ExitError::Unavailable { lacks }),
                None => Ok(KVM_X86_SW_PROTECTED_VM.into()),
            },
        }
    }
}

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

/// Guest memory, and the gpas it is shown at.
#[derive(Debug)]
pub struct ExitMemory {
    exits: Exits,
    mapping: Arc<Mapping>,
    slots: Vec<GpaRange>,
}

#[derive(Debug)]
enum Exits {
    View(View),
    Attributes(Attributes),
}

impl ExitMemory {
    /// Memory of a VM with these slots and of the mechanism's
    /// [type](Mechanism::vm_type), none of whose vCPUs has run. The mapping is
    /// registered with a userfaultfd by now, and was
    /// [`inaccessible`](Mapping::inaccessible) until then: KVM's workers touch
    /// memory even while no vCPU runs.
    ///
    /// # Errors
    ///
    /// If the kernel refuses to change the mapping's protection, or KVM the
    /// attributes.
    pub fn new(
        mechanism: Mechanism,
        vm: &Arc<VmFd>,
        mapping: Arc<Mapping>,
        slots: Vec<GpaRange>,
    ) -> Result<Self, ExitError> {
        let exits = match mechanism {
            Mechanism::View => Exits::View(View::new(mapping.clone()).map_err(ExitError::Protect)?),
            Mechanism::Attributes => {
                let attributes = Attributes::new(vm.clone(), &slots)?;
                // KVM's own accesses do not exit, and wait on the userfaultfd.
                mapping.allow(Access::ReadWrite).map_err(ExitError::Protect)?;
                Exits::Attributes(attributes)
            }
        };
        Ok(Self { exits, mapping, slots })
    }

    /// The address in this process of a gpa.
    pub fn hva(&self, gpa: u64) -> Option<Hva> {
        self.slot(gpa).map(|slot| self.hva_in(slot, gpa))
    }

    /// Reads memory. Waits for it where it is missing, as any thread does.
    ///
    /// `None` if not all of it is memory of one memslot.
    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> Option<[u8; N]> {
        let offset = self.offset(gpa, N)?;
        let mut bytes = [0; N];
        self.mapping.read(offset, &mut bytes);
        Some(bytes)
    }

    /// Writes memory, as [`read`](Self::read) reads it. False if it is none.
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        let Some(offset) = self.offset(gpa, bytes.len()) else { return false };
        self.mapping.write(offset, bytes);
        true
    }

    /// Whether so many bytes are memory of one memslot.
    pub(crate) fn is_memory(&self, gpa: u64, len: usize) -> bool {
        self.offset(gpa, len).is_some()
    }

    /// Where in the mapping so many bytes are.
    fn offset(&self, gpa: u64, len: usize) -> Option<usize> {
        let slot = self.slot(gpa)?;
        let offset = gpa - slot.gpa;
        let fits = u64::try_from(len).is_ok_and(|len| len <= slot.len - offset);
        fits.then(|| usize::try_from(slot.offset + offset).ok()).flatten()
    }

    fn hva_in(&self, slot: &GpaRange, gpa: u64) -> Hva {
        Hva(self.mapping.hva() + slot.offset + (gpa - slot.gpa))
    }

    fn slot(&self, gpa: u64) -> Option<&GpaRange> {
        self.slots.iter().find(|slot| (slot.gpa..slot.gpa + slot.len).contains(&gpa))
    }

    /// Lets vCPUs have a page that is in place. Whether they could not so far, as
    /// far as is known; `None` where that is not a matter of single pages.
    pub(super) fn open<I: PageInstaller>(
        &self,
        gpa: u64,
        installer: &I,
    ) -> Result<Option<bool>, ExitError> {
        let (Exits::Attributes(attributes), Some(slot)) = (&self.exits, self.slot(gpa)) else {
            return Ok(None);
        };
        let is_present = |offset| installer.is_present(Hva(self.mapping.hva() + offset));
        attributes.clear(slot, gpa, is_present).map(Some)
    }

    /// No page is missing any more: faults need no exit. (With attributes, a
    /// last one for each 2 MiB: to end them all at once would make KVM forget
    /// all that it has mapped.)
    pub(super) fn stop_exits(&self) -> Result<(), ExitError> {
        match &self.exits {
            Exits::View(view) => view.stop_exits().map_err(ExitError::Protect),
            Exits::Attributes(_) => Ok(()),
        }
    }

    /// Lets the userfaultfd deliver what is missing until the answer is dropped;
    /// `None` if exits say what it is.
    pub(super) fn readable(&self) -> io::Result<Option<Readable<'_>>> {
        match &self.exits {
            Exits::View(view) => view.readable().map(Some),
            Exits::Attributes(_) => Ok(None),
        }
    }

    /// What makes the exits.
    pub fn mechanism(&self) -> Mechanism {
        match &self.exits {
            Exits::View(_) => Mechanism::View,
            Exits::Attributes(_) => Mechanism::Attributes,
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
        let hva = self.memory.hva(gpa).ok_or(Absent::NoMemory)?;
        if !self.installer.is_present(hva) {
            return Err(Absent::Missing);
        }
        let offset = hva.0 - self.memory.mapping.hva();
        let offset = usize::try_from(offset).map_err(|_| Absent::NoMemory)?;
        self.memory.mapping.read(offset, bytes);
        Ok(())
    }

    fn is_missing(&self, gpa: u64) -> bool {
        self.memory.hva(gpa).is_some_and(|hva| !self.installer.is_present(hva))
    }
}
