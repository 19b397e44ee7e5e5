//! A vCPU: enters the guest until its user, or a kick, has it stop.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmpager_kvm::apf::{ApfStats, AsyncFaults, Caller, Policy, Told};
use vmpager_kvm::exit::{Delivered, ExitDelivery, ExitMemory, ExitStats, Fault};
use vmpager_kvm::private::PrivateMemory;

use super::kick::Kick;
use super::private::Conversions;
use super::refused;
use super::state::{Msr, StateScope, VcpuState, is_async_pf};
use crate::bringer::Bringer;
use crate::error::VmError;

/// A vCPU, which belongs to whoever runs it.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(super) id: u64,
    pub(super) fd: VcpuFd,
    kick: Arc<Kick>,
    /// Brings missing pages, if they are exits.
    exits: Option<Box<ExitDelivery<Bringer>>>,
    /// Tells the guest of those that take long, if vmpager plays that device.
    async_faults: Option<Box<AsyncFaults>>,
    /// Converts pages, if they can be private.
    private: Option<Conversions>,
}

/// What comes of one exit.
#[derive(Debug)]
pub(crate) enum Answer<S> {
    /// It was dealt with: back into the guest.
    GoOn,
    /// No further.
    Stop(S),
    /// A guest that is well does not do this.
    Unexpected(String),
}

/// Why a vCPU stopped.
#[derive(Debug)]
pub(crate) enum Stopped<S> {
    /// By a kick. Its last exit is complete.
    Kicked,
    /// By an [`Answer::Stop`]. The instruction that exited is completed by the
    /// next entry only.
    Answered(S),
}

impl Vcpu {
    pub(super) fn new(
        id: u64,
        fd: VcpuFd,
        private: Option<Arc<PrivateMemory>>,
    ) -> Result<Self, VmError> {
        let kick = Kick::new(&fd)
            .map_err(|error| VmError::Kvm { what: "share a vCPU's page of control", error })?;
        let private = private.map(Conversions::new);
        Ok(Self { id, fd, kick: Arc::new(kick), exits: None, async_faults: None, private })
    }

    /// Has its missing pages be exits of its own, brought by `bringer`.
    pub(super) fn deliver_by_exits(
        &mut self,
        kvm: &Kvm,
        memory: Arc<ExitMemory>,
        bringer: Bringer,
    ) -> Result<(), VmError> {
        let exits = ExitDelivery::new(kvm, &mut self.fd, memory, bringer)?;
        self.exits = Some(Box::new(exits));
        Ok(())
    }

    /// Plays its device for asynchronous page faults, if its missing pages are exits.
    pub(super) fn tell_of_faults(
        &mut self,
        vm: Arc<VmFd>,
        policy: Arc<dyn Policy>,
    ) -> Result<(), VmError> {
        let Some(exits) = &self.exits else { return Ok(()) };
        let kick = self.kick.clone();
        let caller = Arc::new(Caller::new(move || kick.call()));
        let device = AsyncFaults::new(vm, (self.id, &self.fd), exits, caller, policy)?;
        self.async_faults = Some(Box::new(device));
        Ok(())
    }

    /// Loads the state of the device that vmpager plays.
    pub(super) fn load_async_faults(&mut self, state: &VcpuState) -> Result<(), VmError> {
        let Some(device) = &mut self.async_faults else { return Ok(()) };
        for msr in state.msrs.iter().filter(|msr| is_async_pf(msr.index)) {
            device.load(&self.fd, msr.index, msr.value)?;
        }
        Ok(())
    }

    /// What the device that vmpager plays has done, if there is one.
    pub(crate) fn async_fault_stats(&self) -> Option<ApfStats> {
        self.async_faults.as_ref().map(|device| device.stats())
    }

    /// Tells exit delivery, if there is one, what will be missing.
    pub(super) fn foretell(&mut self, pages: Vec<u64>) {
        if let Some(exits) = &mut self.exits {
            exits.foretell(&mut self.fd, pages);
        }
    }

    /// What exit delivery has done, if there is one.
    pub(crate) fn exit_stats(&self) -> Option<ExitStats> {
        self.exits.as_ref().map(|exits| exits.stats())
    }

    /// What stops it from another thread.
    pub(crate) fn kick(&self) -> &Arc<Kick> {
        &self.kick
    }

