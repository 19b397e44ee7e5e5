//! Places where a test kills the process, to see what its successor makes of it:
//! nothing at all but in builds with the feature `kill-points`.

#[cfg(not(feature = "kill-points"))]
#[inline(always)]
pub(crate) fn point(_name: &str) {}

#[cfg(feature = "kill-points")]
pub use armed::{arm, point};

#[cfg(feature = "kill-points")]
mod armed {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    static NAME: Mutex<String> = Mutex::new(String::new());
    static LEFT: AtomicU32 = AtomicU32::new(0);

    /// Has the process killed when it comes to the place of that name for the
    /// `nth` time, counted from 1.
    pub fn arm(name: &str, nth: u32) {
        if let Ok(mut armed) = NAME.lock() {
            name.clone_into(&mut armed);
        }
        LEFT.store(nth, Ordering::SeqCst);
    }

    /// The process has come to the place of that name.
    pub fn point(name: &str) {
        let armed = LEFT.load(Ordering::SeqCst) > 0 && NAME.lock().is_ok_and(|n| *n == name);
        if armed && LEFT.fetch_sub(1, Ordering::SeqCst) == 1 {
            let me = rustix::process::getpid();
            let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
            // Others of its threads may have been first to notice; this one
            // does nothing more.
            loop {
                std::thread::park();
            }
        }
    }
}
