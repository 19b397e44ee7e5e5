//! How much of what nobody waits for a pager takes on at a time.

use std::time::Duration;

use crate::addr::PageRun;

/// The most pages read from storage for a demanded one: 256 KiB take little
/// longer than one page, 2 MiB ten times as long.
pub const COLD_WINDOW: u64 = 64;

/// The most pages the fill reads from storage at a time: 512 KiB, so that a
/// demanded read never queues behind much.
pub const COLD_PIECE: u64 = 128;

/// Reads for the background fill in flight at once, so that a demanded read
/// never queues behind many: each is [`COLD_PIECE`] at most (or one huge page).
pub const FILL_DEPTH: usize = 4;

/// Reads that nobody waits for, for whatever reason. Those of a profile are small
/// where its pages are far from each other.
pub const PREFETCH_DEPTH: usize = 24;

/// A piece of the fill, or of a profile, that has taken longer ends: who faults
/// meanwhile waits for it, and how long a page takes is up to the machine.
pub const LONG: Duration = Duration::from_micros(700);

/// The most base pages installed between two looks at the clock.
pub const CHUNK: u64 = 64;

/// What may be brought between two looks for faults.
///
/// Each run costs a call beside its pages, which counts as one page more.
#[derive(Debug)]
pub struct Look {
    most: u64,
    left: u64,
}

impl Look {
    /// So many pages, if they are one run.
    pub fn of(pages: u64) -> Self {
        Self { most: pages, left: pages }
    }

    /// How many pages are left.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Whether nothing has been brought.
    pub fn is_empty(&self) -> bool {
        self.left == self.most
    }

    /// A run is brought.
    pub fn brought(&mut self, run: PageRun) {
        self.left = self.left.saturating_sub(run.count + 1);
    }
}
