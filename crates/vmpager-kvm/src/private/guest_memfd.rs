//! guest_memfd for private pages, beside a mapping for shared ones.
//!
//! `KVM_SET_MEMORY_ATTRIBUTES` both closes pages and opens them: from its return on
//! vCPUs get them from the other memory. It zaps the range, and only that, from
//! stage 2; faults that were on their way find that out and start again
//! (`Documentation/virt/kvm/api.rst`). Up to Linux 7.2 nothing moves data between
//! the two, and the host can neither read nor write private pages.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmpager_core::convert::{Kind, Places};
use vmpager_sys::memfd;
use vmpager_sys::memory::Mapping;

use super::Backend;
use super::attributes::set_private;
use super::backend::pieces;
use crate::exit::GpaRange;

/// Memslots that have a guest_memfd for private pages.
#[derive(Debug)]
pub struct GuestMemfd {
    vm: Arc<VmFd>,
    private: OwnedFd,
    shared: Arc<Mapping>,
    slots: Vec<GpaRange>,
}

impl GuestMemfd {
    /// For a VM with memory attributes whose memslots are `slots`; in each, byte
    /// `offset` of `private` and of `shared`, a mapping of shared memory, is the
    /// first.
    pub fn new(
        vm: Arc<VmFd>,
        private: OwnedFd,
        shared: Arc<Mapping>,
        slots: Vec<GpaRange>,
    ) -> Self {
        Self { vm, private, shared, slots }
    }

    fn set(&self, range: &Range<u64>, kind: Kind) -> io::Result<()> {
        set_private(&self.vm, range, kind == Kind::Private)
    }
}

impl Backend for GuestMemfd {
    fn name(&self) -> &'static str {
        "guest_memfd"
    }

    fn places(&self) -> Places {
        Places::Two
    }

    fn close(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        self.set(&range, to)
    }

    fn discard(&self, range: Range<u64>, of: Kind) -> io::Result<()> {
        pieces(&self.slots, &range).try_for_each(|piece| match of {
            Kind::Private => memfd::punch_hole(self.private.as_fd(), piece?),
            Kind::Shared => self.shared.remove(piece?),
        })
    }

    /// Closing has done it already.
    fn open(&self, _: Range<u64>, _: Kind) -> io::Result<()> {
        Ok(())
    }

    fn reopen(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        self.set(&range, to)
    }
}
