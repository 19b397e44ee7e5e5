//! Snapshots of guests under load.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::Lab;
use super::beat::Beat;
use super::guest::{Guest, Size};
use crate::cpus::guest_command;
use crate::pages::{PAGE, still_page};

/// Bytes of memory files that are read at a time.
const PIECE: usize = 64 * PAGE;

/// A snapshot.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    pub(super) state: PathBuf,
    pub(super) memory: PathBuf,
    /// The guest's last line before it was taken.
    beat: Beat,
    /// For how long the guest may have run after that line.
    ran_on: Duration,
    size: Size,
}

impl Saved {
    /// The snapshot that the tests of one boot share: of a guest of that size,
    /// taken while its load was running.
    pub(super) fn shared(lab: &Lab, size: &Size) -> anyhow::Result<Self> {
        let dir =
            lab.scratch.join(format!("shared-{}-{}-{}", size.vcpus, size.still, size.readers));
        let line = dir.join("beat");
        if !line.exists() {
            let mut guest = Guest::boot(lab, size)?;
            guest.work(1000)?;
            let (beat, ran_on) = save(lab, guest, &dir)?;
            // The last file: with it the snapshot is complete.
            fs::write(&line, format!("{} {beat}", ran_on.as_millis()))
                .with_context(|| format!("writing {}", line.display()))?;
        }
        let text = fs::read_to_string(&line).with_context(|| line.display().to_string())?;
        let read = text.split_once(' ').and_then(|(millis, beat)| {
            Some((Duration::from_millis(millis.parse().ok()?), Beat::parse(beat)?))
        });
        let (ran_on, beat) = read.with_context(|| format!("{} has no beat", line.display()))?;
        Ok(Self::in_dir(&dir, beat, ran_on, size))
    }

    /// Takes a snapshot in this directory, and ends the guest.
    pub(super) fn of(lab: &Lab, guest: Guest, size: &Size) -> anyhow::Result<Self> {
        let dir = PathBuf::from("saved");
        let (beat, ran_on) = save(lab, guest, &dir)?;
        Ok(Self::in_dir(&dir, beat, ran_on, size))
    }

    fn in_dir(dir: &Path, beat: Beat, ran_on: Duration, size: &Size) -> Self {
        let (state, memory) = (dir.join("state"), dir.join("memory"));
        Self { state, memory, beat, ran_on, size: *size }
    }

    /// Takes the next snapshot, of a guest restored from this one.
    pub(super) fn succeed(&self, lab: &Lab, guest: Guest) -> anyhow::Result<Self> {
        Self::of(lab, guest, &self.size)
    }

    /// Restores it. The guest must go on where it was.
    pub(super) fn restore(&self, lab: &Lab, mode: &[&str]) -> anyhow::Result<Guest> {
        let begin = Instant::now();
        let mut guest = self.start(lab, mode, "control")?;
        self.goes_on(&mut guest, begin)?;
        Ok(guest)
    }

    /// Restores it, and does not wait for anything. Of several guests in one
    /// directory, each needs a name.
    pub(super) fn start(&self, lab: &Lab, mode: &[&str], name: &str) -> anyhow::Result<Guest> {
        let mut command = guest_command(lab, &lab.vmpager);
        command.args(["vm", "restore", "--state"]).arg(&self.state);
        command.arg("--memory").arg(&self.memory).arg("--memory-mode").args(mode);
        Ok(Guest::start(&mut command, name)?.patient(&self.size))
    }

    /// Waits for the guest's first words, which must show that it goes on where
    /// it was.
    pub(super) fn goes_on(&self, guest: &mut Guest, since: Instant) -> anyhow::Result<()> {
        let beat = guest.beat()?;
        let before = &self.beat;
        ensure!(
            beat.goes_on_from(before, self.ran_on + since.elapsed()),
            "it did not go on where it was: {before:?} before, {beat:?} after"
        );
        Ok(())
    }

    /// Compares, in the memory of a guest that was restored from this snapshot,
    /// the pages that no guest ever touches for writing.
    pub(super) fn compare(&self, later: &Path) -> anyhow::Result<()> {
        let (before, after) = (open(&self.memory)?, open(later)?);
        let len = before.metadata().context("the memory file")?.len();
        let is = after.metadata().with_context(|| later.display().to_string())?.len();
        ensure!(is == len, "{} has {is} bytes, not {len}", later.display());
        let mut still = vec![false; self.size.still];
        let (mut old, mut new) = (vec![0; PIECE], vec![0; PIECE]);
        let mut at = 0;
        // What is a hole in the snapshot has no such page.
        while let Some(data) = next_data(&before, at).context("the memory file")? {
            at = len.min(data + PIECE as u64);
            let piece = usize::try_from(at - data)?;
            for (file, bytes) in [(&before, &mut old), (&after, &mut new)] {
                file.read_exact_at(&mut bytes[..piece], data).context("reading memory files")?;
            }
            let pages = old[..piece].chunks_exact(PAGE).zip(new.chunks_exact(PAGE));
            for (number, (page, same)) in (data / PAGE as u64..).zip(pages) {
                let found = still_page(page).map_err(|error| anyhow::anyhow!("{error}"))?;
                let Some(found) = found else { continue };
                ensure!(page == same, "page {number} of memory, which is never written, changed");
                let seen = usize::try_from(found).ok().and_then(|at| still.get_mut(at));
                *seen.with_context(|| format!("an unchanging page with number {found}"))? = true;
            }
        }
        let missing = still.iter().filter(|seen| !**seen).count();
        ensure!(missing == 0, "{missing} of the pages that never change are not in memory");
        Ok(())
    }

    /// A copy of the snapshot in this directory, in which one byte of one page
    /// that never changes is another.
    pub(super) fn broken(&self) -> anyhow::Result<Self> {
        let memory = PathBuf::from("broken");
        let mut bytes = fs::read(&self.memory).context("the memory file")?;
        let wanted = self.size.still as u64 / 2;
        let is_wanted = |page: &[u8]| still_page(page) == Ok(Some(wanted));
        let at = bytes.chunks_exact(PAGE).position(is_wanted);
        let at = at.with_context(|| format!("no unchanging page {wanted} in memory"))?;
        bytes[at * PAGE + 1234] ^= 1;
        fs::write(&memory, bytes).context("writing the broken memory file")?;
        Ok(Self { memory, ..self.clone() })
    }
}

/// Takes a snapshot and ends the guest; its last line before, and for how long it may
/// have run after that. (On a busy machine the pause comes late.)
fn save(lab: &Lab, mut guest: Guest, dir: &Path) -> anyhow::Result<(Beat, Duration)> {
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let begin = Instant::now();
    guest.snapshot(lab, &dir.join("state"), &dir.join("memory"), true)?;
    let status = guest.wait()?;
    ensure!(status.success(), "a VM that was saved and stopped ended with {status}");
    Ok((guest.last_beat()?, begin.elapsed()))
}

fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("opening {}", path.display()))
}

/// Where the next page is that may not be zero, from a page on.
fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(from)) {
        Ok(data) => Ok(Some(data - data % PAGE as u64)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
