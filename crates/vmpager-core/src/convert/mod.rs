//! Private and shared pages of guest memory, and the rules by which one becomes
//! the other.
//!
//! Each page has one [`Kind`] at any time. A *conversion* gives a range of pages
//! the other one, and says what becomes of their contents ([`Contents`]). What it
//! takes is done by a back-end, step by [`Step`]:
//!
//! ```text
//!   close    whoever is to lose the pages can reach them no more, vCPUs included
//!   discard  what they held is gone (unless contents are preserved)
//!   open     whoever is to have the pages can reach them
//! ```
//!
//! That order, because pages discarded while they can be reached may come to life
//! again, and pages opened before they are discarded show what they held.
//!
//! A step may fail. Pages discarded by then have their new kind, and stay with it;
//! the others go back, with what they held. [`Outcome`] tells which are which, and
//! which pages could be given to nobody ([`Outcome::closed`]); these are repaired by
//! the next conversion that includes them.
//!
//! ```text
//!   Kinds::begin ──> Conversion: next_step ──> answer ──> next_step … ──> Kinds::finish
//!        └─ Nothing, Busy                                                    └─ Outcome
//! ```
//!
//! While a conversion goes on its pages are *busy*: faults on them are to be tried
//! again ([`Kinds::on_fault`]), and other conversions of them wait.

mod conversion;
mod kinds;
mod request;
mod runs;

pub use conversion::{Conversion, Outcome, State, Step};
pub use kinds::{Begin, FaultAnswer, Kinds, Places, SlotError, Slots};
pub use request::{Contents, HC_MAP_GPA_RANGE, Kind, Refusal, Request};
pub use runs::Runs;

/// The unit of conversions, in bytes.
pub const PAGE_BYTES: u64 = 4096;
