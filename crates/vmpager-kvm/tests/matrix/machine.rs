//! A VM whose missing pages are exits, run by the very code that delivers them,
//! and what a program did to it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_fpu, kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmpager_core::{Hva, PageInstaller, Resolution};
use vmpager_kvm::exit::{
    Delivered, ExitDelivery, ExitMemory, ExitStats, Fault, GpaRange, Mechanism,
};
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::uffd::{Features, Message, Messages, Userfaultfd};

use super::{MEMORY, PAGE, Setup, offset};

/// More exits than any program here has pages, and tries.
const MOST_EXITS: u32 = 3000;

/// Memory, and who brings its pages: the vCPU's thread, or a thread that serves
/// the userfaultfd.
#[derive(Debug)]
struct Pages {
    memory: Arc<Mapping>,
    uffd: Userfaultfd,
    state: Mutex<State>,
    stop: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    image: Arc<Vec<u8>>,
    present: BTreeSet<u64>,
    /// Pages that the vCPU's thread brought, in order.
    installed: Vec<u64>,
    /// Pages that the userfaultfd asked for, in order.
    served: Vec<u64>,
}

impl Pages {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    fn install(&self, state: &mut State, gpa: u64) {
        if state.present.insert(gpa) {
            let source = state.image[offset(gpa)..].as_ptr() as usize;
            let installed = self.uffd.copy(self.memory.hva() + gpa, source, PAGE);
            assert_eq!(installed.stop, None, "page {gpa:#x}");
        } else {
            self.uffd.wake(self.memory.hva() + gpa, PAGE).expect("registered memory");
        }
    }

    /// Serves the userfaultfd until told to stop.
    fn serve(&self) {
        let mut messages = Messages::new();
        let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        while !self.stop.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(&self.uffd, PollFlags::IN)];
            poll(&mut fds, Some(&wait)).expect("poll");
            self.uffd.read(&mut messages).expect("a userfaultfd that can be read");
            for message in messages.drain() {
                let Message::Fault { address, .. } = message else { panic!("{message:?}") };
                let gpa = (address - self.memory.hva()) / PAGE * PAGE;
                let mut state = self.state();
                state.served.push(gpa);
                self.install(&mut state, gpa);
            }
        }
    }
}

/// The vCPU thread's way to bring pages.
#[derive(Debug)]
struct Own(Arc<Pages>);

impl PageInstaller for Own {
    fn is_present(&self, hva: Hva) -> bool {
        self.0.state().present.contains(&((hva.0 - self.0.memory.hva()) / PAGE * PAGE))
    }

    fn is_complete(&self) -> bool {
        false
    }

    fn resolve(&mut self, hva: Hva) -> Resolution {
        let gpa = (hva.0 - self.0.memory.hva()) / PAGE * PAGE;
        let mut state = self.0.state();
        if state.present.contains(&gpa) {
            return Resolution::Present;
        }
        state.installed.push(gpa);
        self.0.install(&mut state, gpa);
        Resolution::Installed
    }
}

/// In words, in an XSAVE area.
const XSAVE_HEADER: std::ops::Range<usize> = 128..144;

/// What a program left behind.
#[derive(PartialEq)]
pub(crate) struct Outcome {
    pub(crate) regs: kvm_regs,
    sregs: kvm_sregs,
    vectors: Vec<u32>,
    /// The pages that it changed, as they are now.
    pub(crate) changed: BTreeMap<u64, Vec<u8>>,
}

impl Outcome {
    /// In what it differs from another.
    pub(crate) fn differs_from(&self, other: &Self) -> Option<String> {
        if self == other {
            return None;
        }
        let pages = |outcome: &Self| outcome.changed.keys().copied().collect::<Vec<_>>();
        Some(format!(
            "registers {:x?} not {:x?}; sregs equal: {}; vectors equal: {}; changed {:x?}, not \
             {:x?}, alike: {}",
            self.regs,
            other.regs,
            self.sregs == other.sregs,
            self.vectors == other.vectors,
            pages(self),
            pages(other),
            self.changed == other.changed,
        ))
    }
}

