//! What to bring in though nobody waits for it.
//!
//! A page costs a fraction of a fault: most of a fault is the way to the pager
//! and back. Who chooses pages is a [`Prefetch`]; the engine asks three of them,
//! in this order, and none while somebody waits:
//!
//! - [`Neighbours`] widens the install around a fault, but only where the guest
//!   has shown interest, so that a VM that touches little stays small. Up to seven
//!   faults in 2 MiB, `n` of them bring in fewer than 2^n pages there, and none
//!   elsewhere; the eighth brings in the rest. Faults that follow each other at
//!   equal steps ([`Strides`]) bring in what comes next on their way.
//! - [`Replay`] brings in what a profile says the guest will touch, as long as the
//!   guest proves it right.
//! - [`Fill`] brings in everything, in pieces that a demand fault never waits long
//!   behind ([`Pace`]).

mod fill;
pub mod limits;
mod neighbours;
mod pace;
mod replay;
mod strides;

use crate::addr::PageRun;

pub use self::fill::Fill;
pub use self::neighbours::{NeighbourPolicy, Neighbours};
pub use self::pace::Pace;
pub use self::replay::{Replay, ReplayCounts};
pub use self::strides::Strides;

/// A way to choose pages.
///
/// It names pages whether they are in place or not, in flight, given back: the
/// engine takes from what is named only what is missing, and claims it. It does
/// no I/O, looks at no clock, and allocates nothing once it is made.
pub trait Prefetch {
    /// Somebody waits for a page of a slot, whose pages are `bounds`.
    fn faulted(&mut self, _page: u64, _bounds: PageRun) {}

    /// That page has to be brought: which pages of the slot, it among them, to
    /// bring at once.
    fn window(&mut self, page: u64, _bounds: PageRun) -> PageRun {
        PageRun::new(page, 1)
    }

    /// Not all of the window around a page came at once: the rest shall have its
    /// turn.
    fn put_off(&mut self, _page: u64, _window: PageRun) {}

    /// Somebody waits, here or in other memory: pieces begin small again.
    fn interrupted(&mut self) {}

    /// The pages whose turn it is; a run within one slot, or across several.
    fn next(&self) -> Option<PageRun>;

    /// Those of [`next`](Self::next) below this page have had their turn, one of
    /// them at least.
    fn took(&mut self, until: u64);

    /// Whether what is next is worth a read of its own, if it is not at hand.
    fn is_expected(&self) -> bool {
        true
    }
}
