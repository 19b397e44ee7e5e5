//! Private pages in the same memory as shared ones: for hosts whose KVM has no
//! memory attributes.
//!
//! vCPUs have their pages by a mapping of their own, whatever the pages' kind. The
//! host has other mappings of the same file, its *views*, and a private page is in
//! none of them: touching it is a SIGSEGV. Contents stay where they are unless they
//! are to be zeroes.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vmpager_core::convert::{Kind, Places};
use vmpager_sys::memory::{Access, Mapping};

use super::Backend;
use super::backend::pieces;
use crate::exit::GpaRange;

/// Memory that only vCPUs reach where it is private.
#[derive(Debug)]
pub struct InPlace {
    vcpus: Arc<Mapping>,
    views: Vec<Arc<Mapping>>,
    slots: Vec<GpaRange>,
    name: &'static str,
}

impl InPlace {
    /// For memslots whose pages are in `vcpus`, a shared mapping of a memfd of which
    /// `views` are the others.
    pub fn new(vcpus: Arc<Mapping>, views: Vec<Arc<Mapping>>, slots: Vec<GpaRange>) -> Self {
        Self { vcpus, views, slots, name: "memory in place" }
    }

    /// The same, when the file is a guest_memfd that the host can map
    /// (`GUEST_MEMFD_FLAG_MMAP` and `GUEST_MEMFD_FLAG_INIT_SHARED`): vCPUs have pages of
    /// it whoever else maps them.
    #[must_use]
    pub fn of_guest_memfd(self) -> Self {
        Self { name: "guest_memfd in place", ..self }
    }

    fn allow(&self, range: &Range<u64>, access: Access) -> io::Result<()> {
        pieces(&self.slots, range).try_for_each(|piece| {
            let piece = piece?;
            self.views.iter().try_for_each(|view| view.allow_in(piece.clone(), access))
        })
    }
}

impl Backend for InPlace {
    fn name(&self) -> &'static str {
        self.name
    }

    fn places(&self) -> Places {
        Places::One
    }

    /// vCPUs reach all pages at all times: what they have mapped goes when the
    /// pages are discarded.
    fn close(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        match to {
            Kind::Private => self.allow(&range, Access::None),
            Kind::Shared => Ok(()),
        }
    }

    fn discard(&self, range: Range<u64>, _: Kind) -> io::Result<()> {
        pieces(&self.slots, &range).try_for_each(|piece| self.vcpus.remove(piece?))
    }

    fn open(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        match to {
            Kind::Private => Ok(()),
            Kind::Shared => self.allow(&range, Access::ReadWrite),
        }
    }

    fn reopen(&self, range: Range<u64>, to: Kind) -> io::Result<()> {
        match to {
            Kind::Private => self.allow(&range, Access::None),
            Kind::Shared => self.allow(&range, Access::ReadWrite),
        }
    }
}
