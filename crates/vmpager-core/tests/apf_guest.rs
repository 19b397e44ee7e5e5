//! The device for asynchronous page faults in random histories, with a model of
//! what Linux does on its side, which panics where Linux would: when it is told of
//! a fault at a wrong moment, when a token is given twice, when it is called
//! without a token. At the end of each history nobody sleeps.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;

use proptest::prelude::*;
use vmpager_core::apf::{
    Arrival, AsyncPf, Conditions, Features, Refusal, Register, Ticket, TokenError,
};

const VCPUS: usize = 3;
const VECTOR: u8 = 0xf3;

/// A vCPU as the guest sees it.
#[derive(Debug)]
struct Cpu {
    /// The area's two words.
    flags: u32,
    token: u32,
    /// The guest's own note that the device is on.
    enabled: bool,
    interrupts: bool,
    user: bool,
    local_apic: bool,
    /// The vector is raised, and not taken.
    raised: bool,
    /// The handler has taken the token and not acknowledged it yet.
    in_handler: bool,
}

/// One guest, and the device of each of its vCPUs.
struct World {
    cpus: Vec<Cpu>,
    devices: Vec<AsyncPf>,
    /// The table of those who sleep: the token, and the vCPU they fell asleep on.
    sleepers: HashMap<u32, usize>,
    /// Reads under way.
    fetches: Vec<(usize, Ticket)>,
    /// Those of which the guest must not hear any more.
    done: Vec<(usize, Ticket)>,
}

#[derive(Clone, Debug)]
enum Step {
    Fault { page: u64, event: bool, area: bool, early: bool },
    Arrive { which: prop::sample::Index },
    ArriveAgain { which: prop::sample::Index },
    Post,
    Interrupt,
    Acknowledge,
    Toggle { interrupts: bool, user: bool, local_apic: bool },
    Offline,
    Online,
    Reenable,
    Kexec,
    Restore,
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let yes = || prop::bool::weighted(0.9);
    let no = || prop::bool::weighted(0.1);
    let which = any::<prop::sample::Index>;
    let step = prop_oneof![
        20 => (0..6_u64, no(), yes(), no())
            .prop_map(|(page, event, area, early)| Step::Fault { page, event, area, early }),
        12 => which().prop_map(|which| Step::Arrive { which }),
        1 => which().prop_map(|which| Step::ArriveAgain { which }),
        25 => Just(Step::Post),
        25 => Just(Step::Interrupt),
        25 => Just(Step::Acknowledge),
        4 => (yes(), yes(), yes()).prop_map(|(interrupts, user, local_apic)| Step::Toggle {
            interrupts,
            user,
            local_apic,
        }),
        1 => Just(Step::Offline),
        8 => Just(Step::Online),
        1 => Just(Step::Reenable),
        1 => Just(Step::Kexec),
        1 => Just(Step::Restore),
    ];
    prop::collection::vec((0..VCPUS, step), 1..400)
}

fn device(vcpu: usize) -> AsyncPf {
    let features = Features { async_pf: true, interrupt: true, vmexit: false };
    AsyncPf::new(u32::try_from(vcpu).unwrap(), features).unwrap()
}

impl World {
    fn new() -> Self {
        let cpu = |_| Cpu {
            flags: 0,
            token: 0,
            enabled: false,
            interrupts: true,
            user: true,
            local_apic: true,
            raised: false,
            in_handler: false,
        };
        let mut world = Self {
            cpus: (0..VCPUS).map(cpu).collect(),
            devices: (0..VCPUS).map(device).collect(),
            sleepers: HashMap::new(),
            fetches: Vec::new(),
            done: Vec::new(),
        };
        (0..VCPUS).for_each(|at| world.online(at));
        world
    }

