//! Mappings of guest memory in this process.
//!
//! Others write to guest memory at any time (vCPUs, the kernel, other
//! processes), so it is never lent as a slice: bytes go in and out by volatile
//! copies.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::mm::{self, Advice, MapFlags, MprotectFlags, ProtFlags};

/// What may be done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: touching it is a SIGSEGV.
    None,
    /// Writing and, on x86, reading: its page tables know no memory that can
    /// be written and not read. But the kernel will not *pin* such memory for
    /// reading (`get_user_pages` checks the mapping's flags), which is what KVM
    /// does to serve a vCPU's fault.
    Write,
    /// Both.
    ReadWrite,
}

/// A mapping of this process, unmapped when dropped.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and all access through it is by
// volatile copies, as to memory shared with other processes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:p}, {:#x})", self.base, self.len)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are those of a mapping this value owns.
        let result = unsafe { mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap: {result:?}");
    }
}

impl Mapping {
    /// Private anonymous memory in base pages (no transparent huge pages, so
    /// that a touch faults for 4 KiB).
    ///
    /// # Errors
    ///
    /// If there is no address space left for it.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let mapping = Self::map_anonymous(len, MapFlags::PRIVATE | MapFlags::NORESERVE)?;
        mapping.advise(0..len, Advice::LinuxNoHugepage)?;
        Ok(mapping)
    }

    /// Private anonymous memory, aligned to 2 MiB, for a pager to fill and to
    /// make huge pages of. Absent pages arrive one by one all the same: a
    /// userfaultfd keeps the kernel from making larger ones. Before there is one,
    /// a touch may bring 2 MiB of zeroes at once, if the kernel is set to use huge
    /// pages always.
    ///
    /// # Errors
    ///
    /// If there is no address space left for it.
    pub fn for_pager(len: usize) -> io::Result<Self> {
        const HUGE: usize = 2 << 20;
        let wider = len.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let wider = Self::map_anonymous(wider, MapFlags::PRIVATE | MapFlags::NORESERVE)?;
        let start = wider.base.as_ptr().align_offset(HUGE);
        wider.cut_to(start..start + len)
    }

    /// Keeps a part of the mapping, page-aligned, and unmaps the rest.
    fn cut_to(self, part: Range<usize>) -> io::Result<Self> {
        let keep = Self::owning(self.at(part.start, part.len()).cast(), part.len())?;
        for rest in [0..part.start, part.end..self.len] {
            if !rest.is_empty() {
                let at = self.at(rest.start, rest.len());
                // SAFETY: a part of this mapping, which nobody has got hold of.
                unsafe { mm::munmap(at.cast(), rest.len()) }?;
            }
        }
        std::mem::forget(self);
        Ok(keep)
    }

    /// Private anonymous memory in hugetlb pages of 2 MiB. Not reserved: with
    /// an empty pool, touching it fails rather than making it.
    ///
    /// # Errors
    ///
    /// If the kernel has no such pages.
    pub fn hugetlb_2m(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        Self::map_anonymous(len, flags | MapFlags::NORESERVE)
    }

    /// As [`anonymous`](Self::anonymous), but nobody may touch it before
    /// [`allow`](Self::allow) says so: for memory that must be registered with
    /// a userfaultfd before anybody does.
    ///
    /// # Errors
    ///
    /// If there is no address space left for it.
    pub fn inaccessible(len: usize) -> io::Result<Self> {
        let mapping = Self::anonymous(len)?;
        mapping.allow(Access::None)?;
        Ok(mapping)
    }

    /// Changes what may be done with all of the memory.
    ///
    /// # Errors
    ///
    /// If the kernel refuses (a file that may not be written, say).
    pub fn allow(&self, access: Access) -> io::Result<()> {
        self.allow_in(0..self.len, access)
    }

    /// Changes what may be done with some of the memory, in whole pages. Each
    /// boundary between what may and may not be done costs a mapping, of which a
    /// process has `vm.max_map_count`.
    ///
    /// # Errors
    ///
    /// If the kernel refuses: some of it may have changed.
    ///
    /// # Panics
    ///
    /// If the range is outside.
    pub fn allow_in(&self, range: Range<usize>, access: Access) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        let at = self.at(range.start, len);
        let flags = match access {
            Access::None => MprotectFlags::empty(),
            Access::Write => MprotectFlags::WRITE,
            Access::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        // SAFETY: all of it belongs to this mapping, as just checked. What is
        // forbidden ends in a signal, not in wrong bytes.
        Ok(unsafe { mm::mprotect(at.cast(), len, flags) }?)
    }

    fn map_anonymous(len: usize, flags: MapFlags) -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mm::mmap_anonymous(ptr::null_mut(), len, prot, flags) }?;
        Self::owning(base, len)
    }

    /// A copy-on-write mapping of a file's first `len` bytes, as a VMM restores
    /// a snapshot without a pager.
    ///
    /// # Errors
    ///
    /// If the file cannot be mapped.
    pub fn file_private(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        Self::map_file(file, 0, len, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }

    /// A shared mapping of a file's or memfd's first `len` bytes.
    ///
    /// # Errors
    ///
    /// If the file cannot be mapped.
    pub fn file_shared(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        Self::file_shared_at(file, 0, len)
    }

    /// A shared mapping of `len` bytes of a file or memfd from `offset` on.
    ///
    /// # Errors
    ///
    /// If the file cannot be mapped there.
    pub fn file_shared_at(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        Self::map_file(file, offset, len, MapFlags::SHARED | MapFlags::NORESERVE)
    }

    fn map_file(file: BorrowedFd<'_>, offset: u64, len: usize, how: MapFlags) -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mm::mmap(ptr::null_mut(), len, prot, how, file, offset) }?;
        Self::owning(base, len)
    }

    /// A shared mapping of a file's first `len` bytes, for reading: by [`read`](Self::read)
    /// and the kernel. Writing to it is a SIGSEGV.
    ///
    /// # Errors
    ///
    /// If the file cannot be mapped.
    pub fn file_read_only(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        let (prot, flags) = (ProtFlags::READ, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mm::mmap(ptr::null_mut(), len, prot, flags, file, 0) }?;
        Self::owning(base, len)
    }

    fn owning(base: *mut c_void, len: usize) -> io::Result<Self> {
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// Its address in this process.
    pub fn hva(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes (it always has some).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A pointer to `offset`, after checking that `size` bytes fit there.
    ///
    /// # Panics
    ///
    /// If they do not.
    fn at(&self, offset: usize, size: usize) -> *mut u8 {
        let end = offset.checked_add(size).expect("range fits the address space");
        assert!(end <= self.len, "{offset:#x}+{size:#x} is outside {self:?}");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Reads one naturally aligned word.
    ///
    /// # Panics
    ///
    /// If the offset is outside or misaligned.
    pub fn read_u64(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8), "misaligned word at {offset:#x}");
        let at = self.at(offset, 8).cast::<u64>();
        // SAFETY: inside the mapping and aligned.
        unsafe { at.read_volatile() }
    }

    /// Writes one naturally aligned word.
    ///
    /// # Panics
    ///
    /// If the offset is outside or misaligned.
    pub fn write_u64(&self, offset: usize, value: u64) {
        assert!(offset.is_multiple_of(8), "misaligned word at {offset:#x}");
        let at = self.at(offset, 8).cast::<u64>();
        // SAFETY: inside the mapping and aligned.
        unsafe { at.write_volatile(value) };
    }

    /// Copies bytes out. Aligned words of eight bytes are read whole: whoever
    /// writes such a word meanwhile is seen to have written all of it or nothing.
    ///
    /// # Panics
    ///
    /// If the range is outside.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let at = self.at(offset, into.len());
        let head = at.align_offset(8).min(into.len());
        let (before, rest) = into.split_at_mut(head);
        let (words, after) = rest.as_chunks_mut::<8>();
        let tail = head + words.len() * 8;
        for (i, byte) in (0..).zip(before).chain((tail..).zip(after)) {
            // SAFETY: inside the mapping, as checked for the whole range.
            let from = unsafe { at.add(i) };
            // SAFETY: inside the mapping.
            *byte = unsafe { from.read_volatile() };
        }
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: inside the mapping, as checked for the whole range.
            let from = unsafe { at.add(head + i * 8) }.cast::<u64>();
            // SAFETY: inside the mapping, and aligned: `head` bytes further on.
            *word = unsafe { from.read_volatile() }.to_ne_bytes();
        }
    }

    /// Copies bytes in.
    ///
    /// # Panics
    ///
    /// If the range is outside.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let at = self.at(offset, from.len());
        // SAFETY: inside the mapping, and a slice never overlaps guest memory.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), at, from.len()) };
    }

    /// Gives pages back to the kernel (`MADV_DONTNEED`), as a balloon does:
    /// anonymous ones read as zeroes afterwards.
    ///
    /// # Errors
    ///
    /// If the range is not page-aligned.
    pub fn discard(&self, range: Range<usize>) -> io::Result<()> {
        self.advise(range, Advice::LinuxDontNeed)
    }

    /// Gives pages of shared memory back to the kernel, for everybody
    /// (`MADV_REMOVE`): they read as zeroes afterwards.
    ///
    /// # Errors
    ///
    /// If the range is not page-aligned, or the memory not shared.
    pub fn remove(&self, range: Range<usize>) -> io::Result<()> {
        self.advise(range, Advice::LinuxRemove)
    }

    /// Has the kernel take pages out of memory, as it does where that is short
    /// (`MADV_PAGEOUT`): what they hold stays. It takes those that nobody else maps,
    /// and of them as many as it likes.
    ///
    /// # Errors
    ///
    /// If the range is not page-aligned.
    pub fn page_out(&self, range: Range<usize>) -> io::Result<()> {
        self.advise(range, Advice::LinuxPageOut)
    }

    /// Brings pages in for writing (`MADV_POPULATE_WRITE`).
    ///
    /// # Errors
    ///
    /// If a page cannot be had.
    pub fn populate(&self, range: Range<usize>) -> io::Result<()> {
        self.advise(range, Advice::LinuxPopulateWrite)
    }

    /// Has the kernel use huge pages where it can (`MADV_HUGEPAGE`).
    pub(crate) fn want_huge_pages(&self) -> io::Result<()> {
        self.advise(0..self.len, Advice::LinuxHugepage)
    }

    /// Where a range is, for the kernel to read or write.
    pub(crate) fn pointer(&self, range: Range<usize>) -> *mut c_void {
        self.at(range.start, range.len()).cast()
    }

    /// Keeps the kernel from taking this memory away again (mlock(2)).
    ///
    /// # Errors
    ///
    /// If this user may not lock that much (`RLIMIT_MEMLOCK`).
    pub fn lock(&self, range: Range<usize>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        let at = self.at(range.start, len);
        // SAFETY: inside the mapping, whose contents stay as they are.
        Ok(unsafe { mm::mlock(at.cast(), len) }?)
    }

    fn advise(&self, range: Range<usize>, advice: Advice) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        let at = self.at(range.start, len);
        // SAFETY: inside a mapping that is only accessed by volatile copies,
        // which any change of contents leaves sound.
        unsafe { mm::madvise(at.cast(), len, advice) }?;
        Ok(())
    }

    /// The kernel's `pread` straight into the mapping, until `len` bytes are
    /// there or the file ends.
    ///
    /// # Errors
    ///
    /// If reading fails, or the file ends early.
    pub fn read_from_file(&self, file: BorrowedFd<'_>, range: Range<usize>) -> io::Result<()> {
        let mut done = range.start;
        while done < range.end {
            let at = self.at(done, range.end - done);
            // SAFETY: `at` is valid for that many bytes; the kernel writes them.
            let n = unsafe {
                libc::pread(
                    std::os::fd::AsRawFd::as_raw_fd(&file),
                    at.cast(),
                    range.end - done,
                    libc::off_t::try_from(done).map_err(io::Error::other)?,
                )
            };
            match usize::try_from(n) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
        Ok(())
    }
}

