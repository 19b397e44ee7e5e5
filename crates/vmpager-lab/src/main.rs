//! The lab's program, one static binary in several roles: the init of the
//! emulated machine, which runs the tests; the init of the Linux guests that
//! the tests start; a runner of the same tests on a machine's own KVM; one test,
//! in a process of its own; a device's back-end; and what starts guests where they are
//! safe.
//! `docs/lab.md` tells how it all goes together.
//!
//! | module | what lives there |
//! |---|---|
//! | `init` | what both kinds of init do |
//! | `runner` | tests in processes of their own, with limits |
//! | `report` | the protocol to the outside |
//! | `cpus` | where guests may run in the emulator |
//! | `held` | VMs that keep the kernel from patching itself |
//! | `cases` | the tests, and what they share |
//! | `guest` | the load a guest runs, and how it checks itself |
//! | `pages` | contents that tell what they ought to be |
#![forbid(unsafe_code)]

mod cases;
mod cpus;
mod guest;
mod held;
mod init;
mod pages;
mod report;
mod runner;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use cases::{GuestLost, Lab};
use report::Report;

/// The lab's program.
#[derive(Debug, Parser)]
enum Role {
    /// Prints a line for every test: boot, name, seconds it may take.
    List,
    /// Runs tests on this machine.
    Run {
        #[command(flatten)]
        lab: Lab,
        /// The tests.
        names: Vec<String>,
    },
    /// Is one test.
    Test {
        #[command(flatten)]
        lab: Lab,
        /// The test.
        name: String,
    },
    /// Is a device's back-end, which uses the memory of a guest.
    TakePart {
        /// Where it is to be had.
        #[arg(long)]
        door: PathBuf,
        /// The snapshot the guest was restored from.
        #[arg(long)]
        memory: PathBuf,
    },
    /// Becomes a command, on CPUs where the emulator does not lose guests.
    WhereGuestsMayRun {
        /// The program and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    if rustix::process::getpid().is_init() {
        return init::run();
    }
    let result = match Role::parse() {
        Role::List => {
            for case in cases::ALL {
                println!("{} {} {}", case.boot, case.name, case.limit.as_secs());
            }
            Ok(())
        }
        Role::Run { lab, names } => {
            runner::run(&lab, &names, &mut Report::new(Box::new(io::stdout())))
        }
        Role::Test { lab, name } => cases::named(&name).and_then(|case| (case.run)(&lab)),
        Role::TakePart { door, memory } => cases::take_part(&door, &memory),
        Role::WhereGuestsMayRun { command } => {
            Err(anyhow::Error::new(cpus::run_off_the_first(&command)).context("running a guest"))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            let lost = error.downcast_ref::<GuestLost>().is_some();
            if lost { ExitCode::from(runner::GUEST_LOST) } else { ExitCode::FAILURE }
        }
    }
}
