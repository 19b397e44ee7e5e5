//! futex(2) on words shared between processes.
//!
//! A futex is 32 bits wide: of a 64-bit word it is the low half. Only the
//! kernel looks at it as such; whoever changes the word changes all of it.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex::{Flags, Timespec, wait, wake};

#[cfg(not(target_endian = "little"))]
compile_error!("the low half of a word is taken to come first");

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Somebody woke this thread, or the word was not as expected: look again.
    Look,
    /// A signal handler ran.
    Interrupted,
    /// Nothing happened for so long.
    TimedOut,
}

/// As good as for ever. The kernel goes on with a wait without a limit after a
/// handler that was installed with `SA_RESTART`; one with a limit it ends.
const LONG: Duration = Duration::from_secs(1 << 20);

/// Sleeps until somebody wakes the waiters of `word`, unless its low half is
/// not that of `expected` (any more), or a signal handler has run. Without a
/// limit it may time out all the same, after days.
///
/// # Errors
///
/// What futex(2) says, but for the ends that [`Woken`] names.
pub fn wait_while(word: &AtomicU64, expected: u64, limit: Option<Duration>) -> io::Result<Woken> {
    let limit = Timespec::try_from(limit.unwrap_or(LONG)).unwrap_or_default();
    // The lower 32 bits are what is meant.
    let [a, b, c, d, ..] = expected.to_le_bytes();
    match wait(low(word), Flags::empty(), u32::from_le_bytes([a, b, c, d]), Some(&limit)) {
        Ok(()) | Err(Errno::AGAIN) => Ok(Woken::Look),
        Err(Errno::INTR) => Ok(Woken::Interrupted),
        Err(Errno::TIMEDOUT) => Ok(Woken::TimedOut),
        Err(errno) => Err(errno.into()),
    }
}

/// Wakes all who wait on a word, in every process.
pub fn wake_all(word: &AtomicU64) {
    // It fails only where no futex can be: then nobody waits.
    let _ = wake(low(word), Flags::empty(), i32::MAX.unsigned_abs());
}

fn low(word: &AtomicU64) -> &AtomicU32 {
    let low: *const AtomicU32 = std::ptr::from_ref(word).cast();
    // SAFETY: the first four of the word's eight bytes, aligned as it is, alive
    // as long as it; nothing but their address is used, by the kernel.
    unsafe { &*low }
}
