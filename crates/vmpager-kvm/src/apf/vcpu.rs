//! The device of one vCPU, carried out.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_PAYLOAD, kvm_mp_state, kvm_msi,
    kvm_vcpu_events,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vmpager_core::apf::{
    AsyncPf, Conditions, Expectation, Features, GeneralProtection, Policy, Refusal, Register,
    Ticket, Token, Written,
};
use vmpager_core::{Hva, WatchedInstaller};

use super::local::{Apic, look, set_canary};
use super::{ApfError, ApfStats, CPUID_FEATURES, Caller, refused};
use crate::exit::{ExitDelivery, ExitMemory, State};

const PAGE_FAULT: u8 = 14;
const RFLAGS_IF: u64 = 1 << 9;
const CR0_PG: u64 = 1 << 31;
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// The guest's area, as far as it is used.
const AREA_BYTES: usize = 8;
/// In the guest's area, the word after the flags is for tokens.
const TOKEN_AT: u64 = 4;
/// `KVM_PV_REASON_PAGE_NOT_PRESENT`.
const NOT_PRESENT: u32 = 1;

/// Where MSIs for the local APIC with id 0 go; the id is in bits 12 to 19.
const MSI_ADDRESS: u32 = 0xfee0_0000;

/// When to look again whether a local APIC was turned on, which does not end in
/// userspace.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// What came of a fault that would wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The guest is told: enter it.
    Guest,
    /// The vCPU waits in KVM, interrupts welcome: enter the guest.
    Parked,
    /// The page has come: enter the guest.
    Came,
    /// The vCPU's thread has to wait.
    Nobody,
}

/// The device of one vCPU. All of it is done by the thread that runs the vCPU.
#[derive(Debug)]
pub struct AsyncFaults {
    device: AsyncPf,
    vm: Arc<VmFd>,
    memory: Arc<ExitMemory>,
    policy: Arc<dyn Policy>,
    caller: Arc<Caller>,
    flights: Vec<Flight>,
    expected: Expectation,
    park: Option<Park>,
    /// Where it was parked last, for what page.
    parked_at: Option<(Hva, u64)>,
    /// There is something to post, or may be.
    due: bool,
    /// Pages may have come for which nobody called.
    unheard: bool,
    /// KVM's copy of the vector is to be put there.
    enabled: bool,
    stats: ApfStats,
}

/// A page that a task of the guest waits for.
#[derive(Clone, Copy, Debug)]
struct Flight {
    page: Hva,
    gpa: u64,
    ticket: Ticket,
    since: Instant,
}

/// A vCPU that waits in KVM.
#[derive(Clone, Copy, Debug)]
struct Park {
    page: Hva,
    gpa: u64,
    rip: u64,
    since: Instant,
}

impl AsyncFaults {
    /// For the vCPU with this number, whose CPUID is set, in a VM whose registers
    /// were [taken](super::take_registers). `caller` watches the memory from now
    /// on.
    ///
    /// # Errors
    ///
    /// If KVM does not tell the vCPU's CPUID, or its number is 4096 or higher.
    pub fn new<I: WatchedInstaller>(
        vm: Arc<VmFd>,
        (number, vcpu): (u64, &VcpuFd),
        delivery: &ExitDelivery<I>,
        caller: Arc<Caller>,
        policy: Arc<dyn Policy>,
    ) -> Result<Self, ApfError> {
        let device = u32::try_from(number).ok().and_then(|n| AsyncPf::new(n, features(vcpu).ok()?));
        let device = device.ok_or(ApfError::Unavailable { lacks: "vCPU with that number" })?;
        delivery.installer().watch(caller.clone());
        Ok(Self {
            device,
            vm,
            memory: delivery.shared_memory().clone(),
            policy,
            caller,
            flights: Vec::new(),
            expected: Expectation::default(),
            park: None,
            parked_at: None,
            due: false,
            unheard: false,
            enabled: false,
            stats: ApfStats::default(),
        })
    }

    /// What was done so far.
    pub fn stats(&self) -> ApfStats {
        ApfStats { counts: self.device.counts(), ..self.stats }
    }

    /// The registers, as (index, value), for a saved state.
    pub fn save(&self) -> [(u32, u64); 2] {
        [Register::Interrupt, Register::Enable].map(|register| {
            // A processor without the register has the value after reset.
            (register.index(), self.device.registers().read(register).unwrap_or(0))
        })
    }

    /// Loads a register of a saved state: the vector first. Sleepers of then are
    /// woken, and will miss their pages again.
    ///
    /// # Errors
    ///
    /// [`ApfError::Msr`].
    pub fn load(&mut self, vcpu: &VcpuFd, index: u32, value: u64) -> Result<(), ApfError> {
        let Some(register) = Register::of(index).filter(|_| value != 0) else { return Ok(()) };
        self.device.set_features(features(vcpu)?);
        self.write(register, value).map(drop).map_err(|_| ApfError::Msr { index, value })
    }

