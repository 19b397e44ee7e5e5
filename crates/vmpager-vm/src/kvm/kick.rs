//! Getting a vCPU out of the guest from another thread.
//!
//! KVM looks at a byte it shares with this process, `immediate_exit`, before it
//! enters the guest, and leaves the guest for any signal. The byte is set
//! first, then the signal sent: a vCPU thread on its way into `KVM_RUN` sees
//! the byte, one inside gets the signal, and no kick is lost.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmpager_sys::memory::Mapping;

use crate::PAGE_BYTES;

/// The byte says "stay out" and "come out": two reasons, of which the first is kept
/// beside it.
const IMMEDIATE_EXIT: usize = offset_of!(kvm_run, immediate_exit);

/// Stops one vCPU, from any thread.
#[derive(Debug)]
pub(crate) struct Kick {
    /// The start of `kvm_run`, mapped once more: the vCPU's own mapping belongs
    /// to the thread that runs it.
    run: Mapping,
    stopped: AtomicBool,
    /// The thread that runs the vCPU; 0 if none does.
    thread: AtomicI32,
}

impl Kick {
    /// For one vCPU. Sees to it that the signal does nothing but interrupt.
    pub(super) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        handle_signal()?;
        // SAFETY: the descriptor is the vCPU's, which is borrowed until the
        // mapping is made.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let run = Mapping::file_shared(fd, PAGE_BYTES)?;
        Ok(Self { run, stopped: AtomicBool::new(false), thread: AtomicI32::new(0) })
    }

    /// Has the vCPU stop as soon as it can, and stay out of the guest until
    /// [`clear`](Self::clear).
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.call();
    }

    /// Has the vCPU leave the guest as soon as it can, or not enter it, until its
    /// thread [has come](Self::came).
    pub(crate) fn call(&self) {
        self.run.write(IMMEDIATE_EXIT, &[1]);
        self.interrupt();
    }

    /// The vCPU is out of the guest: calls are over. What was to be done must be
    /// looked for afterwards.
    pub(super) fn came(&self) {
        self.run.write(IMMEDIATE_EXIT, &[0]);
        fence(Ordering::SeqCst);
        // Stopping comes before the byte: it is seen here, or the byte comes later.
        if self.is_stopped() {
            self.run.write(IMMEDIATE_EXIT, &[1]);
        }
    }

    /// Interrupts the vCPU, should it be in the guest just now. It may enter
    /// again at once.
    pub(super) fn interrupt(&self) {
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: sends a signal that has a handler to a thread of this very
            // process. Should it have ended by now, and another have its number,
            // that one is interrupted for nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal()) };
        }
    }

    /// Lets it enter the guest again.
    pub(crate) fn clear(&self) {
        self.stopped.store(false, Ordering::SeqCst);
        self.run.write(IMMEDIATE_EXIT, &[0]);
    }

    /// Whether it is to stay out of the guest.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// The calling thread runs the vCPU from now on; it does until the answer
    /// is dropped.
    pub(super) fn enter(&self) -> Inside<'_> {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        self.thread.store(thread, Ordering::SeqCst);
        Inside(self)
    }
}

/// A thread that runs a vCPU.
pub(super) struct Inside<'a>(&'a Kick);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::SeqCst);
    }
}

/// A signal that neither the system nor this program uses for anything else.
fn signal() -> i32 {
    libc::SIGRTMIN() + 3
}

/// Without a handler the signal would end the process.
fn handle_signal() -> io::Result<()> {
    static HANDLED: Mutex<bool> = Mutex::new(false);
    /// Set by the handler, read by nobody.
    static INTERRUPTED: AtomicBool = AtomicBool::new(false);
    let mut handled = HANDLED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*handled {
        signal_hook::flag::register(signal(), &INTERRUPTED)?;
        *handled = true;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::super::{Answer, Builtin, Parts, Stopped};
    use super::*;
    use crate::error::VmError;
    use crate::layout::Layout;
    use crate::memory::{GuestMemory, Memslot};

    /// A guest that never leaves by itself: `jmp $`, in ring 3.
    fn spinning(vcpus: u64) -> Option<Builtin> {
        let layout = Layout::new(4 << 20, vcpus).unwrap();
        let mapping = Mapping::anonymous(4 << 20).unwrap();
        for (page, bytes) in layout.fixed_pages(&[0xeb, 0xfe]).iter().enumerate() {
            mapping.write(page * PAGE_BYTES, bytes);
        }
        let memory = GuestMemory::new(Arc::new(mapping), Memslot::flat(4 << 20));
        let parts = Parts { memory: &memory, device: None, vcpus, irqchip: false };
        match Builtin::new(&parts, &layout, None) {
            Ok(guest) => Some(guest),
            Err(VmError::NoKvm(error)) => {
                vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Kicked on the way in, inside, and again: it stops each time, and runs in
    /// between.
    #[test]
    fn a_kick_stops_a_vcpu_wherever_it_is() {
        let Some(mut guest) = spinning(1) else { return };
        let vcpu = &mut guest.vcpus()[0];
        let kick = vcpu.kick().clone();
        for delay in [0, 0, 1, 50, 3000, 0, 100, 20_000].map(Duration::from_micros) {
            let since = Instant::now();
            let kicker = std::thread::spawn({
                let kick = kick.clone();
                move || {
                    std::thread::sleep(delay);
                    kick.stop();
                }
            });
            let stopped = vcpu.run(|exit| Answer::<()>::Unexpected(format!("{exit:?}")));
            assert!(matches!(stopped, Ok(Stopped::Kicked)), "{stopped:?}");
            assert!(since.elapsed() >= delay.mul_f32(0.5) && since.elapsed().as_secs() < 5);
            kicker.join().unwrap();
            // Stopped it stays.
            let stopped = vcpu.run(|exit| Answer::<()>::Unexpected(format!("{exit:?}")));
            assert!(matches!(stopped, Ok(Stopped::Kicked)), "{stopped:?}");
            kick.clear();
        }
    }
}
