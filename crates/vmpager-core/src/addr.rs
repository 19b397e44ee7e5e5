//! Addresses, pages and ranges as types, so that a host address is never taken
//! for a file offset nor a page number for either.

use std::fmt;

/// A host virtual address: where a slot is mapped in the process whose faults
/// are served.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hva(pub u64);

impl fmt::Debug for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The unit in which a slot's pages are installed: the page size of the
/// memory behind it, as reported by the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// Base pages, 4096 bytes.
    Size4K,
    /// hugetlb pages of 2 MiB; the kernel installs them whole or not at all.
    Size2M,
}

impl PageSize {
    /// The page size of that many bytes, if vmpager serves it.
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            4096 => Some(Self::Size4K),
            0x20_0000 => Some(Self::Size2M),
            _ => None,
        }
    }

    /// log2 of the size in bytes.
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
        }
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }
}

/// A half-open range of bytes in a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// Offset of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `start`.
    pub const fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }

    /// One past the last byte; saturates at the end of the address space.
    pub const fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end())
    }
}

/// A run of pages that lie next to each other, by index in a
/// [`PageMap`](crate::PageMap). A run handed out by the
/// [`Engine`](crate::Engine) never crosses a slot, so it is also contiguous in
/// host addresses and in the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// Index of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl PageRun {
    /// The run of `count` pages from `first`.
    pub const fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// One past the last page.
    pub const fn end(&self) -> u64 {
        self.first + self.count
    }

    /// The run's pages, in order.
    pub fn pages(&self) -> std::ops::Range<u64> {
        self.first..self.end()
    }
}
