//! The processor a vCPU claims to be.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::VcpuFd;

use super::mirror::mirror;
use super::refused;
use crate::error::VmError;

mirror!(CpuidEntry of kvm_cpuid_entry2 {
    function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32,
});

pub(super) fn save(fd: &VcpuFd) -> Result<Vec<CpuidEntry>, VmError> {
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(refused("save the vCPU's CPUID"))?;
    Ok(cpuid.as_slice().iter().map(|entry| (*entry).into()).collect())
}

pub(super) fn load(fd: &VcpuFd, saved: &[CpuidEntry]) -> Result<(), VmError> {
    let entries: Vec<_> = saved.iter().map(|entry| entry.clone().into()).collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|_| VmError::Config {
        field: "entries in a vCPU's cpuid",
        value: saved.len() as u64,
        remedy: "use a state file as it was written; KVM takes at most 256",
    })?;
    fd.set_cpuid2(&cpuid).map_err(refused("load the vCPU's CPUID"))
}
