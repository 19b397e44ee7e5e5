//! The device for asynchronous page faults: each way in which it can go wrong, by
//! name. `apf_guest` has random histories, with the guest's side.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashSet;

use vmpager_core::apf::{
    Arrival, AsyncPf, Conditions, Features, IN_FLIGHT, Post, Refusal, Register, Ticket, TokenError,
    Written,
};

const VECTOR: u8 = 0xf3;
const ALL: Post = Post { word: u32::MAX, vector: VECTOR };
const AREA: u64 = 0x7f00_0040;
const ENABLE: u64 = AREA | 0b1001;

/// A task of the guest runs, and all is well.
const USER: Conditions = Conditions {
    event: false,
    shadow: false,
    interrupts: true,
    privilege: 3,
    paging: true,
    smm: false,
    nested: false,
    local_apic: true,
    flags: Some(0),
};

fn off(vcpu: u32) -> AsyncPf {
    let features = Features { async_pf: true, interrupt: true, vmexit: false };
    AsyncPf::new(vcpu, features).unwrap()
}

/// By a guest that has taken what was posted.
fn write(device: &mut AsyncPf, register: Register, value: u64) {
    if device.write(register, value, |_| true).unwrap() == Written::Acknowledged {
        device.taken(Some(0));
    }
}

/// Turned on, and all sleepers woken.
fn on(vcpu: u32) -> AsyncPf {
    let mut device = off(vcpu);
    write(&mut device, Register::Interrupt, VECTOR.into());
    write(&mut device, Register::Enable, ENABLE);
    assert_eq!(device.post(Some(0), true), Some(ALL));
    write(&mut device, Register::Acknowledge, 1);
    device
}

fn tell(device: &mut AsyncPf, page: u64) -> Ticket {
    let ticket = device.admit(page, &USER).unwrap();
    device.announced(ticket, true);
    ticket
}

fn ready(ticket: Ticket) -> Option<Post> {
    Some(Post { word: ticket.token().get(), vector: VECTOR })
}

#[test]
fn a_fault_is_told_and_then_that_its_page_came() {
    let mut device = on(0);
    let ticket = tell(&mut device, 7);
    assert!(device.awaits(7));
    assert_eq!(device.post(Some(0), true), None);
    assert_eq!(device.arrived(ticket), Ok(Arrival::Queued));
    assert_eq!(device.post(Some(0), true), ready(ticket));
    assert_eq!((device.counts().injected, device.counts().ready), (1, 1));
    write(&mut device, Register::Acknowledge, 1);
    assert_eq!(device.in_flight(), 0);
}

/// The guest keeps the sleepers of all its vCPUs in one table.
#[test]
fn tokens_are_unique_in_the_vm_and_never_0_or_all_ones() {
    let mut seen = HashSet::new();
    for vcpu in [0, 1, 4095] {
        let mut device = on(vcpu);
        for page in 0..IN_FLIGHT as u64 {
            let token = tell(&mut device, page).token().get();
            assert!(token != 0 && token != u32::MAX && seen.insert(token), "{token:#x}");
            assert_eq!(token & 0xfff, vcpu);
        }
    }
    let features = Features::default();
    assert!(AsyncPf::new(4096, features).is_none());
}

/// After all numbers were used, those that are still out are left out.
#[test]
fn a_token_that_is_out_is_not_given_again() {
    let mut device = on(4095);
    let old = tell(&mut device, 0);
    let mut last = old;
    for _ in 0..(1 << 20) + 5 {
        last = device.admit(1, &USER).unwrap();
        assert!(last.token() != old.token() && last.token().get() != u32::MAX);
        device.announced(last, false);
    }
    assert!(last.token().get() >> 12 < 10, "they have begun anew: {}", last.token());
}

