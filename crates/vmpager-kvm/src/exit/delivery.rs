//! Delivery of one vCPU's faults.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_PRE_FAULT_MEMORY, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_regs,
    kvm_sregs, kvm_sync_regs, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuExit, VcpuFd};
use vmpager_core::{Hva, PageInstaller, Resolution};
use vmpager_sys::pre_fault::pre_fault;

use super::memory::{ExitMemory, Mechanism, PresentPages};
use super::{Delivered, ExitError, ExitStats, Fault, refused};
use crate::candidates::{
    CandidateFinder, Cause, GuestView, Missing, PAGE_BYTES, Registers, VectorRegisters, XsaveLayout,
};

/// Enters so often at one spot with nothing missing before it falls back.
const ENTRIES: u32 = 3;

/// Brings so many pages at one spot before it falls back: more than any
/// instruction touches, so that what is brought goes away again.
const PAGES: u32 = 200;

/// Falls back so often at one spot before it gives up (R-A4): after some seconds,
/// for the interruption may come before the page.
const FALLBACKS: u32 = 200;

/// So many exits in a row on one page that is in place, and told to be, are the
/// end.
const EXITS: u32 = 1000;

/// How long an entry with the view readable lasts, if nothing else ends it. Twice
/// as long each time at one spot, up to 2^[`DOUBLINGS`] times.
const READABLE: Duration = Duration::from_micros(500);
const DOUBLINGS: u32 = 6;

/// Delivery of one vCPU's faults.
#[derive(Debug)]
pub struct ExitDelivery<I> {
    installer: I,
    memory: Arc<ExitMemory>,
    finder: CandidateFinder,
    foretold: Option<Foretold>,
    xsave: Xsave,
    syncs: bool,
    /// KVM maps pages before they are touched, if asked to.
    maps: bool,
    spot: Spot,
    /// What the page was for that the last fault was on, if that had to be found out.
    missed: Option<Cause>,
    /// The last fault whose page was found out, and is waited for.
    awaited: Option<Awaited>,
    stats: ExitStats,
}

/// Where the last exits were, as long as they are at the same instruction, or
/// the same page where that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Spot {
    at: Option<At>,
    /// How many they were.
    exits: u32,
    /// With how many of them nothing was missing, in a row.
    idle: u32,
    /// How many of them took the fallback.
    fallbacks: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Instruction(kvm_regs),
    Page(u64),
}

impl Spot {
    /// Counts an exit.
    fn visit(&mut self, at: At) {
        if self.at != Some(at) {
            *self = Self { at: Some(at), ..Self::default() };
        }
        self.exits += 1;
    }
}

/// How the vCPU's registers lie in an XSAVE area.
#[derive(Debug)]
struct Xsave {
    bytes: u32,
    layout: XsaveLayout,
}

/// A fault on a page that is waited for: a vCPU that takes interrupts meanwhile comes
/// back to it after each.
#[derive(Debug)]
struct Awaited {
    regs: kvm_regs,
    cr3: u64,
    events: kvm_vcpu_events,
    /// Its gpa, and what it is for.
    page: (u64, Cause),
}

/// The pages a vCPU will miss, known beforehand.
#[derive(Debug)]
struct Foretold {
    pages: Vec<u64>,
    /// Those before it are in place.
    next: usize,
}

