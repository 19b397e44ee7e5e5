//! The vCPUs of a Linux guest while they run, each on a thread of its own.
//!
//! ```text
//!   Running::start          threads enter the guest ──> exits ──> Ports
//!        |                        |
//!   Running::stop  ── kick ──>    v                (a paused VM has no threads)
//!        |               threads hand their vCPUs back
//!        v
//!   Vec<Vcpu>, every exit complete
//! ```
//!
//! What ends the guest, a write to a port or an error, is kept in [`End`] by the
//! thread that saw it, which stops the others.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use kvm_ioctls::VcpuExit;
use rustix::event::{EventfdFlags, eventfd};

use crate::devices::{GuestEnd, Ports};
use crate::error::VmError;
use crate::kvm::{Answer, Kick, Stopped, Vcpu};
use crate::threads::vcpu_thread;

/// How the guest ended, once it has.
#[derive(Debug)]
pub(crate) struct End {
    state: Mutex<EndState>,
    /// Readable from the end on.
    readable: OwnedFd,
}

#[derive(Debug, Default)]
struct EndState {
    has_ended: bool,
    /// Until somebody takes it.
    outcome: Option<Result<GuestEnd, VmError>>,
    /// When a vCPU first entered the guest.
    entered: Option<Instant>,
}

impl End {
    pub(crate) fn new() -> Result<Self, VmError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let readable = eventfd(0, flags).map_err(|e| VmError::Eventfd(e.into()))?;
        Ok(Self { state: Mutex::default(), readable })
    }

    /// The first end is the one that counts.
    fn set(&self, outcome: Result<GuestEnd, VmError>) {
        let mut state = self.lock();
        if !state.has_ended {
            state.has_ended = true;
            state.outcome = Some(outcome);
            // The only write ever: the counter cannot overflow.
            let _ = rustix::io::write(&self.readable, &1u64.to_ne_bytes());
        }
    }

    /// How the guest ended; `None` if it runs on, or was asked before.
    pub(crate) fn take(&self) -> Option<Result<GuestEnd, VmError>> {
        self.lock().outcome.take()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.lock().has_ended
    }

    pub(crate) fn entered(&self) -> Option<Instant> {
        self.lock().entered
    }

    fn set_entered(&self) {
        self.lock().entered.get_or_insert_with(Instant::now);
    }

    fn lock(&self) -> MutexGuard<'_, EndState> {
        // Each change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }
}

/// vCPUs that run. Stopped when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    threads: Vec<JoinHandle<Option<Vcpu>>>,
    kicks: Arc<[Arc<Kick>]>,
}

impl Running {
    /// Starts a thread for each vCPU. If one cannot be had, all vCPUs are left
    /// where they are.
    pub(crate) fn start(
        vcpus: &mut Vec<Vcpu>,
        ports: &Arc<Ports>,
        end: &Arc<End>,
    ) -> io::Result<Self> {
        let kicks: Arc<[Arc<Kick>]> = vcpus.iter().map(|vcpu| vcpu.kick().clone()).collect();
        let (mut threads, mut seats) = (Vec::new(), Vec::<SyncSender<Vcpu>>::new());
        for number in (0..).take(vcpus.len()) {
            let (seat, vcpu) = sync_channel(1);
            let thread =
                Thread { vcpu, ports: ports.clone(), end: end.clone(), kicks: kicks.clone() };
            // Threads without a vCPU end as soon as the seats are gone.
            let spawned = vcpu_thread(number).spawn(|| thread.run())?;
            threads.push(spawned);
            seats.push(seat);
        }
        for (seat, vcpu) in seats.iter().zip(vcpus.drain(..)) {
            vcpu.kick().clear();
            seat.send(vcpu).expect("the thread waits for it");
        }
        Ok(Self { threads, kicks })
    }

    /// Stops the vCPUs and gives them back, their last exits complete unless one
    /// of them ended the guest.
    pub(crate) fn stop(mut self) -> Vec<Vcpu> {
        self.stop_threads()
    }

    fn stop_threads(&mut self) -> Vec<Vcpu> {
        stop_all(&self.kicks);
        let threads = self.threads.drain(..);
        let vcpus = threads.map(|thread| thread.join().expect("no panic in a vCPU thread"));
        vcpus.flatten().collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop_threads());
    }
}

fn stop_all(kicks: &[Arc<Kick>]) {
    kicks.iter().for_each(|kick| kick.stop());
}

/// What a vCPU's thread works with.
struct Thread {
    vcpu: Receiver<Vcpu>,
    ports: Arc<Ports>,
    end: Arc<End>,
    kicks: Arc<[Arc<Kick>]>,
}

impl Thread {
    fn run(self) -> Option<Vcpu> {
        let mut vcpu = self.vcpu.recv().ok()?;
        self.end.set_entered();
        let outcome = match vcpu.run(|exit| answer(exit, &self.ports)) {
            Ok(Stopped::Kicked) => return Some(vcpu),
            Ok(Stopped::Answered(end)) => Ok(end),
            Err(error) => Err(error),
        };
        self.end.set(outcome);
        stop_all(&self.kicks);
        Some(vcpu)
    }
}

/// Everything that KVM does not do itself.
fn answer(exit: VcpuExit<'_>, ports: &Ports) -> Answer<GuestEnd> {
    match exit {
        VcpuExit::IoIn(port, data) => ports.read(port, data),
        VcpuExit::IoOut(port, data) => {
            if let Some(end) = ports.write(port, data) {
                return Answer::Stop(end);
            }
        }
        // Addresses without a device: as on a bus, ones, and nobody listens.
        VcpuExit::MmioRead(_, data) => data.fill(0xff),
        VcpuExit::MmioWrite(..) => {}
        // A triple fault resets a PC.
        VcpuExit::Shutdown => return Answer::Stop(ports.reset()),
        exit => return Answer::Unexpected(format!("{exit:?}")),
    }
    Answer::GoOn
}
