//! State goes into a real VM and comes out of it again. The vCPUs never run:
//! nothing may change but what counts time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::path::Path;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmpager_sys::memory::Mapping;

use super::msrs::Msr;
use super::*;

const TSC: u32 = 0x10;
const PV_CLOCK: u32 = 0x4b56_4d01;
const WALL_CLOCK: u32 = 0x4b56_4d00;
const LSTAR: u32 = 0xc000_0082;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const MTRR_DEFAULT: u32 = 0x2ff;

/// A VM with two vCPUs and a little memory.
struct Machine {
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    scope: StateScope,
    memory: Mapping,
}

impl Machine {
    /// `None`, and said so, where there is no KVM.
    fn new(irqchip: bool) -> Option<Self> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
            return None;
        }
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let memory = Mapping::anonymous(1 << 20).unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: memory.len() as u64,
            userspace_addr: memory.hva(),
            ..Default::default()
        };
        // SAFETY: the mapping lives as long as the machine, and nothing refers to
        // its bytes.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        if irqchip {
            vm.create_irq_chip().unwrap();
            vm.create_pit2(kvm_pit_config::default()).unwrap();
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let vcpu = |id| {
            let fd = vm.create_vcpu(id).unwrap();
            fd.set_cpuid2(&cpuid).unwrap();
            fd
        };
        let vcpus = vec![vcpu(0), vcpu(1)];
        let scope = StateScope::of(&kvm, &vm, irqchip, true).unwrap();
        Some(Self { vcpus, vm, scope, memory })
    }

    fn save(&self) -> KvmState {
        let vcpus = self.vcpus.iter().map(|fd| VcpuState::save(fd, &self.scope).unwrap()).collect();
        KvmState { vcpus, machine: MachineState::save(&self.vm, &self.scope).unwrap() }
    }

    fn load(&self, state: &KvmState) -> Result<(), VmError> {
        state.load(&self.vm, &self.vcpus, &self.scope)
    }
}

fn msr(vcpu: &mut VcpuState, index: u32) -> &mut Msr {
    vcpu.msrs.iter_mut().find(|msr| msr.index == index).unwrap()
}

/// Changes something of every kind, so that no part is equal because it was
/// never loaded.
fn disturb(state: &mut KvmState) {
    for (n, vcpu) in (1..).zip(&mut state.vcpus) {
        vcpu.regs.r8 = 0x1234_5678_9abc_def0 + n;
        vcpu.regs.rip = 0x8000 + n;
        vcpu.sregs.gs.base = 0x5000 * n;
        vcpu.sregs.cr2 = 0xdead_b000 + n;
        vcpu.debugregs.db[2] = 0x4000 + n;
        // XMM7, whose bit in XSTATE_BV says that it is there; and x87's control word.
        vcpu.xsave.0[0..2].copy_from_slice(&[0x7f, 0x02]);
        vcpu.xsave.0[272..288].fill(0xa5);
        vcpu.xsave.0[512] |= 3;
        if let Some(xcr) = vcpu.xcrs.first_mut() {
            xcr.value = 3; // x87 and SSE
        }
        msr(vcpu, LSTAR).value = 0xffff_ffff_8100_0000 + n;
        msr(vcpu, KERNEL_GS_BASE).value = 0x7700 + n;
        msr(vcpu, MTRR_DEFAULT).value = 0x806;
        msr(vcpu, TSC).value = 5_000_000_000_000;
        msr(vcpu, PV_CLOCK).value = 0x1000 * n + 1;
        vcpu.events.nmi.masked = 1;
        vcpu.events.exception.nr = 13;
        if let Some(lapic) = &mut vcpu.lapic {
            lapic.0[0x80] = 0x20; // task priority
            lapic.0[0xa0] = 0x20; // processor priority, which follows from it
            lapic.0[0x320] = 0xec; // timer vector, masked
            lapic.0[0x381] = 0x10; // timer initial count
            vcpu.sregs.cr8 = 2; // the same priority, by its other name
            vcpu.mp_state = if n == 1 { KVM_MP_STATE_HALTED } else { KVM_MP_STATE_INIT_RECEIVED };
        }
    }
    state.machine.clock_ns = 7_000_000_000_000;
    if let Some(irqchip) = &mut state.machine.irqchip {
        irqchip.pic_master.imr = 0xfb;
        irqchip.pic_master.irq_base = 0x30;
        irqchip.pic_slave.imr = 0xef;
        irqchip.ioapic.id = 1;
        irqchip.ioapic.redirtbl[4] = 0x0100_0000_0001_0034; // masked
        irqchip.ioapic.redirtbl[23] = 0x0001_0037;
        irqchip.pit.channels[2].count = 0x4321;
        irqchip.pit.channels[2].mode = 3;
    }
}

