//! The processor a guest sees: the host's, as far as KVM offers it, with the
//! guest's own topology.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use vmpager_kvm::apf::{CPUID_FEATURES, Features};

/// Leaf 1, ECX: the local APIC's timer has a deadline mode. Hidden: under nested
/// virtualisation deadlines were seen not to fire at all, and the one-shot mode
/// that Linux uses instead costs about as much.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: VMX. Hidden, as is SVM: a snapshot does not hold the state of a
/// guest's own guests.
const VMX: u32 = 1 << 5;
/// Leaf 0x8000_0001, ECX.
const SVM: u32 = 1 << 2;
/// Leaf 1, ECX: this is a virtual machine.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package has several logical processors.
const HTT: u32 = 1 << 28;

/// Levels of the leaves 0xb and 0x1f.
const SMT: u32 = 1 << 8;
const CORE: u32 = 2 << 8;

/// What KVM offers, as the vCPU with that number of `vcpus` has it: one package,
/// one thread a core.
pub(super) fn of_vcpu(offered: &CpuId, id: u64, vcpus: u64) -> CpuId {
    let (id, vcpus) = (small(id), small(vcpus));
    let mut cpuid = offered.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | vcpus << 16 | id << 24;
                entry.ecx = entry.ecx & !(TSC_DEADLINE | VMX) | HYPERVISOR;
                entry.edx = if vcpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            // Caches (Intel): none is shared, and there are that many cores.
            4 if entry.eax != 0 => entry.eax = entry.eax & 0x3fff | (vcpus - 1) << 26,
            0xb | 0x1f => topology(entry, id, vcpus),
            CPUID_FEATURES => entry.eax = Features::offered(entry.eax),
            0x8000_0001 => entry.ecx &= !SVM,
            // Cores (AMD), and the bits an APIC id has for them.
            0x8000_0008 => entry.ecx = (vcpus - 1) | id_bits(vcpus) << 12,
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    cpuid
}

/// Whether the processor is AMD's, or one of those made after them.
pub(super) fn is_amd(offered: &CpuId) -> bool {
    let leaf = offered.as_slice().iter().find(|entry| entry.function == 0);
    let name = leaf.map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes));
    name.is_some_and(|name| [&b"AuthenticAMD"[..], b"HygonGenuine"].contains(&name.as_flattened()))
}

fn topology(entry: &mut kvm_cpuid_entry2, id: u32, vcpus: u32) {
    let (shift, processors, level) = match entry.index {
        0 => (0, 1, SMT),
        1 => (id_bits(vcpus), vcpus, CORE),
        _ => (0, 0, 0),
    };
    entry.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (shift, processors, level | entry.index, id);
}

/// Bits that number as many processors.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// APIC ids, of which a machine has 64 at most.
fn small(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX) & 0xff
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut entries = cpuid.as_slice().iter();
        *entries.find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn no_guest_is_offered_what_a_snapshot_cannot_hold() {
        let entries = [1, CPUID_FEATURES, 0x8000_0001].map(|function| kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ecx: u32::MAX,
            ..Default::default()
        });
        let cpuid = of_vcpu(&CpuId::from_entries(&entries).unwrap(), 0, 1);
        assert_eq!(leaf(&cpuid, 1, 0).ecx, !(TSC_DEADLINE | VMX));
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx, !SVM);
        // Asynchronous page faults, but not as exits of a guest's own guests.
        let features = Features { async_pf: true, interrupt: true, vmexit: false };
        assert_eq!(Features::of(leaf(&cpuid, CPUID_FEATURES, 0).eax), features);
    }

    #[test]
    fn every_vcpu_has_its_number_and_the_same_siblings() {
        let leaves = [(1, 0), (4, 0), (0xb, 0), (0xb, 1), (0x8000_0008, 0), (0x8000_001e, 0)];
        let entries = leaves.map(|(function, index)| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0x1234_5678,
            ebx: 0x1234_5678,
            ecx: u32::MAX,
            edx: 0,
            ..Default::default()
        });
        let offered = CpuId::from_entries(&entries).unwrap();
        for id in 0..6 {
            let cpuid = of_vcpu(&offered, id, 6);
            let id = small(id);
            let features = leaf(&cpuid, 1, 0);
            assert_eq!(features.ebx, id << 24 | 6 << 16 | 0x5678);
            assert_eq!(features.ecx & TSC_DEADLINE, 0, "no deadline timer");
            assert_eq!(features.edx & HTT, HTT);
            assert_eq!(leaf(&cpuid, 4, 0).eax >> 26, 5);
            let cores = leaf(&cpuid, 0xb, 1);
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, CORE | 1, id));
            let threads = leaf(&cpuid, 0xb, 0);
            assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, SMT, id));
            assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 3 << 12 | 5);
            assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, id);
        }
        assert_eq!(leaf(&of_vcpu(&offered, 0, 1), 1, 0).edx & HTT, 0);
    }
}
