//! The holes of a sparse file: pages that read as zeroes and cost no read.

use std::os::fd::AsFd;

use rustix::fs::SeekFrom;
use vmpager_core::ByteRange;

use crate::PAGE;

/// Most holes to remember: 4 MiB of them. Taking a hole for data is slower,
/// never wrong.
const MAX_HOLES: usize = 1 << 19;

/// Holes in ascending order, as first page and number of pages.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Holes(Vec<(u32, u32)>);

impl Holes {
    /// Asks the file system where the holes are. One that cannot tell has
    /// none; one that fails half-way has those found so far.
    pub(crate) fn find(file: impl AsFd, len: u64) -> Self {
        let mut holes = Self::default();
        let mut at = 0;
        while at < len && holes.0.len() < MAX_HOLES {
            let Ok(hole) = rustix::fs::seek(&file, SeekFrom::Hole(at)) else { break };
            if hole >= len {
                break;
            }
            let data = match rustix::fs::seek(&file, SeekFrom::Data(hole)) {
                Ok(data) => data.min(len),
                // Only a hole follows.
                Err(rustix::io::Errno::NXIO) => len,
                Err(_) => break,
            };
            holes.add(hole, data);
            if data <= at {
                break;
            }
            at = data;
        }
        holes.0.shrink_to_fit();
        holes
    }

    /// Adds the whole pages of a hole that lies behind all others.
    fn add(&mut self, start: u64, end: u64) {
        let (first, last) = (start.div_ceil(PAGE), end / PAGE);
        if first >= last {
            return;
        }
        let (Ok(first), Ok(count)) = (u32::try_from(first), u32::try_from(last - first)) else {
            return;
        };
        match self.0.last_mut() {
            Some((before, pages)) if *before + *pages == first => *pages += count,
            _ => self.0.push((first, count)),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = ByteRange> {
        self.0
            .iter()
            .map(|&(first, count)| ByteRange::new(u64::from(first) * PAGE, u64::from(count) * PAGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_count_and_neighbours_merge() {
        let mut holes = Holes::default();
        holes.add(1, 2 * PAGE);
        holes.add(2 * PAGE, 3 * PAGE + 5);
        holes.add(4 * PAGE + 1, 5 * PAGE + 4095);
        holes.add(8 * PAGE, 9 * PAGE);
        let found: Vec<_> = holes.iter().collect();
        assert_eq!(found, [ByteRange::new(PAGE, 2 * PAGE), ByteRange::new(8 * PAGE, PAGE)]);
    }

    #[test]
    fn pages_beyond_16_tib_are_data() {
        let mut holes = Holes::default();
        holes.add(1 << 44, (1 << 44) + PAGE);
        holes.add(0, 1 << 50);
        assert_eq!(holes, Holes::default());
    }
}
