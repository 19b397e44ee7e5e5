//! A KVM virtual machine: memslots, interrupt controllers, vCPUs.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_GUEST_MEMFD, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_msr_entry,
    kvm_pit_config, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmpager_kvm::ahead::{self, MappedAhead};
use vmpager_kvm::apf::{self, ApfStats};
use vmpager_kvm::exit::ExitStats;
use vmpager_kvm::private::PrivateMemory;
use vmpager_kvm::stats;
use vmpager_sys::memory::Mapping;

use super::private::{Protected, Protection};
use super::state::{KvmState, MachineState, StateScope};
use super::vcpu::Vcpu;
use super::{cpuid, refused};
use crate::error::VmError;
use crate::linux::{Entry, INITIAL_MSRS};
use crate::memory::{GuestMemory, Memslot};
use crate::private::PrivateParts;

/// What a machine is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) memory: &'a GuestMemory,
    /// Memory that is no part of a snapshot, and where it is.
    pub(crate) device: Option<(u64, &'a Arc<Mapping>)>,
    pub(crate) vcpus: u64,
    /// Whether KVM plays the interrupt controllers (local APICs, I/O APIC,
    /// PICs) and the timer of a PC; all of them, for an interrupt then reaches a
    /// halted vCPU without this process being asked.
    pub(crate) irqchip: bool,
}

/// Memory mapped into a VM, and the vCPUs that run in it.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Whoever runs them takes them out.
    pub(crate) vcpus: Vec<Vcpu>,
    /// What of it there is to save.
    pub(super) scope: StateScope,
    // After the vCPUs, which may share it, and before the memory: KVM must let go
    // of it first.
    pub(super) vm: Arc<VmFd>,
    /// Which of its pages are private, if they can be.
    pub(crate) private: Option<Arc<PrivateMemory>>,
    /// Whether its processor's hypercalls are AMD's.
    pub(super) is_amd: bool,
    /// What came of mapping hot pages, once that was tried.
    mapped_ahead: Option<MappedAhead>,
    _memory: Vec<Arc<Mapping>>,
}

