//! The built-in guest on a machine: its start, its rounds, its state.

use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use kvm_ioctls::VcpuExit;
use vmpager_kvm::ahead::MappedAhead;
use vmpager_kvm::exit::ExitStats;
use vmpager_kvm::private::PrivateMemory;
use vmpager_kvm::probe;
use vmpager_sys::memory::Mapping;

use super::machine::{Machine, Parts};
use super::parameters::{Gate, Parameters};
use super::private::hypercalls_exit;
use super::program::{CONVERT_PORT, EVENT_DONE, EVENT_PORT, EVENT_STARTED, gate_offset};
use super::refused;
use super::registers::{INTERRUPTS, IOPL_3, initial_regs, initial_sregs, set_gate};
use super::state::KvmState;
use super::vcpu::{Answer, Stopped, Vcpu};
use crate::PAGE_SIZE;
use crate::device::to_usize;
use crate::error::VmError;
use crate::layout::Layout;
use crate::memory::GuestMemory;
use crate::threads::vcpu_thread;

/// When a round's first and last events came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    pub(crate) started: Instant,
    pub(crate) done: Instant,
}

/// A machine that runs the built-in guest.
#[derive(Debug)]
pub(crate) struct Builtin {
    machine: Machine,
    /// Where conversions are asked for by the port.
    device: Option<Arc<Mapping>>,
    gate: Gate,
}

impl Builtin {
    /// The guest as saved, or ready for its first instruction.
    pub(crate) fn new(
        parts: &Parts<'_>,
        layout: &Layout,
        saved: Option<&KvmState>,
    ) -> Result<Self, VmError> {
        let mut machine = Machine::new(parts)?;
        match saved {
            Some(state) => machine.load(state)?,
            None => {
                machine.vcpus.iter().try_for_each(|vcpu| reset(vcpu, layout, parts.irqchip))?;
            }
        }
        let gate = Gate::of(&machine);
        if machine.private.is_some() {
            let address = layout.code * PAGE_SIZE + gate_offset(machine.is_amd);
            machine.vcpus.iter().try_for_each(|vcpu| set_gate(&vcpu.fd, address))?;
        }
        Ok(Self { machine, device: parts.device.map(|(_, mapping)| mapping.clone()), gate })
    }

    /// Which of its pages are private, if they can be.
    pub(crate) fn private(&self) -> Option<&Arc<PrivateMemory>> {
        self.machine.private.as_ref()
    }

    /// How its program asks for conversions, if not by accesses.
    pub(crate) fn gate(&self) -> Gate {
        self.gate
    }

    #[cfg(test)]
    pub(crate) fn vcpus(&mut self) -> &mut [Vcpu] {
        &mut self.machine.vcpus
    }

    /// Tells exit delivery, if there is one, what each vCPU will miss.
    pub(crate) fn foretell(&mut self, parts: Vec<Vec<u64>>) {
        for (vcpu, part) in self.machine.vcpus.iter_mut().zip(parts) {
            vcpu.foretell(part);
        }
    }

    pub(crate) fn exit_stats(&self) -> Option<ExitStats> {
        self.machine.exit_stats()
    }

    /// See [`Machine::map_ahead`].
    pub(crate) fn map_ahead(&mut self, memory: &GuestMemory) {
        self.machine.map_ahead(memory);
    }

    pub(crate) fn mapped_ahead(&self) -> Option<MappedAhead> {
        self.machine.mapped_ahead()
    }

    pub(crate) fn stage2_faults(&self) -> Option<u64> {
        self.machine.stage2_faults()
    }

    /// Runs one round of the program on every vCPU, each on a thread of its own.
    pub(crate) fn run(&mut self) -> Result<Vec<Round>, VmError> {
        let calls = Calls { private: self.machine.private.clone(), device: self.device.clone() };
        let calls = &calls;
        std::thread::scope(|scope| {
            let threads = self.machine.vcpus.iter_mut().map(|vcpu| {
                vcpu_thread(vcpu.id)
                    .spawn_scoped(scope, move || round(vcpu, calls))
                    .map_err(VmError::Thread)
            });
            let threads = threads.collect::<Result<Vec<_>, _>>()?;
            threads.into_iter().map(|t| t.join().expect("no panic in a vCPU thread")).collect()
        })
    }

    /// The state of all of it, between rounds.
    pub(crate) fn save(&mut self) -> Result<KvmState, VmError> {
        let mut state = self.machine.save()?;
        for vcpu in &mut state.vcpus {
            // kvm_pvm forgets it; other hosts' ring 3 may not do `out` without.
            vcpu.regs.rflags |= IOPL_3;
        }
        Ok(state)
    }
}

fn reset(vcpu: &Vcpu, layout: &Layout, irqchip: bool) -> Result<(), VmError> {
    let sregs = vcpu.fd.get_sregs().map_err(refused("read system registers"))?;
    let mut regs = initial_regs(layout, vcpu.id);
    if irqchip {
        regs.rflags |= INTERRUPTS;
        // All but the first would wait for others to start them.
        let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
        vcpu.fd.set_mp_state(runnable).map_err(refused("start a vCPU"))?;
    }
    vcpu.set_registers(&regs, &initial_sregs(layout, sregs))
}

impl Gate {
    fn of(machine: &Machine) -> Self {
        // Where ring 0 is emulated, so would the hypercall be.
        let emulated = probe::kvm().is_ok_and(|kvm| kvm.ring0_emulated());
        if hypercalls_exit(&machine.vm) && !emulated { Self::Hypercall } else { Self::Port }
    }
}

/// Answers conversions asked for by the port.
struct Calls {
    private: Option<Arc<PrivateMemory>>,
    device: Option<Arc<Mapping>>,
}

impl Calls {
    /// Whether there is somebody to answer a vCPU.
    fn answer(&self, vcpu: usize) -> bool {
        let (Some(private), Some(device)) = (&self.private, &self.device) else { return false };
        let answer = private.hypercall(&Parameters::load_call(device, vcpu));
        Parameters::store_answer(device, vcpu, answer);
        true
    }
}

/// One round: from the next entry to the event `done`.
fn round(vcpu: &mut Vcpu, calls: &Calls) -> Result<Round, VmError> {
    let mut started = None;
    let number = to_usize(vcpu.id);
    let stopped = vcpu.run(|exit| match (exit, started) {
        (VcpuExit::IoOut(EVENT_PORT, [EVENT_STARTED]), _) => {
            started = Some(Instant::now());
            Answer::GoOn
        }
        (VcpuExit::IoOut(EVENT_PORT, [EVENT_DONE]), Some(started)) => {
            Answer::Stop(Round { started, done: Instant::now() })
        }
        (VcpuExit::IoOut(CONVERT_PORT, _), _) if calls.answer(number) => Answer::GoOn,
        (exit, _) => Answer::Unexpected(format!("{exit:?}")),
    })?;
    match stopped {
        Stopped::Answered(round) => Ok(round),
        Stopped::Kicked => Err(vcpu.unexpected("it was stopped in a round".to_owned())),
    }
}
