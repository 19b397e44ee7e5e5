//! What KVM offers vmpager on this host.
//!
//! [`probe::kvm`] tells whether this user can run a VM here, what the KVM
//! behind it can do, and whether a Linux guest is worth trying. It changes
//! nothing and creates no VM.
#![forbid(unsafe_code)]

pub mod probe;
