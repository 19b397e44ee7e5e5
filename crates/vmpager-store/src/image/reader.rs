//! One worker's way into an image.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, PoisonError};

use vmpager_core::{
    ByteRange, PageData, PageReader, PageSource, Priority, ReadId, ReadRequest, SourceError,
};

use super::PAGE_BYTES;
use crate::PAGE;
use crate::buffers::BufferPool;
use crate::doorbell::Doorbell;
use crate::queue::ReadQueue;
use crate::remote::Frames;

use super::contents::{Contents, Tools, Wait};
use super::decoders::{DecodeClient, Decoders, Job};
use super::index::Kind;
use super::{Image, page_range};

/// The most bytes read and decoded at once on the worker's own thread, which
/// serves nobody meanwhile: a quarter of a millisecond's worth.
const AT_ONCE: u64 = 256 << 10;
/// The most bytes to decode for that, if the pages lie in many frames.
const DECODE_AT_ONCE: usize = 512 << 10;

/// Reads given to the decoders at a time; the others wait here, where a demand
/// overtakes. With the buffers of each, that bounds the memory of a reader.
const DEPTH: usize = 8;
/// Of which the fill may have so many.
const FILL_DEPTH: usize = 4;
/// And prefetch and fill together, so that a demand finds room.
const PREFETCH_DEPTH: usize = 6;
/// Bytes of buffers to keep for the next reads.
const IDLE_BYTES: usize = 2 << 20;

impl PageSource for Image {
    fn name(&self) -> Arc<str> {
        Arc::clone(&self.contents.name)
    }

    fn len(&self) -> u64 {
        self.memory_bytes()
    }

    fn fingerprint(&self) -> u64 {
        crate::fingerprint(self.content().as_bytes())
    }

    fn visit_zero_ranges(&self, visit: &mut dyn FnMut(ByteRange)) {
        for span in self.contents.index.spans().filter(|span| span.kind == Kind::Zero) {
            visit(ByteRange::new(u64::from(span.first) * PAGE, u64::from(span.count) * PAGE));
        }
    }

    fn open_reader(self: Arc<Self>) -> Result<Box<dyn PageReader>, SourceError> {
        let failed = |error| SourceError::Io {
            name: self.name(),
            range: ByteRange::new(0, self.len()),
            error: Arc::new(error),
        };
        let bell = Arc::new(Doorbell::new().map_err(failed)?);
        let client = self.decoders().map_err(failed)?.client(Arc::clone(&bell));
        Ok(Box::new(ImageReader {
            contents: Arc::clone(&self.contents),
            client,
            bell,
            tools: Tools::new(),
            scratch: Vec::new(),
            waiting: ReadQueue::new(),
            running: HashMap::new(),
            fills: 0,
            buffers: BufferPool::new(IDLE_BYTES),
        }))
    }
}

impl Image {
    /// The threads that decode, started when they are first needed.
    fn decoders(&self) -> io::Result<Arc<Decoders>> {
        let mut decoders = self.decoders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(decoders) = &*decoders {
            return Ok(Arc::clone(decoders));
        }
        let spawned = Arc::new(Decoders::spawn(&self.contents)?);
        *decoders = Some(Arc::clone(&spawned));
        Ok(spawned)
    }
}

#[derive(Debug)]
struct ImageReader {
    contents: Arc<Contents>,
    client: DecodeClient,
    bell: Arc<Doorbell>,
    tools: Tools,
    scratch: Vec<u8>,
    /// Reads that the decoders have not been given yet.
    waiting: ReadQueue<ReadId, (ByteRange, bool)>,
    /// Those they have.
    running: HashMap<ReadId, (ByteRange, Priority)>,
    fills: usize,
    buffers: BufferPool,
}

impl ImageReader {
    fn start_next(&mut self) {
        while let Some((priority, _)) = self.waiting.peek() {
            let full = match priority {
                Priority::Demand => self.running.len() >= DEPTH,
                Priority::Prefetch => self.running.len() >= PREFETCH_DEPTH,
                Priority::Fill => self.running.len() >= PREFETCH_DEPTH || self.fills >= FILL_DEPTH,
            };
            let Some((id, priority, (range, here_only))) =
                (!full).then(|| self.waiting.pop()).flatten()
            else {
                return;
            };
            let pages = page_range(range);
            let buf = self.buffers.take(pages.len() * PAGE_BYTES);
            self.fills += usize::from(priority == Priority::Fill);
            self.running.insert(id, (range, priority));
            self.client.start(id, priority, Job { pages, buf, fetched: Frames::new(), here_only });
        }
    }
}

/// The part of whole pages that a range is.
fn part(pages: &[u8], range: ByteRange) -> PageData<'_> {
    let skip = usize::try_from(range.start % PAGE).unwrap_or(0);
    let len = usize::try_from(range.len).unwrap_or(usize::MAX);
    PageData::Bytes(&pages[skip..skip + len])
}

