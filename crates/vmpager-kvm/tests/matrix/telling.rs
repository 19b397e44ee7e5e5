//! A guest that is told of missing pages, and whose kernel is the test: its handlers
//! do nothing but leave the guest, so that the test sees what it was told, and does
//! what a kernel would, one step at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msi, kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmpager_core::apf::{Always, Refusal};
use vmpager_kvm::apf::{
    ApfStats, AsyncFaults, CPUID_FEATURES, Caller, Features, Told, allow_payloads, take_registers,
};
use vmpager_kvm::exit::{Delivered, ExitDelivery, ExitMemory, Fault, GpaRange, Mechanism};

use super::machine::complete;
use super::modes::{self, Mode, on_event};
use super::slow::{Own, Pages, Server};
use super::{END, FLAGS, INTERRUPTS, MEMORY, PAGE, Setup, cases, offset};

/// The area that the guest shares with its device, and another one.
pub(crate) const AREA: u64 = 0x14_0040;
pub(crate) const OTHER_AREA: u64 = 0x15_0080;

/// Registers, and what turns the device on (`Documentation/virt/kvm/x86/msr.rst`).
const ENABLE: u32 = 0x4b56_4d02;
const INTERRUPT: u32 = 0x4b56_4d06;
const ACKNOWLEDGE: u32 = 0x4b56_4d07;
const ON: u64 = 1 | 1 << 3;
/// Of the local APIC, whose registers are MSRs.
const APIC_BASE_X2APIC: u64 = 1 << 10;
const END_OF_INTERRUPT: u32 = 0x80b;
const SPURIOUS: u32 = 0x80f;
const SPURIOUS_ENABLED: u64 = 0x1ff;

const PAGE_FAULT: u64 = 14;
const VECTOR: u8 = 0xf3;
/// An interrupt that a task of the guest raises, and an exception; both change to a
/// stack of their own.
const CALL: u64 = 0x80;
const UNDEFINED: u64 = 6;

/// Kernel code: `out PORT, al`, and before that `wrmsr` for the last.
const HANDLERS: u64 = 0x12_0000;
const TOLD_PORT: u16 = 0xe1;
const READY_PORT: u16 = 0xe2;
const EVENT_PORT: u16 = 0xe3;
const MSR_PORT: u16 = 0xe4;
const RESET_PORT: u16 = 0xe5;
const TOLD_AT: u64 = HANDLERS;
const READY_AT: u64 = HANDLERS + 0x10;
const EVENT_AT: u64 = HANDLERS + 0x20;
const WRMSR_AT: u64 = HANDLERS + 0x30;

/// Code beside that which reads a word.
const OTHER_CODE: u64 = cases::CODE + 0x80;

/// What tasks say, and hear, by strings.
pub(crate) const STRING_PORT: u16 = 0xe7;
pub(crate) const INPUT: u8 = 0x5a;

/// Where a processor starts after INIT.
const RESET_PAGE: u64 = 0xffff_f000;

/// More entries than any step here takes.
const MOST_ENTRIES: u32 = 1000;

/// A task of the guest, to be gone on with.
#[derive(Clone, Copy)]
pub(crate) struct Task {
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl Task {
    /// What it reads.
    pub(crate) fn reads(&self) -> u64 {
        self.regs.rbx
    }
}

/// What stopped the guest.
pub(crate) enum Step {
    /// The task's end, and what it has read.
    End(u64),
    /// The guest is told that a page is missing, by that token.
    Told(u32, Task),
    /// By this word, that one has come.
    Ready(u32, Task),
    /// The handler of a task's own event.
    Event,
    /// The vCPU is parked.
    Parked,
    /// Its thread has to wait.
    Waits,
    /// It starts anew.
    Reset,
}

impl Step {
    pub(crate) fn told(self) -> (u32, Task) {
        match self {
            Self::Told(token, task) => (token, task),
            other => panic!("{} and not told", other.name()),
        }
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Self::End(read) => format!("ended with {read:#x}"),
            Self::Told(token, _) => format!("told of {token:#x}"),
            Self::Ready(word, _) => format!("ready {word:#x}"),
            Self::Event => "an event".into(),
            Self::Parked => "parked".into(),
            Self::Waits => "waits".into(),
            Self::Reset => "reset".into(),
        }
    }
}

