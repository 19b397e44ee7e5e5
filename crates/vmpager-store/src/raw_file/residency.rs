//! Which ranges of a mapped file are in the page cache, remembered for some
//! milliseconds so that a burst of faults does not pay a system call each.

use std::io;
use std::time::Duration;

use vmpager_core::ByteRange;
use vmpager_sys::file_map::FileMap;

use crate::PAGE;

/// Pages are remembered in windows of as many as fit one word.
const WINDOW_PAGES: u64 = 64;
/// Windows remembered at a time: 256 MiB of file in 32 KiB.
const ENTRIES: usize = 1024;
/// The page cache may drop a page meanwhile; then a fault waits for it once.
/// Even a host that reclaims 1 GiB/s drops half a percent of 20 GiB in this
/// time, while a tenth of it would cost each random fault a tenth more.
const LIFETIME: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug)]
struct Window {
    index: u64,
    probed: Duration,
    /// Pages found in the page cache; the first is bit 0.
    resident: u64,
}

#[derive(Debug)]
pub(crate) struct Residency {
    windows: Box<[Option<Window>; ENTRIES]>,
}

impl Residency {
    pub(crate) fn new() -> Self {
        Self { windows: Box::new([None; ENTRIES]) }
    }

    /// Whether the range, made of whole pages, is in the page cache, or was
    /// less than 100 ms before `now`.
    pub(crate) fn holds(
        &mut self,
        map: &FileMap,
        range: ByteRange,
        now: Duration,
    ) -> io::Result<bool> {
        let first = range.start / PAGE;
        let index = first / WINDOW_PAGES;
        let offset = first % WINDOW_PAGES;
        let count = range.len / PAGE;
        if offset + count > WINDOW_PAGES {
            // One probe of so many pages costs less than installing them by far.
            return map.resident(range.start..range.end());
        }
        let wanted = (u64::MAX >> (WINDOW_PAGES - count)) << offset;
        let entry = &mut self.windows[usize::try_from(index).unwrap_or(0) % ENTRIES];
        let known = entry
            .filter(|window| window.index == index && now.saturating_sub(window.probed) < LIFETIME);
        let resident = match known {
            Some(window) if window.resident & wanted == wanted => return Ok(true),
            // The second question about this window: more will come, and a
            // probe of all of it costs as much as four of single pages.
            Some(_) => {
                let start = index * WINDOW_PAGES * PAGE;
                map.resident_pages(start..map.len().min(start + WINDOW_PAGES * PAGE))?
            }
            None => map.resident_pages(range.start..range.end())? << offset,
        };
        *entry = Some(Window { index, probed: now, resident });
        Ok(resident & wanted == wanted)
    }
}
