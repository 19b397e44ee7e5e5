//! What KVM knows of a virtual machine beside its memory: taken out of it,
//! kept in a state file, and put back into another one.
//!
//! The structures here are copies of those in the kernel's
//! `Documentation/virt/kvm/api.rst`, field by field and under the same names,
//! without padding: an error in a state file then names the register.
//!
//! # Order
//!
//! KVM's state is not a set of independent values; reading or writing some of
//! it changes other parts. [`VcpuState::save`] and [`VcpuState::load`] keep to
//! an order within a vCPU. Among them:
//!
//! - Saving: no vCPU runs, and the last exit of each is complete.
//! - Loading ([`KvmState::load`]): memslots and irqchip exist, and guest memory
//!   can be touched, since KVM maps the pages of its paravirtual clock: a pager
//!   must serve by then. All [`VcpuState`]s come first. [`MachineState`] is last,
//!   for the I/O APIC sends what is pending to the local APICs, and for the clock
//!   to start when everything else is in place.

mod cpuid;
mod events;
mod irqchip;
mod lapic;
mod mirror;
mod msrs;
mod registers;
mod scope;
mod vcpu;
mod xsave;

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use irqchip::Irqchip;
pub(crate) use irqchip::MachineState;
#[cfg(test)]
pub(crate) use lapic::Lapic;
pub(crate) use msrs::{Msr, is_async_pf};
pub(crate) use scope::StateScope;
pub(crate) use vcpu::VcpuState;

use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::refused;
use crate::error::VmError;

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(deny_unknown_fields)]
pub(crate) struct KvmState {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) machine: MachineState,
}

impl KvmState {
    /// Puts the state into a VM that has not run, vCPU by vCPU.
    ///
    /// # Errors
    ///
    /// If KVM refuses some of it, or has no such state.
    pub(crate) fn load<'a>(
        &self,
        vm: &VmFd,
        vcpus: impl IntoIterator<Item = &'a VcpuFd>,
        scope: &StateScope,
    ) -> Result<(), VmError> {
        for (fd, state) in vcpus.into_iter().zip(&self.vcpus) {
            state.load(fd, scope)?;
        }
        self.machine.load(vm)
    }
}