impl Machine {
    /// Makes a VM whose vCPUs are as they are after reset.
    pub(crate) fn new(parts: &Parts<'_>) -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|e| VmError::NoKvm(e.into()))?;
        let private = Protection::of(&kvm, parts.memory)?;
        let kind = match (&private, parts.memory.mechanism()) {
            (Some(private), _) => private.vm_type(),
            (None, Some(mechanism)) => mechanism.vm_type(&kvm)?,
            (None, None) => 0,
        };
        let own = parts.memory.private.as_ref().and_then(|parts| parts.guest_memfd.as_ref());
        let vm = match own {
            Some(own) => own.vm.clone(),
            None => Arc::new(create_vm(&kvm, kind)?),
        };
        check_capabilities(parts.vcpus, parts.irqchip, |cap| vm.check_extension_int(cap))?;
        let private = private.map(|private| private.set_up(&vm, parts.memory)).transpose()?;
        let memory = add_memory(&vm, parts, private.as_ref())?;
        let private = private.map(|private| private.start(&vm, parts.memory)).transpose()?;
        if parts.irqchip {
            create_irqchip(&vm)?;
        }
        let offered = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("tell what processor it offers"))?;
        // Without interrupt controllers no guest can be told that a page came.
        let async_faults = parts.memory.async_faults().filter(|_| parts.irqchip);
        apf::allow_payloads(&vm)?;
        if async_faults.is_some() {
            apf::take_registers(&vm)?;
        }
        let scope = StateScope::of(&kvm, &vm, parts.irqchip, async_faults.is_none())?;
        let mut exits = parts.memory.exits(&vm, parts.vcpus)?;
        let mut vcpus = Vec::new();
        for id in 0..parts.vcpus {
            let fd = vm.create_vcpu(id).map_err(refused("create a vCPU"))?;
            // 0 is the host's frequency. KVM gives a new vCPU the one it knew when
            // it was loaded; if the host has measured its TSC better since, and
            // cannot scale it, KVM takes the guest's for one that stands still,
            // and the guest's clock jumps.
            fd.set_tsc_khz(0).map_err(refused("run the vCPU's TSC at the host's frequency"))?;
            let cpuid = cpuid::of_vcpu(&offered, id, parts.vcpus);
            fd.set_cpuid2(&cpuid).map_err(refused("set the vCPU's CPUID"))?;
            let mut vcpu = Vcpu::new(id, fd, private.clone())?;
            if let Some(exits) = &mut exits
                && let Some(bringer) = exits.bringers.pop()
            {
                vcpu.deliver_by_exits(&kvm, exits.memory.clone(), bringer)?;
                if let Some(which) = async_faults {
                    vcpu.tell_of_faults(vm.clone(), which.policy())?;
                }
            }
            vcpus.push(vcpu);
        }
        let is_amd = cpuid::is_amd(&offered);
        Ok(Self { vcpus, scope, vm, private, is_amd, mapped_ahead: None, _memory: memory })
    }

    /// Puts a saved state into a machine that has not run. Its memory must be
    /// there, or be served by now: KVM touches it.
    pub(crate) fn load(&mut self, state: &KvmState) -> Result<(), VmError> {
        state.load(&self.vm, self.vcpus.iter().map(|vcpu| &vcpu.fd), &self.scope)?;
        self.vcpus.iter_mut().zip(&state.vcpus).try_for_each(|(vcpu, s)| vcpu.load_async_faults(s))
    }

    /// The state of a machine whose vCPUs do not run.
    pub(crate) fn save(&mut self) -> Result<KvmState, VmError> {
        let vcpus = self.vcpus.iter_mut().map(|vcpu| vcpu.save(&self.scope));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        Ok(KvmState { vcpus, machine: MachineState::save(&self.vm, &self.scope)? })
    }

    /// Has an eventfd raise an interrupt line.
    pub(crate) fn connect_interrupt(&self, interrupt: &EventFd, line: u32) -> Result<(), VmError> {
        self.vm.register_irqfd(interrupt, line).map_err(refused("connect an interrupt"))
    }

    /// Puts the boot vCPU at a kernel's entry. The others wait to be started by
    /// the guest (INIT, SIPI), as they do after reset.
    pub(crate) fn set_linux_entry(&self, entry: &Entry) -> Result<(), VmError> {
        let msrs =
            INITIAL_MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
        let msrs = Msrs::from_entries(&msrs).expect("fewer than KVM takes");
        for vcpu in &self.vcpus {
            vcpu.fd.set_msrs(&msrs).map_err(refused("set MSRs"))?;
        }
        let Some(boot) = self.vcpus.first() else { return Ok(()) };
        let reset = boot.fd.get_sregs().map_err(refused("read system registers"))?;
        boot.set_registers(&entry.regs(), &entry.sregs(reset))
    }

    /// Has KVM map the hot pages of its memory that are in place, once, if that is wanted
    /// and it can; to be called before the guest runs.
    pub(crate) fn map_ahead(&mut self, memory: &GuestMemory) {
        if self.mapped_ahead.is_none()
            && let Some(within) = memory.map_ahead()
            && let Some(vcpu) = self.vcpus.first()
            && ahead::is_offered(&self.vm)
        {
            let hot = memory.hot_in_place();
            self.mapped_ahead = Some(ahead::map_ahead(&vcpu.fd, hot, within));
        }
    }

    /// What came of it; `None` if it was not tried.
    pub(crate) fn mapped_ahead(&self) -> Option<MappedAhead> {
        self.mapped_ahead
    }

    /// How many stage-2 faults all vCPUs have taken; `None` if KVM does not tell.
    pub(crate) fn stage2_faults(&self) -> Option<u64> {
        let faults = self.vcpus.iter().map(|vcpu| stats::stage2_faults(&vcpu.fd).ok().flatten());
        faults.sum()
    }

    /// What exit delivery has done on all vCPUs, if there is any.
    pub(crate) fn exit_stats(&self) -> Option<ExitStats> {
        self.vcpus.iter().filter_map(Vcpu::exit_stats).reduce(|a, b| a + b)
    }

    /// What the device for asynchronous page faults has done on all vCPUs, if
    /// vmpager plays it.
    pub(crate) fn async_fault_stats(&self) -> Option<ApfStats> {
        self.vcpus.iter().filter_map(Vcpu::async_fault_stats).reduce(|a, b| a + b)
    }

    /// Tells a guest with KVM's clock that it was paused, lest its watchdogs take
    /// the time for a lockup.
    pub(crate) fn tell_of_pause(&self) -> Result<(), VmError> {
        for vcpu in &self.vcpus {
            match vcpu.fd.kvmclock_ctrl().map_err(io::Error::from) {
                // A guest that does not use that clock has nothing to be told.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                told => told.map_err(|error| VmError::Kvm { what: "tell of a pause", error })?,
            }
        }
        Ok(())
    }
}

