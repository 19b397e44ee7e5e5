//! `vmpager vm`: the reference microVM, run, saved and restored.

mod async_pf;
mod control;
mod outcome;
mod protocol;
mod restore;
mod run;
mod session;
mod snapshot;
mod terminal;

use std::process::ExitCode;

use clap::Subcommand;

pub(crate) use async_pf::AsyncPf;

/// Commands of `vmpager vm`.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Boot Linux, or run the built-in guest.
    Run(run::RunArgs),
    /// Save a running VM, by its control socket.
    Snapshot(snapshot::SnapshotArgs),
    /// Bring a saved VM back, and run it on.
    Restore(restore::RestoreArgs),
    /// Stop a running VM's vCPUs where they are.
    Pause(control::ControlArgs),
    /// Let a paused VM run on.
    Resume(control::ControlArgs),
    /// Tell whether a VM runs, and what it has.
    Status(control::ControlArgs),
    /// End a VM, as pulling its plug would.
    Quit(control::ControlArgs),
}

pub(crate) fn run(command: &VmCommand) -> anyhow::Result<ExitCode> {
    use protocol::Request;
    match command {
        VmCommand::Run(args) => return run::run(args),
        VmCommand::Restore(args) => return restore::run(args),
        VmCommand::Snapshot(args) => snapshot::run(args),
        VmCommand::Pause(args) => control::run(args, &Request::Pause),
        VmCommand::Resume(args) => control::run(args, &Request::Resume),
        VmCommand::Status(args) => control::run(args, &Request::Status),
        VmCommand::Quit(args) => control::run(args, &Request::Quit),
    }?;
    Ok(ExitCode::SUCCESS)
}
