//! Missing pages as exits of the vCPU, on stock kernels: the **write-only
//! view**.
//!
//! Guest memory is mapped `PROT_WRITE` without `PROT_READ` and registered with
//! a userfaultfd. On x86 such memory can be read by any thread all the same;
//! only `get_user_pages` refuses to pin it for reading, and that is what KVM
//! does when a vCPU faults on a missing page. So `KVM_RUN` returns at once with
//! `EFAULT`, nothing done, while KVM's own accesses (its emulator, its clock
//! pages) wait on the userfaultfd as those of any thread.
//!
//! ```text
//!   KVM_RUN: EFAULT ──> ExitDelivery::after_fault
//!        registers ──> candidates ──> installer, on this very thread
//!          ├─ installed, or somebody else just has   Resumed
//!          ├─ being fetched                          Waiting(gpa)
//!          └─ nothing is missing
//!                 ├─ a few times: enter again        Resumed
//!                 └─ still at the same instruction   FallBack
//! ```
//!
//! That nothing is missing happens when another thread has just installed the
//! page. Or KVM could not pin a page that is there without looking at the
//! mapping's protection, as while the kernel changes a page table nearby.
//!
//! **The fallback** makes the view readable for one entry, so that the
//! userfaultfd delivers the page whatever it is; the vCPU is interrupted soon
//! after. It always advances, but zaps all of the VM's stage-2 mappings twice,
//! and is counted. (Not by single steps: some KVMs hand their traps to the
//! guest.)

mod memory;

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{
    KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_regs, kvm_sregs, kvm_sync_regs,
    kvm_vcpu_events,
};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuExit, VcpuFd};
use vmpager_core::{PageInstaller, Resolution};

use crate::candidates::{
    CandidateFinder, GuestView, Missing, Registers, VectorRegisters, XsaveLayout,
};

use memory::PresentPages;
pub use memory::{ExitMemory, GpaRange};

/// What to do after a `KVM_RUN` that failed with `EFAULT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// Enter the guest again.
    Resumed,
    /// The page at this gpa is being fetched: wait for it, or do something
    /// else, then enter the guest again.
    Waiting(u64),
    /// The page at this gpa cannot be had: the guest cannot go on.
    Poisoned(u64),
    /// Nothing that is known to be touched is missing:
    /// [`ExitDelivery::fall_back`].
    FallBack,
}

/// Why a fault could not be delivered.
#[derive(Debug, thiserror::Error)]
pub enum ExitError {
    /// KVM refused something.
    #[error("KVM refused to {what}: {error}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        error: std::io::Error,
    },
    /// The view's protection could not be changed.
    #[error("changing the protection of guest memory: {0}")]
    Protect(std::io::Error),
    /// The pager ended with pages missing.
    #[error("the pager ended before guest memory was complete")]
    PagerEnded,
    /// The same access faults for ever.
    #[error(
        "the instruction at rip {rip:#x} faults again and again, with all pages in place that it \
         is known to touch"
    )]
    Stuck {
        /// The guest's instruction pointer.
        rip: u64,
    },
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> ExitError {
    move |error| ExitError::Kvm { what, error: error.into() }
}

/// What exit delivery has done on one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitStats {
    /// Exits with `EFAULT`.
    pub exits: u64,
    /// Pages installed by the vCPU's own thread.
    pub installed: u64,
    /// Exits whose page was being fetched.
    pub waited: u64,
    /// Exits without a missing candidate, answered by entering again.
    pub reentered: u64,
    /// Entries with the view readable.
    pub fallbacks: u64,
}

impl std::ops::Add for ExitStats {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            exits: self.exits + other.exits,
            installed: self.installed + other.installed,
            waited: self.waited + other.waited,
            reentered: self.reentered + other.reentered,
            fallbacks: self.fallbacks + other.fallbacks,
        }
    }
}

/// Enters so often at one spot before it falls back.
const ENTRIES: u32 = 3;

/// Falls back so often at one spot before it gives up (R-A4). The interruption
/// may come before the page.
const FALLBACKS: u32 = 1000;

/// How long an entry with the view readable lasts, if nothing else ends it.
const READABLE: Duration = Duration::from_micros(500);

