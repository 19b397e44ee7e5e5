//! Windows around pages that somebody waited for.

use crate::addr::PageRun;

/// log2 of the pages per region in which interest is counted: 2 MiB of base
/// pages.
const REGION_SHIFT: u8 = 9;
const REGION_PAGES: u64 = 1 << REGION_SHIFT;

/// log2 of the last window that is not the whole region. Most pages of a larger
/// one would be in place already: for touches all over a region, windows of 128
/// and 256 pages are two more faults than one of 512, and bring the same.
const LAST_WINDOW_SHIFT: u8 = 6;

/// Which pages to install along with a demanded one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighbourPolicy {
    /// The demanded page alone.
    Off,
    /// A window that starts at `first_window` pages and doubles with every
    /// further fault in the same 2 MiB, up to 64 pages; then all of it.
    Adaptive {
        /// log2 of the window of a region's first fault, in pages.
        first_window_shift: u8,
    },
}

impl Default for NeighbourPolicy {
    /// Adaptive from one page on: an isolated touch costs one page.
    fn default() -> Self {
        Self::Adaptive { first_window_shift: 0 }
    }
}

/// Counts faults per region, and answers with windows.
#[derive(Debug)]
pub struct Neighbours {
    policy: NeighbourPolicy,
    /// Per region: log2 of the next window.
    shifts: Vec<u8>,
}

impl Neighbours {
    /// For a page map of that many pages. Costs one byte per 512 pages.
    pub fn new(policy: NeighbourPolicy, pages: u64) -> Self {
        let (regions, first) = match policy {
            NeighbourPolicy::Off => (0, 0),
            NeighbourPolicy::Adaptive { first_window_shift } => {
                (pages.div_ceil(REGION_PAGES), first_window_shift.min(REGION_SHIFT))
            }
        };
        let regions = usize::try_from(regions).expect("one byte a region fits the address space");
        Self { policy, shifts: vec![first; regions] }
    }

    /// The window around a demanded page, within `bounds` (its slot); counts
    /// the fault.
    pub fn window(&mut self, page: u64, bounds: PageRun) -> PageRun {
        if self.policy == NeighbourPolicy::Off {
            return PageRun::new(page, 1);
        }
        let region = usize::try_from(page / REGION_PAGES).unwrap_or(usize::MAX);
        let Some(shift) = self.shifts.get_mut(region) else { return PageRun::new(page, 1) };
        let size = 1_u64 << *shift;
        *shift = if *shift < LAST_WINDOW_SHIFT { *shift + 1 } else { REGION_SHIFT };
        let first = (page & !(size - 1)).max(bounds.first);
        let end = ((page | (size - 1)) + 1).min(bounds.end());
        PageRun::new(first, end - first)
    }
}
