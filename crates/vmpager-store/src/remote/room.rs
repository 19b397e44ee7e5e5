//! Keeping the directory of the cache within its limit. All of it is done under the
//! lock of the directory.
//!
//! Images that nobody uses go first, those that were not used for the longest time
//! before others. Of images in use, one that has more than its share gives its end
//! away: its first frames are what VMs need first. What does not fit then is not kept:
//! a VM that touches all of an image larger than the cache would otherwise find at its
//! next start only what it needs last.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fallocate, flock};
use rustix::io::Errno;

use super::cache::SUFFIX;

/// What file systems give room in.
pub(crate) const BLOCK: u64 = 4096;

/// An image's file.
#[derive(Debug)]
struct Entry {
    path: PathBuf,
    /// What it takes on disk.
    bytes: u64,
    used: SystemTime,
}

/// Makes room for `need` bytes more in a directory that may have `limit`. Whether
/// there is. Of `own`, the file that the room is for, nothing is taken.
pub(crate) fn make(path: &Path, limit: u64, need: u64, own: Option<&Path>) -> io::Result<bool> {
    let mut entries = entries(path)?;
    let mut used: u64 = entries.iter().map(|entry| entry.bytes).sum();
    if used + need <= limit {
        return Ok(true);
    }
    // A little more, so that this is not done for each frame.
    let goal = limit.saturating_sub(need).saturating_sub(limit / 16);
    entries.sort_by_key(|entry| entry.used);
    let mut in_use = Vec::new();
    for entry in entries {
        if used > goal && remove_unused(&entry)? {
            used -= entry.bytes;
        } else {
            in_use.push(entry);
        }
    }
    let share = limit / (in_use.len() as u64).max(1);
    in_use.sort_by_key(|entry| std::cmp::Reverse(entry.bytes));
    let greedy = |entry: &&Entry| entry.bytes > share && own != Some(&entry.path);
    for entry in in_use.iter().filter(greedy) {
        if used <= goal {
            break;
        }
        let keep = entry.bytes.saturating_sub(used - goal).max(share.min(goal));
        used -= shorten(&entry.path, keep)?;
    }
    Ok(used + need <= limit)
}

fn entries(path: &Path) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().ends_with(SUFFIX.as_bytes()) {
            continue;
        }
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_file() {
            let (bytes, used) = (metadata.blocks() * 512, metadata.modified()?);
            entries.push(Entry { path: entry.path(), bytes, used });
        }
    }
    Ok(entries)
}

fn open(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    File::options().read(true).write(true).custom_flags(flags).open(path)
}

/// Removes a file that no process uses. Whether it did.
fn remove_unused(entry: &Entry) -> io::Result<bool> {
    let file = open(&entry.path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    std::fs::remove_file(&entry.path)?;
    Ok(true)
}

/// Makes a hole of the end of a file, so that `keep` bytes of its contents stay.
/// Returns how much smaller it is.
fn shorten(path: &Path, keep: u64) -> io::Result<u64> {
    let file = open(path)?;
    let before = file.metadata()?;
    let (mut kept, mut from) = (0, before.len());
    for part in data(&file)? {
        let len = part.end - part.start;
        if kept + len > keep {
            from = part.start + (keep - kept);
            break;
        }
        kept += len;
    }
    let from = from.next_multiple_of(BLOCK);
    if from < before.len() {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, flags, from, before.len() - from)?;
    }
    Ok((before.blocks().saturating_sub(file.metadata()?.blocks())) * 512)
}

/// The parts of a file that are no holes.
pub(crate) fn data(mut file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut parts = Vec::new();
    let end = file.metadata()?.len();
    let mut at = 0;
    while at < end {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?;
        parts.push(start..at);
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(parts)
}
