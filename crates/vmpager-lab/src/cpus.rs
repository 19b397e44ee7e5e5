//! Which CPUs may run guests.
//!
//! QEMU's emulation changes a flag word of its *first* CPU from whichever CPU
//! executes FXRSTOR, FRSTOR or FLDENV (`cpu_clear_ignne`), and not atomically. The
//! same word says whether that CPU is in a guest, with nested paging. An update lost
//! so would leave a guest without nested paging, or its host with it, which is what
//! traces of lost guests show; that it is the cause is inferred (`docs/lab.md`).

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::cases::Lab;

/// A command for a program that runs guests.
pub(crate) fn guest_command(lab: &Lab, program: &Path) -> Command {
    if lab.direct {
        return Command::new(program);
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg("where-guests-may-run").arg(program);
    command
}

/// Becomes a command that stays off the first CPU; why that failed.
pub(crate) fn run_off_the_first(command: &[OsString]) -> io::Error {
    let Some((program, arguments)) = command.split_first() else {
        return io::Error::new(io::ErrorKind::InvalidInput, "no command");
    };
    if let Err(error) = leave_the_first() {
        return error;
    }
    Command::new(program).args(arguments).exec()
}

/// Has this process, whose threads are to run guests, stay off the first CPU.
pub(crate) fn run_guests_here(lab: &Lab) -> io::Result<()> {
    if lab.direct { Ok(()) } else { leave_the_first() }
}

fn leave_the_first() -> io::Result<()> {
    let mut cpus: CpuSet = sched_getaffinity(None)?;
    cpus.unset(0);
    if cpus.count() == 0 {
        return Ok(()); // where there is no other there is no race
    }
    Ok(sched_setaffinity(None, &cpus)?)
}
