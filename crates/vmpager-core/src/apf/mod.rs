//! Asynchronous page faults: the device that lets a guest run another task
//! while one waits for a page, as decisions.
//!
//! The guest sees what KVM's own device shows (`Documentation/virt/kvm/x86/msr.rst`,
//! `MSR_KVM_ASYNC_PF_EN`, `_INT`, `_ACK`): it is told by a page fault that a page
//! is *not present*, with a token, and by an interrupt that the page of a token is
//! *ready*. [`AsyncPf`] is that device for one vCPU; who carries its decisions out
//! (guest memory, exceptions, interrupts) is in the crate for KVM.
//!
//! ```text
//!   a fault that would wait ── admit ──> reserved ── announced ──> asleep
//!                                            │                        │ arrived
//!                              arrived: nothing to tell               v
//!        the word is free, and acknowledged ──────────── post <── the ready queue
//!
//!   enabling: a wake-all goes first into the queue, and no fault is told before
//!   it is acknowledged; disabling, INIT and reset: everything is forgotten
//! ```
//!
//! [`Policy`] says which faults go this way, [`Bell`] is how the thread that
//! brings a page reaches the vCPU that waits for it.

mod bell;
mod device;
mod policy;
mod registers;

pub use bell::Bell;
pub use device::{
    Arrival, AsyncPf, Conditions, Counts, IN_FLIGHT, Post, Refusal, Ticket, Token, TokenError,
};
pub use policy::{Always, Expectation, LongerThan, Never, Policy};
pub use registers::{Features, GeneralProtection, Register, Registers, Written};
