//! VMs whose memory can be private to the guest.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmpager::core::convert::Contents;
use vmpager_kvm::exit::GpaRange;
use vmpager_kvm::private::PrivateMemory;
use vmpager_sys::memfd;
use vmpager_sys::memory::Mapping;

use crate::PAGE_SIZE;
use crate::device::to_usize;
use crate::error::VmError;
use crate::kvm::OwnGuestMemfd;
use crate::layout::SHARED_GPA;
use crate::memory::{GuestMemory, Memslot};

/// Where private pages are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrivateBackend {
    /// In a guest_memfd if this KVM has memory attributes, else in place.
    #[default]
    Auto,
    /// In a guest_memfd, in a software-protected VM: the host cannot map it.
    GuestMemfd,
    /// Where they were, and in none of the host's mappings but the vCPUs'.
    InPlace,
    /// The same, in a guest_memfd that the host can map: from Linux 6.18 on.
    MappedGuestMemfd,
    /// In place, in a software-protected VM whose guest says by the address which
    /// kind it means: its accesses ask for conversions, too.
    ByAddress,
}

/// Memory that can be private to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrivateConfig {
    /// Where private pages are.
    pub backend: PrivateBackend,
    /// What becomes of contents when pages are converted.
    pub contents: Contents,
}

/// What of a VM's memory the host has, and how pages leave it.
#[derive(Clone, Debug)]
pub(crate) struct PrivateParts {
    pub(crate) config: PrivateConfig,
    /// What is private from the start, in bytes of guest-physical memory.
    pub(crate) ranges: Vec<Range<u64>>,
    /// The host's view, which loses private pages if they stay in place.
    pub(crate) view: Arc<Mapping>,
    /// What it is in, if that is a guest_memfd.
    pub(crate) guest_memfd: Option<Arc<OwnGuestMemfd>>,
}

impl PrivateParts {
    /// How far above its address a shared page has another; 0 if it has none.
    pub(crate) fn shared_at(&self) -> u64 {
        if self.config.backend == PrivateBackend::ByAddress { SHARED_GPA } else { 0 }
    }
}

impl GuestMemory {
    /// Fresh memory, in slots, that can be private, and is in some ranges.
    pub(crate) fn private(
        bytes: u64,
        slots: Vec<Memslot>,
        config: PrivateConfig,
        ranges: Vec<Range<u64>>,
    ) -> Result<Self, VmError> {
        let failed = |error| VmError::Memory { bytes, error };
        let map = |file: BorrowedFd<'_>| Mapping::file_shared(file, to_usize(bytes));
        let parts = |view: Mapping, guest_memfd| {
            let view = Arc::new(view);
            PrivateParts { config, ranges, view, guest_memfd }
        };
        if config.backend == PrivateBackend::MappedGuestMemfd {
            let own = OwnGuestMemfd::new(bytes)?;
            let mapping = Arc::new(map(own.fd.as_fd()).map_err(failed)?);
            let view = map(own.fd.as_fd()).map_err(failed)?;
            return Ok(Self::new(mapping, slots).protected(None, parts(view, Some(Arc::new(own)))));
        }
        let memfd = memfd::sealed("guest-memory", bytes).map_err(failed)?;
        let mapping = Arc::new(map(memfd.as_fd()).map_err(failed)?);
        let view = map(memfd.as_fd()).map_err(failed)?;
        Ok(Self::new(mapping, slots).protected(Some(memfd), parts(view, None)))
    }

    /// The same, these pages private from the start too, what they hold included, if
    /// the guest says by the address which kind it means: it begins in them.
    pub(crate) fn owned(mut self, pages: Range<u64>) -> Self {
        if let Some(parts) = self.private.as_mut().filter(|parts| parts.shared_at() != 0) {
            parts.ranges.push(pages.start * PAGE_SIZE..pages.end * PAGE_SIZE);
        }
        self
    }

    /// Where its memslots are in the mapping.
    pub(crate) fn ranges(&self) -> Vec<GpaRange> {
        let range = |slot: &Memslot| GpaRange { gpa: slot.gpa, offset: slot.offset, len: slot.len };
        self.slots.iter().map(range).collect()
    }
}

/// What of a saved VM was private.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PrivateState {
    /// Whether contents stay when pages are converted.
    pub(crate) preserves: bool,
    /// The private ranges of guest-physical memory, in order: address and bytes.
    pub(crate) ranges: Vec<(u64, u64)>,
}

impl PrivateState {
    /// Of memory whose private pages the host can read.
    pub(crate) fn save(private: &PrivateMemory) -> Result<Self, VmError> {
        let ranges = private.private_ranges();
        if !private.is_in_place() && !ranges.is_empty() {
            return Err(VmError::NotPrivate {
                problem: "some of it is in a guest_memfd, which the host cannot read, so that it \
                          cannot be saved; have the guest share its pages first, or keep private \
                          pages in place",
            });
        }
        let ranges = ranges.into_iter().map(|range| (range.start, range.end - range.start));
        Ok(Self { preserves: private.preserves(), ranges: ranges.collect() })
    }