/// What counts time may have gone on, by a minute at most, and not back.
fn forget_time(state: &mut KvmState, loaded: &KvmState) {
    let minute_ns = 60_000_000_000;
    let clock = loaded.machine.clock_ns;
    assert!((clock..clock + minute_ns).contains(&state.machine.clock_ns), "{state:?}");
    state.machine.clock_ns = clock;
    for (vcpu, loaded) in state.vcpus.iter_mut().zip(&loaded.vcpus) {
        let minute = u64::from(vcpu.tsc_khz) * 60_000;
        let expected = loaded.msrs.iter().find(|msr| msr.index == TSC).unwrap().value;
        let tsc = msr(vcpu, TSC);
        // kvm_pvm's guests see the host's, whatever is loaded.
        if !Path::new("/sys/module/kvm_pvm").exists() {
            assert!((expected..expected + minute).contains(&tsc.value), "{tsc:?}, not {expected}");
        }
        tsc.value = expected;
    }
}

#[track_caller]
fn assert_same(got: &KvmState, wanted: &KvmState) {
    for (got, wanted) in got.vcpus.iter().zip(&wanted.vcpus) {
        for (got, wanted) in got.msrs.iter().zip(&wanted.msrs) {
            assert_eq!(got, wanted, "MSR {:#x}", wanted.index);
        }
    }
    let text = |state| serde_json::to_string_pretty::<KvmState>(state).unwrap();
    let (got_text, wanted_text) = (text(got), text(wanted));
    for (got, wanted) in got_text.lines().zip(wanted_text.lines()) {
        assert_eq!(got, wanted);
    }
    assert_eq!(got, wanted);
}

fn goes_through_two_machines(irqchip: bool) {
    let Some(first) = Machine::new(irqchip) else { return };
    let mut state = first.save();
    assert_eq!(state.machine.irqchip.is_some(), irqchip);
    disturb(&mut state);
    // KVM fills in what follows from it (the high part of XSTATE_BV, say), once.
    first.load(&state).unwrap();
    let mut saved = first.save();
    forget_time(&mut saved, &state);
    assert_same(&saved, &state);

    let second = Machine::new(irqchip).unwrap();
    let text = serde_json::to_string(&saved).unwrap();
    second.load(&serde_json::from_str(&text).unwrap()).unwrap();
    let mut again = second.save();
    forget_time(&mut again, &saved);
    assert_same(&again, &saved);
}

#[test]
fn all_state_goes_through_two_machines_with_an_irqchip() {
    goes_through_two_machines(true);
}

#[test]
fn all_state_goes_through_two_machines_without_an_irqchip() {
    goes_through_two_machines(false);
}

#[test]
fn a_register_kvm_refuses_is_named_with_its_value() {
    let Some(machine) = Machine::new(true) else { return };
    let mut state = machine.save();
    // Not canonical.
    msr(&mut state.vcpus[1], LSTAR).value = 0x1234_0000_0000_0000;
    let error = machine.load(&state).unwrap_err().to_string();
    assert!(error.contains("0xc0000082") && error.contains("0x1234000000000000"), "{error}");
}

#[test]
fn lists_of_the_wrong_length_are_refused_by_name() {
    let Some(machine) = Machine::new(true) else { return };
    let state = machine.save();
    let refused = |change: fn(&mut VcpuState)| {
        let mut state = state.clone();
        change(&mut state.vcpus[0]);
        machine.load(&state).unwrap_err().to_string()
    };
    assert!(refused(|vcpu| vcpu.xsave.0.truncate(4095)).contains("xsave 4095"));
    let error = refused(|vcpu| {
        let xcr = registers::ExtendedControl { xcr: 0, value: 1 };
        vcpu.xcrs = vec![xcr; 17];
    });
    assert!(error.contains("xcrs 17"), "{error}");
    let error = refused(|vcpu| vcpu.cpuid = vec![vcpu.cpuid[0].clone(); 257]);
    assert!(error.contains("cpuid 257"), "{error}");
}

#[test]
fn registers_load_in_an_order_that_restores_and_requests_are_no_state() {
    let Some(machine) = Machine::new(true) else { return };
    let state = machine.save();
    let at = |index| state.vcpus[0].msrs.iter().position(|msr| msr.index == index);
    assert!(at(TSC).unwrap() < at(PV_CLOCK).unwrap());
    assert_eq!(at(WALL_CLOCK), None);
    // Nothing was asked for, so nothing was written to the guest.
    let mut bytes = vec![1; machine.memory.len()];
    machine.memory.read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0));
}