/// Delivery of one vCPU's faults.
#[derive(Debug)]
pub struct ExitDelivery<I> {
    installer: I,
    memory: Arc<ExitMemory>,
    finder: CandidateFinder,
    foretold: Option<Foretold>,
    xsave: Xsave,
    syncs: bool,
    /// Where the last exit without a missing candidate was.
    spot: Option<kvm_regs>,
    /// How often it was there, in a row.
    tried: u32,
    stats: ExitStats,
}

/// How the vCPU's registers lie in an XSAVE area.
#[derive(Debug)]
struct Xsave {
    bytes: u32,
    layout: XsaveLayout,
}

/// The pages a vCPU will miss, known beforehand.
#[derive(Debug)]
struct Foretold {
    pages: Vec<u64>,
    /// Those before it are in place.
    next: usize,
}

/// A copy of what tells what a vCPU was about to do.
struct State {
    regs: kvm_regs,
    sregs: kvm_sregs,
    events: kvm_vcpu_events,
}

impl<I: PageInstaller> ExitDelivery<I> {
    /// For a vCPU whose CPUID is set, in a VM whose memory is `memory`.
    ///
    /// # Errors
    ///
    /// If KVM does not tell the vCPU's CPUID.
    pub fn new(
        kvm: &Kvm,
        vcpu: &mut VcpuFd,
        memory: Arc<ExitMemory>,
        installer: I,
    ) -> Result<Self, ExitError> {
        let needed = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
        let offered = u32::try_from(kvm.check_extension_int(Cap::SyncRegs)).unwrap_or(0);
        let syncs = offered & needed == needed;
        if syncs {
            for registers in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
                vcpu.set_sync_valid_reg(registers);
            }
        }
        let cpuid = vcpu
            .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("tell a vCPU's CPUID"))?;
        let cpuid = cpuid.as_slice();
        let leaf = cpuid.iter().find(|entry| entry.function == 0xd && entry.index == 0);
        let xsave = Xsave {
            bytes: leaf.map_or(0, |leaf| leaf.ecx),
            layout: XsaveLayout::from_cpuid(cpuid),
        };
        Ok(Self {
            installer,
            memory,
            finder: CandidateFinder::new(),
            foretold: None,
            xsave,
            syncs,
            spot: None,
            tried: 0,
            stats: ExitStats::default(),
        })
    }

    /// For benchmarks, the floor of all exit delivery: neither registers nor
    /// instructions are looked at, and a fault is taken for one on the first of
    /// these gpas that is missing. On any other the delivery falls back.
    pub fn foretell(&mut self, vcpu: &mut VcpuFd, pages: Vec<u64>) {
        if std::mem::take(&mut self.syncs) {
            for registers in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
                vcpu.clear_sync_valid_reg(registers);
            }
        }
        self.foretold = Some(Foretold { pages, next: 0 });
    }

    /// What was done so far.
    pub fn stats(&self) -> ExitStats {
        self.stats
    }

    /// Who installs, to wait for a page that is being fetched.
    pub fn installer(&self) -> &I {
        &self.installer
    }

    /// The memory served.
    pub fn memory(&self) -> &ExitMemory {
        &self.memory
    }

    /// Deals with a `KVM_RUN` that has just failed with `EFAULT`.
    ///
    /// # Errors
    ///
    /// [`ExitError`]: the guest cannot go on.
    pub fn after_fault(&mut self, vcpu: &VcpuFd) -> Result<Delivered, ExitError> {
        self.stats.exits += 1;
        if let Some(page) = self.foretold_page() {
            self.spot = None;
            return self.bring(page);
        }
        let state = self.state(vcpu)?;
        let registers = Registers {
            regs: &state.regs,
            sregs: &state.sregs,
            events: &state.events,
            xsave_bytes: self.xsave.bytes,
        };
        let view = PresentPages { installer: &self.installer, memory: &self.memory };
        let layout = &self.xsave.layout;
        let missing = match self.foretold {
            Some(_) => None,
            None => Some(self.finder.missing(&registers, &view, || vector_registers(vcpu, layout))),
        };
        let pages = missing.as_ref().map_or(&[][..], Missing::pages);
        let Some((first, others)) = pages.split_first() else {
            return self.nothing_missing(&state.regs);
        };
        self.spot = None;
        let delivered = self.bring(first.page)?;
        // The vCPU was stopped by the first; the others would be next.
        for other in others {
            if let Some(hva) = self.memory.hva(other.page)
                && self.installer.resolve(hva) == Resolution::Installed
            {
                self.stats.installed += 1;
            }
        }
        Ok(delivered)
    }

    /// Brings the page that stopped the vCPU.
    fn bring(&mut self, gpa: u64) -> Result<Delivered, ExitError> {
        let Some(hva) = self.memory.hva(gpa) else { return Ok(Delivered::Resumed) };
        match self.installer.resolve(hva) {
            Resolution::Installed => self.stats.installed += 1,
            Resolution::Present | Resolution::Outside => {}
            Resolution::Waiting => {
                self.stats.waited += 1;
                return Ok(Delivered::Waiting(gpa));
            }
            Resolution::Poisoned => return Ok(Delivered::Poisoned(gpa)),
            Resolution::Filled => return self.complete(),
            Resolution::Ended => return Err(ExitError::PagerEnded),
        }
        Ok(Delivered::Resumed)
    }

    /// The first of the foretold pages that is missing.
    fn foretold_page(&mut self) -> Option<u64> {
        let foretold = self.foretold.as_mut()?;
        let view = PresentPages { installer: &self.installer, memory: &self.memory };
        while let Some(page) = foretold.pages.get(foretold.next) {
            if view.is_missing(*page) {
                return Some(*page);
            }
            foretold.next += 1;
        }
        None
    }

    /// Pages nobody installed are the kernel's to make from now on.
    fn complete(&mut self) -> Result<Delivered, ExitError> {
        self.memory.stop_exits().map_err(ExitError::Protect)?;
        Ok(Delivered::Resumed)
    }

    fn nothing_missing(&mut self, regs: &kvm_regs) -> Result<Delivered, ExitError> {
        if self.installer.is_complete() {
            return self.complete();
        }
        if self.spot.replace(*regs) != Some(*regs) {
            self.tried = 0;
        }
        self.tried += 1;
        if self.tried <= ENTRIES {
            self.stats.reentered += 1;
            return Ok(Delivered::Resumed);
        }
        if self.tried > ENTRIES + FALLBACKS {
            return Err(ExitError::Stuck { rip: regs.rip });
        }
        Ok(Delivered::FallBack)
    }

    /// Enters the guest with the view readable, so that the userfaultfd delivers
    /// what is missing, until `on_exit` has an exit to deal with or `interrupt`
    /// has interrupted this thread's `KVM_RUN`. It is called from another
    /// thread, again and again until it had its effect.
    ///
    /// # Errors
    ///
    /// If the view's protection cannot be changed.
    pub fn fall_back<T>(
        &mut self,
        vcpu: &mut VcpuFd,
        interrupt: impl Fn() + Send,
        on_exit: impl FnOnce(Result<VcpuExit<'_>, kvm_ioctls::Error>) -> T,
    ) -> Result<T, ExitError> {
        self.stats.fallbacks += 1;
        let (entered, left) = mpsc::channel::<()>();
        let readable = self.memory.readable().map_err(ExitError::Protect)?;
        let answer = thread::scope(|scope| {
            scope.spawn(move || {
                while left.recv_timeout(READABLE) == Err(RecvTimeoutError::Timeout) {
                    interrupt();
                }
            });
            let answer = on_exit(vcpu.run());
            drop(entered);
            answer
        });
        drop(readable);
        Ok(answer)
    }

    fn state(&self, vcpu: &VcpuFd) -> Result<State, ExitError> {
        if self.syncs {
            let kvm_sync_regs { regs, sregs, events } = vcpu.sync_regs();
            return Ok(State { regs, sregs, events });
        }
        Ok(State {
            regs: vcpu.get_regs().map_err(refused("read registers"))?,
            sregs: vcpu.get_sregs().map_err(refused("read system registers"))?,
            events: vcpu.get_vcpu_events().map_err(refused("read pending events"))?,
        })
    }
}

fn vector_registers(vcpu: &VcpuFd, layout: &XsaveLayout) -> Option<VectorRegisters> {
    // Up to AVX-512 all of it lies in the 4 KiB of the plain call.
    let xsave = vcpu.get_xsave().ok()?;
    let bytes: Vec<u8> = xsave.region.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Some(VectorRegisters::from_xsave(&bytes, layout))
}
