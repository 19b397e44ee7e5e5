//! Bytes in this process as a source: always at hand.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use vmpager_core::{
    ByteRange, PageData, PageReader, PageSource, Priority, ReadId, ReadRequest, SourceError,
};

use crate::PAGE;
use crate::doorbell::Doorbell;

/// A source whose bytes lie in this process, for tests and benchmarks.
#[derive(Debug)]
pub struct MemorySource {
    name: Arc<str>,
    bytes: Vec<u8>,
    zero_ranges: Vec<ByteRange>,
    fingerprint: OnceLock<u64>,
}

impl MemorySource {
    /// A source of these bytes, made up to whole pages with zeroes.
    pub fn new(mut bytes: Vec<u8>) -> Self {
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        let fingerprint = OnceLock::new();
        Self { name: "memory".into(), bytes, zero_ranges: Vec::new(), fingerprint }
    }

    /// A source in which every 8-byte word differs from every other: it holds
    /// its own offset plus one, little-endian. No page is zero.
    pub fn numbered(pages: u64) -> Self {
        let words = (0..pages * PAGE).step_by(8);
        Self::new(words.flat_map(|offset| (offset + 1).to_le_bytes()).collect())
    }

    /// Gives it another name than "memory".
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// Makes these ranges, in ascending order, zero and known to be so.
    ///
    /// # Panics
    ///
    /// If a range is not within the source.
    #[must_use]
    pub fn with_zero_ranges(mut self, ranges: Vec<ByteRange>) -> Self {
        for &range in &ranges {
            let part = span(&self.bytes, range).expect("zero ranges lie within the source");
            self.bytes[part].fill(0);
        }
        self.zero_ranges = ranges;
        self
    }

    /// Its contents.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn read(&self, range: ByteRange) -> Result<PageData<'_>, SourceError> {
        match span(&self.bytes, range) {
            Some(part) => Ok(PageData::Bytes(&self.bytes[part])),
            None => Err(SourceError::Truncated {
                name: Arc::clone(&self.name),
                range,
                len: self.bytes.len() as u64,
            }),
        }
    }
}

fn span(bytes: &[u8], range: ByteRange) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(range.start).ok()?;
    let end = usize::try_from(range.end()).ok()?;
    (start <= end && end <= bytes.len()).then_some(start..end)
}

impl PageSource for MemorySource {
    fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn fingerprint(&self) -> u64 {
        *self.fingerprint.get_or_init(|| crate::fingerprint(&self.bytes))
    }

    fn visit_zero_ranges(&self, visit: &mut dyn FnMut(ByteRange)) {
        self.zero_ranges.iter().copied().for_each(visit);
    }

    fn open_reader(self: Arc<Self>) -> Result<Box<dyn PageReader>, SourceError> {
        let bell = Doorbell::new().map_err(|error| SourceError::Io {
            name: self.name(),
            range: ByteRange::new(0, self.len()),
            error: Arc::new(error),
        })?;
        Ok(Box::new(MemoryReader { source: self, bell, submitted: Vec::new() }))
    }
}

#[derive(Debug)]
struct MemoryReader {
    source: Arc<MemorySource>,
    bell: Doorbell,
    submitted: Vec<ReadRequest>,
}

impl PageReader for MemoryReader {
    fn try_read(&mut self, range: ByteRange) -> Result<Option<PageData<'_>>, SourceError> {
        self.source.read(range).map(Some)
    }

    fn submit(&mut self, request: ReadRequest) {
        self.submitted.push(request);
        self.bell.ring();
    }

    fn promote(&mut self, _id: ReadId, _priority: Priority) {}

    fn complete(&mut self, done: &mut dyn FnMut(ReadId, Result<PageData<'_>, SourceError>)) {
        if self.submitted.is_empty() {
            return;
        }
        self.bell.clear();
        for request in self.submitted.drain(..) {
            done(request.id, self.source.read(request.range));
        }
    }

    fn ready_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bell.as_fd())
    }
}
