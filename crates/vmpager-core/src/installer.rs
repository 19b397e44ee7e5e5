//! What a thread that misses a page asks for, if it can install pages by
//! itself.

use std::fmt::Debug;
use std::sync::Arc;

use crate::addr::Hva;

/// What came of asking for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It was in place, as far as is known: somebody has just installed it, or
    /// it was given back since. Touch it again; if it is still missing, let the
    /// userfaultfd deliver the fault.
    Present,
    /// It is in place now.
    Installed,
    /// It is being fetched: wait for it, or do something else meanwhile and ask
    /// again.
    Waiting,
    /// It cannot be had (I3).
    Poisoned,
    /// The memory is complete and no longer registered with a userfaultfd: no
    /// page is missing, and pages nobody installed are the kernel's zeroes.
    Filled,
    /// The pager has ended before the memory was complete.
    Ended,
    /// No region of the pager is there.
    Outside,
}

/// A thread's way to install pages, whatever brings their bytes.
pub trait PageInstaller {
    /// Whether a page is known to be in place. Asks nobody, takes no lock.
    fn is_present(&self, hva: Hva) -> bool;

    /// Whether no page is missing any more, and none is registered with a
    /// userfaultfd ([`Resolution::Filled`]).
    fn is_complete(&self) -> bool;

    /// Brings the page at `hva`, if it can be had at once.
    fn resolve(&mut self, hva: Hva) -> Resolution;
}

/// Somebody who waits for pages without sleeping.
pub trait Watcher: Debug + Send + Sync {
    /// Pages have changed their state: called often, by whoever changed it, after
    /// it did. `is_settled` tells whether asking for a page may have another answer
    /// than [`Resolution::Waiting`].
    fn changed(&self, is_settled: &dyn Fn(Hva) -> bool);
}

/// An installer whose pages can be waited for without sleeping.
pub trait WatchedInstaller: PageInstaller {
    /// Whether asking for a page may have another answer than
    /// [`Resolution::Waiting`].
    fn is_settled(&self, hva: Hva) -> bool;

    /// Has somebody be told of all changes, for as long as the memory is served.
    fn watch(&self, watcher: Arc<dyn Watcher>);
}
