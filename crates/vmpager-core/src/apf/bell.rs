//! How a thread that brings a page reaches the vCPU that waits for it.

use crate::sync::{AtomicU64, Ordering, fence};

/// Rung when a page that a vCPU waits for may have come. Nobody who waits is
/// missed, and whoever does not wait is left alone.
///
/// The vCPU's thread [arms](Self::arm) it and *then* looks whether the page has
/// come; the other publishes the page and *then* [rings](Self::ring). So one of
/// them sees what the other did.
#[derive(Debug, Default)]
pub struct Bell {
    /// Pages waited for.
    armed: AtomicU64,
    /// Not answered yet.
    rung: AtomicU64,
}

impl Bell {
    /// One that nobody listens to.
    pub fn new() -> Self {
        Self { armed: AtomicU64::new(0), rung: AtomicU64::new(0) }
    }

    /// The vCPU waits for so many pages from now on. Look at all of them
    /// afterwards.
    pub fn arm(&self, pages: u64) {
        self.armed.store(pages, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Whether somebody waits. To be asked after a page was published, by whoever
    /// can tell which pages are waited for.
    pub fn is_armed(&self) -> bool {
        fence(Ordering::SeqCst);
        self.armed.load(Ordering::Relaxed) > 0
    }

    /// Rings. True if the vCPU must be called out of the guest: it has not been
    /// since it last [answered](Self::answer).
    pub fn ring(&self) -> bool {
        self.rung.swap(1, Ordering::SeqCst) == 0
    }

    /// Whether it was rung since this was last asked. Look at all pages
    /// afterwards.
    pub fn answer(&self) -> bool {
        // Not just a look: whoever rings after this must be known to have called
        // after what the vCPU's thread did before it.
        self.rung.swap(0, Ordering::SeqCst) != 0
    }
}
