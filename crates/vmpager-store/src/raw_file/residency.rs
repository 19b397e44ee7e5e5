//! Which ranges of a mapped file are in the page cache, remembered for some
//! milliseconds so that a burst of faults does not pay a system call each.

use std::io;
use std::time::Duration;

use vmpager_core::ByteRange;
use vmpager_sys::file_map::FileMap;

use crate::PAGE;

/// Pages are remembered in windows of as many as fit one word.
const WINDOW_PAGES: u64 = 64;
/// Windows remembered at a time: 16 MiB of file in 1.5 KiB.
const ENTRIES: usize = 64;
/// The page cache may drop a page meanwhile; then a fault waits for it once.
const LIFETIME: Duration = Duration::from_millis(10);

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
    /// less than 10 ms before `now`.
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
        match known {
            Some(window) if window.resident & wanted == wanted => return Ok(true),
            // A neighbour was asked for just before: others will be, and a
            // probe of the window costs as much as four of single pages.
            Some(window) if window.resident & (wanted << 1 | wanted >> 1) != 0 => {
                let start = index * WINDOW_PAGES * PAGE;
                let end = map.len().min(start + WINDOW_PAGES * PAGE);
                let resident = map.resident_pages(start..end)?;
                *entry = Some(Window { index, probed: now, resident });
                return Ok(resident & wanted == wanted);
            }
            _ => {}
        }
        let resident = map.resident_pages(range.start..range.end())? << offset;
        let before = known.map_or(0, |window| window.resident);
        let probed = known.map_or(now, |window| window.probed);
        *entry = Some(Window { index, probed, resident: before | resident });
        Ok(resident & wanted == wanted)
    }
}
