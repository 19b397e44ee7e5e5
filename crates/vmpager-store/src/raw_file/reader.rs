//! One worker's way into a raw memory file.

use std::io::{self, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::{Errno, ReadWriteFlags};
use rustix::time::{ClockId, clock_gettime};
use vmpager_core::{
    ByteRange, PageData, PageReader, PageSource, Priority, ReadId, ReadRequest, SourceError,
};
use vmpager_sys::file_map::FileMap;

use crate::PAGE;
use crate::background::{Background, Outcome};
use crate::readahead;

use super::identity::Identity;
use super::open::Storage;
use super::residency::Residency;
use super::{RawFile, Way};

/// How long the file is taken to be unmodified after it was looked at.
const TRUST: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(crate) struct RawReader {
    file: Arc<RawFile>,
    background: Background,
    residency: Residency,
    /// When the file was last looked at, and what it was then.
    seen: Option<(Duration, Identity)>,
    /// Lent by the last call, and reserved until the next.
    lent: Option<ByteRange>,
    scratch: Vec<u8>,
}

impl RawReader {
    pub(crate) fn new(file: Arc<RawFile>, background: Background) -> Self {
        Self {
            file,
            background,
            residency: Residency::new(),
            seen: None,
            lent: None,
            scratch: Vec::new(),
        }
    }

    fn take_back(&mut self) {
        if let Some(range) = self.lent.take() {
            self.file.forget(range);
        }
    }

    /// Refuses ranges of a file that is not what it was some milliseconds ago.
    fn check_lately(&mut self, range: ByteRange, now: Duration) -> Result<(), SourceError> {
        let identity = match self.seen {
            Some((at, identity)) if now.saturating_sub(at) < TRUST => identity,
            _ => {
                let identity = Identity::of(&self.file.file)
                    .map_err(|error| self.file.failed(range, error))?;
                self.seen = Some((now, identity));
                identity
            }
        };
        self.file.identity.judge(identity, &self.file.name, range)
    }

    /// The address of a range whose pages can be read through the mapping
    /// without waiting.
    fn mapped(&mut self, range: ByteRange, now: Duration) -> Result<Option<usize>, SourceError> {
        let file = &*self.file;
        let Some(map) = &file.map else { return Ok(None) };
        let pages = whole_pages(range);
        if file.storage != Storage::Memory {
            let resident = self.residency.holds(map, pages, now);
            if !resident.map_err(|error| file.failed(range, error))? {
                return Ok(None);
            }
        }
        if pages.len > PAGE && !enter(map, pages) {
            // Truncated, most likely; else the background read will tell.
            file.check(range)?;
            return Ok(None);
        }
        Ok(Some(map.addr_of(range.start)))
    }

    fn lend(
        &mut self,
        range: ByteRange,
        reserved: Option<ByteRange>,
        now: Duration,
    ) -> Result<Option<PageData<'_>>, SourceError> {
        self.lent = reserved;
        let address = self.mapped(range, now);
        if !matches!(address, Ok(Some(_))) {
            self.take_back();
        }
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        Ok(address?.map(|addr| PageData::Mapped { addr, len }))
    }

    fn copy(
        &mut self,
        range: ByteRange,
        read: impl Fn(&RawFile, &mut [u8], u64) -> io::Result<usize>,
    ) -> Result<Option<PageData<'_>>, SourceError> {
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        if self.scratch.len() < len {
            self.scratch.resize(len, 0);
        }
        let buf = &mut self.scratch[..len];
        match read(&self.file, buf, range.start) {
            Ok(n) if n == len => Ok(Some(PageData::Bytes(buf))),
            // The rest is not at hand, or not there at all.
            Ok(_) => self.file.check(range).map(|()| None),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AGAIN | Errno::INTR) => Ok(None),
                _ => Err(self.file.failed(range, error)),
            },
        }
    }
}

impl PageReader for RawReader {
    fn try_read(&mut self, range: ByteRange) -> Result<Option<PageData<'_>>, SourceError> {
        self.take_back();
        if range.end() > self.file.identity.len {
            let (name, len) = (Arc::clone(&self.file.name), self.file.identity.len);
            return Err(SourceError::Truncated { name, range, len });
        }
        let now = coarse_now();
        self.check_lately(range, now)?;
        match self.file.way(range) {
            Way::Map(reserved) => self.lend(range, reserved, now),
            Way::CopyCached => self.copy(range, |file, buf, offset| {
                let mut bufs = [IoSliceMut::new(buf)];
                let flags = ReadWriteFlags::NOWAIT;
                Ok(rustix::io::preadv2(&file.file, &mut bufs, offset, flags)?)
            }),
            Way::Copy => self.copy(range, |file, buf, offset| file.file.read_at(buf, offset)),
            Way::Submit => Ok(None),
        }
    }

    fn will_need(&mut self, ranges: &[ByteRange]) {
        readahead::fetch(&self.file.file, ranges.iter().copied());
    }

    fn submit(&mut self, request: ReadRequest) {
        self.take_back();
        self.background.submit(request);
    }

    fn promote(&mut self, id: ReadId, priority: Priority) {
        self.background.promote(id, priority);
    }

    fn complete(&mut self, done: &mut dyn FnMut(ReadId, Result<PageData<'_>, SourceError>)) {
        self.take_back();
        if !self.background.collect() {
            return;
        }
        // All of these reads had ended by now, so one look serves them all.
        let file = &*self.file;
        let now = Identity::of(&file.file).map_err(Arc::new);
        let judge = |range| match &now {
            Ok(now) => file.identity.judge(*now, &file.name, range),
            Err(error) => {
                let (name, error) = (Arc::clone(&file.name), Arc::clone(error));
                Err(SourceError::Io { name, range, error })
            }
        };
        self.background.deliver(|id, range, outcome| {
            let result = judge(range).and_then(|()| match outcome {
                Outcome::Complete(buf) => Ok(PageData::Bytes(buf)),
                Outcome::EndOfFile => Err(SourceError::Truncated {
                    name: file.name(),
                    range,
                    len: now.as_ref().map_or(0, |now| now.len),
                }),
                Outcome::Failed(error) => Err(file.failed(range, copy_of(error))),
            });
            done(id, result);
        });
    }

    fn ready_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.background.ready_fd())
    }
}

impl Drop for RawReader {
    fn drop(&mut self) {
        self.take_back();
    }
}

/// Enters pages known to be in the page cache in the page tables, so that the
/// kernel does not stop for each of them while it copies.
fn enter(map: &FileMap, pages: ByteRange) -> bool {
    match map.populate(pages.start..pages.end()) {
        Ok(()) => true,
        // Before Linux 5.14 it has to stop.
        Err(error) => Errno::from_io_error(&error) == Some(Errno::INVAL),
    }
}

fn whole_pages(range: ByteRange) -> ByteRange {
    let start = range.start / PAGE * PAGE;
    ByteRange::new(start, range.end().next_multiple_of(PAGE) - start)
}

fn copy_of(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)
}

/// The time since some past moment, to some milliseconds: a tenth of the price
/// of the exact time.
fn coarse_now() -> Duration {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    Duration::try_from(now).unwrap_or_default()
}
