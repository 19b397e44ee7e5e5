//! Where things lie in guest memory.
//!
//! ```text
//! page 0          nothing
//!      1          PML4
//!      2          PDPT
//!      3 ..       page directories: one per GiB of memory, one for the device
//!      code       the program
//!      gdt        descriptor table and task state segment
//!      stacks ..  one page per vCPU
//!      sums ..    the checksum table, eight bytes per page of memory
//!      first ..   contents
//!      end ..     nothing, to the end of memory
//! ```
//!
//! All of it is in the snapshot, so that a restored guest misses its code, its
//! page tables and its stack as a real one does. All of memory is mapped a second
//! time from [`SHARED_GPA`] on, where some VMs have its shared pages. What the host writes before a
//! run (parameters, order, results) is in the device memory at
//! [`DEVICE_GPA`], which is always present and no part of the snapshot.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::device::to_usize;
use crate::error::VmError;
use crate::{PAGE_BYTES, PAGE_SIZE};

/// Where the device memory starts; also the limit of guest memory. Within 36
/// bits, which every x86-64 processor has.
pub(crate) const DEVICE_GPA: u64 = 32 << 30;
/// Where memory is again, in VMs whose guest says by the address which kind of page
/// it means: there it means shared ones. It takes 37 bits.
pub(crate) const SHARED_GPA: u64 = 64 << 30;
pub(crate) const MAX_VCPUS: u64 = 64;
const MIN_MEMORY: u64 = 4 << 20;
/// Guest page tables map 2 MiB at a time, and so does hugetlb memory.
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

const PML4: u64 = 1;
const PDPT: u64 = 2;
const FIRST_DIRECTORY: u64 = 3;

/// Page numbers of the guest's own structures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Layout {
    pub(crate) memory_pages: u64,
    pub(crate) vcpus: u64,
    pub(crate) code: u64,
    pub(crate) gdt: u64,
    pub(crate) stacks: u64,
    pub(crate) sums: u64,
    pub(crate) first: u64,
    pub(crate) end: u64,
}

impl Layout {
    pub(crate) fn new(memory_bytes: u64, vcpus: u64) -> Result<Self, VmError> {
        if !memory_bytes.is_multiple_of(LARGE_PAGE)
            || !(MIN_MEMORY..=DEVICE_GPA).contains(&memory_bytes)
        {
            return Err(VmError::Config {
                field: "memory_bytes",
                value: memory_bytes,
                remedy: "use a multiple of 2 MiB between 4 MiB and 32 GiB",
            });
        }
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(VmError::Config {
                field: "vcpus",
                value: vcpus,
                remedy: "use 1 to 64 vCPUs",
            });
        }
        let memory_pages = memory_bytes / PAGE_SIZE;
        let code = FIRST_DIRECTORY + memory_bytes.div_ceil(GIB) + 1;
        let gdt = code + 1;
        let stacks = gdt + 1;
        let sums = stacks + vcpus;
        let first = sums + (memory_pages * 8).div_ceil(PAGE_SIZE);
        Ok(Self { memory_pages, vcpus, code, gdt, stacks, sums, first, end: memory_pages })
    }

    /// The same with that many pages of contents, and nothing after them.
    pub(crate) fn with_content_pages(self, pages: u64) -> Result<Self, VmError> {
        if !(1..=self.memory_pages - self.first).contains(&pages) {
            return Err(VmError::Config {
                field: "pages of contents",
                value: pages,
                remedy: "have at least one, and memory for them and the guest's own structures",
            });
        }
        Ok(Self { end: self.first + pages, ..self })
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory_pages * PAGE_SIZE
    }

    /// The pages with contents.
    pub(crate) fn contents(&self) -> Range<u64> {
        self.first..self.end
    }

    pub(crate) fn page_table_root(&self) -> u64 {
        PML4 * PAGE_SIZE
    }

    /// The first byte after a vCPU's stack.
    pub(crate) fn stack_top(&self, vcpu: u64) -> u64 {
        (self.stacks + vcpu + 1) * PAGE_SIZE
    }

    /// Where the checksum table has a page's entry.
    pub(crate) fn sum_of(&self, page: u64) -> u64 {
        self.sums * PAGE_SIZE + page * 8
    }

    /// The pages before the stacks, as the guest starts with them and as they
    /// stay: page tables, code, descriptors.
    pub(crate) fn fixed_pages(&self, code: &[u8]) -> Vec<[u8; PAGE_BYTES]> {
        let mut pages = Vec::new();
        for page in 0..self.stacks {
            let mut bytes = [0; PAGE_BYTES];
            if page == self.code {
                bytes[..code.len()].copy_from_slice(code);
            } else {
                let words = bytes.as_chunks_mut::<8>().0;
                for (word, value) in words.iter_mut().zip(self.fixed_words(page)) {
                    *word = value.to_le_bytes();
                }
            }
            pages.push(bytes);
        }
        pages
    }

    fn fixed_words(&self, page: u64) -> Vec<u64> {
        // Present, writable, user; accessed and dirty already set, so that the
        // walker never writes and the pages stay as they are in the snapshot.
        const TABLE: u64 = 0x27;
        const LARGE: u64 = 0xe7;
        let device_directory = self.code - 1;
        let large_pages =
            |base: u64| (0..512).map(|i| (base + i * LARGE_PAGE) | LARGE).collect::<Vec<_>>();
        match page {
            PML4 => vec![(PDPT * PAGE_SIZE) | TABLE],
            PDPT => {
                let mut entries: Vec<u64> =
                    (FIRST_DIRECTORY..device_directory).map(|d| (d * PAGE_SIZE) | TABLE).collect();
                while (entries.len() as u64) < DEVICE_GPA / GIB {
                    entries.push(0);
                }
                entries.push((device_directory * PAGE_SIZE) | TABLE);
                entries.resize(to_usize(SHARED_GPA / GIB), 0);
                let shared = (0..device_directory - FIRST_DIRECTORY).map(|i| i * GIB);
                entries.extend(shared.map(|base| (SHARED_GPA + base) | LARGE));
                entries
            }
            _ if page == device_directory => large_pages(DEVICE_GPA),
            _ if (FIRST_DIRECTORY..device_directory).contains(&page) => {
                let base = (page - FIRST_DIRECTORY) * GIB;
                let mut entries = large_pages(base);
                entries.retain(|entry| *entry < self.memory_bytes());
                entries
            }
            // Linux's places for ring 3 (data 0x28, code 0x30), and a busy TSS
            // at 0x40.
            _ if page == self.gdt => {
                let tss = self.gdt * PAGE_SIZE + TSS_OFFSET;
                let descriptor = 0x0000_8b00_0000_0067 | ((tss & 0xff_ffff) << 16);
                vec![0, 0, 0, 0, 0, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff, 0, descriptor, 0]
            }
            _ => Vec::new(),
        }
    }
}