/// A copy of what tells what a vCPU was about to do.
pub(crate) struct State {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) events: kvm_vcpu_events,
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
        // Who is told the page needs no registers.
        let syncs = offered & needed == needed && memory.mechanism() == Mechanism::View;
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
            maps: kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0,
            spot: Spot::default(),
            missed: None,
            awaited: None,
            stats: ExitStats::default(),
        })
    }

    /// For benchmarks, the floor of all exit delivery: neither registers nor
    /// instructions are looked at, and a fault is taken for one on the first of
    /// these gpas that is missing. On any other the delivery falls back. With
    /// attributes there is nothing to foretell: KVM tells the page.
    pub fn foretell(&mut self, vcpu: &mut VcpuFd, pages: Vec<u64>) {
        if std::mem::take(&mut self.syncs) {
            for registers in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
                vcpu.clear_sync_valid_reg(registers);
            }
        }
        self.maps = false;
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

    /// The memory served, to be shared.
    pub(crate) fn shared_memory(&self) -> &Arc<ExitMemory> {
        &self.memory
    }

    /// Has a page brought, though no vCPU misses it now.
    pub(crate) fn ask_for(&mut self, hva: Hva) {
        if self.installer.resolve(hva) == Resolution::Installed {
            self.stats.installed += 1;
        }
    }

    /// Deals with a fault that has just ended this vCPU's `KVM_RUN`.
    ///
    /// # Errors
    ///
    /// [`ExitError`]: the guest cannot go on.
    pub fn after_fault(&mut self, vcpu: &VcpuFd, fault: Fault) -> Result<Delivered, ExitError> {
        self.stats.exits += 1;
        self.missed = None;
        match (self.memory.mechanism(), fault) {
            // Nobody here converts memory, or unmaps it.
            (Mechanism::Attributes, Fault::Somewhere) => Ok(Delivered::NotOurs),
            (Mechanism::Attributes, Fault::At { gpa }) => self.exact(vcpu, gpa),
            (Mechanism::View, _) => match self.foretold_page() {
                Some(page) => self.bring(vcpu, page),
                None => self.guess(vcpu),
            },
        }
    }

    /// Asks for a page again for which the vCPU was [told](Delivered::Waiting) to
    /// wait.
    ///
    /// # Errors
    ///
    /// [`ExitError`]: the guest cannot go on.
    pub fn ask_again(&mut self, vcpu: &VcpuFd, gpa: u64) -> Result<Delivered, ExitError> {
        self.stats.asked_again += 1;
        let installed = self.stats.installed;
        let delivered = self.bring(vcpu, gpa)?;
        if delivered == Delivered::Resumed && self.stats.installed == installed {
            self.map(vcpu, gpa);
        }
        Ok(delivered)
    }

    /// A page has come for which the vCPU was [told](Delivered::Waiting) to wait: if it is
    /// in place, whoever touches it now need not leave the guest.
    pub(crate) fn came(&mut self, vcpu: &VcpuFd, gpa: u64) -> Result<(), ExitError> {
        let hva = self.memory.hva(gpa);
        if hva.is_some_and(|hva| self.installer.is_present(hva)) {
            if self.memory.open(gpa, &self.installer)? == Some(true) {
                self.stats.cleared += 1;
            }
            self.map(vcpu, gpa);
        }
        Ok(())
    }

    /// Has KVM map a page that is in place, so that the vCPU need not leave the guest
    /// once more for that.
    fn map(&mut self, vcpu: &VcpuFd, gpa: u64) {
        if !self.maps {
            return;
        }
        let page = gpa / PAGE_BYTES * PAGE_BYTES;
        match pre_fault(vcpu, page, PAGE_BYTES) {
            Ok(_) => self.stats.mapped += 1,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.maps = false,
            // The vCPU will see to it itself.
            Err(_) => {}
        }
    }

    /// A fault on a page that KVM told.
    fn exact(&mut self, vcpu: &VcpuFd, gpa: u64) -> Result<Delivered, ExitError> {
        let page = gpa / PAGE_BYTES * PAGE_BYTES;
        self.spot.visit(At::Page(page));
        let before = self.stats.reentered;
        let delivered = self.bring(vcpu, page)?;
        // Another vCPU's clearing of the attribute was not yet over.
        if self.stats.reentered > before && self.spot.exits > EXITS {
            let regs = vcpu.get_regs().map_err(refused("read registers"))?;
            return Err(ExitError::Stuck { rip: regs.rip });
        }
        Ok(delivered)
    }

    /// A fault on a page that follows from what the vCPU was about to do.
    fn guess(&mut self, vcpu: &VcpuFd) -> Result<Delivered, ExitError> {
        let state = self.state(vcpu)?;
        self.spot.visit(At::Instruction(state.regs));
        if self.spot.fallbacks >= FALLBACKS {
            return Err(ExitError::Stuck { rip: state.regs.rip });
        }
        if let Some(awaited) = self.still_awaited(&state) {
            let (page, cause) = awaited.page;
            self.missed = Some(cause);
            let delivered = self.bring(vcpu, page)?;
            self.awaited = Some(awaited);
            return Ok(delivered);
        }
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
            return self.nothing_missing();
        };
        self.spot.idle = 0;
        self.missed = Some(first.cause);
        if self.spot.exits > PAGES {
            return Ok(self.unknown());
        }
        let delivered = self.bring(vcpu, first.page)?;
        self.awaited = matches!(delivered, Delivered::Waiting(_)).then_some(Awaited {
            regs: state.regs,
            cr3: state.sregs.cr3,
            events: state.events,
            page: (first.page, first.cause),
        });
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

    /// The page of the fault before, if this is the same fault still.
    fn still_awaited(&mut self, state: &State) -> Option<Awaited> {
        let view = PresentPages { installer: &self.installer, memory: &self.memory };
        let awaited = self.awaited.take()?;
        let before = (awaited.regs, awaited.cr3, awaited.events);
        let same = before == (state.regs, state.sregs.cr3, state.events);
        (same && view.is_missing(awaited.page.0)).then_some(awaited)
    }

    /// Brings the page that stopped the vCPU.
    fn bring(&mut self, vcpu: &VcpuFd, gpa: u64) -> Result<Delivered, ExitError> {
        let Some(hva) = self.memory.hva(gpa) else { return Ok(Delivered::NotOurs) };
        let resolution = self.installer.resolve(hva);
        match resolution {
            Resolution::Installed => self.stats.installed += 1,
            Resolution::Present => {}
            Resolution::Waiting => {
                self.stats.waited += 1;
                // However long that takes, the vCPU is not stuck.
                self.spot = Spot::default();
                return Ok(Delivered::Waiting(gpa));
            }
            Resolution::Poisoned => return Ok(Delivered::Poisoned(gpa)),
            Resolution::Outside => return Ok(Delivered::NotOurs),
            Resolution::Filled => self.memory.stop_exits()?,
            Resolution::Ended => return Err(ExitError::PagerEnded),
        }
        match self.memory.open(gpa, &self.installer)? {
            Some(true) => self.stats.cleared += 1,
            Some(false) if resolution == Resolution::Installed => self.stats.overtaken += 1,
            Some(false) => self.stats.reentered += 1,
            None => {}
        }
        if resolution == Resolution::Installed {
            self.map(vcpu, gpa);
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

    fn nothing_missing(&mut self) -> Result<Delivered, ExitError> {
        if self.installer.is_complete() {
            // Pages nobody installed are the kernel's to make from now on.
            self.memory.stop_exits()?;
            return Ok(Delivered::Resumed);
        }
        self.spot.idle += 1;
        if self.spot.idle <= ENTRIES {
            self.stats.reentered += 1;
            return Ok(Delivered::Resumed);
        }
        Ok(self.unknown())
    }

    /// What the vCPU misses is not known.
    fn unknown(&mut self) -> Delivered {
        self.spot.fallbacks += 1;
        Delivered::FallBack
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
        let doublings = self.spot.fallbacks.saturating_sub(1).min(DOUBLINGS);
        let lasts = READABLE * (1 << doublings);
        let (entered, left) = mpsc::channel::<()>();
        let readable = self.memory.readable().map_err(ExitError::Protect)?;
        let answer = thread::scope(|scope| {
            scope.spawn(move || {
                while left.recv_timeout(lasts) == Err(RecvTimeoutError::Timeout) {
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

    /// Whether what a vCPU missed first, with its last fault, is part of the delivery
    /// of an event, an instruction's own (`INT n`) included.
    pub(crate) fn missed_an_event(&mut self, state: &State) -> bool {
        if let Some(cause) = self.missed {
            return is_event(cause);
        }
        let registers = Registers {
            regs: &state.regs,
            sregs: &state.sregs,
            events: &state.events,
            xsave_bytes: self.xsave.bytes,
        };
        let view = PresentPages { installer: &self.installer, memory: &self.memory };
        // Vector registers hold no event's addresses.
        let missing = self.finder.missing(&registers, &view, || None);
        missing.pages().first().is_some_and(|first| is_event(first.cause))
    }

    /// Gives a vCPU these events: by the next entry, where that spares a call.
    pub(crate) fn set_events(
        &self,
        vcpu: &mut VcpuFd,
        events: kvm_vcpu_events,
    ) -> Result<(), kvm_ioctls::Error> {
        if self.syncs {
            vcpu.sync_regs_mut().events = events;
            vcpu.set_sync_dirty_reg(SyncReg::VcpuEvents);
            return Ok(());
        }
        vcpu.set_vcpu_events(&events)
    }

    /// What a vCPU was about to do when its `KVM_RUN` ended with a fault.
    pub(crate) fn state(&self, vcpu: &VcpuFd) -> Result<State, ExitError> {
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

/// Whether a page is touched to deliver an event.
fn is_event(cause: Cause) -> bool {
    match cause {
        Cause::Code | Cause::PageTable | Cause::Operand => false,
        Cause::Descriptor
        | Cause::InterruptTable
        | Cause::TaskState
        | Cause::EventStack
        | Cause::Handler => true,
    }
}

fn vector_registers(vcpu: &VcpuFd, layout: &XsaveLayout) -> Option<VectorRegisters> {
    // Up to AVX-512 all of it lies in the 4 KiB of the plain call.
    let xsave = vcpu.get_xsave().ok()?;
    let bytes: Vec<u8> = xsave.region.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Some(VectorRegisters::from_xsave(&bytes, layout))
}