    /// Answers a guest's access to one of the registers. False if it is another
    /// exit.
    pub fn on_exit(&mut self, exit: &mut VcpuExit<'_>) -> bool {
        match exit {
            VcpuExit::X86Wrmsr(write) => match Register::of(write.index) {
                Some(register) => {
                    let written = self.write(register, write.data);
                    *write.error = written.is_err().into();
                    if written == Ok(Written::Enabled) {
                        self.clear_area();
                    }
                    true
                }
                None => false,
            },
            VcpuExit::X86Rdmsr(read) => match Register::of(read.index) {
                Some(register) => {
                    let value = self.device.registers().read(register);
                    *read.error = value.is_err().into();
                    *read.data = value.unwrap_or(0);
                    true
                }
                None => false,
            },
            _ => false,
        }
    }

    /// Whatever is left there of the time before it was turned on: a word that
    /// nobody takes any more would keep everything back.
    fn clear_area(&self) {
        if let Some(area) = self.device.registers().area() {
            self.memory.write(area, &[0; AREA_BYTES]);
        }
    }

    fn write(&mut self, register: Register, value: u64) -> Result<Written, GeneralProtection> {
        let is_memory = |gpa: u64| self.memory.is_memory(gpa, AREA_BYTES);
        let written = self.device.write(register, value, is_memory)?;
        match written {
            Written::Enabled => {
                // Who slept before is woken; their pages come all the same.
                self.enabled = true;
                self.due = true;
                self.unheard = true;
            }
            Written::Acknowledged => {
                let area = self.device.registers().area();
                let word = area.and_then(|area| self.memory.read(area + TOKEN_AT));
                self.device.taken(word.map(u32::from_le_bytes));
                self.due = true;
                self.unheard = true;
            }
            Written::Disabled | Written::Nothing => {}
        }
        Ok(written)
    }

    /// Before each entry: takes the vCPU from its park, and tells the guest of
    /// pages that came.
    ///
    /// # Errors
    ///
    /// [`ApfError`]: the guest cannot go on.
    pub fn before_entry<I: WatchedInstaller>(
        &mut self,
        vcpu: &VcpuFd,
        delivery: &mut ExitDelivery<I>,
    ) -> Result<(), ApfError> {
        self.leave_park(vcpu, delivery)?;
        if std::mem::take(&mut self.enabled) {
            set_canary(vcpu)?;
        }
        if std::mem::take(&mut self.unheard) {
            self.listen();
            self.take_arrivals(vcpu, delivery)?;
        }
        if self.caller.answer() {
            self.take_arrivals(vcpu, delivery)?;
        }
        if std::mem::take(&mut self.due) && self.device.has_ready() {
            self.post(vcpu)?;
            self.listen();
        }
        Ok(())
    }