/// Where the task state segment lies in the descriptor page.
pub(crate) const TSS_OFFSET: u64 = 0x800;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_cannot_be_laid_out_are_refused_by_name() {
        for bytes in [0, 4096, (4 << 20) + 4096, DEVICE_GPA + LARGE_PAGE] {
            let error = Layout::new(bytes, 1).unwrap_err().to_string();
            assert!(error.contains("memory_bytes") && error.contains(&bytes.to_string()));
        }
        assert!(Layout::new(4 << 20, 0).unwrap_err().to_string().contains("vcpus"));
        let largest = Layout::new(DEVICE_GPA, MAX_VCPUS).unwrap();
        let room = largest.memory_pages - largest.first;
        for pages in [0, room + 1, u64::MAX] {
            let error = largest.clone().with_content_pages(pages).unwrap_err().to_string();
            assert!(error.contains(&format!("contents {pages}")), "{error}");
        }
        assert_eq!(largest.clone().with_content_pages(room).unwrap(), largest);
    }

    const LARGE_BIT: u64 = 1 << 7;

    #[test]
    fn every_page_of_memory_and_of_the_device_is_mapped_once() {
        let layout = Layout::new(3 * GIB + LARGE_PAGE, 2).unwrap();
        let pages = layout.fixed_pages(&[0x90]);
        let words = |page: u64| {
            let bytes = pages[usize::try_from(page).unwrap()];
            bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect::<Vec<_>>()
        };
        let mut mapped = Vec::new();
        let (tables, shared): (Vec<_>, Vec<_>) = (0..)
            .zip(words(PDPT))
            .filter(|(_, entry)| *entry != 0)
            .partition(|(_, entry)| entry & LARGE_BIT == 0);
        for (i, entry) in tables {
            for (j, leaf) in (0..).zip(words(entry >> 12)).filter(|(_, e)| *e != 0) {
                assert_eq!(leaf & !0xfff, i * GIB + j * LARGE_PAGE, "identity");
                mapped.push(leaf & !0xfff);
            }
        }
        assert_eq!(mapped.len(), 3 * 512 + 1 + 512);
        assert_eq!(mapped[3 * 512], 3 * GIB);
        assert_eq!(mapped[3 * 512 + 1], DEVICE_GPA);
        let shared: Vec<u64> = shared.into_iter().map(|(_, entry)| entry & !0xfff).collect();
        assert_eq!(shared, [0, 1, 2, 3].map(|i| SHARED_GPA + i * GIB), "once more");
    }
}
