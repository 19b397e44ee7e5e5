//! Frames on disk, for the next process that serves the same image.
//!
//! A directory holds a file for each image, named by the hash of its index, in which
//! every contents and every frame's checksum is. In that file a frame is where it is
//! in the image; what was not fetched is a hole. There is nothing else to keep right:
//! a frame is in the cache if its bytes there have its checksum. So it does not matter
//! who writes at the same time (they write the same), who dies half-way, or what a
//! power failure leaves.
//!
//! A process holds a shared lock on the files it uses (`flock`), so that others take
//! those first that nobody does. Room is made, and written to, under the lock of the
//! directory, by a thread of its own: whoever holds that lock for long keeps nobody
//! from being served.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::fs::{Advice, FlockOperation, OFlags, fadvise, flock};
use rustix::io::ReadWriteFlags;
use tracing::warn;

use crate::image::FrameRecord;

use super::Counters;
use super::queue::Packed;
use super::room;

/// Bytes that were fetched and are not written yet, at most.
const BACKLOG: usize = 16 << 20;
/// For so long a thread that fetches what nobody waits for waits for the disk.
const FOR_THE_DISK: Duration = Duration::from_secs(1);
/// Between two complaints about the disk.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);
/// Files of images in the directory end like this.
pub(crate) const SUFFIX: &str = ".frames";

/// A frame, and where it belongs.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) record: FrameRecord,
    pub(crate) packed: Packed,
}

/// The directory, and the thread that writes to it.
#[derive(Debug)]
pub(crate) struct CacheDir {
    path: PathBuf,
    bytes: u64,
    writes: Sender<(Arc<Frames>, Vec<Piece>)>,
    backlog: Arc<Backlog>,
    counters: Arc<Counters>,
}

/// How many bytes wait to be written.
#[derive(Debug, Default)]
struct Backlog {
    bytes: Mutex<usize>,
    less: Condvar,
}

impl Backlog {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes room for so many bytes, within this time. Whether there was.
    fn add(&self, bytes: usize, patience: Duration) -> bool {
        let is_full = |waiting: &mut usize| *waiting > 0 && *waiting + bytes > BACKLOG;
        let waited = self.less.wait_timeout_while(self.lock(), patience, is_full);
        let (mut waiting, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return false;
        }
        *waiting += bytes;
        true
    }

    fn remove(&self, bytes: usize) {
        *self.lock() -= bytes;
        self.less.notify_all();
    }
}

fn bytes_of(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.packed.len()).sum()
}

/// One image's file.
#[derive(Debug)]
pub(crate) struct CacheFile {
    dir: Arc<CacheDir>,
    frames: Arc<Frames>,
}

#[derive(Debug)]
struct Frames {
    path: PathBuf,
    file: File,
    /// A bit for each [`GRAIN`] of the file: there may be something in it.
    filled: Vec<AtomicU64>,
}

/// Half of a frame of the default size, packed by half.
const GRAIN: u64 = 16 << 10;

fn open(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(flags);
    let file = options.open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    Ok(file)
}