    /// Takes the vCPU from its park, if it is in one: to be done before its state
    /// is looked at.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub fn leave_park<I: WatchedInstaller>(
        &mut self,
        vcpu: &VcpuFd,
        delivery: &mut ExitDelivery<I>,
    ) -> Result<(), ApfError> {
        let Some(park) = self.park else { return Ok(()) };
        self.ran(vcpu, delivery)?;
        let state = vcpu.get_mp_state().map_err(refused("tell a vCPU's run state"))?;
        let regs = vcpu.get_regs().map_err(refused("read registers"))?;
        // Elsewhere it was woken by an interrupt, and has halted by itself.
        if state.mp_state == KVM_MP_STATE_HALTED && regs.rip == park.rip {
            set_run_state(vcpu, KVM_MP_STATE_RUNNABLE)?;
        }
        Ok(())
    }

    /// The vCPU has executed something, so that it is in no park any more: it missed a
    /// page, for one. Costs nothing, unlike [`leave_park`](Self::leave_park).
    ///
    /// # Errors
    ///
    /// If KVM refuses to let vCPUs have the page that came.
    pub fn ran<I: WatchedInstaller>(
        &mut self,
        vcpu: &VcpuFd,
        delivery: &mut ExitDelivery<I>,
    ) -> Result<(), ApfError> {
        let Some(park) = self.park.take() else { return Ok(()) };
        if delivery.installer().is_settled(park.page) {
            self.expected.learn(park.since.elapsed());
            self.parked_at = None;
            delivery.came(vcpu, park.gpa)?;
        }
        self.listen();
        Ok(())
    }

    /// Has the bell ring for all pages that are waited for. While the guest has not
    /// acknowledged a token it is told of no other, and its acknowledging ends in
    /// userspace: nobody need call for a task's page until then.
    fn listen(&self) {
        let told = self.flights.iter().filter(|_| !self.device.is_unacknowledged());
        let parked = self.park.map(|park| park.page);
        self.caller.wait_for(told.map(|flight| flight.page).chain(parked));
    }

    /// Tells the device which pages have come.
    fn take_arrivals<I: WatchedInstaller>(
        &mut self,
        vcpu: &VcpuFd,
        delivery: &mut ExitDelivery<I>,
    ) -> Result<(), ApfError> {
        let is_settled = |flight: &Flight| delivery.installer().is_settled(flight.page);
        let (came, left) = self.flights.iter().partition(|flight| is_settled(flight));
        self.flights = left;
        let came: Vec<Flight> = came;
        for flight in came {
            self.expected.learn(flight.since.elapsed());
            self.device.arrived(flight.ticket)?;
            self.due = true;
            // The task touches it as soon as it is woken.
            delivery.came(vcpu, flight.gpa)?;
        }
        self.listen();
        Ok(())
    }

    /// Tells the guest of what is ready, if it can be told.
    fn post(&mut self, vcpu: &VcpuFd) -> Result<(), ApfError> {
        let apic = self.apic(vcpu)?;
        // After an INIT there is none.
        let Some(area) = self.device.registers().area() else { return Ok(()) };
        let word = self.memory.read(area + TOKEN_AT).map(u32::from_le_bytes);
        let Some(post) = self.device.post(word, apic.on) else {
            if !apic.on {
                self.look_again();
            }
            return Ok(());
        };
        self.memory.write(area + TOKEN_AT, &post.word.to_le_bytes());
        let address_lo = MSI_ADDRESS | u32::from(apic.id) << 12;
        let msi = kvm_msi { address_lo, data: post.vector.into(), ..Default::default() };
        self.vm.signal_msi(msi).map_err(refused("raise the interrupt of a page that came"))?;
        Ok(())
    }

    /// Nobody tells when a local APIC is turned on: the device looks again.
    fn look_again(&mut self) {
        self.due = true;
        let caller = self.caller.clone();
        thread::spawn(move || {
            thread::sleep(LOOK_AGAIN);
            caller.ring();
        });
    }

    /// Deals with a fault of this vCPU on a page that is being fetched, which has
    /// just ended its `KVM_RUN`.
    ///
    /// # Errors
    ///
    /// [`ApfError`]: the guest cannot go on.
    pub fn on_wait<I: WatchedInstaller>(
        &mut self,
        vcpu: &mut VcpuFd,
        delivery: &mut ExitDelivery<I>,
        gpa: u64,
    ) -> Result<Told, ApfError> {
        let Some(page) = self.memory.hva(gpa) else { return Ok(Told::Nobody) };
        if !self.policy.goes_async(self.expected.get()) {
            self.device.refuse(Refusal::Policy);
            return Ok(Told::Nobody);
        }
        let state = delivery.state(vcpu)?;
        let conditions = self.conditions(vcpu, delivery, &state)?;
        let again = self.parked_at == Some((page, state.regs.rip)) && may_park(&conditions);
        if again && !self.device.admits(page.0, &conditions) {
            // An interrupt came, and was taken: it is the same fault still.
            return self.enter_park(vcpu, delivery, &state, (page, gpa));
        }
        match self.device.admit(page.0, &conditions) {
            Ok(ticket) => self.tell(vcpu, delivery, &state, (page, gpa), ticket),
            Err(_) if may_park(&conditions) => self.enter_park(vcpu, delivery, &state, (page, gpa)),
            Err(_) => Ok(Told::Nobody),
        }
    }

    /// The vCPU's thread has waited for a page, for that long.
    pub fn waited(&mut self, took: Duration) {
        self.expected.learn(took);
    }

    fn conditions<I: WatchedInstaller>(
        &mut self,
        vcpu: &VcpuFd,
        delivery: &mut ExitDelivery<I>,
        state: &State,
    ) -> Result<Conditions, ApfError> {
        let State { regs, sregs, events } = state;
        let mut conditions = Conditions {
            event: has_event(events),
            shadow: events.interrupt.shadow != 0,
            interrupts: regs.rflags & RFLAGS_IF != 0,
            privilege: sregs.ss.dpl,
            paging: sregs.cr0 & CR0_PG != 0,
            smm: events.smi.smm != 0,
            nested: sregs.efer & EFER_SVME != 0 || sregs.cr4 & CR4_VMXE != 0,
            local_apic: true,
            flags: Some(0),
        };
        // What costs more is asked of those only that pass so far.
        let Some(area) = self.device.registers().area() else { return Ok(conditions) };
        let registers = self.device.registers();
        if conditions.privilege != 3 && !registers.sends_always() || conditions.event {
            return Ok(conditions);
        }
        conditions.event = delivery.missed_an_event(state);
        conditions.flags = self.flags(delivery, area);
        conditions.local_apic = self.apic(vcpu)?.on;
        Ok(conditions)
    }

    /// The vCPU's local APIC. If an INIT has turned the device off, it is off from now
    /// on.
    fn apic(&mut self, vcpu: &VcpuFd) -> Result<Apic, ApfError> {
        let (apic, had_init) = look(vcpu)?;
        if had_init {
            self.stats.inits += 1;
            self.device.reset();
        }
        Ok(apic)
    }

    /// The flags word, if its page is there; else the page is asked for.
    fn flags<I: WatchedInstaller>(&self, delivery: &mut ExitDelivery<I>, area: u64) -> Option<u32> {
        let hva = self.memory.hva(area)?;
        if !delivery.installer().is_present(hva) {
            delivery.ask_for(hva);
            return None;
        }
        self.memory.read(area).map(u32::from_le_bytes)
    }

    fn tell<I: WatchedInstaller>(
        &mut self,
        vcpu: &mut VcpuFd,
        delivery: &ExitDelivery<I>,
        state: &State,
        (page, gpa): (Hva, u64),
        ticket: Ticket,
    ) -> Result<Told, ApfError> {
        self.flights.push(Flight { page, gpa, ticket, since: Instant::now() });
        self.listen();
        // From here on the bell rings when it comes; perhaps it came before.
        if delivery.installer().is_settled(page) {
            self.flights.pop();
            self.device.arrived(ticket)?;
            self.listen();
            return Ok(Told::Came);
        }
        self.parked_at = None;
        let told = self.inject(vcpu, delivery, state.events, ticket.token());
        self.device.announced(ticket, told.is_ok());
        told.map(|()| Told::Guest)
    }

    fn inject<I: WatchedInstaller>(
        &self,
        vcpu: &mut VcpuFd,
        delivery: &ExitDelivery<I>,
        mut events: kvm_vcpu_events,
        token: Token,
    ) -> Result<(), ApfError> {
        let Some(area) = self.device.registers().area() else { return Ok(()) };
        // Nothing but the exception is said to be valid, so that NMIs and SMIs that
        // have come since stay.
        events.flags = KVM_VCPUEVENT_VALID_PAYLOAD;
        events.exception.pending = 1;
        events.exception.injected = 0;
        events.exception.nr = PAGE_FAULT;
        events.exception.has_error_code = 1;
        events.exception.error_code = 0;
        events.exception_has_payload = 1;
        events.exception_payload = token.get().into();
        // The guest takes any page fault for one of these while the word is set.
        self.memory.write(area, &NOT_PRESENT.to_le_bytes());
        delivery.set_events(vcpu, events).map_err(|error| {
            self.memory.write(area, &0_u32.to_le_bytes());
            refused("tell a guest that a page is not present")(error)
        })
    }

    /// Lets the vCPU wait in KVM.
    fn enter_park<I: WatchedInstaller>(
        &mut self,
        vcpu: &VcpuFd,
        delivery: &ExitDelivery<I>,
        state: &State,
        (page, gpa): (Hva, u64),
    ) -> Result<Told, ApfError> {
        self.park = Some(Park { page, gpa, rip: state.regs.rip, since: Instant::now() });
        self.listen();
        if delivery.installer().is_settled(page) {
            self.park = None;
            self.listen();
            return Ok(Told::Came);
        }
        set_run_state(vcpu, KVM_MP_STATE_HALTED)?;
        let at = Some((page, state.regs.rip));
        self.stats.parked += u64::from(std::mem::replace(&mut self.parked_at, at) != at);
        Ok(Told::Parked)
    }
}

/// Whether interrupts would be taken, and nothing else is to be delivered.
fn may_park(vcpu: &Conditions) -> bool {
    vcpu.interrupts && !vcpu.shadow && !vcpu.event && !vcpu.smm && vcpu.local_apic
}

fn has_event(events: &kvm_vcpu_events) -> bool {
    let exception = events.exception.injected | events.exception.pending;
    let nmi = events.nmi.injected | events.nmi.pending;
    let others = events.interrupt.injected | events.smi.pending | events.triple_fault.pending;
    exception | nmi | others | events.exception_has_payload != 0
}

fn features(vcpu: &VcpuFd) -> Result<Features, ApfError> {
    let cpuid = vcpu
        .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("tell a vCPU's CPUID"))?;
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == CPUID_FEATURES);
    Ok(Features::of(leaf.map_or(0, |leaf| leaf.eax)))
}

fn set_run_state(vcpu: &VcpuFd, mp_state: u32) -> Result<(), ApfError> {
    vcpu.set_mp_state(kvm_mp_state { mp_state }).map_err(refused("change a vCPU's run state"))
}
