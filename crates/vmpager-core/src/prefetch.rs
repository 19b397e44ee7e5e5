//! How much to bring in beside what was asked for.
//!
//! A page costs a fraction of a fault: most of a fault is the way to the pager
//! and back. [`Neighbours`] therefore widens the install around a fault, but
//! only where the guest has shown interest, so that a VM that touches little
//! stays small: up to seven faults in 2 MiB, `n` of them bring in fewer than 2^n
//! pages there, and none elsewhere; the eighth brings in the rest. [`FillPace`] sizes the pieces of the background fill so that
//! a demand fault never waits long behind one.

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

impl NeighbourPolicy {
    /// All 2 MiB around a demanded page at once.
    pub const WHOLE_PIECES: Self = Self::Adaptive { first_window_shift: REGION_SHIFT };
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

/// Sizes the pieces of the background fill: up to 4 MiB while nobody faults,
/// smaller from the moment somebody does (I6).
///
/// How much smaller depends on how far the fill has come. A piece under way
/// makes a fault wait, which hurts most just after the VM has started; but
/// each fault that interrupts the fill also costs it a wake-up of the guest,
/// many times what the page itself costs. So a piece that follows a fault is a
/// fraction of what has been filled so far: a wait of some 20 us at first, of
/// as long as the worker's limit once 16 MiB are in place. (How long a page
/// takes is not known here: whoever fills also looks at the clock.)
#[derive(Debug)]
pub struct FillPace {
    shift: u32,
    filled: u64,
}

impl FillPace {
    /// 64 KiB in base pages.
    const MIN_SHIFT: u32 = 4;
    /// 4 MiB in base pages: larger pieces gain nothing.
    const MAX_SHIFT: u32 = 10;
    /// log2 of the fraction.
    const FRACTION_SHIFT: u32 = 3;

    /// Starts small: a VM faults most just after it started.
    pub fn new() -> Self {
        Self { shift: Self::MIN_SHIFT, filled: 0 }
    }

    /// Demand faults were served since the last piece.
    pub fn demanded(&mut self) {
        let fraction = (self.filled >> Self::FRACTION_SHIFT).max(1).ilog2();
        self.shift = fraction.clamp(Self::MIN_SHIFT, Self::MAX_SHIFT);
    }

    /// The size of the next piece in base pages; grows from call to call.
    pub fn next_pages(&mut self) -> u64 {
        let pages = 1 << self.shift;
        self.shift = (self.shift + 1).min(Self::MAX_SHIFT);
        self.filled += pages;
        pages
    }
}

impl Default for FillPace {
    fn default() -> Self {
        Self::new()
    }
}
