//! The programs that run in the lab: static, so that an initramfs needs
//! nothing else.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What goes into the lab.
#[derive(Debug)]
pub(super) struct Programs {
    /// The program `vmpager`.
    pub(super) vmpager: PathBuf,
    /// The lab's init, its tests, and the init of its guests.
    pub(super) lab: PathBuf,
    /// The test of all kinds of access, which is also one of this machine's own
    /// tests.
    pub(super) matrix: PathBuf,
}

/// One test, as the lab's program lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Case {
    /// The group that shares a boot.
    pub(super) boot: String,
    pub(super) name: String,
    /// How long it may take.
    pub(super) limit: Duration,
}

/// The test that is one of the lab's programs.
const MATRIX: &str = "matrix";

/// Builds the programs, in a target directory of their own: other flags would
/// make cargo build everything anew in the usual one. All at once, so that no part of
/// them is built twice.
pub(super) fn programs(root: &Path, target: &Path) -> anyhow::Result<Programs> {
    let output = cargo(root, target)
        .args(["build", "--release", "--target", TARGET])
        .args(["--package", "vmpager-cli", "--package", "vmpager-lab"])
        .args(["--package", "vmpager-kvm", "--bins", "--test", MATRIX])
        // There is no network in the lab.
        .arg("--no-default-features")
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cargo cannot be run")?;
    if !output.status.success() {
        bail!("building the lab's programs failed ({}); static ones need libc6-dev", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let program = |name: &str| {
        let found = messages.lines().find_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            let is_it = message["target"]["name"] == name;
            message["executable"].as_str().filter(|_| is_it).map(PathBuf::from)
        });
        found.with_context(|| format!("cargo names no program {name} among those it built"))
    };
    Ok(Programs {
        vmpager: program("vmpager")?,
        lab: program("vmpager-lab")?,
        matrix: program(MATRIX)?,
    })
}

/// Cargo for static programs that go into the lab.
fn cargo(root: &Path, target: &Path) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    let mut command = Command::new(cargo);
    command
        .current_dir(root)
        .env("RUSTFLAGS", format!("{flags} -C target-feature=+crt-static").trim())
        // Making and loading what nobody reads takes time.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        // The programs are tested here, not measured.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_TARGET_DIR", target);
    command
}

/// Asks the lab's program for its tests.
pub(super) fn cases(programs: &Programs) -> anyhow::Result<Vec<Case>> {
    let output = Command::new(&programs.lab)
        .arg("list")
        .output()
        .with_context(|| format!("running {}", programs.lab.display()))?;
    let list = String::from_utf8_lossy(&output.stdout);
    list.lines().map(parse_case).collect()
}

fn parse_case(line: &str) -> anyhow::Result<Case> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [boot, name, limit] = words[..] else { bail!("`{line}` is no line of the list of tests") };
    let limit = limit.parse().with_context(|| format!("the limit in `{line}`"))?;
    Ok(Case { boot: boot.into(), name: name.into(), limit: Duration::from_secs(limit) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_line_is_boot_name_and_seconds() {
        let case = parse_case("host kvm_is_there 30").expect("three words");
        assert_eq!((case.boot.as_str(), case.name.as_str()), ("host", "kvm_is_there"));
        assert_eq!(case.limit, Duration::from_secs(30));
        assert!(parse_case("host kvm_is_there").is_err());
        assert!(parse_case("host kvm_is_there soon").is_err());
    }
}
