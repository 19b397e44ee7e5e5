//! Memory that can be private, on KVM: the type of VM, the guest_memfd, and the
//! exits by which guests ask for conversions.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_VM_TYPES,
    KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_X86_SW_PROTECTED_VM,
    kvm_create_guest_memfd, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use vmpager::core::convert::{HC_MAP_GPA_RANGE, Kind};
use vmpager_kvm::private::{AfterFault, Backend, GuestMemfd, InPlace, Intent, PrivateMemory};

use super::refused;
use crate::error::VmError;
use crate::memory::GuestMemory;
use crate::private::{PrivateBackend, PrivateConfig};

/// So many faults in a row on one page that is as it should be are the end.
const FAULTS: u32 = 1000;

/// How memory can be private, before there is a VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protection {
    config: PrivateConfig,
    has_guest_memfd: bool,
}

/// The same with a VM, whose memory is not yet in memslots.
#[derive(Debug)]
pub(super) struct Protected {
    config: PrivateConfig,
    guest_memfd: Option<OwnedFd>,
}

impl Protection {
    /// What this KVM has for memory that is asked to be private, if it is.
    pub(super) fn of(kvm: &Kvm, memory: &GuestMemory) -> Result<Option<Self>, VmError> {
        let Some(parts) = &memory.private else { return Ok(None) };
        let answer = |cap: u32| u64::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
        let has_all = answer(KVM_CAP_VM_TYPES) & (1 << KVM_X86_SW_PROTECTED_VM) != 0
            && answer(KVM_CAP_MEMORY_ATTRIBUTES) & u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) != 0
            && answer(KVM_CAP_GUEST_MEMFD) > 0;
        let has_guest_memfd = match parts.config.backend {
            PrivateBackend::Auto => has_all,
            PrivateBackend::GuestMemfd if has_all => true,
            PrivateBackend::GuestMemfd => {
                return Err(VmError::NotPrivate {
                    problem: "this KVM has no software-protected VMs with memory attributes; use a \
                              host kernel built with CONFIG_KVM_SW_PROTECTED_VM, on a processor \
                              with nested paging, or private memory in place",
                });
            }
            PrivateBackend::InPlace => false,
        };
        Ok(Some(Self { config: parts.config, has_guest_memfd }))
    }

    /// The type of VM it takes.
    pub(super) fn vm_type(self) -> u64 {
        if self.has_guest_memfd { KVM_X86_SW_PROTECTED_VM.into() } else { 0 }
    }

    /// Has hypercalls exit that ask for conversions, and makes what memslots need.
    pub(super) fn set_up(self, vm: &VmFd, memory: &GuestMemory) -> Result<Protected, VmError> {
        if hypercalls_exit(vm) {
            let mut exits = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
            exits.args[0] = 1 << HC_MAP_GPA_RANGE;
            vm.enable_cap(&exits).map_err(refused("have hypercalls exit"))?;
        }
        let size = memory.mapping.len() as u64;
        let make = |()| {
            let wanted = kvm_create_guest_memfd { size, ..Default::default() };
            let fd = vm.create_guest_memfd(wanted).map_err(refused("create a guest_memfd"))?;
            // SAFETY: KVM has just made the descriptor, for this process, and nobody
            // else was told of it.
            Ok::<_, VmError>(unsafe { OwnedFd::from_raw_fd(fd) })
        };
        let guest_memfd = self.has_guest_memfd.then_some(()).map(make).transpose()?;
        Ok(Protected { config: self.config, guest_memfd })
    }
}

impl Protected {
    /// What memslots have private pages from.
    pub(super) fn guest_memfd(&self) -> Option<BorrowedFd<'_>> {
        self.guest_memfd.as_ref().map(AsFd::as_fd)
    }

    /// Memory that is all shared, its memslots in place.
    pub(super) fn start(
        self,
        vm: &Arc<VmFd>,
        memory: &GuestMemory,
    ) -> Result<Arc<PrivateMemory>, VmError> {
        let ranges = memory.ranges();
        let slots: Vec<_> = ranges.iter().map(|slot| (slot.gpa, slot.len)).collect();
        let mapping = memory.mapping.clone();
        let views = memory.private.iter().map(|parts| parts.view.clone()).collect();
        let backend: Box<dyn Backend> = match self.guest_memfd {
            Some(private) => Box::new(GuestMemfd::new(vm.clone(), private, mapping, ranges)),
            None => Box::new(InPlace::new(mapping, views, ranges)),
        };
        let contents = self.config.contents;
        let private =
            PrivateMemory::new(backend, slots, Kind::Shared, contents, Intent::Attribute)?;
        for range in memory.private.iter().flat_map(|parts| &parts.ranges) {
            private.restore(range.clone())?;
        }
        Ok(Arc::new(private))
    }
}

/// Whether a guest in ring 0 can ask for conversions by hypercall.
pub(super) fn hypercalls_exit(vm: &VmFd) -> bool {
    let offered = vm.check_extension_raw(KVM_CAP_EXIT_HYPERCALL.into());
    u64::try_from(offered).unwrap_or(0) & (1 << HC_MAP_GPA_RANGE) != 0
}

/// What one vCPU's exits have to do with conversions.
#[derive(Debug)]
pub(super) struct Conversions {
    pub(super) memory: Arc<PrivateMemory>,
    /// The page of the last fault that had no reason, and how many there were.
    last: (u64, u32),
}

impl Conversions {
    pub(super) fn new(memory: Arc<PrivateMemory>) -> Self {
        Self { memory, last: (0, 0) }
    }

    /// Deals with an exit, if it is one of a guest that asks for a conversion or
    /// meets one. Whether it was.
    pub(super) fn take(
        &mut self,
        ran: &mut Result<VcpuExit<'_>, kvm_ioctls::Error>,
    ) -> Result<bool, VmError> {
        match ran {
            Ok(VcpuExit::Hypercall(call)) if call.nr == HC_MAP_GPA_RANGE => {
                *call.ret = self.memory.hypercall(&call.args);
                Ok(true)
            }
            Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                let private = *flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
                let accessed_as = if private { Kind::Private } else { Kind::Shared };
                Ok(match self.memory.on_fault(*gpa, *size, accessed_as)? {
                    AfterFault::Enter => true,
                    AfterFault::Matches => self.is_first(*gpa),
                    AfterFault::Outside => false,
                })
            }
            _ => Ok(false),
        }
    }

    /// A page that was converted to and fro since the fault is as it should be; one
    /// that the kernel cannot give is, too, again and again.
    fn is_first(&mut self, gpa: u64) -> bool {
        let (last, count) = self.last;
        self.last = if last == gpa { (gpa, count + 1) } else { (gpa, 1) };
        self.last.1 < FAULTS
    }
}