/// A VM with a guest, whose kernel is the test.
pub(crate) struct World {
    device: AsyncFaults,
    exits: ExitDelivery<Own>,
    vcpu: VcpuFd,
    vm: Arc<VmFd>,
    // After the VM, which uses it.
    pub(crate) pages: Arc<Pages>,
    user: Task,
    kernel: kvm_sregs,
    area: u64,
    /// What tasks have said.
    pub(crate) said: Vec<u8>,
    calls: Arc<AtomicU64>,
    _server: Server,
}

impl World {
    /// A guest that has turned its device on, with these pages slow. None, and said so,
    /// where there is no such thing.
    pub(crate) fn new(mechanism: Mechanism, slow: &[u64]) -> Option<Self> {
        let mut world = Self::off(mechanism, slow)?;
        world.turn_on(AREA);
        Some(world)
    }

    fn off(mechanism: Mechanism, slow: &[u64]) -> Option<Self> {
        let skip = |why: String| {
            vmpager_testing::skipped(&why);
            None
        };
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => return skip(format!("no KVM ({error})")),
        };
        let kind = match mechanism.vm_type(&kvm) {
            Ok(kind) => kind,
            Err(error) => return skip(error.to_string()),
        };
        let vm = Arc::new(kvm.create_vm_with_type(kind).expect("a VM"));
        if let Err(error) = allow_payloads(&vm).and_then(|()| take_registers(&vm)) {
            return skip(error.to_string());
        }
        vm.create_irq_chip().expect("interrupt controllers");
        vm.create_pit2(kvm_pit_config::default()).expect("a timer");
        let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
        for leaf in cpuid.as_mut_slice().iter_mut().filter(|leaf| leaf.function == CPUID_FEATURES) {
            leaf.eax = Features::offered(leaf.eax);
        }
        vcpu.set_cpuid2(&cpuid).expect("what KVM offers");

