//! Raw memory files: byte `n` of the file is byte `n` of guest memory.
//!
//! Bytes in the page cache are at hand, and are best not copied by this
//! process at all: a reader lends addresses in a mapping of the file, from
//! which `UFFDIO_COPY` copies straight out of the page cache. Others are read
//! in the background, by io_uring or by threads.

mod holes;
mod identity;
mod open;
mod reader;
mod residency;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmpager_core::{ByteRange, PageReader, PageSource, SourceError};
use vmpager_sys::file_map::FileMap;

use crate::background::{self, Background};
use crate::doorbell::Doorbell;
use crate::executor::Executor;
use crate::threads::ReadThreads;

use open::Storage;
use reader::RawReader;

pub(crate) use holes::Holes;
pub(crate) use identity::Identity;
pub use open::OpenError;
pub(crate) use open::{open as open_raw, open_at_once};

/// A mapping may enter the page tables in units of this many bytes, whatever
/// was touched: that is how page-cache folios of this size are mapped.
const MAP_UNIT: u64 = 2 << 20;
/// Under a bound on mapped bytes, shorter ranges are read rather than mapped.
const MAP_FROM: u64 = 64 << 10;
/// Longest range to copy on the caller's thread.
const COPY_MAX: u64 = 256 << 10;

/// Who carries out background reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring if the kernel allows it, else threads.
    #[default]
    Auto,
    /// io_uring; opening a reader fails where it is not allowed.
    IoUring,
    /// Four threads per file.
    Threads,
}

/// How to open a [`RawFile`].
#[derive(Clone, Debug)]
pub struct RawFileOptions {
    max_mapped: Option<u64>,
    max_buffered: usize,
    backend: Backend,
}

impl Default for RawFileOptions {
    fn default() -> Self {
        Self { max_mapped: None, max_buffered: 4 << 20, backend: Backend::Auto }
    }
}

impl RawFileOptions {
    /// Bounds how many bytes of the file may be entered in this process's page
    /// tables at a time, by all readers together. They are page cache, shared
    /// with every other user of the file, but count as this process's resident
    /// memory (RssFile).
    ///
    /// Unlimited by default, which is fastest. Under a bound, ranges below
    /// 64 KiB are copied out of the page cache by read calls (0.3 to 0.7 µs
    /// more a page), longer ones are mapped and forgotten again; they count in
    /// units of 2 MiB, so a bound below that means no mapping at all.
    #[must_use]
    pub fn max_mapped(mut self, bytes: u64) -> Self {
        self.max_mapped = Some(bytes);
        self
    }

    /// Bounds the bytes one reader has in background reads, 4 MiB by default.
    /// Demands may go 1 MiB beyond, and one read may always run, however long.
    /// Idle buffers are kept up to half of it.
    #[must_use]
    pub fn max_buffered(mut self, bytes: usize) -> Self {
        self.max_buffered = bytes;
        self
    }

    /// Chooses who carries out background reads.
    #[must_use]
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Opens a file with these options.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(self, path: impl AsRef<Path>) -> Result<Arc<RawFile>, OpenError> {
        let path = path.as_ref();
        let file = open::open(path)?;
        let failed = |error| OpenError::Open { path: path.to_owned(), error };
        // Before the holes: a writer that fills one is then noticed.
        let identity = Identity::of(&file).map_err(failed)?;
        let holes = Holes::find(&file, identity.len);
        let (storage, mappable) = Storage::of(&file);
        // Without a mapping (no address space?) everything can still be read.
        let knowable = storage == Storage::Memory || open::residency_is_known(&file);
        let map = if mappable && knowable { FileMap::new(&file, identity.len).ok() } else { None };
        Ok(Arc::new(RawFile {
            name: path.display().to_string().into(),
            file,
            identity,
            holes,
            storage,
            map,
            mapped: AtomicU64::new(0),
            threads: Mutex::new(None),
            options: self,
        }))
    }
}

/// A raw memory file as a [`PageSource`].
///
/// A file that is modified or cut short while it is served is noticed within
/// about 10 ms by reads at hand, and after each background read; the two
/// signs are its length and its modification time. Bytes that somebody writes
/// through a shared mapping of their own may go unnoticed for longer.
///
/// Per reader: 1.5 times [`max_buffered`](RawFileOptions::max_buffered) plus
/// 1 MiB of read buffers, 256 KiB to copy into and 32 KiB of what is known of
/// the page cache, at most. Per file: 8 bytes
/// a hole, 4 MiB at most (more holes are taken for data).
#[derive(Debug)]
pub struct RawFile {
    name: Arc<str>,
    file: File,
    identity: Identity,
    holes: Holes,
    storage: Storage,
    /// Present only if what is resident in it can be known.
    map: Option<FileMap>,
    /// Bytes reserved against `max_mapped`.
    mapped: AtomicU64,
    threads: Mutex<Option<Arc<ReadThreads>>>,
    options: RawFileOptions,
}