    /// How its memory can be private again.
    pub(crate) fn config(&self, backend: PrivateBackend) -> PrivateConfig {
        let contents = if self.preserves { Contents::Preserve } else { Contents::Zero };
        let backend = match backend {
            PrivateBackend::Auto if !self.ranges.is_empty() => PrivateBackend::InPlace,
            backend => backend,
        };
        PrivateConfig { backend, contents }
    }

    /// What is wrong with the ranges, given the memslots.
    pub(crate) fn problem(&self, slots: &[Memslot]) -> Option<String> {
        let mut at = 0;
        for &(gpa, len) in &self.ranges {
            let whole = gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && len > 0;
            let end = gpa.checked_add(len).filter(|_| whole && gpa >= at);
            let inside =
                |end: u64| slots.iter().any(|slot| gpa >= slot.gpa && end - slot.gpa <= slot.len);
            match end {
                Some(end) if inside(end) => at = end,
                _ => {
                    return Some(format!(
                        "({gpa:#x}, {len:#x}) is no range of pages in a memslot, in order"
                    ));
                }
            }
        }
        None
    }
}

/// What vCPUs are to convert.
#[derive(Clone, Debug)]
pub struct ConvertWorkload {
    /// How many conversions each vCPU does.
    pub conversions: u64,
    /// Decides which.
    pub seed: u64,
    /// Numbers of pages of which each conversion has one, by chance.
    pub sizes: Vec<u64>,
    /// Whether the guest asks by touching pages as what they are to become, page by
    /// page, instead of by hypercalls; for [`PrivateBackend::ByAddress`].
    pub implicit: bool,
    /// Instead of by chance, range after range, each made private and shared again:
    /// for benchmarks.
    pub to_and_fro: bool,
}

impl Default for ConvertWorkload {
    /// 4 KiB to 2 MiB + 4 KiB, mostly small.
    fn default() -> Self {
        Self {
            conversions: 64,
            seed: 1,
            sizes: vec![1, 1, 1, 1, 2, 2, 3, 8, 16, 64, 512, 513],
            implicit: false,
            to_and_fro: false,
        }
    }
}

/// What came of a conversion workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertReport {
    /// Conversions that the guest asked for.
    pub conversions: u64,
    /// How long they took, filling and checking of the pages included.
    pub took: std::time::Duration,
    /// Pages in which the guest found a byte that should not be there.
    pub mismatches: u64,
    /// The first of them.
    pub first_mismatch: Option<u64>,
    /// Shared pages that the host compared, byte by byte.
    pub host_pages: u64,
    /// Those that were not what the guest had written.
    pub host_mismatches: u64,
    /// Pages that are private now.
    pub private_pages: u64,
}

/// A conversion as the guest's program has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) first: u32,
    pub(crate) pages: u32,
    /// As in `KVM_HC_MAP_GPA_RANGE`.
    pub(crate) flags: u32,
    /// What the pages are filled with afterwards.
    pub(crate) tag: u32,
}

/// The flag that asks for private pages.
pub(crate) const TO_PRIVATE: u32 = 16;

impl ConvertWorkload {
    /// The conversions of a vCPU that has these pages.
    pub(crate) fn ops(&self, area: &Range<u64>, vcpu: u64) -> Vec<Op> {
        let mut rng = crate::contents::Rng(self.seed ^ vcpu << 48);
        let room = area.end - area.start;
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let op = |number: u64| {
            let choice = to_usize(rng.below(self.sizes.len().max(1) as u64));
            let pages = self.sizes.get(choice).copied().unwrap_or(1).clamp(1, room);
            let (first, to_private) = if self.to_and_fro {
                (number / 2 % (room / pages) * pages, number.is_multiple_of(2))
            } else {
                (rng.below(room - pages + 1), rng.below(2) == 0)
            };
            let first = area.start + first;
            let flags = if to_private { TO_PRIVATE } else { 0 };
            let tag = small(1 + rng.below(LARGEST_TAG));
            Op { first: small(first), pages: small(pages), flags, tag }
        };
        (0..self.conversions).map(op).collect()
    }
}

/// Tags, of 31 bits: 0 is a page of zeroes, the last is not known.
const LARGEST_TAG: u64 = 0x7fff_fffd;
/// A page of which is not known what it holds.
pub(crate) const UNKNOWN: u32 = 0x7fff_ffff;
/// The bit of a tag that says that its page is private.
pub(crate) const IS_PRIVATE: u32 = 1 << 31;
