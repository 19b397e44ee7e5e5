//! Every kind of access with the page under each operand missing in turn: the
//! vCPU must end as it does when all pages are in place, in registers and in
//! memory. Code, page tables, descriptors, task state and stacks are operands,
//! too.
//!
//! Each program runs first with all pages in place, then with all of them
//! missing, which tells what it touches; then once for each of these pages, with
//! just that one missing.

#[path = "../cases/mod.rs"]
#[allow(dead_code, reason = "the order of pages is another test's matter")]
mod cases;
mod machine;
mod modes;
mod programs;
mod slow;
mod telling;
mod told;

use std::collections::BTreeSet;
use std::sync::Arc;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_sregs};
use kvm_ioctls::Kvm;
use vmpager_core::{Hva, PageInstaller, Resolution};
use vmpager_kvm::exit::{
    Delivered, ExitDelivery, ExitError, ExitMemory, Fault, GpaRange, Mechanism,
};
use vmpager_kvm::probe::{self, KvmReport};
use vmpager_sys::memory::Mapping;

use machine::{Came, Machine, Outcome};
use modes::Mode;
use programs::Program;

const PAGE: u64 = 4096;
const MEMORY: u64 = 4 << 20;
/// Where a program's end is told.
const END: u16 = 0xe9;
/// `out 0xe9, al`.
const END_CODE: [u8; 2] = [0xe6, 0xe9];
/// IOPL 3, and a bit that is always set.
const FLAGS: u64 = 3 << 12 | 2;
const INTERRUPTS: u64 = 1 << 9;

fn offset(gpa: u64) -> usize {
    usize::try_from(gpa).expect("a guest of 4 MiB")
}

/// What a guest starts with.
#[derive(Clone)]
struct Setup {
    regs: kvm_regs,
    sregs: kvm_sregs,
    msrs: Vec<(u32, u64)>,
    has_avx: bool,
    image: Arc<Vec<u8>>,
}

