//! The lab's program, one static binary in four roles: the init of the
//! emulated machine, which runs the tests; the init of the Linux guests that
//! the tests start; a runner of the same tests on a machine's own KVM; and one
//! test, in a process of its own. `docs/lab.md` tells how it all goes together.
//!
//! | module | what lives there |
//! |---|---|
//! | `init` | what both kinds of init do |
//! | `runner` | tests in processes of their own, with limits |
//! | `report` | the protocol to the outside |
//! | `cases` | the tests, and what they share |
//! | `guest` | the load a guest runs, and how it checks itself |
//! | `pages` | contents that tell what they ought to be |
#![forbid(unsafe_code)]

mod cases;
mod guest;
mod init;
mod pages;
mod report;
mod runner;

use std::io;
use std::process::ExitCode;

use clap::Parser;

use cases::Lab;
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
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
