//! A VM made to try out how missing pages reach this process.

use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_regs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmpager_kvm::exit::Fault;
use vmpager_sys::memory::{Access, Mapping};
use vmpager_sys::uffd::Userfaultfd;

use super::machine::{add_memslot, create_vm};
use super::program::EVENT_PORT;
use super::refused;
use super::registers::{initial_regs, initial_sregs};
use super::vcpu::is_interrupted;
use crate::error::VmError;
use crate::layout::Layout;
use crate::memory::Memslot;
use crate::{PAGE_BYTES, PAGE_SIZE};

/// Touches `rcx` pages from `rdi` on, then leaves by the port of events.
///
/// ```text
/// mov al, [rdi]; add rdi, 4096; dec rcx; jnz -14; out 0xe9, al
/// ```
const TOUCH: [u8; 16] = [
    0x8a, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x48, 0xff, 0xc9, 0x75, 0xf2, 0xe6, 0xe9,
];
const _: () = assert!(EVENT_PORT == 0xe9);

const MEMORY_BYTES: usize = 4 << 20;

/// How long KVM takes to make this memory that of a VM.
pub(crate) fn memslot_time(memory: &Arc<Mapping>) -> Result<Duration, VmError> {
    let kvm = Kvm::new().map_err(|error| VmError::NoKvm(error.into()))?;
    let vm = create_vm(&kvm, 0)?;
    let slot = Memslot { gpa: 0, offset: 0, len: memory.len() as u64 };
    let since = Instant::now();
    add_memslot(&vm, 0, &slot, memory)?;
    Ok(since.elapsed())
}

/// A VM with one vCPU, no device, and memory of which the guest's own structures
/// are there, its contents are missing.
#[derive(Debug)]
pub(crate) struct Trial {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: Arc<Mapping>,
    layout: Layout,
    start: kvm_regs,
    /// The first page not touched so far.
    next: u64,
}

impl Trial {
    pub(crate) fn new() -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(|error| VmError::NoKvm(error.into()))?;
        let vm = create_vm(&kvm, 0)?;
        let layout = Layout::new(MEMORY_BYTES as u64, 1)?;
        let memory = Mapping::anonymous(MEMORY_BYTES)
            .map_err(|error| VmError::Memory { bytes: MEMORY_BYTES as u64, error })?;
        for (page, bytes) in layout.fixed_pages(&TOUCH).iter().enumerate() {
            memory.write(page * PAGE_BYTES, bytes);
        }
        let memory = Arc::new(memory);
        let slot = Memslot { gpa: 0, offset: 0, len: MEMORY_BYTES as u64 };
        add_memslot(&vm, 0, &slot, &memory)?;
        let vcpu = vm.create_vcpu(0).map_err(refused("create a vCPU"))?;
        vcpu.set_cpuid2(&processor()).map_err(refused("set the vCPU's CPUID"))?;
        let sregs = vcpu.get_sregs().map_err(refused("read system registers"))?;
        vcpu.set_sregs(&initial_sregs(&layout, sregs)).map_err(refused("set system registers"))?;
        let (start, next) = (initial_regs(&layout, 0), layout.contents().start);
        Ok(Self { vcpu, vm, memory, layout, start, next })
    }

    /// Its memory, for a userfaultfd.
    pub(crate) fn memory(&self) -> &Arc<Mapping> {
        &self.memory
    }

    /// Touches pages that somebody else brings. Afterwards they are there.
    pub(crate) fn touch(&mut self, count: u64) -> Result<(), VmError> {
        self.aim(count)?;
        match self.enter()? {
            Left::Done => Ok(()),
            Left::Faulted(fault) => Err(self.unexpected(format!("{fault:?}"))),
        }
    }

    /// Touches pages, each of which ends `KVM_RUN` and is then brought by this
    /// thread; when it did. The last thing to try: memory stays write-only.
    pub(crate) fn touch_by_exits(
        &mut self,
        count: u64,
        uffd: &Userfaultfd,
        page: &[u8; PAGE_BYTES],
    ) -> Result<Vec<Instant>, VmError> {
        self.memory
            .allow(Access::Write)
            .map_err(|error| VmError::Memory { bytes: MEMORY_BYTES as u64, error })?;
        let mut wanted = self.aim(count)?;
        let mut faults = Vec::new();
        // KVM may fault twice on a page that has just come.
        for _ in 0..4 * count {
            let Left::Faulted(_) = self.enter()? else { return Ok(faults) };
            faults.push(Instant::now());
            if let Some(next) = wanted.next() {
                let to = self.memory.hva() + next * PAGE_SIZE;
                uffd.copy(to, page.as_ptr() as usize, PAGE_SIZE);
            }
        }
        Err(self.unexpected("it faults on pages that are there".to_owned()))
    }

    /// Has the guest start over, with the next pages.
    fn aim(&mut self, count: u64) -> Result<Range<u64>, VmError> {
        let pages = self.next..(self.next + count).min(self.layout.contents().end);
        let regs = kvm_regs { rdi: pages.start * PAGE_SIZE, rcx: count, ..self.start };
        self.vcpu.set_regs(&regs).map_err(refused("set registers"))?;
        self.next = pages.end;
        Ok(pages)
    }

    fn enter(&mut self) -> Result<Left, VmError> {
        loop {
            let ran = self.vcpu.run();
            if let Some(fault) = Fault::of(&ran) {
                return Ok(Left::Faulted(fault));
            }
            let exit = match ran {
                Ok(VcpuExit::IoOut(EVENT_PORT, _)) => return Ok(Left::Done),
                Err(error) if is_interrupted(error) => continue,
                exit => format!("{exit:?}"),
            };
            return Err(self.unexpected(exit));
        }
    }

    fn unexpected(&self, exit: String) -> VmError {
        let rip = self.vcpu.get_regs().map_or(0, |regs| regs.rip);
        VmError::Exit { vcpu: 0, exit, rip }
    }

    /// Ends it on another thread: KVM takes half a millisecond to forget a VM.
    pub(crate) fn end(self) {
        let Self { vcpu, vm, memory, .. } = self;
        // Where no thread is to be had, this one does it.
        let _ = thread::Builder::new().spawn(move || {
            drop((vcpu, vm));
            drop(memory);
        });
    }
}

/// The least of a processor that has long mode and can forbid execution. To ask KVM
/// for all that it offers takes as long as the trial.
fn processor() -> CpuId {
    const LONG_MODE_AND_NX: u32 = 1 << 29 | 1 << 20;
    let leaf = |function, eax, edx| kvm_cpuid_entry2 { function, eax, edx, ..Default::default() };
    let leaves = [
        leaf(0, 1, 0),
        leaf(1, 0, 0),
        leaf(0x8000_0000, 0x8000_0001, 0),
        leaf(0x8000_0001, 0, LONG_MODE_AND_NX),
    ];
    CpuId::from_entries(&leaves).expect("fewer than KVM takes")
}

/// How the guest was left.
enum Left {
    /// It has touched all its pages.
    Done,
    Faulted(Fault),
}
