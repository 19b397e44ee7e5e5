//! A device's back-end, in a process of its own: it takes part in a guest's memory, and
//! reads and writes pages of it while the guest runs.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use vmpager::Attached;

use super::guest::PATIENCE;
use crate::pages::{PAGE, still_page};

/// The process. Killed when dropped.
#[derive(Debug)]
pub(super) struct BackEnd(Child);

impl Drop for BackEnd {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl BackEnd {
    /// Starts it, at the only door there is or will be in that directory.
    pub(super) fn start(doors: &Path, memory: &Path) -> anyhow::Result<Self> {
        let begin = Instant::now();
        let door = loop {
            if let Some(door) = only_door(doors)? {
                break door;
            }
            ensure!(begin.elapsed() < PATIENCE, "no door was opened in {}", doors.display());
            thread::sleep(Duration::from_millis(10));
        };
        let mut command = Command::new("/proc/self/exe");
        command.arg("take-part").arg("--door").arg(door).arg("--memory").arg(memory);
        let child = command.spawn().with_context(|| format!("running {command:?}"));
        Ok(Self(child?))
    }

    /// Waits until it has done all its work; it must have found nothing wrong.
    pub(super) fn end_well(mut self) -> anyhow::Result<()> {
        let status = self.0.wait().context("waiting for the back-end")?;
        ensure!(status.success(), "the back-end ended with {status}");
        Ok(())
    }
}

/// A socket that is being made has a longer name.
fn only_door(doors: &Path) -> anyhow::Result<Option<PathBuf>> {
    let entries = std::fs::read_dir(doors).with_context(|| doors.display().to_string())?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let is_door = |path: &PathBuf| path.extension().is_some_and(|is| is == "sock");
    let paths = paths.collect::<Result<Vec<_>, _>>().context("listing doors")?;
    Ok(paths.into_iter().find(is_door))
}

/// What the process does: of the pages that never change, as the snapshot has them, it
/// reads every other one, and has the kernel write the same bytes to the others.
pub(crate) fn take_part(door: &Path, memory: &Path) -> anyhow::Result<()> {
    let attached = Attached::connect(door)?;
    let [region] = attached.regions() else { anyhow::bail!("not one region") };
    ensure!(region.gpa == 0, "memory begins at {:#x}", region.gpa);
    let file = File::open(memory).with_context(|| memory.display().to_string())?;
    let (mut page, mut same, mut still) = ([0; PAGE], [0; PAGE], 0);
    for at in (0..region.memory.len()).step_by(PAGE) {
        file.read_exact_at(&mut page, at as u64).context("reading the snapshot")?;
        if still_page(&page).map_err(|error| anyhow::anyhow!("{error}"))?.is_none() {
            continue;
        }
        still += 1;
        if still % 2 == 0 {
            let range = at..at + PAGE;
            region.memory.read_from_file(file.as_fd(), range).context("writing by the kernel")?;
        }
        region.memory.read(at, &mut same);
        ensure!(page == same, "the page at {at:#x} is not what the snapshot has");
    }
    ensure!(still > 0, "no page that never changes");
    println!("the back-end: {still} pages, every other one written");
    Ok(())
}
