//! The programs that run in the lab, and what an initramfs needs to run them: the same
//! release builds that are used outside, so that whoever has those builds little more.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use super::tool;

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

/// Builds the programs. The test is built by itself: what only tests need would change
/// features of what the others share with the usual release build.
pub(super) fn programs(root: &Path) -> anyhow::Result<Programs> {
    let bins = build(root, &["--package", "vmpager-cli", "--package", "vmpager-lab", "--bins"])?;
    let test = build(root, &["--package", "vmpager-kvm", "--test", MATRIX])?;
    Ok(Programs {
        vmpager: executable(&bins, "vmpager")?,
        lab: executable(&bins, "vmpager-lab")?,
        matrix: executable(&test, MATRIX)?,
    })
}

/// Builds; what cargo says of it, in JSON, a message a line.
fn build(root: &Path, what: &[&str]) -> anyhow::Result<String> {
    let output = crate::cargo(root)
        .args(["build", "--release", "--message-format=json-render-diagnostics"])
        .args(what)
        .stderr(Stdio::inherit())
        .output()
        .context("cargo cannot be run")?;
    if !output.status.success() {
        bail!("building the lab's programs failed ({})", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn executable(messages: &str, name: &str) -> anyhow::Result<PathBuf> {
    let found = messages.lines().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let is_it = message["target"]["name"] == name;
        message["executable"].as_str().filter(|_| is_it).map(PathBuf::from)
    });
    found.with_context(|| format!("cargo names no program {name} among those it built"))
}

impl Programs {
    /// The same without symbols, in a directory: loading what nobody reads takes time
    /// where loading is emulated.
    pub(super) fn stripped(&self, dir: &Path) -> anyhow::Result<Self> {
        let strip = |program: &Path, name: &str| {
            let to = dir.join(name);
            tool::output(Command::new("strip").arg("-o").arg(&to).arg(program), "binutils")?;
            anyhow::Ok(to)
        };
        Ok(Self {
            vmpager: strip(&self.vmpager, "vmpager")?,
            lab: strip(&self.lab, "vmpager-lab")?,
            matrix: strip(&self.matrix, MATRIX)?,
        })
    }
}

/// The shared libraries a program is linked to, its loader among them, where they were
/// found on this machine.
pub(super) fn libraries(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let list = tool::output(Command::new("ldd").arg(program), "libc-bin")?;
    let list = String::from_utf8_lossy(&list);
    let libraries: Vec<PathBuf> = list.lines().filter_map(parse_library).collect();
    for library in &libraries {
        fs::metadata(library).with_context(|| {
            format!("{}, a library of {}", library.display(), program.display())
        })?;
    }
    Ok(libraries)
}

/// `libc.so.6 => /lib/libc.so.6 (0x7f…)`, or `/lib64/ld-linux-x86-64.so.2 (0x7f…)`. What
/// has no path, the kernel brings.
fn parse_library(line: &str) -> Option<PathBuf> {
    let found = line.split_once("=>").map_or(line, |(_, found)| found);
    let path = found.split_whitespace().next()?;
    path.starts_with('/').then(|| path.into())
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
    fn a_library_is_where_the_loader_found_it() {
        let library = |line| parse_library(line).map(|path| path.display().to_string());
        let at = |path: &str| Some(path.to_owned());
        assert_eq!(
            library("\tlibc.so.6 => /lib/libc.so.6 (0x00007fe228b3e000)"),
            at("/lib/libc.so.6")
        );
        assert_eq!(library("\t/lib64/ld.so.2 (0x00007fe229931000)"), at("/lib64/ld.so.2"));
        assert_eq!(library("\tlinux-vdso.so.1 (0x00007fe22992f000)"), None);
        assert_eq!(library("\tstatically linked"), None);
        assert_eq!(library("\tlibgone.so => not found"), None);
    }

    #[test]
    fn a_list_line_is_boot_name_and_seconds() {
        let case = parse_case("host kvm_is_there 30").expect("three words");
        assert_eq!((case.boot.as_str(), case.name.as_str()), ("host", "kvm_is_there"));
        assert_eq!(case.limit, Duration::from_secs(30));
        assert!(parse_case("host kvm_is_there").is_err());
        assert!(parse_case("host kvm_is_there soon").is_err());
    }
}