    fn step(&mut self, at: usize, step: &Step) {
        match step {
            Step::Fault { page, event, area, early } => {
                self.fault(at, *page, *event, *area, *early);
            }
            Step::Arrive { which } if !self.fetches.is_empty() => {
                self.arrive(which.index(self.fetches.len()));
            }
            Step::ArriveAgain { which } if !self.done.is_empty() => {
                let (vcpu, ticket) = self.done[which.index(self.done.len())];
                let again = self.devices[vcpu].arrived(ticket);
                let twice = Err(TokenError::Twice(ticket.token()));
                assert!(again == twice || again == Ok(Arrival::Late), "{again:?}");
            }
            Step::Arrive { .. } | Step::ArriveAgain { .. } => {}
            Step::Post => self.post(at),
            Step::Interrupt => self.interrupt(at),
            Step::Acknowledge => self.acknowledge(at),
            Step::Toggle { interrupts, user, local_apic } => {
                let cpu = &mut self.cpus[at];
                if !cpu.in_handler {
                    cpu.user = *user;
                    // No task runs with interrupts off.
                    cpu.interrupts = *interrupts || *user;
                    cpu.local_apic = *local_apic;
                }
            }
            Step::Offline => self.offline(at),
            Step::Online => self.online(at),
            Step::Reenable if self.cpus[at].enabled => self.enable(at),
            Step::Reenable => {}
            Step::Kexec => self.kexec(),
            Step::Restore => self.restore(),
        }
    }

    /// A vCPU misses a page. `early`: it came while the guest was being told.
    fn fault(&mut self, at: usize, page: u64, event: bool, area: bool, early: bool) {
        let cpu = &mut self.cpus[at];
        let conditions = Conditions {
            event,
            shadow: false,
            interrupts: cpu.interrupts && !cpu.in_handler,
            privilege: if cpu.user && !cpu.in_handler { 3 } else { 0 },
            paging: true,
            smm: false,
            nested: false,
            local_apic: cpu.local_apic,
            flags: area.then_some(cpu.flags),
        };
        let device = &mut self.devices[at];
        let Ok(ticket) = device.admit(page, &conditions) else { return };
        if early {
            assert_eq!(device.arrived(ticket), Ok(Arrival::NotTold));
            return;
        }
        cpu.flags = 1;
        device.announced(ticket, true);
        self.fetches.push((at, ticket));
        self.page_fault(at, ticket.token().get());
    }

    /// The guest's handler of page faults.
    fn page_fault(&mut self, at: usize, token: u32) {
        let cpu = &mut self.cpus[at];
        assert!(cpu.enabled, "the fault would be taken for a real one");
        assert_eq!(std::mem::take(&mut cpu.flags), 1);
        assert!(cpu.interrupts && !cpu.in_handler, "told with interrupts off");
        assert!(cpu.user, "told in the kernel");
        let before = self.sleepers.insert(token, at);
        assert_eq!(before, None, "token {token:#x} sleeps already");
    }

    fn arrive(&mut self, which: usize) {
        let (vcpu, ticket) = self.fetches.swap_remove(which);
        let came = self.devices[vcpu].arrived(ticket).unwrap();
        assert!(matches!(came, Arrival::Queued | Arrival::Late));
        self.done.push((vcpu, ticket));
    }

    fn post(&mut self, at: usize) {
        let cpu = &mut self.cpus[at];
        if let Some(post) = self.devices[at].post(Some(cpu.token), cpu.local_apic) {
            assert_eq!((cpu.token, post.vector), (0, VECTOR));
            cpu.token = post.word;
            cpu.raised = true;
        }
    }

    /// The guest's handler of the vector, up to the acknowledgement.
    fn interrupt(&mut self, at: usize) {
        let cpu = &mut self.cpus[at];
        if !cpu.raised || !cpu.interrupts || cpu.in_handler {
            return;
        }
        cpu.raised = false;
        if !cpu.enabled {
            return;
        }
        let token = std::mem::take(&mut cpu.token);
        cpu.in_handler = true;
        match token {
            // Raised before the device was turned off and on.
            0 => {}
            u32::MAX => self.wake_all(at),
            token => {
                // Nobody is told of a page before it is told that it is missing.
                assert!(self.sleepers.remove(&token).is_some(), "nobody sleeps on {token:#x}");
            }
        }
    }

