//! Windows around pages that somebody waited for.

use std::collections::VecDeque;

use super::{Prefetch, Strides};
use crate::addr::PageRun;

/// log2 of the pages per region in which interest is counted: 2 MiB of base
/// pages.
const REGION_SHIFT: u8 = 9;
const REGION_PAGES: u64 = 1 << REGION_SHIFT;

/// log2 of the last window that is not the whole region. Most pages of a larger
/// one would be in place already: for touches all over a region, windows of 128
/// and 256 pages are two more faults than one of 512, and bring the same.
const LAST_WINDOW_SHIFT: u8 = 6;

/// The most windows kept: half as many as faults are read at a time. Faults
/// that come faster need no neighbours to keep their threads going.
const MAX_WINDOWS: usize = 32;

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
    /// What comes next where faults follow each other at equal steps.
    Strides,
    /// Where they do, what comes next; elsewhere as `Adaptive`, from one page on.
    Mixed,
}

impl Default for NeighbourPolicy {
    /// What `vmpager bench prefetch` and `bench restore` found to be best: an
    /// isolated touch costs one page, and streams wait least.
    fn default() -> Self {
        Self::Mixed
    }
}

/// Counts faults per region, and answers with windows.
#[derive(Debug)]
struct Regions {
    /// log2 of the next window of each.
    shifts: Vec<u8>,
}

impl Regions {
    fn new(first_window_shift: u8, pages: u64) -> Self {
        let regions = usize::try_from(pages.div_ceil(REGION_PAGES));
        let regions = regions.expect("one byte a region fits the address space");
        Self { shifts: vec![first_window_shift.min(REGION_SHIFT); regions] }
    }

    /// The window around a page; counts the fault.
    fn window(&mut self, page: u64, bounds: PageRun) -> PageRun {
        let region = usize::try_from(page / REGION_PAGES).unwrap_or(usize::MAX);
        let Some(shift) = self.shifts.get_mut(region) else { return PageRun::new(page, 1) };
        let size = 1_u64 << *shift;
        *shift = if *shift < LAST_WINDOW_SHIFT { *shift + 1 } else { REGION_SHIFT };
        let first = (page & !(size - 1)).max(bounds.first);
        let end = ((page | (size - 1)) + 1).min(bounds.end());
        PageRun::new(first, end - first)
    }
}

/// Brings in what lies around pages that somebody waited for, and what comes next
/// on the way of such pages.
#[derive(Debug)]
pub struct Neighbours {
    regions: Option<Regions>,
    strides: Option<Strides>,
    /// The windows around pages somebody waited for, without what was brought
    /// in of them already.
    windows: VecDeque<PageRun>,
}

impl Neighbours {
    /// For a page map of that many pages. Costs one byte per 512 pages, where
    /// windows are adaptive.
    pub fn new(policy: NeighbourPolicy, pages: u64) -> Self {
        use NeighbourPolicy::{Adaptive, Mixed, Off, Strides as Streams};
        let regions = match policy {
            Off | Streams => None,
            Adaptive { first_window_shift } => Some(Regions::new(first_window_shift, pages)),
            Mixed => Some(Regions::new(0, pages)),
        };
        let strides = matches!(policy, Streams | Mixed).then(Strides::new);
        Self { regions, strides, windows: VecDeque::with_capacity(MAX_WINDOWS) }
    }
}

impl Prefetch for Neighbours {
    fn faulted(&mut self, page: u64, bounds: PageRun) {
        if let Some(strides) = &mut self.strides {
            strides.faulted(page, bounds);
        }
    }

    /// The window around a demanded page, within `bounds` (its slot); counts
    /// the fault.
    fn window(&mut self, page: u64, bounds: PageRun) -> PageRun {
        if let Some(strides) = &mut self.strides
            && strides.leads_to(page)
        {
            return strides.window(page, bounds);
        }
        let Some(regions) = &mut self.regions else { return PageRun::new(page, 1) };
        let window = regions.window(page, bounds);
        if let Some(strides) = &mut self.strides {
            strides.brought(page, window);
        }
        window
    }

    fn put_off(&mut self, page: u64, window: PageRun) {
        if self.strides.as_ref().is_some_and(|strides| strides.leads_to(page)) {
            return; // what is ahead has its turn anyway
        }
        if self.windows.len() == MAX_WINDOWS {
            self.windows.pop_front();
        }
        self.windows.push_back(window);
    }

    fn next(&self) -> Option<PageRun> {
        let expected = self.strides.as_ref().and_then(Strides::next);
        expected.or_else(|| self.windows.front().copied())
    }

    fn took(&mut self, until: u64) {
        if self.is_expected() {
            if let Some(strides) = &mut self.strides {
                strides.took(until);
            }
            return;
        }
        let Some(window) = self.windows.front_mut() else { return };
        let until = until.clamp(window.first, window.end());
        *window = PageRun::new(until, window.end() - until);
        if window.count == 0 {
            self.windows.pop_front();
        }
    }

    /// What lies near is not; what comes next is.
    fn is_expected(&self) -> bool {
        self.strides.as_ref().is_some_and(|strides| strides.next().is_some())
    }
}