/// How pages came in one run.
#[derive(Debug)]
pub(crate) struct Came {
    pub(crate) installed: Vec<u64>,
    pub(crate) served: Vec<u64>,
    pub(crate) stats: ExitStats,
}

/// A VM with one vCPU.
pub(crate) struct Machine {
    kvm: Kvm,
    vcpu: VcpuFd,
    vm: Arc<VmFd>,
    // After the VM, which uses it.
    pages: Arc<Pages>,
    server: Option<JoinHandle<()>>,
    mechanism: Mechanism,
    pub(crate) first_sregs: kvm_sregs,
    first_fpu: kvm_fpu,
    pub(crate) has_avx: bool,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.pages.stop.store(true, Ordering::Release);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

impl Machine {
    /// None, and said so, where there is no such thing.
    pub(crate) fn new(mechanism: Mechanism, irqchip: bool) -> Option<Self> {
        let skip = |why: String| {
            vmpager_testing::skipped(&why);
            None
        };
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => return skip(format!("no KVM ({error})")),
        };
        let uffd = match Userfaultfd::open(Features::NONE) {
            Ok(uffd) => uffd,
            Err(error) => return skip(error.to_string()),
        };
        let kind = match mechanism.vm_type(&kvm) {
            Ok(kind) => kind,
            Err(error) => return skip(error.to_string()),
        };
        let vm = Arc::new(kvm.create_vm_with_type(kind).expect("a VM"));
        let memory = Arc::new(Mapping::inaccessible(offset(MEMORY)).expect("4 MiB"));
        uffd.register_missing(&GuestRange::of_mapping(&memory)).expect("anonymous memory");
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY,
            userspace_addr: memory.hva(),
            ..Default::default()
        };
        // SAFETY: the mapping outlives the VM, and is accessed by volatile copies
        // only.
        unsafe { vm.set_user_memory_region(region) }.expect("a memslot");
        if irqchip {
            vm.create_irq_chip().expect("interrupt controllers");
            vm.create_pit2(kvm_pit_config::default()).expect("a timer");
        }
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
        vcpu.set_cpuid2(&cpuid).expect("what KVM offers");
        let pages = Pages { memory, uffd, state: Mutex::default(), stop: AtomicBool::new(false) };
        let pages = Arc::new(pages);
        let server = std::thread::spawn({
            let pages = pages.clone();
            move || pages.serve()
        });
        let first_sregs = vcpu.get_sregs().expect("system registers");
        let first_fpu = vcpu.get_fpu().expect("floating-point registers");
        let has_avx = enable_avx(&vcpu) && std::is_x86_feature_detected!("avx2");
        let server = Some(server);
        Some(Self { kvm, vcpu, vm, pages, server, mechanism, first_sregs, first_fpu, has_avx })
    }

    /// Runs a program to its end, with just these pages in place.
    pub(crate) fn run(
        &mut self,
        setup: &Setup,
        present: &BTreeSet<u64>,
    ) -> Result<(Outcome, Came), String> {
        let mut exits = self.reset(setup, present);
        for _ in 0..MOST_EXITS {
            let ran = self.vcpu.run();
            let fault = Fault::of(&ran);
            match (fault, ran) {
                (Some(fault), _) => {
                    let delivered =
                        exits.after_fault(&self.vcpu, fault).map_err(|error| error.to_string())?;
                    match delivered {
                        Delivered::Resumed => {}
                        Delivered::FallBack => {
                            // Every program ends by itself.
                            let ended = exits.fall_back(
                                &mut self.vcpu,
                                || (),
                                |exit| matches!(exit, Ok(VcpuExit::IoOut(super::END, _))),
                            );
                            if ended.map_err(|error| error.to_string())? {
                                return Ok(self.outcome(&exits));
                            }
                        }
                        other => return Err(format!("{other:?} after {fault:?}")),
                    }
                }
                (None, Ok(VcpuExit::IoOut(super::END, _))) => return Ok(self.outcome(&exits)),
                (None, Ok(exit)) => {
                    let exit = format!("{exit:?}");
                    return Err(format!("{exit} at {:x?}", self.vcpu.get_regs()));
                }
                (None, Err(error)) => {
                    let error = std::io::Error::from(error);
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        return Err(format!("KVM_RUN: {error}"));
                    }
                }
            }
        }
        Err(format!("no end: {:x?}", self.came(&exits)))
    }

    /// Memory and registers as at the start.
    fn reset(&mut self, setup: &Setup, present: &BTreeSet<u64>) -> ExitDelivery<Own> {
        let memory = self.pages.memory.clone();
        memory.discard(0..offset(MEMORY)).expect("anonymous memory");
        {
            let mut state = self.pages.state();
            *state = State { image: setup.image.clone(), ..State::default() };
            for page in present {
                self.pages.install(&mut state, *page);
            }
        }
        let slot = GpaRange { gpa: 0, offset: 0, len: MEMORY };
        let memory = ExitMemory::new(self.mechanism, &self.vm, memory, vec![slot]);
        let memory = Arc::new(memory.expect("memory whose missing pages exit"));
        let own = Own(self.pages.clone());
        let exits = ExitDelivery::new(&self.kvm, &mut self.vcpu, memory, own);
        self.vcpu.set_sregs(&setup.sregs).expect("system registers");
        self.vcpu.set_regs(&setup.regs).expect("registers");
        self.vcpu.set_fpu(&self.first_fpu).expect("floating-point registers");
        self.vcpu.set_vcpu_events(&kvm_vcpu_events::default()).expect("no events");
        self.set_msrs(&setup.msrs);
        exits.expect("a vCPU with CPUID")
    }

    fn set_msrs(&self, msrs: &[(u32, u64)]) {
        let entries: Vec<_> = msrs
            .iter()
            .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
            .collect();
        let set = self.vcpu.set_msrs(&Msrs::from_entries(&entries).expect("a few"));
        assert_eq!(set.expect("MSRs"), msrs.len(), "{msrs:x?}");
    }

    fn came(&self, exits: &ExitDelivery<Own>) -> Came {
        let state = self.pages.state();
        let (installed, served) = (state.installed.clone(), state.served.clone());
        Came { installed, served, stats: exits.stats() }
    }

    fn outcome(&mut self, exits: &ExitDelivery<Own>) -> (Outcome, Came) {
        complete(&mut self.vcpu);
        let came = self.came(exits);
        let state = self.pages.state();
        let mut changed = BTreeMap::new();
        // What is missing is left missing.
        for &page in &state.present {
            let at = offset(page);
            let mut bytes = vec![0; offset(PAGE)];
            self.pages.memory.read(at, &mut bytes);
            if bytes != state.image[at..at + bytes.len()] {
                changed.insert(page, bytes);
            }
        }
        let mut vectors = self.vcpu.get_xsave().expect("vector registers").region;
        // Which of them are in use is the host's matter.
        vectors[XSAVE_HEADER].fill(0);
        let outcome = Outcome {
            regs: self.vcpu.get_regs().expect("registers"),
            sregs: self.vcpu.get_sregs().expect("system registers"),
            vectors: vectors.to_vec(),
            changed,
        };
        (outcome, came)
    }
}

/// Lets the `out` of the last exit end, if there was one, and executes nothing
/// else.
pub(crate) fn complete(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    let entered = vcpu.run().map(drop);
    vcpu.set_kvm_immediate_exit(0);
    let kind = entered.map_err(|error| std::io::Error::from(error).kind());
    assert_eq!(kind, Err(std::io::ErrorKind::Interrupted));
}

/// Lets the guest use YMM registers, if KVM does.
fn enable_avx(vcpu: &VcpuFd) -> bool {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: 7 };
    vcpu.set_xcrs(&xcrs).is_ok()
}
