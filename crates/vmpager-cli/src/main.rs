//! The program `vmpager`: one command per module.
#![forbid(unsafe_code)]

mod bench;
mod demo;
mod doctor;
mod image;
mod output;
mod profile;
mod remote;
mod report;
mod restore;
mod scratch;
mod serve;
mod size;
mod smaps;
mod top;
mod vm;
mod vm_process;

use std::io;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// The variable that says how much is logged.
const LOG: &str = "VMPAGER_LOG";

/// As `clap` exits.
const WRONG_USAGE: u8 = 2;

/// Guest memory on demand: a VM restored from a snapshot starts at once, and
/// each page arrives when it is first touched or, better, just before.
#[derive(Debug, Parser)]
#[command(
    name = "vmpager",
    version,
    after_help = "Start with:\n  \
    vmpager demo       the main job, end to end, on this machine\n  \
    vmpager doctor     what this machine can do for it\n\n\
    Logs go to stderr; VMPAGER_LOG=debug shows more of them.\n\
    Exit status: 0 done, 1 failed, 2 wrong usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the main job end to end: make a VM, snapshot it, restore it in
    /// every way, check every byte.
    Demo(demo::DemoArgs),
    /// Tell what this kernel, user and machine can do for vmpager.
    Doctor(doctor::DoctorArgs),
    /// Serve VMs' memory from a file, in place of Firecracker's example
    /// page-fault handler.
    Serve(Box<serve::ServeArgs>),
    /// Watch a daemon's sessions, on a terminal.
    Top(top::TopArgs),
    /// Make a picture of a run: one HTML file that needs nothing else.
    Report(report::ReportArgs),
    /// Pack memory files into small images that VMs are served from.
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Record which pages a guest touches, so that later restores bring them first.
    #[command(subcommand)]
    Profile(profile::ProfileCommand),
    /// Measure, side by side with the floor or a peer.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Run a microVM: boot Linux, snapshot it, restore it.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// A VM in a process of its own, for `demo` and `bench restore`.
    #[command(hide = true)]
    VmProcess(vm_process::VmProcessArgs),
    /// The handler `bench restore` compares with.
    #[command(hide = true)]
    NaiveHandler(restore::naive::NaiveArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = start_log() {
        eprintln!("error: {error:#}");
        return ExitCode::from(WRONG_USAGE);
    }
    let result = match &cli.command {
        Command::Demo(args) => demo::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Serve(args) => return exit(serve::run(args)),
        Command::Top(args) => top::run(args),
        Command::Report(args) => report::run(args),
        Command::Image(command) => image::run(command),
        Command::Profile(command) => profile::run(command),
        Command::Bench(command) => bench::run(command),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "vmpager", &mut script);
            output::write(&script)
        }
        Command::Vm(command) => return exit(vm::run(command)),
        Command::VmProcess(args) => vm_process::run(args),
        Command::NaiveHandler(args) => restore::naive::run(args),
    };
    exit(result.map(|()| ExitCode::SUCCESS))
}

fn exit(result: anyhow::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whoever read our output has seen enough (`vmpager doctor | head`).
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn start_log() -> anyhow::Result<()> {
    let said =
        std::env::var_os(LOG).map_or("info".into(), |said| said.to_string_lossy().into_owned());
    let filter: Targets = said.parse().with_context(|| {
        format!(
            "{LOG} is \"{said}\": use off, error, warn, info, debug or trace, or one for \
             each part of the program, as in info,vmpager=debug"
        )
    })?;
    let log = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(output::colour(&io::stderr()))
        .with_target(false);
    tracing_subscriber::registry().with(log.with_filter(filter)).init();
    Ok(())
}