    /// The guest wakes those who fell asleep on this vCPU.
    fn wake_all(&mut self, at: usize) {
        self.sleepers.retain(|_, vcpu| *vcpu != at);
    }

    fn acknowledge(&mut self, at: usize) {
        if std::mem::take(&mut self.cpus[at].in_handler) {
            self.devices[at].write(Register::Acknowledge, 1, |_| true).unwrap();
            let word = self.cpus[at].token;
            self.devices[at].taken(Some(word));
        }
    }

    fn enable(&mut self, at: usize) {
        let (cpu, device) = (&mut self.cpus[at], &mut self.devices[at]);
        device.write(Register::Interrupt, VECTOR.into(), |_| true).unwrap();
        device.write(Register::Enable, 0x1000 | 0b1001, |_| true).unwrap();
        // Whoever carries the device out clears the area then.
        (cpu.flags, cpu.token) = (0, 0);
        cpu.enabled = true;
    }

    fn online(&mut self, at: usize) {
        if !self.cpus[at].enabled {
            self.devices[at].reset();
            self.enable(at);
        }
    }

    /// Linux turns the device off, and wakes whoever sleeps there.
    fn offline(&mut self, at: usize) {
        if self.cpus[at].enabled && !self.cpus[at].in_handler {
            self.devices[at].write(Register::Enable, 0, |_| true).unwrap();
            self.cpus[at].enabled = false;
            self.wake_all(at);
        }
    }

    /// Another kernel: it knows nothing of tokens, and must not hear of any.
    fn kexec(&mut self) {
        self.sleepers.clear();
        for at in 0..VCPUS {
            self.devices[at].reset();
            self.cpus[at].in_handler = false;
            self.cpus[at].raised = false;
            self.cpus[at].enabled = false;
            self.enable(at);
        }
    }

    /// The guest as it is, its devices new: what was being fetched is not any more.
    fn restore(&mut self) {
        for (at, old) in self.devices.iter_mut().enumerate() {
            let mut new = device(at);
            for register in [Register::Interrupt, Register::Enable] {
                let value = old.registers().read(register).unwrap();
                new.write(register, value, |_| true).unwrap();
            }
            *old = new;
        }
        self.fetches.clear();
        self.done.clear();
    }

    /// Lets everything come to its end.
    fn settle(&mut self) {
        while !self.fetches.is_empty() {
            self.arrive(0);
        }
        for at in 0..VCPUS {
            self.cpus[at].local_apic = true;
            self.cpus[at].interrupts = true;
            for _ in 0..3 * 64 {
                self.acknowledge(at);
                self.post(at);
                self.interrupt(at);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn linux_neither_panics_nor_sleeps_for_ever(steps in steps()) {
        let mut world = World::new();
        for (at, step) in &steps {
            world.step(*at, step);
        }
        world.settle();
        prop_assert!(world.sleepers.is_empty(), "asleep for ever: {:?}", world.sleepers);
        for device in &world.devices {
            prop_assert_eq!(device.in_flight(), 0);
        }
    }
}

/// That histories are worth something: all of it happens in them.
#[test]
fn histories_have_everything() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut total = vmpager_core::apf::Counts::default();
    for _ in 0..300 {
        let mut world = World::new();
        for (at, step) in steps().new_tree(&mut runner).unwrap().current() {
            world.step(at, &step);
        }
        total = world.devices.iter().fold(total, |total, device| total + device.counts());
    }
    assert!(total.injected > 500 && total.ready > 200 && total.wake_alls > 300, "{total:?}");
    assert!(total.late > 20, "{total:?}");
    let happens = [
        Refusal::Disabled,
        Refusal::Event,
        Refusal::Kernel,
        Refusal::LocalApicOff,
        Refusal::AreaMissing,
        Refusal::WakingAll,
        Refusal::InFlight,
    ];
    for why in happens {
        assert!(total.refused[why as usize] > 10, "{why:?}: {total:?}");
    }
}
