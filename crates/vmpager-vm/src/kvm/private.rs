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
use vmpager_kvm::private::{
    AfterFault, Backend, ByAddress, GuestMemfd, InPlace, Intent, PrivateMemory,
};
use vmpager_kvm::probe::{GUEST_MEMFD_INIT_SHARED, GUEST_MEMFD_MMAP, guest_memfd_flags};

use super::machine::create_vm;
use super::refused;
use crate::error::VmError;
use crate::layout::SHARED_GPA;
use crate::memory::GuestMemory;
use crate::private::{PrivateBackend, PrivateConfig};

/// So many faults in a row on one page that is as it should be are the end.
const FAULTS: u32 = 1000;

/// A guest_memfd that the host can map, and the VM it is for: KVM ties the two.
#[derive(Debug)]
pub(crate) struct OwnGuestMemfd {
    pub(crate) fd: OwnedFd,
    pub(super) vm: Arc<VmFd>,
}

impl OwnGuestMemfd {
    /// Of zeroes, for a VM that has no vCPU yet.
    pub(crate) fn new(bytes: u64) -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|e| VmError::NoKvm(e.into()))?;
        let vm = create_vm(&kvm, 0)?;
        let wanted = GUEST_MEMFD_MMAP | GUEST_MEMFD_INIT_SHARED;
        if guest_memfd_flags(&vm) & wanted != wanted {
            return Err(VmError::NotPrivate {
                problem: "this KVM has no guest_memfd that the host can map (flags MMAP and \
                          INIT_SHARED, from Linux 6.18 on); use memory in place",
            });
        }
        let fd = create_guest_memfd(&vm, bytes, wanted.into())?;
        Ok(Self { fd, vm: Arc::new(vm) })
    }
}

fn create_guest_memfd(vm: &VmFd, size: u64, flags: u64) -> Result<OwnedFd, VmError> {
    let wanted = kvm_create_guest_memfd { size, flags, ..Default::default() };
    let fd = vm.create_guest_memfd(wanted).map_err(refused("create a guest_memfd"))?;
    // SAFETY: KVM has just made the descriptor, for this process, and nobody
    // else was told of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How memory can be private, before there is a VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Protection {
    config: PrivateConfig,
    /// Never [`PrivateBackend::Auto`].
    backend: PrivateBackend,
}

/// The same with a VM, whose memory is not yet in memslots.
#[derive(Debug)]
pub(super) struct Protected {
    config: PrivateConfig,
    backend: PrivateBackend,
    guest_memfd: Option<OwnedFd>,
}

impl Protection {
    /// What this KVM has for memory that is asked to be private, if it is.
    pub(super) fn of(kvm: &Kvm, memory: &GuestMemory) -> Result<Option<Self>, VmError> {
        let Some(parts) = &memory.private else { return Ok(None) };
        let answer = |cap: u32| u64::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
        let has_attributes = answer(KVM_CAP_VM_TYPES) & (1 << KVM_X86_SW_PROTECTED_VM) != 0
            && answer(KVM_CAP_MEMORY_ATTRIBUTES) & u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) != 0;
        let has_all = has_attributes && answer(KVM_CAP_GUEST_MEMFD) > 0;
        let backend = match parts.config.backend {
            PrivateBackend::Auto if has_all => PrivateBackend::GuestMemfd,
            PrivateBackend::Auto => PrivateBackend::InPlace,
            PrivateBackend::GuestMemfd if has_all => PrivateBackend::GuestMemfd,
            PrivateBackend::ByAddress if has_attributes => PrivateBackend::ByAddress,
            backend @ (PrivateBackend::InPlace | PrivateBackend::MappedGuestMemfd) => backend,
            PrivateBackend::GuestMemfd | PrivateBackend::ByAddress => {
                return Err(VmError::NotPrivate {
                    problem: "this KVM has no software-protected VMs with memory attributes; use a \
                              host kernel built with CONFIG_KVM_SW_PROTECTED_VM, on a processor \
                              with nested paging, or private memory in place",
                });
            }
        };
        Ok(Some(Self { config: parts.config, backend }))
    }

    /// The type of VM it takes.
    pub(super) fn vm_type(self) -> u64 {
        match self.backend {
            PrivateBackend::GuestMemfd | PrivateBackend::ByAddress => {
                KVM_X86_SW_PROTECTED_VM.into()
            }
            PrivateBackend::InPlace | PrivateBackend::MappedGuestMemfd | PrivateBackend::Auto => 0,
        }
    }

    /// Has hypercalls exit that ask for conversions, and makes what memslots need.
    pub(super) fn set_up(self, vm: &VmFd, memory: &GuestMemory) -> Result<Protected, VmError> {
        if hypercalls_exit(vm) {
            let mut exits = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
            exits.args[0] = 1 << HC_MAP_GPA_RANGE;
            vm.enable_cap(&exits).map_err(refused("have hypercalls exit"))?;
        }
        let size = memory.mapping.len() as u64;
        let own = memory.private.as_ref().and_then(|parts| parts.guest_memfd.as_ref());
        let guest_memfd = match (self.backend, own) {
            (PrivateBackend::GuestMemfd, _) => Some(create_guest_memfd(vm, size, 0)?),
            (_, Some(own)) => {
                let again = own.fd.try_clone();
                Some(again.map_err(|error| VmError::Memory { bytes: size, error })?)
            }
            (_, None) => None,
        };
        Ok(Protected { config: self.config, backend: self.backend, guest_memfd })
    }
}

impl Protected {
    /// What memslots have private pages from.
    pub(super) fn guest_memfd(&self) -> Option<BorrowedFd<'_>> {
        self.guest_memfd.as_ref().map(AsFd::as_fd)
    }

    /// Memory that is shared but for what was private from the start, its memslots in
    /// place.
    pub(super) fn start(
        self,
        vm: &Arc<VmFd>,
        memory: &GuestMemory,
    ) -> Result<Arc<PrivateMemory>, VmError> {
        let ranges = memory.ranges();
        let slots: Vec<_> = ranges.iter().map(|slot| (slot.gpa, slot.len)).collect();
        let mapping = memory.mapping.clone();
        let views = memory.private.iter().map(|parts| parts.view.clone()).collect();
        let in_place = |ranges| InPlace::new(mapping.clone(), views, ranges);
        let (backend, intent): (Box<dyn Backend>, _) = match (self.guest_memfd, self.backend) {
            (Some(_), PrivateBackend::MappedGuestMemfd) => {
                (Box::new(in_place(ranges).of_guest_memfd()), Intent::Attribute)
            }
            (Some(private), _) => {
                let backend = GuestMemfd::new(vm.clone(), private, mapping, ranges);
                (Box::new(backend), Intent::Attribute)
            }
            (None, PrivateBackend::ByAddress) => {
                let in_place = in_place(ranges.clone());
                let backend = ByAddress::new(vm.clone(), in_place, &ranges, SHARED_GPA);
                let backend = backend.map_err(|error| VmError::Kvm {
                    what: "close guest memory to accesses as private",
                    error,
                })?;
                (Box::new(backend), Intent::Access)
            }
            (None, _) => (Box::new(in_place(ranges)), Intent::Attribute),
        };
        let contents = self.config.contents;
        let private = PrivateMemory::new(backend, slots, Kind::Shared, contents, intent)?;
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
