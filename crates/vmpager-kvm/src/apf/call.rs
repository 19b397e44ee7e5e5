//! How whoever brings a page calls a vCPU out of the guest.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmpager_core::apf::Bell;
use vmpager_core::{Hva, Watcher};

/// Calls one vCPU when a page has come that it waits for.
pub struct Caller {
    pages: Mutex<Vec<Hva>>,
    bell: Bell,
    call: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caller").field("bell", &self.bell).finish_non_exhaustive()
    }
}

impl Caller {
    /// `call` has the vCPU leave the guest, and not enter it again before its
    /// thread has answered. It is called by any thread.
    pub fn new(call: impl Fn() + Send + Sync + 'static) -> Self {
        Self { pages: Mutex::default(), bell: Bell::new(), call: Box::new(call) }
    }

    /// Waits for these pages from now on, and no others. Look at all of them
    /// afterwards: what has come already is not told.
    pub(super) fn wait_for(&self, pages: impl Iterator<Item = Hva>) {
        let mut waited = self.pages();
        waited.clear();
        waited.extend(pages);
        self.bell.arm(waited.len() as u64);
    }

    /// Whether it was called since this was last asked.
    pub(super) fn answer(&self) -> bool {
        self.bell.answer()
    }

    /// Has the vCPU look at everything anew.
    pub(super) fn ring(&self) {
        if self.bell.ring() {
            (self.call)();
        }
    }

    fn pages(&self) -> MutexGuard<'_, Vec<Hva>> {
        // A list that was half written is only asked about too few pages, by a
        // thread that has panicked.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watcher for Caller {
    fn changed(&self, is_settled: &dyn Fn(Hva) -> bool) {
        if self.bell.is_armed() && self.pages().iter().any(|page| is_settled(*page)) {
            self.ring();
        }
    }
}
