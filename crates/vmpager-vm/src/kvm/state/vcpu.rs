//! All of a vCPU.

use kvm_bindings::kvm_mp_state;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::cpuid::{self, CpuidEntry};
use super::events::Events;
use super::lapic::Lapic;
use super::msrs::{self, Msr};
use super::refused;
use super::registers::{
    DebugRegisters, ExtendedControl, Registers, SystemRegisters, extended_controls,
    kvm_extended_controls,
};
use super::scope::StateScope;
use super::xsave::{self, XsaveArea};
use crate::error::VmError;

/// A vCPU that does not run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(deny_unknown_fields)]
pub(crate) struct VcpuState {
    pub(crate) cpuid: Vec<CpuidEntry>,
    pub(crate) tsc_khz: u32,
    pub(crate) regs: Registers,
    pub(crate) sregs: SystemRegisters,
    pub(crate) debugregs: DebugRegisters,
    pub(crate) xcrs: Vec<ExtendedControl>,
    pub(crate) xsave: XsaveArea,
    /// Where KVM has the interrupt controllers.
    pub(crate) lapic: Option<Lapic>,
    /// In the order in which they load.
    pub(crate) msrs: Vec<Msr>,
    /// Running, halted, waiting for INIT or SIPI: `KVM_MP_STATE_…`.
    pub(crate) mp_state: u32,
    pub(crate) events: Events,
}

impl VcpuState {
    /// Takes the state out of a vCPU. No vCPU of its VM may run, and its last
    /// exit must be complete: enter once with `immediate_exit` set.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub(crate) fn save(fd: &VcpuFd, scope: &StateScope) -> Result<Self, VmError> {
        // First, since KVM acts on a pending INIT or SIPI to answer: everything
        // else may change.
        let mp_state = fd.get_mp_state().map_err(refused("save the vCPU's run state"))?.mp_state;
        let xcrs = fd.get_xcrs().map_err(refused("save extended control registers"))?;
        let lapic = match scope.irqchip {
            true => Some(fd.get_lapic().map_err(refused("save the local APIC"))?.into()),
            false => None,
        };
        Ok(Self {
            cpuid: cpuid::save(fd)?,
            tsc_khz: fd.get_tsc_khz().map_err(refused("tell the vCPU's TSC frequency"))?,
            regs: fd.get_regs().map_err(refused("save registers"))?.into(),
            sregs: fd.get_sregs().map_err(refused("save system registers"))?.into(),
            debugregs: fd.get_debug_regs().map_err(refused("save debug registers"))?.into(),
            xcrs: extended_controls(&xcrs),
            xsave: xsave::save(fd, scope)?,
            lapic,
            msrs: msrs::save(fd, scope)?,
            mp_state,
            // Last: what is read before may queue or deliver some.
            events: fd.get_vcpu_events().map_err(refused("save pending events"))?.into(),
        })
    }

    /// Puts the state into a vCPU that has not run.
    ///
    /// # Errors
    ///
    /// If KVM refuses some of it, or has no such state.
    pub(crate) fn load(&self, fd: &VcpuFd, scope: &StateScope) -> Result<(), VmError> {
        // What the vCPU claims to be decides what it may be told afterwards.
        cpuid::load(fd, &self.cpuid)?;
        self.load_tsc_frequency(fd, scope)?;
        // They say whether the local APIC is on, and in which mode.
        let sregs = self.sregs.clone().into();
        fd.set_sregs(&sregs).map_err(refused("load system registers"))?;
        // KVM forgets pending exceptions with it: before the events.
        fd.set_regs(&self.regs.clone().into()).map_err(refused("load registers"))?;
        self.load_xcrs(fd)?;
        xsave::load(fd, &self.xsave, scope)?;
        let debugregs = self.debugregs.clone().into();
        fd.set_debug_regs(&debugregs).map_err(refused("load debug registers"))?;
        if let Some(lapic) = &self.lapic {
            fd.set_lapic(&lapic.into()).map_err(refused("load the local APIC"))?;
        }
        // After the local APIC, whose timer mode decides what the deadline means.
        msrs::load(fd, &self.msrs, scope)?;
        let mp_state = kvm_mp_state { mp_state: self.mp_state };
        fd.set_mp_state(mp_state).map_err(refused("load the vCPU's run state"))?;
        let events = self.events.clone().into();
        fd.set_vcpu_events(&events).map_err(refused("load pending events"))
    }

    /// Leaves a frequency alone that is nearly right: the host measures it at
    /// each boot, and not every processor can scale it for a guest. Where it
    /// cannot, the two may be as far apart as a host's first measurement and its
    /// better one, between which it may have been saved.
    fn load_tsc_frequency(&self, fd: &VcpuFd, scope: &StateScope) -> Result<(), VmError> {
        const SCALED_PPM: u64 = 250;
        const MEASURED_PPM: u64 = 10_000;
        let tolerance = if scope.scales_tsc { SCALED_PPM } else { MEASURED_PPM };
        let own = fd.get_tsc_khz().map_err(refused("tell the vCPU's TSC frequency"))?;
        let apart = u64::from(own.abs_diff(self.tsc_khz));
        if apart * 1_000_000 > u64::from(own) * tolerance {
            fd.set_tsc_khz(self.tsc_khz).map_err(refused(
                "run the vCPU's TSC at the saved frequency; restore on a host whose TSC has it",
            ))?;
        }
        Ok(())
    }

    fn load_xcrs(&self, fd: &VcpuFd) -> Result<(), VmError> {
        // KVM refuses the call where the processor has no XSAVE.
        if self.xcrs.is_empty() {
            return Ok(());
        }
        let xcrs = kvm_extended_controls(&self.xcrs).ok_or(VmError::Config {
            field: "entries in a vCPU's xcrs",
            value: self.xcrs.len() as u64,
            remedy: "use a state file as it was written; KVM takes at most 16",
        })?;
        fd.set_xcrs(&xcrs).map_err(refused("load extended control registers"))
    }
}