/// How to come by a range without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Lend its address in the mapping. The range is what to forget afterwards.
    Map(Option<ByteRange>),
    /// Copy it, if it is in the page cache.
    CopyCached,
    /// Copy it: storage is memory.
    Copy,
    /// Not at all.
    Submit,
}

impl RawFile {
    /// Opens a file with default options.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>, OpenError> {
        RawFileOptions::default().open(path)
    }

    /// Options to open a file with.
    pub fn options() -> RawFileOptions {
        RawFileOptions::default()
    }

    fn way(&self, range: ByteRange) -> Way {
        if let Some(map) = &self.map {
            let Some(limit) = self.options.max_mapped else { return Way::Map(None) };
            if range.len >= MAP_FROM || self.storage == Storage::Waits {
                let unit = map_units(map, range);
                if self.reserve(unit.len, limit) {
                    return Way::Map(Some(unit));
                }
            }
        }
        match self.storage {
            _ if range.len > COPY_MAX => Way::Submit,
            Storage::Memory => Way::Copy,
            Storage::Nowait => Way::CopyCached,
            Storage::Waits => Way::Submit,
        }
    }

    fn reserve(&self, bytes: u64, limit: u64) -> bool {
        let before = self.mapped.fetch_add(bytes, Ordering::Relaxed);
        let fits = before.saturating_add(bytes) <= limit;
        if !fits {
            self.mapped.fetch_sub(bytes, Ordering::Relaxed);
        }
        fits
    }

    /// Drops a reserved range from the page tables, then the reservation.
    fn forget(&self, range: ByteRange) {
        if let Some(map) = &self.map {
            // It can only fail for a range that is not mapped.
            let _ = map.forget(range.start..range.end());
        }
        self.mapped.fetch_sub(range.len, Ordering::Relaxed);
    }

    /// Whether the file is still what was opened, now.
    fn check(&self, range: ByteRange) -> Result<(), SourceError> {
        let now = Identity::of(&self.file).map_err(|error| self.failed(range, error))?;
        self.identity.judge(now, &self.name, range)
    }

    fn failed(&self, range: ByteRange, error: io::Error) -> SourceError {
        SourceError::Io { name: Arc::clone(&self.name), range, error: Arc::new(error) }
    }

    fn open_background(&self) -> io::Result<Background> {
        let bell = Arc::new(Doorbell::new()?);
        let ring = |file: File| Executor::ring(file, background::DEPTH, &bell);
        let executor = match self.options.backend {
            Backend::IoUring => ring(self.file.try_clone()?)?,
            Backend::Threads => Executor::threads(&self.threads()?, &bell),
            Backend::Auto => match ring(self.file.try_clone()?) {
                Ok(ring) => ring,
                Err(_) => Executor::threads(&self.threads()?, &bell),
            },
        };
        Ok(Background::new(executor, bell, self.options.max_buffered))
    }

    fn threads(&self) -> io::Result<Arc<ReadThreads>> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(threads) = &*threads {
            return Ok(Arc::clone(threads));
        }
        let spawned = Arc::new(ReadThreads::spawn(self.file.try_clone()?)?);
        *threads = Some(Arc::clone(&spawned));
        Ok(spawned)
    }
}

/// The part of the mapping that touching a range can enter in the page tables.
fn map_units(map: &FileMap, range: ByteRange) -> ByteRange {
    // Units are aligned in addresses; the mapping need not be.
    let base = map.addr_of(0) as u64;
    let start = (base + range.start) / MAP_UNIT * MAP_UNIT;
    let end = (base + range.end()).next_multiple_of(MAP_UNIT);
    let start = start.max(base) - base;
    ByteRange::new(start, (end - base).min(map.len()) - start)
}

impl PageSource for RawFile {
    fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    fn len(&self) -> u64 {
        self.identity.len
    }

    fn fingerprint(&self) -> u64 {
        self.identity.fingerprint()
    }

    fn visit_zero_ranges(&self, visit: &mut dyn FnMut(ByteRange)) {
        self.holes.iter().for_each(visit);
    }

    fn open_reader(self: Arc<Self>) -> Result<Box<dyn PageReader>, SourceError> {
        let background = self
            .open_background()
            .map_err(|error| self.failed(ByteRange::new(0, self.len()), error))?;
        Ok(Box::new(RawReader::new(self, background)))
    }
}
