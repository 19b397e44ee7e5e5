//! Chores of the vmpager workspace.
#![forbid(unsafe_code)]

mod lab;
mod loom;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

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

/// Cargo, in the workspace, as if called by hand: what cargo itself told this program, build
/// scripts of some crates look at, and would run again.
fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    for (name, _) in std::env::vars_os() {
        let of_this_package = ["CARGO_PKG_", "CARGO_MANIFEST_"];
        if of_this_package.iter().any(|start| name.as_encoded_bytes().starts_with(start.as_bytes()))
        {
            command.env_remove(name);
        }
    }
    command
}
