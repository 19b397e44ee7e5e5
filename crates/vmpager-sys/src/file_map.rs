//! Read-only mappings of whole files that only the **kernel** reads.
//!
//! Others may write or truncate the file at any time, so this process never
//! dereferences the mapping: it hands addresses to system calls
//! (`UFFDIO_COPY`, `write`), which answer `EFAULT` where a plain load would
//! raise `SIGBUS`. That is why nothing here gives out a pointer or a slice,
//! and why every method is safe.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr;

use rustix::mm::{Advice, MapFlags, ProtFlags};

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;
/// Pages whose residency one `mincore` call reports: a buffer small enough
/// for the stack.
const PROBE_PAGES: usize = 512;

/// A shared, read-only mapping of the first bytes of a file, unmapped on drop.
#[derive(Debug)]
pub struct FileMap {
    addr: usize,
    len: usize,
}

impl FileMap {
    /// Maps the file's first `len` bytes. The mapping outlives the descriptor.
    ///
    /// # Errors
    ///
    /// What mmap(2) reports; `InvalidInput` if `len` is 0, not a multiple of
    /// 4096, or beyond this machine's addresses.
    pub fn new(fd: impl AsFd, len: u64) -> io::Result<Self> {
        let bytes =
            usize::try_from(len).ok().filter(|&bytes| bytes > 0 && len.is_multiple_of(PAGE));
        let Some(len) = bytes else {
            return Err(invalid(format!("cannot map {len} bytes of a file")));
        };
        // SAFETY: a fresh mapping at an address the kernel chooses replaces
        // nothing, and this type never reads through it.
        let addr = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, fd, 0)
        }?;
        Ok(Self { addr: addr.addr(), len })
    }

    /// Length of the mapping in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Always false: an empty file is not mapped.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Where the byte at `offset` lies in this process, for system calls only.
    ///
    /// # Panics
    ///
    /// If the offset is beyond the mapping.
    pub fn addr_of(&self, offset: u64) -> usize {
        let inside = usize::try_from(offset).ok().filter(|&offset| offset <= self.len);
        self.addr + inside.expect("the caller keeps offsets within the mapping")
    }

    /// Whether every page of the range is in the page cache, so that reading
    /// it does not wait for storage.
    ///
    /// The kernel tells the truth only to the file's owner and to those who
    /// may write it; everybody else always hears "yes".
    ///
    /// # Errors
    ///
    /// What mincore(2) reports; `InvalidInput` for a range that is not made of
    /// whole pages within the mapping.
    pub fn resident(&self, range: Range<u64>) -> io::Result<bool> {
        let (addr, len) = self.span(&range)?;
        let mut vector = [0_u8; PROBE_PAGES];
        let step = PROBE_PAGES * PAGE_BYTES;
        for start in (0..len).step_by(step) {
            let piece = step.min(len - start);
            let pages = mincore(addr + start, piece, &mut vector)?;
            if pages.iter().any(|page| page & 1 == 0) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Which of the pages of a range of at most 64 pages are in the page
    /// cache: bit 0 is the first. [`resident`](Self::resident) says who is
    /// told the truth.
    ///
    /// # Errors
    ///
    /// As [`resident`](Self::resident), and `InvalidInput` for a longer range.
    pub fn resident_pages(&self, range: Range<u64>) -> io::Result<u64> {
        let (addr, len) = self.span(&range)?;
        let mut vector = [0_u8; 64];
        if len > vector.len() * PAGE_BYTES {
            return Err(invalid(format!("{range:#x?} has more than 64 pages")));
        }
        let pages = mincore(addr, len, &mut vector)?;
        Ok(pages.iter().rev().fold(0, |bits, page| bits << 1 | u64::from(page & 1)))
    }

    /// Enters the range into this process's page tables, reading what is not
    /// in the page cache (`MADV_POPULATE_READ`).
    ///
    /// # Errors
    ///
    /// `InvalidInput` (`EINVAL`) before Linux 5.14, `EFAULT` where the file
    /// ends or cannot be read.
    pub fn populate(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(&range, Advice::LinuxPopulateRead)
    }

    /// Takes the range out of this process's page tables, so that it no longer
    /// counts as resident memory here. The page cache keeps it.
    ///
    /// # Errors
    ///
    /// What madvise(2) reports.
    pub fn forget(&self, range: Range<u64>) -> io::Result<()> {
        self.advise(&range, Advice::LinuxDontNeed)
    }

    fn advise(&self, range: &Range<u64>, advice: Advice) -> io::Result<()> {
        let (addr, len) = self.span(range)?;
        // SAFETY: the span lies within this mapping, which nobody holds
        // references into; populating or dropping clean file pages changes
        // nothing a later access by the kernel would see.
        unsafe { rustix::mm::madvise(ptr::without_provenance_mut(addr), len, advice) }?;
        Ok(())
    }

    fn span(&self, range: &Range<u64>) -> io::Result<(usize, usize)> {
        let whole = range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE);
        if !whole || range.start >= range.end || range.end > self.len() {
            return Err(invalid(format!(
                "{range:#x?} is not a range of whole pages in a mapping of {:#x} bytes",
                self.len
            )));
        }
        let start = self.addr_of(range.start);
        Ok((start, self.addr_of(range.end) - start))
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        // SAFETY: this type made the mapping, and gave out numbers, not
        // references. Failure would leave address space mapped, no more.
        let _ = unsafe { rustix::mm::munmap(ptr::without_provenance_mut(self.addr), self.len) };
    }
}

