//! Descriptors that a service manager gives to a process it starts
//! (`sd_listen_fds(3)`).

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The descriptors that this process was started with, by `LISTEN_FDS` and
/// `LISTEN_PID`, and their names; `unknown` if the manager gave none. Whoever asks
/// first has them, and is to ask before the program does anything else: nobody asks
/// twice, and none of these numbers has been given to anything else yet.
///
/// # Errors
///
/// If the variables make no sense, or a descriptor is missing.
pub fn listen_fds() -> io::Result<Vec<(OwnedFd, String)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Ok(Vec::new());
    }
    let given = sd_notify::listen_fds_with_names()?;
    let own = given.map(|(fd, name)| {
        // SAFETY: the manager opened it for this process, to be its own; it is open,
        // as setting its flags has shown, and `TAKEN` says that nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        (fd, name)
    });
    Ok(own.collect())
}