#[test]
fn the_65th_waits() {
    let mut device = on(1);
    let tickets: Vec<_> = (0..64).map(|page| tell(&mut device, page)).collect();
    assert_eq!(device.admit(64, &USER), Err(Refusal::Full));
    // It came, but the guest has not heard of it.
    device.arrived(tickets[9]).unwrap();
    assert_eq!(device.admit(64, &USER), Err(Refusal::Full));
    assert_eq!(device.post(Some(0), true), ready(tickets[9]));
    assert_eq!(device.admit(64, &USER), Err(Refusal::Full));
    write(&mut device, Register::Acknowledge, 1);
    device.admit(64, &USER).unwrap();
    let full = Refusal::ALL.iter().position(|why| *why == Refusal::Full).unwrap();
    assert_eq!(device.counts().refused[full], 3);
}

#[test]
fn a_second_fault_on_a_page_waits() {
    let mut device = on(0);
    let ticket = tell(&mut device, 7);
    assert_eq!(device.admit(7, &USER), Err(Refusal::InFlight));
    device.arrived(ticket).unwrap();
    device.admit(7, &USER).unwrap();
}

/// Linux panics if it is told at the wrong moment.
#[test]
fn a_guest_is_told_at_no_wrong_moment() {
    let wrong = [
        (Refusal::Event, Conditions { event: true, ..USER }),
        (Refusal::Shadow, Conditions { shadow: true, ..USER }),
        (Refusal::InterruptsOff, Conditions { interrupts: false, ..USER }),
        (Refusal::Kernel, Conditions { privilege: 0, ..USER }),
        (Refusal::Kernel, Conditions { privilege: 1, ..USER }),
        (Refusal::PagingOff, Conditions { paging: false, ..USER }),
        (Refusal::Smm, Conditions { smm: true, ..USER }),
        (Refusal::Nested, Conditions { nested: true, ..USER }),
        (Refusal::LocalApicOff, Conditions { local_apic: false, ..USER }),
        (Refusal::AreaMissing, Conditions { flags: None, ..USER }),
        (Refusal::FlagsTaken, Conditions { flags: Some(1), ..USER }),
    ];
    let mut device = on(0);
    for (why, conditions) in wrong {
        assert_eq!(device.admit(1, &conditions), Err(why));
    }
    assert_eq!(device.in_flight(), 0);
    assert_eq!(device.counts().refused.iter().sum::<u64>(), wrong.len() as u64);
    assert_eq!(off(0).admit(1, &USER), Err(Refusal::Disabled));
    // A guest may ask for those of its kernel.
    write(&mut device, Register::Enable, ENABLE | 2);
    device.post(Some(0), true).unwrap();
    write(&mut device, Register::Acknowledge, 1);
    device.admit(1, &Conditions { privilege: 0, ..USER }).unwrap();
}

/// Tokens begin anew with the device: none may be given while tasks may sleep on
/// the same.
#[test]
fn nothing_is_told_before_all_who_slept_are_awake() {
    let mut device = off(0);
    write(&mut device, Register::Interrupt, VECTOR.into());
    write(&mut device, Register::Enable, ENABLE);
    assert_eq!(device.admit(1, &USER), Err(Refusal::WakingAll));
    assert_eq!(device.post(Some(5), true), None, "the word of a snapshot");
    assert_eq!(device.post(None, true), None, "its page is missing");
    assert_eq!(device.post(Some(0), true), Some(ALL));
    assert_eq!(device.admit(1, &USER), Err(Refusal::WakingAll));
    // That was of a token from before the snapshot.
    device.write(Register::Acknowledge, 1, |_| true).unwrap();
    device.taken(Some(u32::MAX));
    device.taken(None);
    assert_eq!(device.admit(1, &USER), Err(Refusal::WakingAll));
    write(&mut device, Register::Acknowledge, 1);
    device.admit(1, &USER).unwrap();
}

