//! A directory for large files that does not outlive the program.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tempfile::TempDir;

use crate::size;

/// A directory removed when dropped, or when the user interrupts the program.
#[derive(Debug)]
pub(crate) struct Scratch {
    dir: TempDir,
}

impl Scratch {
    /// Makes one below `parent` (the system's directory for temporary files by
    /// default), with room for `bytes`.
    pub(crate) fn new(parent: Option<&Path>, bytes: u64) -> anyhow::Result<Self> {
        let parent = parent.map_or_else(std::env::temp_dir, PathBuf::from);
        let at = || format!("a directory for the snapshot below {}", parent.display());
        let dir =
            tempfile::Builder::new().prefix("vmpager-").tempdir_in(&parent).with_context(at)?;
        let fs = rustix::fs::statvfs(dir.path()).with_context(at)?;
        let free = fs.f_bavail * fs.f_frsize;
        if free < bytes {
            bail!(
                "{} has {} free and the snapshot needs {}; choose another place with --dir",
                parent.display(),
                size::show(free),
                size::show(bytes)
            );
        }
        remove_when_interrupted(dir.path().into())?;
        Ok(Self { dir })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

fn remove_when_interrupted(dir: PathBuf) -> anyhow::Result<()> {
    let (mut wait, signalled) = std::os::unix::net::UnixStream::pair()?;
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)
            .context("catching signals")?;
    }
    std::thread::spawn(move || {
        if std::io::Read::read(&mut wait, &mut [0]).is_ok_and(|n| n > 0) {
            let _ = std::fs::remove_dir_all(&dir);
            std::process::exit(130);
        }
    });
    Ok(())
}
