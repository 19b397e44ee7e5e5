//! A page that comes while its vCPU is about to tell the guest that it is missing,
//! under loom: in every interleaving, the guest is not told, or the vCPU is called
//! and the guest is told that it came.
//!
//! Run by `cargo xtask loom`; without `--cfg loom` this file is empty.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;
use vmpager_core::apf::{AsyncPf, Bell, Conditions, Features, Register, Ticket};

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

/// What the threads share, besides the bell.
struct Host {
    bell: Bell,
    /// The page is in place.
    present: [AtomicBool; 2],
    /// Which pages the vCPU waits for.
    waited: Mutex<Vec<usize>>,
    /// The vCPU is to leave the guest.
    called: AtomicBool,
}

fn host() -> Arc<Host> {
    Arc::new(Host {
        bell: Bell::new(),
        present: [AtomicBool::new(false), AtomicBool::new(false)],
        waited: Mutex::new(Vec::new()),
        called: AtomicBool::new(false),
    })
}

impl Host {
    fn has(&self, page: usize) -> bool {
        self.present[page].load(Ordering::Acquire)
    }

    /// Brings a page, and calls the vCPU if it waits for it.
    fn bring(&self, page: usize) {
        self.present[page].store(true, Ordering::Release);
        if self.bell.is_armed()
            && self.waited.lock().unwrap().iter().any(|page| self.has(*page))
            && self.bell.ring()
        {
            self.called.store(true, Ordering::SeqCst);
        }
    }
}

fn on() -> AsyncPf {
    let features = Features { async_pf: true, interrupt: true, vmexit: false };
    let mut device = AsyncPf::new(0, features).unwrap();
    device.write(Register::Enable, 0x1000 | 0b1001, |_| true).unwrap();
    device.post(Some(0), true).unwrap();
    device.taken(Some(0));
    device
}

/// A vCPU of which the guest misses pages.
struct Vcpu {
    host: Arc<Host>,
    device: AsyncPf,
    flights: Vec<(usize, Ticket)>,
    order: Order,
}

/// Where it listens before it looks.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    Everywhere,
    NotForAMiss,
    NotForAnAcknowledgement,
}

impl Vcpu {
    fn listen(&self) {
        let told = self.flights.iter().filter(|_| !self.device.is_unacknowledged());
        let waited: Vec<usize> = told.map(|(page, _)| *page).collect();
        let count = waited.len() as u64;
        *self.host.waited.lock().unwrap() = waited;
        self.host.bell.arm(count);
    }

    fn miss(&mut self, page: usize) {
        let ticket = self.device.admit(page as u64, &USER).unwrap();
        self.flights.push((page, ticket));
        if self.order != Order::NotForAMiss {
            self.listen();
        }
        if self.host.has(page) {
            self.flights.pop();
            self.device.arrived(ticket).unwrap();
        } else {
            self.device.announced(ticket, true);
        }
        self.listen();
    }

    fn look(&mut self) {
        let (came, left) = self.flights.iter().partition(|(page, _)| self.host.has(*page));
        self.flights = left;
        let came: Vec<(usize, Ticket)> = came;
        for (_, ticket) in came {
            self.device.arrived(ticket).unwrap();
        }
        self.listen();
    }

    /// Out of the guest, and in again; then also for what the guest acknowledges.
    fn leave_and_enter(&mut self) {
        self.host.called.store(false, Ordering::SeqCst);
        loop {
            if self.host.bell.answer() {
                self.look();
            }
            if self.device.post(Some(0), true).is_none() {
                return;
            }
            // Until it is acknowledged nobody calls.
            self.listen();
            self.host.called.store(false, Ordering::SeqCst);
            self.device.taken(Some(0));
            if self.order != Order::NotForAnAcknowledgement {
                self.listen();
            }
            self.look();
        }
    }
}

/// A vCPU misses pages while others bring them, and then runs something else.
fn race(pages: &'static [usize], order: Order) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let host = host();
        let bringers: Vec<_> = pages
            .iter()
            .map(|page| {
                let host = host.clone();
                thread::spawn(move || host.bring(*page))
            })
            .collect();
        let mut vcpu = Vcpu { host: host.clone(), device: on(), flights: Vec::new(), order };
        for page in pages {
            vcpu.miss(*page);
            vcpu.leave_and_enter();
        }
        bringers.into_iter().for_each(|bringer| bringer.join().unwrap());
        // It stays in the guest for as long as nobody calls.
        while host.called.load(Ordering::SeqCst) {
            vcpu.leave_and_enter();
        }
        let counts = vcpu.device.counts();
        assert_eq!(counts.ready, counts.injected, "a task sleeps for ever");
        assert_eq!(vcpu.device.in_flight(), 0);
    });
}

#[test]
fn a_page_that_comes_while_the_guest_is_told_is_not_lost() {
    race(&[0], Order::Everywhere);
}

#[test]
fn two_pages_that_come_at_any_time_are_both_told() {
    race(&[0, 1], Order::Everywhere);
}

/// That the model can fail.
#[test]
#[should_panic(expected = "sleeps for ever")]
fn who_looks_before_listening_sleeps_for_ever() {
    race(&[0], Order::NotForAMiss);
}

/// The same, of a page that comes while a token is not acknowledged.
#[test]
#[should_panic(expected = "sleeps for ever")]
fn who_looks_before_listening_anew_sleeps_for_ever() {
    race(&[0, 1], Order::NotForAnAcknowledgement);
}