    /// Runs the guest, and has `on_exit` deal with what KVM cannot.
    ///
    /// # Errors
    ///
    /// [`VmError::Exit`] if the guest does what it should not, or KVM cannot go
    /// on.
    pub(crate) fn run<S>(
        &mut self,
        mut on_exit: impl FnMut(VcpuExit<'_>) -> Answer<S>,
    ) -> Result<Stopped<S>, VmError> {
        let kick = self.kick.clone();
        let _inside = kick.enter();
        loop {
            if let (Some(device), Some(exits)) = (&mut self.async_faults, &mut self.exits) {
                // It answers whoever called, wherever the vCPU was then: no need to come
                // out once more for that.
                kick.came();
                device.before_entry(&self.fd, exits)?;
            }
            let mut ran = self.fd.run();
            if let Some(private) = &mut self.private
                && private.take(&mut ran)?
            {
                continue;
            }
            let fault = Fault::of(&ran).filter(|_| self.exits.is_some());
            let exit = match (fault, ran) {
                (Some(fault), _) => match self.bring(fault, &mut on_exit)? {
                    Answer::GoOn => continue,
                    Answer::Stop(why) => return Ok(Stopped::Answered(why)),
                    Answer::Unexpected(exit) => exit,
                },
                (None, Ok(mut exit)) => {
                    if self.async_faults.as_mut().is_some_and(|device| device.on_exit(&mut exit)) {
                        continue;
                    }
                    match on_exit(exit) {
                        Answer::GoOn => continue,
                        Answer::Stop(why) => return Ok(Stopped::Answered(why)),
                        Answer::Unexpected(exit) => exit,
                    }
                }
                // KVM completes the last exit before it looks at the kick.
                (None, Err(e)) if is_interrupted(e) => {
                    kick.came();
                    if kick.is_stopped() {
                        self.leave_park()?;
                        return Ok(Stopped::Kicked);
                    }
                    continue;
                }
                (None, Err(e)) => failed(e),
            };
            return Err(self.unexpected(exit));
        }
    }

    /// Brings the page that stopped the vCPU.
    fn bring<S>(
        &mut self,
        fault: Fault,
        on_exit: &mut impl FnMut(VcpuExit<'_>) -> Answer<S>,
    ) -> Result<Answer<S>, VmError> {
        let Some(exits) = &mut self.exits else { return Ok(Answer::GoOn) };
        if let Some(device) = &mut self.async_faults {
            device.ran(&self.fd, exits)?;
        }
        let mut delivered = exits.after_fault(&self.fd, fault)?;
        let mut may_tell = true;
        loop {
            return match delivered {
                Delivered::Resumed => Ok(Answer::GoOn),
                Delivered::Waiting(gpa) => {
                    let since = Instant::now();
                    if let Some(device) = self.async_faults.as_mut().filter(|_| may_tell) {
                        match device.on_wait(&mut self.fd, exits, gpa)? {
                            Told::Nobody => {}
                            Told::Guest => {
                                // The guest goes on without a pause: let whoever brings
                                // the page begin, should it share this CPU.
                                thread::yield_now();
                                return Ok(Answer::GoOn);
                            }
                            Told::Parked | Told::Came => return Ok(Answer::GoOn),
                        }
                    }
                    // Once for each fault.
                    may_tell = false;
                    if let Some(hva) = exits.memory().hva(gpa)
                        && exits.installer().wait(hva, since + LOOK)
                    {
                        if let Some(device) = &mut self.async_faults {
                            device.waited(since.elapsed());
                        }
                        delivered = exits.ask_again(&self.fd, gpa)?;
                        continue;
                    }
                    // A kick is looked for on the way into the guest.
                    Ok(Answer::GoOn)
                }
                Delivered::Poisoned(gpa) => Err(VmError::PagePoisoned { gpa }),
                Delivered::NotOurs => Ok(Answer::Unexpected(format!("{fault:?}"))),
                Delivered::FallBack => {
                    let kick = &self.kick;
                    let answer = exits.fall_back(
                        &mut self.fd,
                        || kick.interrupt(),
                        |exit| match exit {
                            Ok(exit) => on_exit(exit),
                            Err(e) if is_interrupted(e) => Answer::GoOn,
                            Err(e) => Answer::Unexpected(failed(e)),
                        },
                    );
                    Ok(answer?)
                }
            };
        }
    }

    fn leave_park(&mut self) -> Result<(), VmError> {
        if let (Some(device), Some(exits)) = (&mut self.async_faults, &mut self.exits) {
            device.leave_park(&self.fd, exits)?;
        }
        Ok(())
    }

    /// Takes its state, which is that after its last instruction.
    pub(super) fn save(&mut self, scope: &StateScope) -> Result<VcpuState, VmError> {
        self.complete()?;
        let mut state = VcpuState::save(&self.fd, scope)?;
        if let Some(device) = &self.async_faults {
            // What KVM has of them is not the guest's.
            state.msrs.retain(|msr| !is_async_pf(msr.index));
            state.msrs.extend(device.save().map(|(index, value)| Msr { index, value }));
        }
        Ok(state)
    }

    /// Completes the instruction of the last exit, and executes no other.
    fn complete(&mut self) -> Result<(), VmError> {
        self.kick.stop();
        let entered = self.run(|exit| Answer::<()>::Unexpected(format!("{exit:?}")));
        self.kick.clear();
        entered.map(drop)
    }

    pub(crate) fn unexpected(&mut self, mut exit: String) -> VmError {
        let run = self.fd.get_kvm_run();
        if run.exit_reason == KVM_EXIT_INTERNAL_ERROR {
            // SAFETY: the exit reason says which member of the union KVM filled.
            let why = unsafe { run.__bindgen_anon_1.internal.suberror };
            exit.push_str(if why == KVM_INTERNAL_ERROR_EMULATION {
                " (an instruction that KVM cannot emulate)"
            } else {
                " (of KVM's own)"
            });
        }
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        VmError::Exit { vcpu: self.id, exit, rip }
    }

    /// Sets what the vCPU starts with.
    pub(super) fn set_registers(
        &self,
        regs: &kvm_bindings::kvm_regs,
        sregs: &kvm_bindings::kvm_sregs,
    ) -> Result<(), VmError> {
        self.fd.set_sregs(sregs).map_err(refused("set system registers"))?;
        self.fd.set_regs(regs).map_err(refused("set registers"))
    }
}

/// The longest time for which a vCPU that waits for a page looks at nothing
/// else.
const LOOK: Duration = Duration::from_millis(20);

fn failed(error: kvm_ioctls::Error) -> String {
    format!("KVM_RUN: {}", io::Error::from(error))
}

/// A signal, or a request to try again.
pub(super) fn is_interrupted(error: kvm_ioctls::Error) -> bool {
    matches!(io::Error::from(error).kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