/// A VM of that type. Tries again when a signal came in between: KVM then gives
/// up, and starts afresh as well.
pub(super) fn create_vm(kvm: &Kvm, kind: u64) -> Result<VmFd, VmError> {
    loop {
        match kvm.create_vm_with_type(kind).map_err(io::Error::from) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            created => return created.map_err(VmError::NoKvm),
        }
    }
}

/// What this needs of any KVM: memory of this process that may come later, a way
/// to stop a vCPU, and to save and load all of it.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];

/// What it needs beyond that if KVM plays the interrupt controllers.
const NEEDED_WITH_IRQCHIP: [(Cap, &str); 7] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
];

/// `answer` is what KVM says of a capability.
fn check_capabilities(
    vcpus: u64,
    irqchip: bool,
    answer: impl Fn(Cap) -> i32,
) -> Result<(), VmError> {
    let more = NEEDED_WITH_IRQCHIP.iter().filter(|_| irqchip);
    for (capability, name) in NEEDED.iter().chain(more) {
        if answer(*capability) <= 0 {
            return Err(VmError::NoCapability(name));
        }
    }
    let most = u64::try_from(answer(Cap::MaxVcpus)).unwrap_or(0);
    if vcpus > most {
        return Err(VmError::Config {
            field: "vcpus",
            value: vcpus,
            remedy: "use fewer: this KVM has not that many",
        });
    }
    Ok(())
}

/// Adds all memslots, and says which mappings they need.
fn add_memory(
    vm: &VmFd,
    parts: &Parts<'_>,
    private: Option<&Protected>,
) -> Result<Vec<Arc<Mapping>>, VmError> {
    let memory = &parts.memory.mapping;
    let device = parts
        .device
        .map(|(gpa, mapping)| (mapping, Memslot { gpa, offset: 0, len: mapping.len() as u64 }));
    let shared_at = parts.memory.private.as_ref().map_or(0, PrivateParts::shared_at);
    let again = parts.memory.slots.iter().filter(|_| shared_at != 0);
    let again = again.map(|slot| Memslot { gpa: slot.gpa + shared_at, ..*slot });
    let slots = parts.memory.slots.iter().copied().chain(again).map(|slot| (memory, slot));
    let slots = slots.chain(device);
    for (id, (mapping, slot)) in (0..).zip(slots) {
        let is_memory = Arc::ptr_eq(mapping, memory);
        match private.and_then(Protected::guest_memfd).filter(|_| is_memory) {
            Some(guest_memfd) => add_private_memslot(vm, id, &slot, mapping, guest_memfd)?,
            None => add_memslot(vm, id, &slot, mapping)?,
        }
    }
    let device = parts.device.map(|(_, mapping)| mapping.clone());
    Ok([memory.clone()].into_iter().chain(device).collect())
}

