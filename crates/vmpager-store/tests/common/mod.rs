//! What the tests of sources share.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use tempfile::NamedTempFile;
use vmpager_core::{ByteRange, PageData, PageReader, Priority, ReadId, ReadRequest, SourceError};
use vmpager_store::Backend;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const BACKENDS: [Backend; 2] = [Backend::IoUring, Backend::Threads];

/// Bytes in which every 8-byte word tells its own offset.
pub(crate) fn numbered(pages: u64) -> Vec<u8> {
    (0..pages * PAGE).step_by(8).flat_map(|offset| (offset + 1).to_le_bytes()).collect()
}

/// A file on the disk the build is on, since /tmp may be in memory.
pub(crate) fn temp_file() -> NamedTempFile {
    tempfile::Builder::new().tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub(crate) fn memory_file(pages: u64) -> NamedTempFile {
    let mut file = temp_file();
    file.write_all(&numbered(pages)).unwrap();
    file.as_file().sync_all().unwrap();
    file
}

/// Drops a synced file from the page cache.
pub(crate) fn evict(file: &File) {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// What the kernel would copy.
pub(crate) fn bytes_of(data: PageData<'_>) -> Vec<u8> {
    match data {
        PageData::Bytes(bytes) => bytes.to_vec(),
        PageData::Mapped { addr, len } => {
            let mut bytes = vec![0; len];
            let memory = File::open("/proc/self/mem").unwrap();
            memory.read_exact_at(&mut bytes, addr as u64).unwrap();
            bytes
        }
    }
}

pub(crate) fn pages(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * PAGE, count * PAGE)
}

pub(crate) fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

/// Where a range lies in the bytes of the whole file.
pub(crate) fn span(range: ByteRange) -> std::ops::Range<usize> {
    index(range.start)..index(range.end())
}

pub(crate) fn request(id: u64, range: ByteRange, priority: Priority) -> ReadRequest {
    ReadRequest { id: ReadId(id), range, priority, here_only: false }
}

/// Whether the reader says that something has ended, within the time given.
pub(crate) fn is_ready(reader: &dyn PageReader, within: Duration) -> bool {
    let fd = reader.ready_fd().unwrap();
    let timeout = Timespec::try_from(within).unwrap();
    rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

type Results = Vec<(u64, Result<Vec<u8>, SourceError>)>;

/// Waits for `count` reads to end, as a worker would, and returns them in the
/// order they were handed over.
pub(crate) fn wait_for(reader: &mut dyn PageReader, count: usize) -> Results {
    let mut results = Results::new();
    let deadline = Instant::now() + Duration::from_secs(30);
    while results.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} reads ended", results.len());
        if is_ready(reader, Duration::from_secs(1)) {
            reader.complete(&mut |id, result| results.push((id.0, result.map(bytes_of))));
        }
    }
    let ids: HashMap<_, _> = results.iter().map(|(id, _)| (id, ())).collect();
    assert_eq!(ids.len(), count, "each read ends once");
    results
}

/// Reads a range, at hand or in the background.
pub(crate) fn fetch(reader: &mut dyn PageReader, range: ByteRange) -> Result<Vec<u8>, SourceError> {
    if let Some(data) = reader.try_read(range)? {
        return Ok(bytes_of(data));
    }
    submit_and_wait(reader, range)
}

pub(crate) fn submit_and_wait(
    reader: &mut dyn PageReader,
    range: ByteRange,
) -> Result<Vec<u8>, SourceError> {
    reader.submit(request(range.start, range, Priority::Demand));
    wait_for(reader, 1).remove(0).1
}
