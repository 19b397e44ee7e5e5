//! What there is to save.

use kvm_ioctls::{Cap, Kvm, VmFd};

use super::refused;
use super::xsave::{LEGACY_BYTES, WORD};
use crate::error::VmError;

/// What of a VM there is to save and load on this KVM: known once the VM is
/// made, and the same for all its vCPUs.
#[derive(Clone, Debug)]
pub(crate) struct StateScope {
    /// Whether the interrupt controllers and the timer are KVM's.
    pub(super) irqchip: bool,
    /// Whether the device for async page faults is KVM's.
    pub(super) async_pf: bool,
    /// Whether a guest's TSC can have another frequency than the host's.
    pub(super) scales_tsc: bool,
    /// Size of the XSAVE area.
    pub(super) xsave_bytes: usize,
    /// The model-specific registers that KVM calls state.
    pub(super) msrs: Vec<u32>,
}

impl StateScope {
    /// Asks KVM.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub(crate) fn of(kvm: &Kvm, vm: &VmFd, irqchip: bool, async_pf: bool) -> Result<Self, VmError> {
        let msrs = kvm.get_msr_index_list().map_err(refused("list its MSRs"))?;
        // 0 before Linux 5.17, where the area has its legacy size.
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            irqchip,
            async_pf,
            scales_tsc: vm.check_extension(Cap::TscControl),
            xsave_bytes: xsave_bytes.max(LEGACY_BYTES).next_multiple_of(WORD),
            msrs: msrs.as_slice().to_vec(),
        })
    }
}
