//! Chores of the vmpager workspace.
#![forbid(unsafe_code)]

mod lab;
mod loom;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Chores of the vmpager workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Chore {
    /// Checks the style rules that neither rustfmt nor clippy knows.
    Tidy,
    /// Runs the model checker over the page map (all interleavings).
    Loom,
    /// Runs the lab's tests in an emulated machine, on real KVM inside.
    Lab(lab::LabArgs),
}

fn main() -> ExitCode {
    let result = match Chore::parse() {
        Chore::Tidy => tidy::run(&root()),
        Chore::Loom => loom::run(&root()),
        Chore::Lab(args) => lab::run(&root(), &args).map_err(|error| format!("{error:#}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace: one above this crate if cargo runs us, else where we are.
fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .and_then(|dir| PathBuf::from(dir).parent().map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from("."))
}
