//! Chores of the vmpager workspace.
#![forbid(unsafe_code)]

mod loom;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <chore>

  tidy   checks the style rules that neither rustfmt nor clippy knows
  loom   runs the model checker over the page map (all interleavings)
";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (chore, rest) = (args.next(), args.next());
    let result = match (chore.as_deref(), rest) {
        (Some("tidy"), None) => tidy::run(&root()),
        (Some("loom"), None) => loom::run(&root()),
        (Some("help" | "--help" | "-h"), None) => {
            print!("{USAGE}");
            Ok(())
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
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
