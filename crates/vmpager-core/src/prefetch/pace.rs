//! How much the background fill, or the replay of a profile, brings in at a time.

/// Sizes the pieces of the background fill and of replays: up to 4 MiB while nobody
/// faults, smaller from the moment somebody does (I6).
///
/// How much smaller depends on how far the fill has come. A piece under way
/// makes a fault wait, which hurts most just after the VM has started; but
/// each fault that interrupts the fill also costs it a wake-up of the guest,
/// many times what the page itself costs. So a piece that follows a fault is a
/// fraction of what has been filled so far: a wait of some 20 us at first, of
/// as long as the worker's limit once 16 MiB are in place. (How long a page
/// takes is not known here: whoever fills also looks at the clock.)
#[derive(Debug)]
pub struct Pace {
    shift: u32,
    /// No piece is larger.
    most_shift: u32,
    filled: u64,
}

impl Pace {
    /// 64 KiB in base pages.
    const MIN_SHIFT: u32 = 4;
    /// 4 MiB in base pages: larger pieces gain nothing.
    pub(super) const MAX_SHIFT: u32 = 10;
    /// log2 of the fraction.
    const FRACTION_SHIFT: u32 = 3;

    /// Starts small: a VM faults most just after it started.
    pub fn new() -> Self {
        Self { shift: Self::MIN_SHIFT, most_shift: Self::MAX_SHIFT, filled: 0 }
    }

    /// Demand faults were served since the last piece.
    pub fn demanded(&mut self) {
        let fraction = (self.filled >> Self::FRACTION_SHIFT).max(1).ilog2();
        self.shift = fraction.max(Self::MIN_SHIFT).min(self.most_shift);
    }

    /// From now on no piece has more pages than 2 to this power.
    pub(super) fn limit(&mut self, shift: u32) {
        self.most_shift = shift.min(Self::MAX_SHIFT);
        self.shift = self.shift.min(self.most_shift);
    }

    /// The size of the next piece in base pages; grows from call to call.
    pub fn next_pages(&mut self) -> u64 {
        let pages = 1 << self.shift;
        self.shift = (self.shift + 1).min(self.most_shift);
        self.filled += pages;
        pages
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::new()
    }
}
