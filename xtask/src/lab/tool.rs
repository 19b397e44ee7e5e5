//! Programs the lab needs.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, bail};

/// Where a program is, or which Debian package to install for it.
pub(super) fn require(name: &str, package: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .with_context(|| format!("`{name}` is not installed; on Debian: apt-get install {package}"))
}

/// Runs a program to its end; its standard output.
pub(super) fn output(command: &mut Command, package: &str) -> anyhow::Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    require(&name, package)?;
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().with_context(|| format!("`{name}` cannot be run"))?;
    if !status.success() {
        bail!("{command:?} failed ({status}): {}", String::from_utf8_lossy(&stderr).trim());
    }
    Ok(stdout)
}