        let first = vcpu.get_sregs().expect("system registers");
        let (setup, kernel) = guest(&first, slow);
        let pages = match Pages::new(setup.image.to_vec(), slow) {
            Ok(pages) => pages,
            Err(error) => return skip(error),
        };
        let server = pages.serve();
        let memory = memory(mechanism, &vm, &pages);
        let exits = ExitDelivery::new(&kvm, &mut vcpu, memory, Own(pages.clone()));
        let exits = exits.expect("a vCPU with CPUID");
        // Nothing comes while the vCPU is in the guest: it looks before it enters.
        let calls = Arc::new(AtomicU64::new(0));
        let counted = calls.clone();
        let caller = Arc::new(Caller::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        }));
        let device = AsyncFaults::new(vm.clone(), (0, &vcpu), &exits, caller, Arc::new(Always));
        let device = device.expect("a device");
        let user = Task { regs: setup.regs, sregs: setup.sregs };
        let said = Vec::new();
        let mut world = Self {
            device,
            exits,
            vcpu,
            vm,
            pages,
            user,
            kernel,
            area: AREA,
            said,
            calls,
            _server: server,
        };
        world.turn_on_local_apic();
        Some(world)
    }

    /// As after INIT, by a kernel that starts.
    pub(crate) fn turn_on_local_apic(&mut self) {
        self.vcpu.set_sregs(&self.user.sregs).expect("system registers");
        let enabled =
            kvm_msr_entry { index: SPURIOUS, data: SPURIOUS_ENABLED, ..Default::default() };
        let set = self.vcpu.set_msrs(&Msrs::from_entries(&[enabled]).expect("one"));
        assert_eq!(set.expect("an MSR"), 1, "a local APIC whose registers are MSRs");
    }

    pub(crate) fn is_by(&self, mechanism: Mechanism) -> bool {
        self.exits.memory().mechanism() == mechanism
    }

    /// How often the vCPU was called out of the guest.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub(crate) fn stats(&self) -> ApfStats {
        self.device.stats()
    }

    pub(crate) fn refused(&self, why: Refusal) -> u64 {
        self.stats().counts.refused[why as usize]
    }

    /// A task that reads a word, with interrupts on.
    pub(crate) fn read(&mut self, gpa: u64) -> Step {
        self.read_with(gpa, |_| ())
    }

    /// The same, with a change of where it starts.
    pub(crate) fn read_with(&mut self, gpa: u64, change: impl FnOnce(&mut kvm_regs)) -> Step {
        let mut task = self.user;
        task.regs.rbx = gpa;
        change(&mut task.regs);
        self.go_on(&task)
    }

    /// A task of this code.
    pub(crate) fn execute(&mut self, code: &[u8], change: impl FnOnce(&mut kvm_regs)) -> Step {
        self.pages.memory.write(offset(OTHER_CODE), &[code, &super::END_CODE].concat());
        let mut task = self.user;
        task.regs.rip = OTHER_CODE;
        change(&mut task.regs);
        self.go_on(&task)
    }

    /// The kernel reads a word, with interrupts on.
    pub(crate) fn read_in_kernel(&mut self, gpa: u64) -> Step {
        let mut task = self.in_kernel(cases::CODE);
        task.regs.rbx = gpa;
        task.regs.rflags |= INTERRUPTS;
        self.go_on(&task)
    }

    fn in_kernel(&self, rip: u64) -> Task {
        let regs = kvm_regs { rip, rsp: modes::RING_0_STACK, rflags: 2, ..Default::default() };
        Task { regs, sregs: self.kernel }
    }

    /// The guest's kernel goes on with a task.
    pub(crate) fn go_on(&mut self, task: &Task) -> Step {
        self.device.leave_park(&self.vcpu, &mut self.exits).expect("no park");
        self.vcpu.set_sregs(&task.sregs).expect("system registers");
        self.vcpu.set_regs(&task.regs).expect("registers");
        self.run()
    }

    /// Lets the vCPU run on.
    pub(crate) fn run(&mut self) -> Step {
        for _ in 0..MOST_ENTRIES {
            self.device.before_entry(&self.vcpu, &mut self.exits).expect("an entry");
            let mut ran = self.vcpu.run();
            if let Some(fault) = Fault::of(&ran) {
                if let Some(step) = self.fault(fault) {
                    return step;
                }
                continue;
            }
            if ran.as_mut().is_ok_and(|exit| self.device.on_exit(exit)) {
                continue;
            }
            let port = match &mut ran {
                Ok(VcpuExit::IoOut(STRING_PORT, bytes)) => {
                    self.said.extend_from_slice(bytes);
                    continue;
                }
                Ok(VcpuExit::IoIn(STRING_PORT, bytes)) => {
                    bytes.fill(INPUT);
                    continue;
                }
                Ok(VcpuExit::IoOut(port, _)) => *port,
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    panic!("{exit} at {:x?}", self.vcpu.get_regs());
                }
                Err(error) => match std::io::Error::from(*error).kind() {
                    std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock => continue,
                    _ => panic!("KVM_RUN: {error}"),
                },
            };
            return self.left(port);
        }
        panic!("no end: {:x?}", self.vcpu.get_regs());
    }

    fn fault(&mut self, fault: Fault) -> Option<Step> {
        self.device.ran(&self.vcpu, &mut self.exits).expect("no park");
        match self.exits.after_fault(&self.vcpu, fault).expect("a page") {
            Delivered::Resumed => None,
            Delivered::Waiting(gpa) => {
                let told = self.device.on_wait(&mut self.vcpu, &mut self.exits, gpa);
                match told.expect("an answer") {
                    Told::Guest | Told::Came => None,
                    Told::Parked => Some(Step::Parked),
                    Told::Nobody => Some(Step::Waits),
                }
            }
            other => panic!("{other:?} after {fault:?}"),
        }
    }

    /// What an `out` means.
    fn left(&mut self, port: u16) -> Step {
        complete(&mut self.vcpu);
        let regs = self.vcpu.get_regs().expect("registers");
        match port {
            TOLD_PORT => {
                let token = self.vcpu.get_sregs().expect("system registers").cr2;
                let error = self.pages.memory.read_u64(offset(regs.rsp));
                assert_eq!(
                    (error, self.word(self.area)),
                    (0, 1),
                    "a fault that it was not told of"
                );
                self.set_word(self.area, 0);
                let task = self.interrupted(&regs, regs.rsp + 8);
                Step::Told(u32::try_from(token).expect("a token"), task)
            }
            READY_PORT => Step::Ready(self.word(self.area + 4), self.interrupted(&regs, regs.rsp)),
            EVENT_PORT => Step::Event,
            RESET_PORT => Step::Reset,
            MSR_PORT | END => Step::End(regs.rax),
            other => panic!("port {other:#x} at {regs:x?}"),
        }
    }

    /// The task that a handler has interrupted.
    fn interrupted(&self, regs: &kvm_regs, frame: u64) -> Task {
        let word = |n: usize| self.pages.memory.read_u64(offset(frame) + 8 * n);
        let regs = kvm_regs { rip: word(0), rflags: word(2), rsp: word(3), ..*regs };
        Task { regs, sregs: self.user.sregs }
    }

    fn word(&self, gpa: u64) -> u32 {
        let mut bytes = [0; 4];
        self.pages.memory.read(offset(gpa), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_word(&self, gpa: u64, value: u32) {
        self.pages.memory.write(offset(gpa), &value.to_le_bytes());
    }

    /// The guest's kernel writes to a register.
    fn write_msr(&mut self, index: u32, value: u64) {
        let mut task = self.in_kernel(WRMSR_AT);
        task.regs.rcx = index.into();
        (task.regs.rax, task.regs.rdx) = (value & 0xffff_ffff, value >> 32);
        let step = self.go_on(&task);
        assert!(matches!(step, Step::End(_)), "after wrmsr: {}", step.name());
    }

    /// The guest's kernel takes the word, acknowledges it, and ends the interrupt.
    pub(crate) fn take(&mut self) {
        self.set_word(self.area + 4, 0);
        self.write_msr(ACKNOWLEDGE, 1);
        self.end_interrupt();
    }

    /// The guest's kernel ends an interrupt, and does nothing else about it.
    pub(crate) fn end_interrupt(&mut self) {
        self.write_msr(END_OF_INTERRUPT, 0);
    }

    pub(crate) fn turn_on(&mut self, area: u64) {
        self.area = area;
        self.write_msr(INTERRUPT, VECTOR.into());
        self.write_msr(ENABLE, area | ON);
    }

    pub(crate) fn turn_off(&mut self) {
        self.write_msr(ENABLE, 0);
    }

    /// As by another vCPU's local APIC.
    pub(crate) fn send_init(&self) {
        const INIT: u32 = 5 << 8;
        let msi = kvm_msi { address_lo: 0xfee0_0000, data: INIT, ..Default::default() };
        assert_eq!(self.vm.signal_msi(msi).expect("an INIT"), 1);
    }
}

/// A guest's memory and what its tasks start with, and its kernel's system registers.
fn guest(first: &kvm_sregs, slow: &[u64]) -> (Setup, kvm_sregs) {
    let regs = kvm_regs {
        rip: cases::CODE,
        rsp: cases::STACK,
        rflags: FLAGS | INTERRUPTS,
        ..Default::default()
    };
    let sregs = kvm_sregs { apic_base: first.apic_base | APIC_BASE_X2APIC, ..*first };
    let image = Arc::new(vec![0; offset(MEMORY + PAGE)]);
    let mut setup = Setup { regs, sregs, msrs: Vec::new(), has_avx: false, image };
    modes::enter(&mut setup, Mode::Long, 0);
    let kernel = setup.sregs;
    modes::enter(&mut setup, Mode::Long, 3);
    on_event(&mut setup, Mode::Long, PAGE_FAULT, TOLD_AT, 0);
    on_event(&mut setup, Mode::Long, VECTOR.into(), READY_AT, 0);
    on_event(&mut setup, Mode::Long, CALL, EVENT_AT, 1);
    on_event(&mut setup, Mode::Long, UNDEFINED, EVENT_AT, 1);
    let out = |port: u16| [0xe6, port.to_le_bytes()[0]];
    setup.put(TOLD_AT, &out(TOLD_PORT));
    setup.put(READY_AT, &out(READY_PORT));
    setup.put(EVENT_AT, &out(EVENT_PORT));
    setup.put(WRMSR_AT, &[[0x0f, 0x30], out(MSR_PORT)].concat());
    // For ever, so that it may be entered again.
    setup.put(MEMORY + 0xff0, &[out(RESET_PORT), [0xeb, 0xfc]].concat());
    // mov rax,[rbx]
    setup.code(b"\x48\x8b\x03");
    slow.iter().for_each(|page| setup.word(*page, content(*page)));
    (setup, kernel)
}

/// The first word of a slow page.
pub(crate) fn content(page: u64) -> u64 {
    page ^ 0x5107_5107_0000_0000
}

fn memory(mechanism: Mechanism, vm: &Arc<VmFd>, pages: &Arc<Pages>) -> Arc<ExitMemory> {
    let slots = [
        GpaRange { gpa: 0, offset: 0, len: MEMORY },
        GpaRange { gpa: RESET_PAGE, offset: MEMORY, len: PAGE },
    ];
    for (slot, range) in (0..).zip(&slots) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: range.gpa,
            memory_size: range.len,
            userspace_addr: pages.memory.hva() + range.offset,
            ..Default::default()
        };
        // SAFETY: the mapping outlives the VM, and is accessed by volatile copies
        // only.
        unsafe { vm.set_user_memory_region(region) }.expect("a memslot");
    }
    let memory = ExitMemory::new(mechanism, vm, pages.memory.clone(), slots.into());
    Arc::new(memory.expect("memory whose missing pages exit"))
}