/// Residency of the pages of a span, one byte each, in the vector's front.
fn mincore(addr: usize, len: usize, vector: &mut [u8]) -> io::Result<&[u8]> {
    let pages = len / PAGE_BYTES;
    let vector = &mut vector[..pages];
    let start: *mut c_void = ptr::without_provenance_mut(addr);
    // SAFETY: the kernel writes one byte per page of the span to the vector,
    // which has been cut to that length.
    let result = unsafe { libc::mincore(start, len, vector.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(vector)
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::Advice as FileAdvice;
    use std::fs::File;
    use std::io::Write;

    fn file(pages: u8) -> File {
        let path = std::env::temp_dir().join(format!(
            "vmpager-file-map-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let mut file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        for page in 0..pages {
            file.write_all(&[page; 4096]).unwrap();
        }
        file.sync_all().unwrap();
        file
    }

    /// Bytes of this process that are mapped files, from its page tables.
    fn mapped_here(map: &FileMap) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let head = format!("{:x}-", map.addr);
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&head));
        let rss = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        rss.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    #[test]
    fn residency_follows_the_page_cache() {
        let file = file(200);
        let map = FileMap::new(&file, 200 * PAGE).unwrap();
        assert!(map.resident(0..200 * PAGE).unwrap(), "just written");
        rustix::fs::fadvise(&file, 0, None, FileAdvice::DontNeed).unwrap();
        if map.resident(0..PAGE).unwrap() {
            vmpager_testing::skipped("this file system keeps its pages cached");
            return;
        }
        rustix::fs::fadvise(&file, 0, None, FileAdvice::Random).unwrap();
        let mut page = [0; 4096];
        for index in [3, 5] {
            rustix::io::pread(&file, &mut page, index * PAGE).unwrap();
        }
        let bits = map.resident_pages(PAGE..9 * PAGE).unwrap();
        assert_eq!(bits & 0b10_1111, 0b1_0100 & 0b10_1111, "pages 3 and 5 of 1..=8: {bits:b}");
        assert!(map.resident(3 * PAGE..4 * PAGE).unwrap());
        assert!(!map.resident(3 * PAGE..5 * PAGE).unwrap());
        map.populate(0..200 * PAGE).unwrap();
        assert!(map.resident(0..200 * PAGE).unwrap(), "populating reads it in");
    }

    #[test]
    fn long_ranges_are_probed_piece_by_piece() {
        let pages = PROBE_PAGES as u64 * 2 + 7;
        let file = file(1);
        file.set_len(pages * PAGE).unwrap();
        let map = FileMap::new(&file, pages * PAGE).unwrap();
        map.populate(0..pages * PAGE).unwrap();
        assert!(map.resident(0..pages * PAGE).unwrap());
        assert!(map.resident((pages - 1) * PAGE..pages * PAGE).unwrap());
    }

    #[test]
    fn the_kernel_reads_through_the_address() {
        let file = file(4);
        let map = FileMap::new(&file, 4 * PAGE).unwrap();
        drop(file);
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        // SAFETY: write(2) only reads the address, in the kernel.
        let n = unsafe {
            libc::write(
                std::os::fd::AsRawFd::as_raw_fd(&writer),
                ptr::without_provenance(map.addr_of(2 * PAGE)),
                4096,
            )
        };
        assert_eq!(n, 4096);
        let mut page = [0_u8; 4096];
        assert_eq!(rustix::io::read(&reader, &mut page).unwrap(), 4096);
        assert_eq!(page, [2; 4096]);
    }

    #[test]
    fn forgetting_leaves_the_page_tables_empty() {
        let file = file(128);
        let map = FileMap::new(&file, 128 * PAGE).unwrap();
        assert_eq!(mapped_here(&map), 0);
        map.populate(0..128 * PAGE).unwrap();
        assert_eq!(mapped_here(&map), 128 * PAGE);
        map.forget(0..128 * PAGE).unwrap();
        assert_eq!(mapped_here(&map), 0);
    }

    #[test]
    fn ranges_outside_are_refused() {
        let file = file(2);
        let map = FileMap::new(&file, 2 * PAGE).unwrap();
        for (start, end) in [(0, 0), (0, 1), (1, PAGE), (PAGE, 3 * PAGE), (2 * PAGE, PAGE)] {
            let range = start..end;
            assert!(map.resident(range.clone()).is_err(), "{range:?}");
            assert!(map.resident_pages(range.clone()).is_err(), "{range:?}");
            assert!(map.populate(range.clone()).is_err(), "{range:?}");
            assert!(map.forget(range.clone()).is_err(), "{range:?}");
        }
        assert!(FileMap::new(&file, 0).is_err());
        assert!(FileMap::new(&file, 4097).is_err());
    }

    #[test]
    fn a_truncated_file_is_an_error_not_a_signal() {
        let file = file(32);
        let map = FileMap::new(&file, 32 * PAGE).unwrap();
        file.set_len(PAGE).unwrap();
        assert!(map.resident(0..PAGE).unwrap());
        assert!(!map.resident(0..32 * PAGE).unwrap());
        assert!(map.populate(8 * PAGE..32 * PAGE).is_err());
    }
}
