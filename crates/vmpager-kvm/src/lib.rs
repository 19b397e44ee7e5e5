//! KVM for vmpager: what this host's offers, and missing pages as exits of
//! vCPUs.
//!
//! [`probe::kvm`] tells whether this user can run a VM here, what the KVM
//! behind it can do, and whether a Linux guest is worth trying. It changes
//! nothing and creates no VM.
//!
//! [`candidates`] tells which guest pages a vCPU touched that stopped on an
//! access to a missing one, where KVM does not say. [`exit`] makes such pages
//! exits of the vCPU, installed by its own thread. [`apf`] tells the guest of those
//! that take long, so that it runs something else.
//! [`ahead`] maps pages that are in place before the guest touches them, and [`stats`] has
//! how many stage-2 faults it took all the same.
//! [`private`] converts memory between private to the guest and shared with the host.
#![forbid(unsafe_code)]

pub mod ahead;
pub mod apf;
pub mod candidates;
pub mod exit;
pub mod private;
pub mod probe;
pub mod stats;