#[test]
fn one_token_is_out_until_it_is_taken_and_acknowledged() {
    let mut device = on(0);
    let tickets = [1, 2].map(|page| tell(&mut device, page));
    // In the order in which they came, not in that of the faults.
    device.arrived(tickets[1]).unwrap();
    device.arrived(tickets[0]).unwrap();
    assert_eq!(device.post(Some(0), true), ready(tickets[1]));
    assert_eq!(device.post(Some(tickets[1].token().get()), true), None);
    assert_eq!(device.post(Some(0), true), None, "taken, and not acknowledged");
    write(&mut device, Register::Acknowledge, 0);
    assert_eq!(device.post(Some(0), true), None, "that was no acknowledgement");
    write(&mut device, Register::Acknowledge, 1);
    assert!(device.has_ready());
    assert_eq!(device.post(Some(0), true), ready(tickets[0]));
}

#[test]
fn ready_waits_for_the_local_apic() {
    let mut device = on(0);
    let ticket = tell(&mut device, 1);
    device.arrived(ticket).unwrap();
    assert_eq!(device.post(Some(0), false), None);
    assert_eq!(device.post(Some(0), true), ready(ticket));
}

#[test]
fn a_page_that_came_before_the_guest_was_told_is_not_told() {
    let mut device = on(0);
    let ticket = device.admit(1, &USER).unwrap();
    assert_eq!(device.arrived(ticket), Ok(Arrival::NotTold));
    device.announced(ticket, true);
    assert!(!device.has_ready());
    assert_eq!((device.in_flight(), device.counts().injected), (0, 0));
    // And one of which it could not be told.
    let ticket = device.admit(1, &USER).unwrap();
    device.announced(ticket, false);
    assert_eq!(device.arrived(ticket), Err(TokenError::Twice(ticket.token())));
}

#[test]
fn what_completes_twice_or_never_began_is_an_error() {
    let (mut device, mut other) = (on(0), on(1));
    let ticket = tell(&mut device, 1);
    let foreign = tell(&mut other, 1);
    assert_eq!(device.arrived(foreign), Err(TokenError::Unknown(foreign.token())));
    device.arrived(ticket).unwrap();
    assert_eq!(device.arrived(ticket), Err(TokenError::Twice(ticket.token())));
    assert_eq!(device.post(Some(0), true), ready(ticket));
    assert_eq!(device.arrived(ticket), Err(TokenError::Twice(ticket.token())));
    write(&mut device, Register::Acknowledge, 1);
    assert!(!device.has_ready());
    // A ticket from after the next time the device is turned on.
    write(&mut other, Register::Enable, ENABLE);
    other.post(Some(0), true).unwrap();
    write(&mut other, Register::Acknowledge, 1);
    let later = tell(&mut other, 1);
    assert_eq!(on(1).arrived(later), Err(TokenError::Unknown(later.token())));
}

/// Off, on again at another place as by another kernel, INIT: what was out is
/// forgotten, what then comes is late, and no token is given twice.
#[test]
fn what_comes_after_the_device_was_turned_off_is_ignored() {
    let ends: [fn(&mut AsyncPf); 3] = [
        |device| write(device, Register::Enable, 0),
        |device| write(device, Register::Enable, ENABLE + 0x1000),
        AsyncPf::reset,
    ];
    for end in ends {
        let mut device = on(0);
        let tickets = [1, 2, 3].map(|page| tell(&mut device, page));
        device.arrived(tickets[0]).unwrap();
        device.arrived(tickets[1]).unwrap();
        device.post(Some(0), true).unwrap();
        end(&mut device);
        assert_eq!(device.arrived(tickets[2]), Ok(Arrival::Late));
        assert_eq!(device.arrived(tickets[1]), Ok(Arrival::Late));
        assert_eq!(device.counts().late, 2);
        let is_on = device.registers().is_enabled();
        assert_eq!(device.has_ready(), is_on, "all are woken, or none");
        write(&mut device, Register::Interrupt, VECTOR.into());
        write(&mut device, Register::Enable, ENABLE);
        assert_eq!(device.post(Some(0), true), Some(ALL));
        write(&mut device, Register::Acknowledge, 1);
        assert!(!device.has_ready());
        let next = tell(&mut device, 1);
        assert!(tickets.iter().all(|old| old.token() != next.token()));
    }
}