/// The lock of a directory, until it is dropped. A descriptor of its own, since
/// threads with one in common would have the lock in common.
fn locked(dir: &Path) -> io::Result<File> {
    let lock = open(&dir.join("lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    Ok(lock)
}

impl CacheDir {
    /// Opens a directory, or makes it, for up to so many bytes.
    pub(crate) fn open(path: &Path, bytes: u64, counters: &Arc<Counters>) -> io::Result<Arc<Self>> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        drop(locked(path)?);
        let (sender, receiver) = unbounded();
        let backlog = Arc::<Backlog>::default();
        let writer = Writer {
            path: path.to_owned(),
            bytes,
            backlog: Arc::clone(&backlog),
            counters: Arc::clone(counters),
            complained: None,
        };
        std::thread::Builder::new()
            .name("vmpager-cache".into())
            .spawn(move || writer.serve(&receiver))?;
        let (path, counters) = (path.to_owned(), Arc::clone(counters));
        Ok(Arc::new(Self { path, bytes, writes: sender, backlog, counters }))
    }

    /// The file of the image whose index has this hash, with the length of the image.
    pub(crate) fn image(self: &Arc<Self>, index: &[u8; 32], len: u64) -> io::Result<CacheFile> {
        let name = blake3::Hash::from_bytes(*index).to_hex();
        let path = self.path.join(format!("{name}{SUFFIX}"));
        let _locked = locked(&self.path)?;
        let file = open(&path)?;
        // Nobody has it for himself, but for as long as he has the directory's lock.
        flock(&file, FlockOperation::NonBlockingLockShared)?;
        // By this those are found that were not used for long.
        file.set_modified(SystemTime::now())?;
        let count = usize::try_from(len.div_ceil(GRAIN).div_ceil(64)).unwrap_or(0);
        let filled = std::iter::repeat_with(AtomicU64::default).take(count).collect();
        let frames = Frames { path, file, filled };
        for data in room::data(&frames.file)? {
            frames.note(data.start, data.end, true);
        }
        // The limit may have been higher when it was filled.
        room::make(&self.path, self.bytes, 0, None)?;
        Ok(CacheFile { dir: Arc::clone(self), frames: Arc::new(frames) })
    }
}

impl Frames {
    /// Says of a part of the file whether there may be something in it.
    fn note(&self, start: u64, end: u64, filled: bool) {
        for grain in start / GRAIN..end.div_ceil(GRAIN) {
            let word = usize::try_from(grain / 64).ok().and_then(|word| self.filled.get(word));
            let (Some(word), bit) = (word, 1 << (grain % 64)) else { return };
            if filled {
                word.fetch_or(bit, Ordering::Relaxed);
            } else {
                word.fetch_and(!bit, Ordering::Relaxed);
            }
        }
    }

    fn may_have(&self, record: FrameRecord) -> bool {
        (record.offset / GRAIN..record.end().div_ceil(GRAIN)).all(|grain| {
            let word = usize::try_from(grain / 64).ok().and_then(|word| self.filled.get(word));
            word.is_some_and(|word| word.load(Ordering::Relaxed) & 1 << (grain % 64) != 0)
        })
    }
}

impl CacheFile {
    /// A frame whose checksum is right, if there is one; if not `wait`, only if the
    /// kernel has it in memory.
    pub(crate) fn read(&self, record: FrameRecord, wait: bool) -> Option<Vec<u8>> {
        let mut bytes = vec![0; record.len as usize];
        if wait {
            self.frames.file.read_exact_at(&mut bytes, record.offset).ok()?;
        } else {
            if !self.may_have(record) {
                return None;
            }
            let mut bufs = [IoSliceMut::new(&mut bytes)];
            let flags = ReadWriteFlags::NOWAIT;
            let count = rustix::io::preadv2(&self.frames.file, &mut bufs, record.offset, flags);
            if count.ok()? != record.len as usize {
                return None;
            }
        }
        (crc32c::crc32c(&bytes) == record.crc).then_some(bytes)
    }

    /// Whether a frame may be there: others may have taken it away, or put it there.
    pub(crate) fn may_have(&self, record: FrameRecord) -> bool {
        self.frames.may_have(record)
    }

    /// Has the kernel read a frame that will be asked for soon.
    pub(crate) fn will_need(&self, record: FrameRecord) {
        let len = std::num::NonZeroU64::new(record.len.into());
        // It is only advice.
        let _ = fadvise(&self.frames.file, record.offset, len, Advice::WillNeed);
    }

    /// Keeps frames, soon. If the disk does not keep up, waits a little for it, if that
    /// `may_wait`, or lets them go.
    pub(crate) fn store(&self, pieces: Vec<Piece>, may_wait: bool) {
        if pieces.is_empty() {
            return;
        }
        let count = pieces.len() as u64;
        let patience = if may_wait { FOR_THE_DISK } else { Duration::ZERO };
        if !self.dir.backlog.add(bytes_of(&pieces), patience)
            || self.dir.writes.send((Arc::clone(&self.frames), pieces)).is_err()
        {
            self.dir.counters.not_stored.fetch_add(count, Ordering::Relaxed);
        }
    }
}

/// The thread that writes.
struct Writer {
    path: PathBuf,
    bytes: u64,
    backlog: Arc<Backlog>,
    counters: Arc<Counters>,
    complained: Option<Instant>,
}

impl Writer {
    fn serve(mut self, writes: &Receiver<(Arc<Frames>, Vec<Piece>)>) {
        for (frames, pieces) in writes {
            let count = pieces.len() as u64;
            let counter = match self.store(&frames, &pieces) {
                Ok(true) => &self.counters.stored,
                Ok(false) => &self.counters.not_stored,
                Err(error) => {
                    self.complain(&error);
                    &self.counters.not_stored
                }
            };
            counter.fetch_add(count, Ordering::Relaxed);
            self.backlog.remove(bytes_of(&pieces));
        }
    }

    /// Writes frames, if there is room for them.
    fn store(&self, frames: &Frames, pieces: &[Piece]) -> io::Result<bool> {
        let _locked = locked(&self.path)?;
        // In whole blocks, at both ends.
        let bytes = pieces.iter().map(|piece| piece.packed.len() as u64 + 2 * room::BLOCK).sum();
        if !room::make(&self.path, self.bytes, bytes, Some(&frames.path))? {
            return Ok(false);
        }
        for Piece { record, packed } in pieces {
            frames.file.write_all_at(packed, record.offset)?;
            frames.note(record.offset, record.end(), true);
        }
        // That also says when the file was last used.
        Ok(true)
    }

    fn complain(&mut self, error: &io::Error) {
        let now = Instant::now();
        if self.complained.is_none_or(|before| now - before > COMPLAIN_EVERY) {
            self.complained = Some(now);
            warn!(
                "the cache in {} takes nothing more: {error}; what is not kept is fetched again",
                self.path.display()
            );
        }
    }
}
