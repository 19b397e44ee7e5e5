//! A KVM virtual machine: two memslots and the vCPUs.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmpager_sys::memory::Mapping;

use super::program::{EVENT_DONE, EVENT_PORT, EVENT_STARTED};
use super::registers::{IOPL_3, VcpuState, initial_regs, initial_sregs};
use crate::error::VmError;
use crate::layout::{DEVICE_GPA, Layout};
use crate::memory::{GuestMemory, Memslot};

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Kvm { what, error: error.into() }
}

/// Memory mapped into a VM, and the vCPUs that run in it.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpus: Vec<Vcpu>,
    // After the vCPUs and before the memory: KVM must let go of it first.
    _vm: VmFd,
    _memory: [Arc<Mapping>; 2],
}

impl Machine {
    /// Makes a VM of guest memory at 0 and device memory at [`DEVICE_GPA`], its
    /// vCPUs as saved, or ready for the guest's first instruction.
    pub(crate) fn new(
        memory: &GuestMemory,
        device: &Arc<Mapping>,
        layout: &Layout,
        saved: &[VcpuState],
    ) -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|e| VmError::NoKvm(e.into()))?;
        let vm = kvm.create_vm().map_err(|e| VmError::NoKvm(e.into()))?;
        let device_slot = Memslot { gpa: DEVICE_GPA, offset: 0, len: device.len() as u64 };
        let slots = memory.slots.iter().map(|slot| (&memory.mapping, slot));
        for (id, (mapping, slot)) in (0..).zip(slots.chain([(device, &device_slot)])) {
            add_memslot(&vm, id, slot, mapping)?;
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("tell what processor it offers"))?;
        let mut vcpus = Vec::new();
        for id in 0..layout.vcpus {
            let fd = vm.create_vcpu(id).map_err(refused("create a vCPU"))?;
            fd.set_cpuid2(&cpuid).map_err(refused("set the vCPU's CPUID"))?;
            let mut vcpu = Vcpu { id, fd };
            match usize::try_from(id).ok().and_then(|id| saved.get(id)) {
                Some(state) => vcpu.load(state)?,
                None => vcpu.reset(layout)?,
            }
            vcpus.push(vcpu);
        }
        Ok(Self { vcpus, _vm: vm, _memory: [memory.mapping.clone(), device.clone()] })
    }

    /// Runs one round of the program on every vCPU, each on a thread of its own.
    pub(crate) fn run(&mut self) -> Result<Vec<Entry>, VmError> {
        if let [only] = &mut self.vcpus[..] {
            return Ok(vec![only.run()?]);
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                self.vcpus.iter_mut().map(|vcpu| scope.spawn(|| vcpu.run())).collect();
            threads.into_iter().map(|t| t.join().expect("no panic in a vCPU thread")).collect()
        })
    }

    /// The registers of all vCPUs, between rounds.
    pub(crate) fn save(&mut self) -> Result<Vec<VcpuState>, VmError> {
        self.vcpus.iter_mut().map(Vcpu::save).collect()
    }
}

fn add_memslot(vm: &VmFd, id: u32, slot: &Memslot, mapping: &Mapping) -> Result<(), VmError> {
    let end = slot.offset.checked_add(slot.len);
    if end.is_none_or(|end| end > mapping.len() as u64) {
        return Err(VmError::Config {
            field: "memslot length",
            value: slot.len,
            remedy: "use memslots that lie inside guest memory",
        });
    }
    let region = kvm_userspace_memory_region {
        slot: id,
        flags: 0,
        guest_phys_addr: slot.gpa,
        memory_size: slot.len,
        userspace_addr: mapping.hva() + slot.offset,
    };
    // SAFETY: the range is inside the mapping, the machine keeps that until the VM is closed, and the
    // process accesses it by volatile copies only.
    let result = unsafe { vm.set_user_memory_region(region) };
    result.map_err(refused("map guest memory"))
}

/// When a round's first and last events came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) started: Instant,
    pub(crate) done: Instant,
}

#[derive(Debug)]
struct Vcpu {
    id: u64,
    fd: VcpuFd,
}

impl Vcpu {
    fn reset(&mut self, layout: &Layout) -> Result<(), VmError> {
        let sregs = self.fd.get_sregs().map_err(refused("read system registers"))?;
        let sregs = initial_sregs(layout, sregs);
        self.fd.set_sregs(&sregs).map_err(refused("set system registers"))?;
        let regs = initial_regs(layout, self.id);
        self.fd.set_regs(&regs).map_err(refused("set registers"))
    }

    fn load(&mut self, state: &VcpuState) -> Result<(), VmError> {
        let sregs = state.sregs.clone().into();
        self.fd.set_sregs(&sregs).map_err(refused("set system registers from the state file"))?;
        let regs = state.regs.clone().into();
        self.fd.set_regs(&regs).map_err(refused("set registers from the state file"))
    }

    fn save(&mut self) -> Result<VcpuState, VmError> {
        // The `out` that ended the last round is completed by the next entry
        // only; enter without running anything, or the round would end twice.
        self.fd.set_kvm_immediate_exit(1);
        let entered = self.fd.run().map(|exit| format!("{exit:?}"));
        self.fd.set_kvm_immediate_exit(0);
        match entered {
            Err(e) if is_interrupted(e) => {}
            Err(e) => return Err(refused("complete the last exit")(e)),
            Ok(exit) => return Err(self.unexpected(exit)),
        }
        let mut regs = self.fd.get_regs().map_err(refused("read registers"))?;
        // kvm_pvm forgets it; other hosts' ring 3 may not do `out` without.
        regs.rflags |= IOPL_3;
        let sregs = self.fd.get_sregs().map_err(refused("read system registers"))?.into();
        Ok(VcpuState { regs: regs.into(), sregs })
    }

    /// One round: from the next entry to the event `done`.
    fn run(&mut self) -> Result<Entry, VmError> {
        let mut started = None;
        loop {
            let exit = match self.fd.run() {
                Ok(VcpuExit::IoOut(EVENT_PORT, [EVENT_STARTED])) => {
                    started = Some(Instant::now());
                    continue;
                }
                Ok(VcpuExit::IoOut(EVENT_PORT, [EVENT_DONE])) => {
                    let done = Instant::now();
                    if let Some(started) = started {
                        return Ok(Entry { started, done });
                    }
                    "done before it started".to_owned()
                }
                Ok(exit) => format!("{exit:?}"),
                Err(e) if is_interrupted(e) => continue,
                Err(e) => format!("KVM_RUN: {}", io::Error::from(e)),
            };
            return Err(self.unexpected(exit));
        }
    }

    fn unexpected(&self, exit: String) -> VmError {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        VmError::Exit { vcpu: self.id, exit, rip }
    }
}

/// A signal, or a request to try again.
fn is_interrupted(error: kvm_ioctls::Error) -> bool {
    matches!(io::Error::from(error).kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