/// A range of this process's memory that may be served by a pager.
///
/// Serving memory means that pages nobody wrote appear filled. Holding a
/// `GuestRange` is the promise that nothing in the process relies on their
/// being absent or zero, and that the memory stays mapped while it is held.
#[derive(Clone)]
pub struct GuestRange {
    hva: u64,
    len: u64,
    _keep: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestRange({:#x}, {:#x})", self.hva, self.len)
    }
}

impl GuestRange {
    /// Any range of this process's memory, kept mapped by `keep`.
    ///
    /// # Safety
    ///
    /// The range must be mapped for as long as `keep` lives, and must only be
    /// accessed as memory shared with others is: by volatile or atomic access,
    /// never through a Rust reference.
    pub unsafe fn new(hva: u64, len: u64, keep: Arc<dyn Any + Send + Sync>) -> Self {
        Self { hva, len, _keep: keep }
    }

    /// A whole [`Mapping`].
    pub fn of_mapping(mapping: &Arc<Mapping>) -> Self {
        Self { hva: mapping.hva(), len: mapping.len() as u64, _keep: mapping.clone() }
    }

    /// Every region of a VMM's guest memory, in guest-physical order.
    ///
    /// `vm-memory` accesses guest memory by volatile copies only, which is what
    /// [`new`](Self::new) asks for.
    #[cfg(feature = "vm-memory")]
    pub fn of_guest_memory(memory: &vm_memory::GuestMemoryMmap) -> Vec<Self> {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        memory
            .iter()
            .map(|region| Self {
                hva: region.as_ptr() as u64,
                len: region.len(),
                _keep: Arc::new(memory.clone()),
            })
            .collect()
    }

