//! A source that breaks its promise to deliver what was asked for.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmpager_core::{
    ByteRange, PageData, PageReader, PageSource, Priority, ReadId, ReadRequest, SourceError,
};

use super::{PAGE, numbered};

/// A numbered source that delivers half of each read of one page.
pub(crate) fn short_source(pages: usize, short: usize) -> Arc<ShortSource> {
    Arc::new(ShortSource { inner: numbered(pages), short: (short * PAGE) as u64 })
}

#[derive(Debug)]
pub(crate) struct ShortSource {
    inner: Arc<vmpager_store::MemorySource>,
    short: u64,
}

impl PageSource for ShortSource {
    fn name(&self) -> Arc<str> {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn fingerprint(&self) -> u64 {
        self.inner.fingerprint()
    }

    fn visit_zero_ranges(&self, _: &mut dyn FnMut(ByteRange)) {}

    fn open_reader(self: Arc<Self>) -> Result<Box<dyn PageReader>, SourceError> {
        let inner = self.inner.clone().open_reader()?;
        Ok(Box::new(ShortReader { inner, short: self.short, submitted: Vec::new() }))
    }
}

#[derive(Debug)]
struct ShortReader {
    inner: Box<dyn PageReader>,
    short: u64,
    submitted: Vec<ReadRequest>,
}

impl PageReader for ShortReader {
    fn try_read(&mut self, _: ByteRange) -> Result<Option<PageData<'_>>, SourceError> {
        Ok(None)
    }

    fn submit(&mut self, request: ReadRequest) {
        self.submitted.push(request);
        self.inner.submit(request);
    }

    fn promote(&mut self, _: ReadId, _: Priority) {}

    fn complete(&mut self, done: &mut dyn FnMut(ReadId, Result<PageData<'_>, SourceError>)) {
        let Self { inner, short, submitted } = self;
        inner.complete(&mut |id, result| {
            let at = submitted.iter().position(|request| request.id == id).unwrap();
            let range = submitted.swap_remove(at).range;
            let is_short = (range.start..range.end()).contains(short);
            done(
                id,
                result.map(|data| match data {
                    PageData::Bytes(bytes) if is_short => {
                        PageData::Bytes(&bytes[..bytes.len() / 2])
                    }
                    whole => whole,
                }),
            );
        });
    }

    fn ready_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.ready_fd()
    }
}
