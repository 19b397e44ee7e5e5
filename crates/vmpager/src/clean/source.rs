//! A source whose pages are kept in [`CleanPages`] as they are read.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmpager_core::{
    ByteRange, PageData, PageReader, PageSource, Priority, ReadId, ReadRequest, SourceError,
};

use super::CleanPages;

/// A source, and the pages of it that were read.
#[derive(Debug)]
pub(crate) struct CleanSource {
    inner: Arc<dyn PageSource>,
    clean: Arc<CleanPages>,
}

impl CleanSource {
    pub(crate) fn new(inner: Arc<dyn PageSource>, clean: Arc<CleanPages>) -> Arc<Self> {
        Arc::new(Self { inner, clean })
    }
}

impl PageSource for CleanSource {
    fn name(&self) -> Arc<str> {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn fingerprint(&self) -> u64 {
        self.inner.fingerprint()
    }

    fn visit_zero_ranges(&self, visit: &mut dyn FnMut(ByteRange)) {
        self.inner.visit_zero_ranges(visit);
    }

    fn open_reader(self: Arc<Self>) -> Result<Box<dyn PageReader>, SourceError> {
        let inner = self.inner.clone().open_reader()?;
        Ok(Box::new(CleanReader { inner, clean: self.clean.clone(), reads: HashMap::new() }))
    }
}

/// A read that was submitted.
#[derive(Clone, Copy, Debug)]
struct Submitted {
    request: ReadRequest,
    /// What the source was asked for: what was lacking, from the first page to the last.
    asked: ByteRange,
}

#[derive(Debug)]
struct CleanReader {
    inner: Box<dyn PageReader>,
    clean: Arc<CleanPages>,
    reads: HashMap<ReadId, Submitted>,
}

impl CleanReader {
    /// The least range that has all that is lacking; if nothing is, all of it.
    fn lacking(&self, range: ByteRange) -> ByteRange {
        let Some(first) = self.clean.gap(range) else { return range };
        let mut last = first;
        while let Some(next) = self.clean.gap(ByteRange::new(last.end(), range.end() - last.end()))
        {
            last = next;
        }
        ByteRange::new(first.start, last.end() - first.start)
    }

    fn start(&mut self, request: ReadRequest, asked: ByteRange) {
        self.reads.insert(request.id, Submitted { request, asked });
        self.inner.submit(ReadRequest { range: asked, ..request });
    }
}

impl PageReader for CleanReader {
    fn try_read(&mut self, range: ByteRange) -> Result<Option<PageData<'_>>, SourceError> {
        while let Some(gap) = self.clean.gap(range) {
            let took = match self.inner.try_read(gap)? {
                None => return Ok(None),
                Some(PageData::Bytes(bytes)) => self.clean.took(gap, bytes),
                // Others may change what is mapped.
                Some(PageData::Mapped { .. }) => false,
            };
            if !took {
                return self.inner.try_read(range);
            }
        }
        let addr = self.clean.address(range);
        Ok(Some(PageData::Mapped { addr, len: super::to_index(range.len) }))
    }

    fn at_hand_bytes(&self) -> u64 {
        self.inner.at_hand_bytes()
    }

    fn will_need(&mut self, ranges: &[ByteRange]) {
        let lacking: Vec<_> = ranges.iter().copied().filter(|it| !self.clean.has(*it)).collect();
        self.inner.will_need(&lacking);
    }

    fn submit(&mut self, request: ReadRequest) {
        let asked = self.lacking(request.range);
        self.start(request, asked);
    }

    fn promote(&mut self, id: ReadId, priority: Priority) {
        if let Some(read) = self.reads.get_mut(&id) {
            read.request.priority = priority;
        }
        self.inner.promote(id, priority);
    }

    fn complete(&mut self, done: &mut dyn FnMut(ReadId, Result<PageData<'_>, SourceError>)) {
        let Self { inner, clean, reads } = self;
        let mut again = Vec::new();
        inner.complete(&mut |id, result| {
            let Some(Submitted { request, asked }) = reads.remove(&id) else { return };
            let range = request.range;
            match result {
                Err(error) => done(id, Err(error)),
                Ok(PageData::Bytes(bytes)) if clean.took(asked, bytes) => {
                    let (addr, len) = (clean.address(range), super::to_index(range.len));
                    done(id, Ok(PageData::Mapped { addr, len }));
                }
                Ok(data) if asked == range => done(id, Ok(data)),
                // No memory for what was lacking: all of it is needed.
                Ok(_) => again.push(request),
            }
        });
        again.into_iter().for_each(|request| self.start(request, request.range));
    }

    fn ready_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.ready_fd()
    }
}