    /// Has the kernel use huge pages where it can (`MADV_HUGEPAGE`).
    ///
    /// # Errors
    ///
    /// If it has none.
    pub fn want_huge_pages(&self) -> io::Result<()> {
        let len = usize::try_from(self.len).map_err(io::Error::other)?;
        let at = ptr::without_provenance_mut(usize::try_from(self.hva).map_err(io::Error::other)?);
        // SAFETY: the range is mapped while `_keep` lives; which pages the kernel
        // chooses changes no contents.
        Ok(unsafe { mm::madvise(at, len, Advice::LinuxHugepage) }?)
    }

    /// First address.
    pub fn hva(&self) -> u64 {
        self.hva
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in_wherever_they_are() {
        let mapping = Mapping::anonymous(4096).unwrap();
        let bytes: Vec<u8> = (0..64).collect();
        for offset in 0..9 {
            mapping.write(offset, &bytes);
            for len in [0, 1, 7, 8, 9, 23, 64] {
                let mut read = vec![0; len];
                mapping.read(offset, &mut read);
                assert_eq!(read, bytes[..len], "{len} bytes at {offset}");
            }
        }
    }

    #[test]
    fn words_are_read_whole() {
        let mapping = Mapping::anonymous(4096).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    mapping.write_u64(8, u64::MAX);
                    mapping.write_u64(8, 0);
                }
            });
            for _ in 0..2_000_000 {
                let mut bytes = [0; 24];
                mapping.read(0, &mut bytes);
                let word = u64::from_ne_bytes(bytes[8..16].try_into().unwrap());
                assert!(word == 0 || word == u64::MAX, "half a word: {word:#x}");
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn what_nobody_may_touch_can_be_opened_later() {
        let mapping = Mapping::inaccessible(8192).unwrap();
        mapping.allow(Access::Write).unwrap();
        mapping.write_u64(4096, 7);
        // x86 knows no memory that can be written and not read.
        #[cfg(target_arch = "x86_64")]
        assert_eq!(mapping.read_u64(4096), 7);
        mapping.allow(Access::ReadWrite).unwrap();
        assert_eq!((mapping.read_u64(0), mapping.read_u64(4096)), (0, 7));
    }
}