impl Setup {
    fn put(&mut self, gpa: u64, bytes: &[u8]) {
        let start = offset(gpa);
        Arc::make_mut(&mut self.image)[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn word(&mut self, gpa: u64, value: u64) {
        self.put(gpa, &value.to_le_bytes());
    }

    /// A guest in a mode and a ring, which has nothing to do yet.
    fn new(machine: &Machine, mode: Mode, ring: u8) -> Self {
        let image = Arc::new(vec![0; offset(MEMORY)]);
        let (rip, rsp) = match mode {
            Mode::Real => (0x100, 0x800),
            _ => (cases::CODE, cases::STACK),
        };
        let regs = kvm_regs { rip, rsp, rflags: FLAGS, ..Default::default() };
        let (sregs, has_avx) = (machine.first_sregs, machine.has_avx);
        let mut setup = Self { regs, sregs, msrs: Vec::new(), has_avx, image };
        modes::enter(&mut setup, mode, ring);
        // Where jumps, calls and returns go.
        let landings: &[u64] =
            if mode == Mode::Real { &[0x1_8000, 0x7_8000] } else { &[cases::LANDING] };
        landings.iter().for_each(|landing| setup.put(*landing, &END_CODE));
        setup
    }

    /// Puts a program where it starts, with an end.
    fn code(&mut self, code: &[u8]) {
        let base = if self.sregs.cs.l == 1 { 0 } else { self.sregs.cs.base };
        self.put(base + self.regs.rip, &[code, &END_CODE].concat());
    }
}

/// Where missing pages of programs are looked for.
struct Matrix {
    machine: Machine,
    /// Whether KVM runs ring 0, or touches guest memory itself.
    emulates: bool,
    interrupts: bool,
    wrong: Vec<String>,
    runs: u64,
    installed: u64,
    served: u64,
    fallbacks: u64,
    not_here: Vec<String>,
}

impl Matrix {
    fn new(mechanism: Mechanism, irqchip: bool) -> Option<Self> {
        let machine = Machine::new(mechanism, irqchip)?;
        let emulates = probe::kvm().is_ok_and(|kvm| kvm.nested_paging != Some(true));
        Some(Self {
            machine,
            emulates,
            interrupts: irqchip,
            wrong: Vec::new(),
            runs: 0,
            installed: 0,
            served: 0,
            fallbacks: 0,
            not_here: Vec::new(),
        })
    }

    /// Runs programs in a mode and a ring.
    fn programs(&mut self, mode: Mode, ring: u8, programs: &[Program]) {
        for program in programs {
            let mut setup = Setup::new(&self.machine, mode, ring);
            (program.set)(&mut setup, mode);
            setup.code(program.code);
            self.program(&format!("{mode:?} {ring}: {}", program.name), setup);
        }
    }

    /// Runs the instructions of 64-bit ring 3.
    fn cases(&mut self, mode: Mode) {
        for case in cases::CASES {
            if case.needs == cases::Needs::Avx2 && !self.machine.has_avx {
                self.not_here.push(case.name.to_owned());
                continue;
            }
            let mut setup = Setup::new(&self.machine, mode, 3);
            (case.set)(&mut setup);
            setup.code(case.code);
            self.program(&format!("{mode:?} 3: {}", case.name), setup);
        }
    }

    fn program(&mut self, name: &str, mut setup: Setup) {
        if self.interrupts {
            setup.regs.rflags |= INTERRUPTS;
        }
        let all_missing = match self.machine.run(&setup, &BTreeSet::new()) {
            Ok(ended) => ended,
            // KVM's emulator does not know all instructions.
            Err(_) if self.emulates && !self.ends(&setup) => {
                return self.not_here.push(name.to_owned());
            }
            Err(error) => return self.wrong.push(format!("{name}, all missing: {error}")),
        };
        let came = &all_missing.1;
        let touched: BTreeSet<u64> = came.installed.iter().chain(&came.served).copied().collect();
        if touched.len() < 2 {
            self.wrong.push(format!("{name}: it touches {touched:x?} only"));
        }
        // Nothing is missing that it touches.
        let wanted = match self.machine.run(&setup, &touched) {
            Ok((wanted, came)) if came.installed.is_empty() && came.served.is_empty() => wanted,
            Ok((_, came)) => return self.wrong.push(format!("{name}, none missing: {came:x?}")),
            Err(error) => return self.wrong.push(format!("{name}, none missing: {error}")),
        };
        self.compare(name, "all", &setup, &wanted, all_missing);
        for &missing in &touched {
            let mut present = touched.clone();
            present.remove(&missing);
            let which = format!("{missing:#x}");
            match self.machine.run(&setup, &present) {
                Ok(ended) => self.compare(name, &which, &setup, &wanted, ended),
                Err(error) => self.wrong.push(format!("{name}, {which} missing: {error}")),
            }
        }
    }

    /// Whether a program comes to its end with all of memory in place.
    fn ends(&mut self, setup: &Setup) -> bool {
        let all = (0..MEMORY).step_by(offset(PAGE)).collect();
        self.machine.run(setup, &all).is_ok()
    }

    /// Compares a run in which pages were missing with one in which none was.
    fn compare(
        &mut self,
        name: &str,
        which: &str,
        setup: &Setup,
        wanted: &Outcome,
        (outcome, came): (Outcome, Came),
    ) {
        self.runs += 1;
        self.installed += came.installed.len() as u64;
        self.served += came.served.len() as u64;
        self.fallbacks += came.stats.fallbacks;
        if let Some(difference) = outcome.differs_from(wanted) {
            self.wrong.push(format!("{name}, {which} missing: {difference}"));
        }
        // Where a processor does it all, KVM touches nothing itself but the root of
        // three levels.
        let three_levels = setup.sregs.cr4 & 0x20 != 0 && setup.sregs.efer == 0;
        let own = |page: &u64| three_levels && *page == modes::TABLES;
        let by_kvm = came.served.iter().all(own);
        if !self.emulates && (came.stats.fallbacks > 0 || !by_kvm) {
            self.wrong.push(format!("{name}, {which} missing: {came:x?}"));
        }
    }

    fn conclude(self) {
        println!(
            "{} runs; {} pages by exits, {} by the userfaultfd, {} fallbacks; not here: {:?}",
            self.runs, self.installed, self.served, self.fallbacks, self.not_here
        );
        if !self.not_here.is_empty() {
            vmpager_testing::skipped(&format!("{} programs", self.not_here.len()));
        }
        // Elsewhere few may be, should the kernel change its page tables meanwhile.
        assert!(self.fallbacks * 1000 <= 3 * self.installed, "{} fallbacks", self.fallbacks);
        assert!(self.wrong.is_empty(), "{} wrong:\n{}", self.wrong.len(), self.wrong.join("\n"));
    }
}

const BOTH: [Mechanism; 2] = [Mechanism::View, Mechanism::Attributes];

/// Programs for each mechanism there is here.
fn everywhere(programs: impl Fn(&mut Matrix)) {
    everywhere_but(|_| None, &[false], programs);
}

/// The same if the KVM here is what that needs, with or without interrupt
/// controllers: with them, interrupts are on.
fn everywhere_but(
    unfit: fn(&KvmReport) -> Option<&'static str>,
    irqchips: &[bool],
    programs: impl Fn(&mut Matrix),
) {
    match probe::kvm() {
        Ok(kvm) => {
            if let Some(why) = unfit(&kvm) {
                return vmpager_testing::skipped(why);
            }
        }
        Err(error) => return vmpager_testing::skipped(&error.to_string()),
    }
    for mechanism in BOTH {
        for irqchip in irqchips {
            let Some(mut matrix) = Matrix::new(mechanism, *irqchip) else { continue };
            programs(&mut matrix);
            matrix.conclude();
        }
    }
}

#[test]
fn long_mode_ring_3() {
    everywhere_but(|_| None, &[false, true], |matrix| matrix.cases(Mode::Long));
}

#[test]
fn long_mode_large_pages() {
    everywhere(|matrix| matrix.cases(Mode::LongLarge));
}

#[test]
fn long_mode_five_levels() {
    let none =
        |_: &KvmReport| (!has_five_levels()).then_some("this processor has no 5-level tables");
    everywhere_but(none, &[false], |matrix| matrix.cases(Mode::Long5));
}

/// CPUID leaf 7, ECX: LA57.
fn has_five_levels() -> bool {
    Kvm::new().is_ok_and(|kvm| {
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        cpuid.is_ok_and(|cpuid| {
            cpuid
                .as_slice()
                .iter()
                .any(|leaf| leaf.function == 7 && leaf.index == 0 && leaf.ecx & (1 << 16) != 0)
        })
    })
}

/// The pages of KVM's clock and of steal time, missing when KVM is told of them
/// and when it writes them: that is no exit, the userfaultfd brings them, and the
/// guest finds them written.
#[test]
fn pages_of_kvms_own() {
    const CLOCK: u64 = 0x14_0000;
    const STEAL: u64 = 0x14_1000;
    const END_OF_INTERRUPT: u64 = 0x14_2000;
    for mechanism in BOTH {
        let Some(mut machine) = Machine::new(mechanism, true) else { continue };
        let mut setup = Setup::new(&machine, Mode::Long, 3);
        setup.msrs = vec![
            (0x4b56_4d01, CLOCK | 1),
            (0x4b56_4d03, STEAL | 1),
            (0x4b56_4d04, END_OF_INTERRUPT | 1),
        ];
        // mov eax,[rbx+24]; mov ecx,[rsi]; mov edx,[rdi]
        (setup.regs.rbx, setup.regs.rsi, setup.regs.rdi) = (CLOCK, STEAL, END_OF_INTERRUPT);
        setup.code(b"\x8b\x43\x18\x8b\x0e\x8b\x17");
        let (outcome, came) = machine.run(&setup, &BTreeSet::new()).expect("an end");
        println!("{came:x?}");
        assert!(came.served.contains(&CLOCK) && came.served.contains(&STEAL), "{came:x?}");
        // The clock's factor from cycles to nanoseconds, as the guest read it.
        assert_ne!(outcome.regs.rax, 0, "{came:x?}");
        assert!(came.stats.fallbacks == 0, "{came:x?}");
    }
}

/// Says that it brings what it does not.
struct Liar {
    /// Whether it says that it is there already.
    there: bool,
}

impl PageInstaller for Liar {
    fn is_present(&self, _: Hva) -> bool {
        self.there
    }

    fn is_complete(&self) -> bool {
        false
    }

    fn resolve(&mut self, _: Hva) -> Resolution {
        if self.there { Resolution::Present } else { Resolution::Installed }
    }
}

/// The same fault for ever ends in an error, and in fallbacks before.
#[test]
fn a_page_that_never_comes_is_an_error() {
    let Ok(kvm) = Kvm::new() else { return vmpager_testing::skipped("no KVM") };
    for there in [false, true] {
        let vm = Arc::new(kvm.create_vm().expect("a VM"));
        let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
        let mapping = Arc::new(Mapping::inaccessible(offset(PAGE)).expect("a page"));
        // Where a vCPU starts.
        let slot = GpaRange { gpa: 0xffff_f000, offset: 0, len: PAGE };
        let memory = ExitMemory::new(Mechanism::View, &vm, mapping, vec![slot]).expect("a view");
        let exits = ExitDelivery::new(&kvm, &mut vcpu, Arc::new(memory), Liar { there });
        let mut exits = exits.expect("a vCPU with CPUID");
        machine::complete(&mut vcpu);
        let (mut again, mut fallbacks) = (0, 0);
        let error = loop {
            match exits.after_fault(&vcpu, Fault::Somewhere) {
                Ok(Delivered::Resumed) if fallbacks == 0 => again += 1,
                Ok(Delivered::FallBack) => fallbacks += 1,
                Ok(other) => panic!("{other:?} after {again}, {fallbacks}"),
                Err(error) => break error,
            }
            assert!(again + fallbacks < 10_000, "a spin");
        };
        println!("entered again {again} times, {fallbacks} fallbacks: {error}");
        assert!(matches!(error, ExitError::Stuck { rip: 0xfff0 }), "{error}");
        assert!(again > 0 && fallbacks > 0);
    }
}

/// Some KVMs only run 64-bit ring 3.
fn only_ring_3(kvm: &KvmReport) -> Option<&'static str> {
    kvm.ring0_emulated().then_some("this KVM emulates ring 0")
}

#[test]
fn long_mode_events_and_ring_0() {
    everywhere_but(only_ring_3, &[false, true], |matrix| {
        matrix.programs(Mode::Long, 3, programs::LONG_EVENTS);
        matrix.programs(Mode::Long, 0, programs::RING_0);
    });
}

#[test]
fn compatibility_mode() {
    everywhere_but(only_ring_3, &[false], |matrix| {
        matrix.programs(Mode::Compatibility, 3, programs::PROTECTED);
        matrix.programs(Mode::Compatibility, 3, programs::PROTECTED_EVENTS);
    });
}

/// 32-bit code.
fn protected(mode: Mode) {
    everywhere_but(only_ring_3, &[false], |matrix| matrix.programs(mode, 3, programs::PROTECTED));
}

#[test]
fn protected_mode_three_levels() {
    protected(Mode::Pae);
}

#[test]
fn protected_mode_two_levels() {
    protected(Mode::Paged32);
}

#[test]
fn protected_mode_without_paging() {
    protected(Mode::Flat);
}

#[test]
fn events_in_protected_mode() {
    everywhere_but(only_ring_3, &[false], |matrix| {
        for mode in [Mode::Pae, Mode::Paged32, Mode::Flat] {
            matrix.programs(mode, 3, programs::PROTECTED_EVENTS);
        }
    });
}

#[test]
fn real_mode() {
    everywhere_but(only_ring_3, &[false], |matrix| matrix.programs(Mode::Real, 0, programs::REAL));
}
