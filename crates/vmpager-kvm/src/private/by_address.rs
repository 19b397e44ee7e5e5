//! Private pages in the same memory as shared ones, which a guest tells apart by
//! address: for VMs whose KVM has memory attributes.
//!
//! Guest memory is in memslots twice, at its address (the *private view*) and at
//! that plus a constant (the *shared view*), as if a bit of the address said which
//! kind is meant. Of each page one view is open. The other one carries
//! `KVM_MEMORY_ATTRIBUTE_PRIVATE`, and its memslot has no guest_memfd, so that KVM
//! answers an access there with `KVM_EXIT_MEMORY_FAULT`, before it looks at the
//! memory (`Documentation/virt/kvm/api.rst`): the guest asks for a conversion by
//! touching the page as what it is to become.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmpager_core::convert::{Kind, Places};

use super::attributes::set_private;
use super::{Backend, InPlace};
use crate::exit::GpaRange;

/// Memory of which vCPUs have two views, of which one at a time shows a page.
#[derive(Debug)]
pub struct ByAddress {
    vm: Arc<VmFd>,
    memory: InPlace,
    shared_at: u64,
}

impl ByAddress {
    /// For a software-protected VM whose memslots `slots` are there again, with the
    /// same memory, `shared_at` above; `memory` is that memory, all of it shared
    /// by now. Closes the private view.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn new(
        vm: Arc<VmFd>,
        memory: InPlace,
        slots: &[GpaRange],
        shared_at: u64,
    ) -> io::Result<Self> {
        for slot in slots {
            set_private(&vm, &(slot.gpa..slot.gpa + slot.len), true)?;
        }
        Ok(Self { vm, memory, shared_at })
    }

    /// Opens or closes the view by which vCPUs have pages of that kind.
    fn show(&self, range: &Range<u64>, kind: Kind, is_open: bool) -> io::Result<()> {
        let base = match kind {
            Kind::Private => 0,
            Kind::Shared => self.shared_at,
        };
        set_private(&self.vm, &(base + range.start..base + range.end), !is_open)
    }
}

impl Backend for ByAddress {
    fn name(&self) -> &'static str {
        "memory in place, by address"
    }

    fn places(&self) -> Places {
        Places::One
    }

    fn close(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        self.show(&range, to.other(), false)?;
        self.memory.close(range, to)
    }

    fn discard(&self, range: Range<u64>, of: Kind) -> io::Result<()> {
        self.memory.discard(range, of)
    }

    fn open(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        self.show(&range, to, true)?;
        self.memory.open(range, to)
    }

    fn reopen(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        self.show(&range, to.other(), false)?;
        self.show(&range, to, true)?;
        self.memory.reopen(range, to)
    }

    fn meant(&self, gpa: u64, _: Kind) -> (u64, Kind) {
        match gpa.checked_sub(self.shared_at) {
            Some(gpa) => (gpa, Kind::Shared),
            None => (gpa, Kind::Private),
        }
    }
}
