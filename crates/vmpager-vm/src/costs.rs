//! What the two ways to learn of a vCPU's fault cost on this machine.
//!
//! ```text
//! userfaultfd   the vCPU sleeps -> another thread wakes, reads, installs -> the vCPU wakes
//! exit          KVM_RUN returns -> this thread installs                  -> KVM_RUN
//! ```
//!
//! Both are tried on a small VM made for the purpose: what they take depends on more
//! than any one of their steps, the dearest of which is often to have a vCPU sleep
//! inside KVM.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmpager_kvm::exit::Mechanism;
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::uffd::{Features, Message, Messages, Userfaultfd};

use crate::device::to_usize;
use crate::error::VmError;
use crate::kvm::{Trial, memslot_time};
use crate::restore::Delivery;
use crate::{PAGE_BYTES, PAGE_SIZE};

/// How many pages are touched in each way: few, for a VM waits to be restored.
const TOUCHES: u64 = 6;

/// What the delivery of one fault costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeliveryCosts {
    /// By an exit of the vCPU.
    pub exit: Duration,
    /// By a userfaultfd and a thread that waits for it.
    pub userfaultfd: Duration,
}

impl DeliveryCosts {
    /// Measures them, by a few faults each. Takes about a millisecond, half of which
    /// KVM needs to make a VM.
    ///
    /// # Errors
    ///
    /// If there is no KVM or no userfaultfd for this user, or one of them refuses.
    pub fn measure() -> Result<Self, VmError> {
        let mut trial = Trial::new()?;
        let uffd = Userfaultfd::open(Features(0))?;
        uffd.register_missing(&GuestRange::of_mapping(trial.memory()))
            .map_err(VmError::Register)?;
        // When it ends with an error, nobody waits for its userfaultfd any more.
        let server = thread::Builder::new().spawn(move || serve(uffd)).map_err(VmError::Thread)?;
        trial.touch(TOUCHES)?;
        let served = server.join().unwrap_or_else(|_| Err(Errno::IO.into()));
        let (uffd, by_userfaultfd) = served.map_err(VmError::Register)?;
        let by_exits = trial.touch_by_exits(TOUCHES, &uffd, &PAGE)?;
        trial.end();
        Ok(Self { exit: between(&by_exits), userfaultfd: between(&by_userfaultfd) })
    }

    /// The cheaper of the two.
    pub fn delivery(&self) -> Delivery {
        if self.exit <= self.userfaultfd {
            Delivery::Exit(Mechanism::View)
        } else {
            Delivery::Userfaultfd
        }
    }
}

/// How long KVM takes to accept so much memory in a VM that has nothing else: no
/// restore is faster. With shadow page tables it grows with the memory, because
/// KVM makes an entry for each page there and then.
///
/// # Errors
///
/// If there is no KVM for this user, or no room for so much memory.
pub fn memslot_cost(memory_bytes: u64) -> Result<Duration, VmError> {
    let memory = Mapping::anonymous(to_usize(memory_bytes))
        .map_err(|error| VmError::Memory { bytes: memory_bytes, error })?;
    memslot_time(&Arc::new(memory))
}

/// What the guest reads.
const PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Brings each page that is touched, and tells when it was.
fn serve(uffd: Userfaultfd) -> io::Result<(Userfaultfd, Vec<Instant>)> {
    let mut messages = Messages::new();
    let mut faults = Vec::new();
    while faults.len() as u64 != TOUCHES {
        match poll(&mut [PollFd::new(&uffd, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        uffd.read(&mut messages)?;
        for message in messages.drain() {
            if let Message::Fault { address, .. } = message {
                faults.push(Instant::now());
                uffd.copy(address, PAGE.as_ptr() as usize, PAGE_SIZE);
            }
        }
    }
    Ok((uffd, faults))
}

/// The median time from one to the next.
fn between(faults: &[Instant]) -> Duration {
    let mut times: Vec<Duration> = faults.windows(2).map(|pair| pair[1] - pair[0]).collect();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheaper_one_is_chosen() {
        let micros = Duration::from_micros;
        let choice = |exit, userfaultfd| {
            DeliveryCosts { exit: micros(exit), userfaultfd: micros(userfaultfd) }.delivery()
        };
        assert_eq!(choice(4, 12), Delivery::Exit(Mechanism::View));
        assert_eq!(choice(48, 18), Delivery::Userfaultfd);
    }

    #[test]
    fn a_memslot_costs_something_at_any_size() {
        for bytes in [4 << 20, 4 << 30] {
            match memslot_cost(bytes) {
                Err(VmError::NoKvm(error)) => {
                    vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
                    return;
                }
                cost => assert!(cost.unwrap() > Duration::ZERO),
            }
        }
    }

    #[test]
    fn costs_are_measured_in_a_moment() {
        let since = Instant::now();
        let costs = match DeliveryCosts::measure() {
            Err(VmError::NoKvm(error)) => {
                vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
                return;
            }
            measured => measured.unwrap(),
        };
        let took = since.elapsed();
        println!("{costs:?} in {took:?}");
        // Nothing that goes through the kernel takes less.
        let least = Duration::from_nanos(500);
        assert!(costs.exit > least && costs.userfaultfd > least, "{costs:?}");
        assert!(took < Duration::from_millis(500), "{took:?}");
    }
}
