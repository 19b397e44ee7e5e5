//! What carries out the steps of a conversion.

use std::fmt;
use std::io;
use std::ops::Range;

use vmpager_core::convert::{Kind, Places};

use crate::exit::GpaRange;

/// Memory whose pages can be private. Ranges are those of guest-physical
/// addresses, in bytes, in whole pages of memory that can be converted; no two
/// calls at the same time have pages in common.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Its name, for people.
    fn name(&self) -> &'static str;

    /// Where memory of the two kinds is.
    fn places(&self) -> Places;

    /// From its return on, whoever has pages of the other kind can reach these no
    /// more; vCPUs that did have lost what they had mapped. The range may go on from
    /// one slot to the next.
    ///
    /// # Errors
    ///
    /// What the kernel says. Some of the range may be closed.
    fn close(&self, range: Range<u64>, to: Kind) -> io::Result<()>;

    /// From its return on, what memory of that kind held for these pages is gone.
    /// The range lies in one slot.
    ///
    /// # Errors
    ///
    /// What the kernel says. Some of it may be gone.
    fn discard(&self, range: Range<u64>, of: Kind) -> io::Result<()>;

    /// From its return on, whoever has pages of this kind can reach these. The range
    /// may go on from one slot to the next.
    ///
    /// # Errors
    ///
    /// What the kernel says. Some of the range may be open.
    fn open(&self, range: Range<u64>, to: Kind) -> io::Result<()>;

    /// As [`open`](Self::open), for a range that may be closed, open, or open to
    /// others, some of it or all.
    ///
    /// # Errors
    ///
    /// What the kernel says. Some of the range may be open.
    fn reopen(&self, range: Range<u64>, to: Kind) -> io::Result<()>;

    /// Which page an access was meant for, and as what, given the address and the
    /// kind that KVM tells of it: these, unless the back-end has views of its own.
    fn meant(&self, gpa: u64, told: Kind) -> (u64, Kind) {
        (gpa, told)
    }
}

/// Where a range of guest-physical addresses is in the memory behind its memslots:
/// offset and bytes, slot by slot.
pub(super) fn pieces(
    slots: &[GpaRange],
    range: &Range<u64>,
) -> impl Iterator<Item = io::Result<Range<usize>>> {
    let Range { start, end } = *range;
    let within = move |slot: &GpaRange| {
        let (start, end) = (start.max(slot.gpa), end.min(slot.gpa + slot.len));
        (start < end).then(|| slot.offset + (start - slot.gpa)..slot.offset + (end - slot.gpa))
    };
    let to_usize = |offset: u64| usize::try_from(offset).map_err(io::Error::other);
    slots
        .iter()
        .filter_map(within)
        .map(move |piece| Ok(to_usize(piece.start)?..to_usize(piece.end)?))
}