/// As [`add_memslot`], its private pages from a guest_memfd.
fn add_private_memslot(
    vm: &VmFd,
    id: u32,
    slot: &Memslot,
    mapping: &Mapping,
    guest_memfd: BorrowedFd<'_>,
) -> Result<(), VmError> {
    check_memslot(slot, mapping)?;
    let region = kvm_userspace_memory_region2 {
        slot: id,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: slot.gpa,
        memory_size: slot.len,
        userspace_addr: mapping.hva() + slot.offset,
        guest_memfd_offset: slot.offset,
        guest_memfd: guest_memfd.as_raw_fd().cast_unsigned(),
        ..Default::default()
    };
    // SAFETY: as for any memslot; and nobody has the guest_memfd mapped.
    let result = unsafe { vm.set_user_memory_region2(region) };
    result.map_err(refused("map guest memory that can be private"))
}

fn check_memslot(slot: &Memslot, mapping: &Mapping) -> Result<(), VmError> {
    let end = slot.offset.checked_add(slot.len);
    if end.is_none_or(|end| end > mapping.len() as u64) {
        return Err(VmError::Config {
            field: "memslot length",
            value: slot.len,
            remedy: "use memslots that lie inside guest memory",
        });
    }
    Ok(())
}

pub(super) fn add_memslot(
    vm: &VmFd,
    id: u32,
    slot: &Memslot,
    mapping: &Mapping,
) -> Result<(), VmError> {
    check_memslot(slot, mapping)?;
    let region = kvm_userspace_memory_region {
        slot: id,
        flags: 0,
        guest_phys_addr: slot.gpa,
        memory_size: slot.len,
        userspace_addr: mapping.hva() + slot.offset,
    };
    // SAFETY: the range is inside the mapping, the machine keeps that until the
    // VM is closed, and the process accesses it by volatile copies only.
    let result = unsafe { vm.set_user_memory_region(region) };
    result.map_err(refused("map guest memory"))
}

/// Must come before the vCPUs.
fn create_irqchip(vm: &VmFd) -> Result<(), VmError> {
    // Pages that KVM on Intel processors needs for real mode, in the hole for
    // devices, where no guest looks for memory.
    const IDENTITY_MAP: u64 = 0xfffb_c000;
    const TASK_STATE: usize = 0xfffb_d000;
    vm.set_identity_map_address(IDENTITY_MAP).map_err(refused("place its identity map"))?;
    vm.set_tss_address(TASK_STATE).map_err(refused("place its task state segment"))?;
    vm.create_irq_chip().map_err(refused("create interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(refused("create a timer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A KVM that has everything but this, and four vCPUs.
    fn without(lacking: Option<Cap>) -> impl Fn(Cap) -> i32 {
        move |asked| match asked {
            _ if lacking.is_some_and(|lacking| lacking as u32 == asked as u32) => 0,
            Cap::MaxVcpus => 4,
            _ => 1,
        }
    }

    #[test]
    fn what_a_kvm_lacks_is_named() {
        for irqchip in [false, true] {
            check_capabilities(4, irqchip, without(None)).unwrap();
            let needed = NEEDED.iter().chain(&NEEDED_WITH_IRQCHIP);
            for (number, (capability, name)) in needed.enumerate() {
                let checked = check_capabilities(4, irqchip, without(Some(*capability)));
                if number >= NEEDED.len() && !irqchip {
                    checked.unwrap();
                    continue;
                }
                let error = checked.unwrap_err().to_string();
                assert!(error.contains(&format!("this KVM lacks {name};")), "{error}");
            }
        }
    }

    #[test]
    fn more_vcpus_than_a_kvm_has_are_refused_by_number() {
        let error = check_capabilities(5, false, without(None)).unwrap_err().to_string();
        assert!(error.contains("vcpus 5 "), "{error}");
    }

    /// An error is no answer.
    #[test]
    fn a_kvm_that_cannot_be_asked_has_nothing() {
        let error = check_capabilities(1, true, |_| -1).unwrap_err().to_string();
        assert!(error.contains("KVM_CAP_USER_MEMORY"), "{error}");
    }
}
