//! Runs the loom tests: another `cfg`, so another target directory.

use std::path::Path;

/// Runs every loom test of the workspace.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    let status = crate::cargo(root)
        .env("RUSTFLAGS", format!("{flags} --cfg loom"))
        .env("CARGO_TARGET_DIR", root.join("target").join("loom"))
        .args(["test", "--package", "vmpager-core", "--release", "--test", "loom_*"])
        // One after the other: loom creates thousands of stacks a second, and
        // in parallel they wait for the kernel's map of this process.
        .args(["--", "--test-threads=1"])
        .status()
        .map_err(|e| format!("cargo cannot be run: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("the loom tests failed: {status}")) }
}
