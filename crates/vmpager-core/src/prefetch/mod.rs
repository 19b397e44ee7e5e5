//! What to bring in though nobody waits for it.
//!
//! A page costs a fraction of a fault: most of a fault is the way to the pager
//! and back. [`Neighbours`] therefore widens the install around a fault, but
//! only where the guest has shown interest, so that a VM that touches little
//! stays small: up to seven faults in 2 MiB, `n` of them bring in fewer than 2^n
//! pages there, and none elsewhere; the eighth brings in the rest. [`Replay`] brings in what a profile says the guest will touch,
//! as long as the guest proves it right. [`FillPace`] sizes the pieces of the
//! background fill so that a demand fault never waits long behind one.

mod neighbours;
mod pace;
mod replay;

pub use self::neighbours::{NeighbourPolicy, Neighbours};
pub use self::pace::FillPace;
pub use self::replay::{Replay, ReplayCounts};