impl PageReader for ImageReader {
    fn try_read(&mut self, range: ByteRange) -> Result<Option<PageData<'_>>, SourceError> {
        if range.len > AT_ONCE {
            return Ok(None);
        }
        let pages = page_range(range);
        self.scratch.resize(pages.len() * PAGE_BYTES, 0);
        let wait = Wait::Never { budget: DECODE_AT_ONCE };
        let whole = self.contents.read(pages, wait, &mut self.tools, &mut self.scratch)?;
        Ok(whole.then(|| part(&self.scratch, range)))
    }

    fn at_hand_bytes(&self) -> u64 {
        AT_ONCE
    }

    fn will_need(&mut self, ranges: &[ByteRange]) {
        self.contents.will_need(ranges.iter().map(|range| page_range(*range)));
    }

    fn submit(&mut self, request: ReadRequest) {
        let what = (request.range, request.here_only);
        self.waiting.push(request.id, request.priority, what);
        self.start_next();
    }

    fn promote(&mut self, id: ReadId, priority: Priority) {
        if self.waiting.promote(id, priority) {
            self.start_next();
        } else {
            self.client.promote(id, priority);
            if let Some((range, _)) = self.running.get(&id) {
                self.contents.promote(page_range(*range), priority);
            }
        }
    }

    fn complete(&mut self, done: &mut dyn FnMut(ReadId, Result<PageData<'_>, SourceError>)) {
        // First the bell, then the reads: one that ends in between rings anew.
        self.bell.clear();
        for decoded in self.client.take() {
            let Some((range, priority)) = self.running.remove(&decoded.id) else { continue };
            self.fills -= usize::from(priority == Priority::Fill);
            // The decoders work on these while the caller installs this one.
            self.start_next();
            done(decoded.id, decoded.result.map(|()| part(&decoded.buf, range)));
            self.buffers.give(decoded.buf);
        }
    }

    fn ready_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bell.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Codec, MemoryInput, PackOptions};
    use std::ops::ControlFlow;
    use std::sync::atomic::Ordering;

    const PAGES: usize = 200;

    /// A memory of distinct pages, and an image of it in frames of four.
    fn made() -> (Vec<u8>, Arc<Image>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let page = |n: usize| format!("this is page {n}; ").repeat(400).into_bytes();
        let memory: Vec<u8> = (0..PAGES).flat_map(|n| page(n)[..PAGE_BYTES].to_vec()).collect();
        std::fs::write(dir.path().join("mem"), &memory).unwrap();
        let input = MemoryInput::raw(dir.path().join("mem")).unwrap();
        let options = PackOptions::default().codec(Codec::Lz4).frame_bytes(4 * PAGE);
        let go_on = &mut |_| ControlFlow::Continue(());
        options.pack(&input, &dir.path().join("image"), go_on).unwrap();
        (memory, Image::open(dir.path().join("image")).unwrap(), dir)
    }

    fn fail(image: &Image, times: u32) {
        image.contents.layers[0].layer.fails.store(times, Ordering::Relaxed);
    }

    /// Whatever of it fails, in which read, at hand or in the background: errors
    /// say so and may be tried again, and what comes is right.
    #[test]
    fn reads_that_fail_with_eio_give_no_byte_and_leave_none_behind() {
        let (memory, image, _dir) = made();
        let mut reader = Arc::clone(&image).open_reader().unwrap();
        let range = |page: usize| ByteRange::new(page as u64 * PAGE, 3 * PAGE);
        let expected = |range: ByteRange| {
            let start = usize::try_from(range.start).unwrap();
            &memory[start..start + usize::try_from(range.len).unwrap()]
        };
        let (mut errors, mut pages) = (0, 0);
        for page in (0..PAGES - 3).step_by(5) {
            fail(&image, 1);
            match reader.try_read(range(page)) {
                Ok(Some(PageData::Bytes(bytes))) => assert_eq!(bytes, expected(range(page))),
                Ok(other) => panic!("{other:?}"),
                Err(error) => {
                    assert!(error.is_transient() && error.to_string().contains("image"), "{error}");
                    errors += 1;
                }
            }
        }
        assert!(errors > 30, "{errors}");
        fail(&image, 25);
        let submit = |reader: &mut Box<dyn PageReader>, page: usize| {
            let priority = [Priority::Demand, Priority::Prefetch, Priority::Fill][page % 3];
            let id = ReadId(page as u64);
            reader.submit(ReadRequest { id, range: range(page), priority, here_only: false });
        };
        (0..PAGES - 3).step_by(4).for_each(|page| submit(&mut reader, page));
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while pages < (PAGES - 3).div_ceil(4) {
            assert!(std::time::Instant::now() < until, "{pages} came");
            let mut again = Vec::new();
            reader.complete(&mut |id, result| match result {
                Ok(PageData::Bytes(bytes)) => {
                    let page = usize::try_from(id.0).unwrap();
                    assert_eq!(bytes, expected(range(page)), "page {page}");
                    pages += 1;
                }
                Ok(other) => panic!("{other:?}"),
                Err(error) => {
                    assert!(error.is_transient(), "{error}");
                    again.push(usize::try_from(id.0).unwrap());
                }
            });
            errors += again.len();
            again.into_iter().for_each(|page| submit(&mut reader, page));
            std::thread::yield_now();
        }
        assert!(errors > 50, "{errors}");
    }
}
