//! What KVM offers vmpager on this host.
//!
//! [`probe::kvm`] tells whether this user can run a VM here, what the KVM
//! behind it can do, and whether a Linux guest is worth trying. It changes
//! nothing and creates no VM.
//!
//! [`candidates`] tells which guest pages a vCPU touched that stopped on an
//! access to a missing one, where KVM does not say.
#![forbid(unsafe_code)]

pub mod candidates;
pub mod probe;
