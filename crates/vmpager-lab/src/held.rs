//! VMs that are there from the first test to the last, and never run.
//!
//! KVM patches the kernel's code when the first VM comes and the last one goes (the
//! scheduler's notifiers of preemption), and when the first and last vCPU of some kinds
//! do: without a LAPIC, or with one that is off, as each is after its reset. On emulated
//! CPUs a kernel was seen to run into the breakpoints it does that with
//! (`docs/lab.md`). While these VMs are held nothing is patched.

use anyhow::Context;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// Two VMs, of a vCPU each.
#[derive(Debug)]
pub(crate) struct Held {
    _vcpus: [VcpuFd; 2],
    _vms: [VmFd; 2],
}

impl Held {
    /// Makes them.
    pub(crate) fn make() -> anyhow::Result<Self> {
        let kvm = Kvm::new().context("opening /dev/kvm")?;
        let make = || kvm.create_vm().context("making a VM");
        let (with, without) = (make()?, make()?);
        with.create_irq_chip().context("making interrupt controllers")?;
        let vcpu = |vm: &VmFd| vm.create_vcpu(0).context("making a vCPU");
        Ok(Self { _vcpus: [vcpu(&with)?, vcpu(&without)?], _vms: [with, without] })
    }
}
