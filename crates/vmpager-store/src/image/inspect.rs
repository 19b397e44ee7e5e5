//! What an image is made of.

use std::path::PathBuf;

use crate::PAGE;

use super::codec::Codec;
use super::contents::Placed;
use super::identity::ContentId;
use super::index::Kind;
use super::layout::{RUN_BYTES, Run};
use super::{Image, PAGE_BYTES};

/// What an image and the layers below it are made of.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// What the contents are called.
    pub content: ContentId,
    /// Pages that are zeroes.
    pub zero_pages: u64,
    /// Pages that are like an earlier page of memory.
    pub duplicate_pages: u64,
    /// Pages that are neither.
    pub distinct_pages: u64,
    /// Bytes of the index in this process.
    pub index_bytes: u64,
    /// Its layers, the bottom one first.
    pub layers: Vec<LayerInfo>,
    /// Its memory in parts of equal size, but for the last.
    pub cells: Vec<Cell>,
}

/// One layer.
#[derive(Clone, Debug)]
pub struct LayerInfo {
    /// Its file.
    pub path: PathBuf,
    /// What the contents are called, with this layer on top.
    pub content: ContentId,
    /// How it is compressed.
    pub codec: Codec,
    /// Bytes of memory that are compressed together.
    pub frame_bytes: u64,
    /// Bytes of its file.
    pub file_bytes: u64,
    /// Bytes of its frames.
    pub packed_bytes: u64,
    /// Pages that it stores.
    pub stored_pages: u64,
    /// Pages of memory that come from it.
    pub used_pages: u64,
}

/// A part of memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cell {
    /// Pages that are zeroes.
    pub zero_pages: u64,
    /// Pages that are like an earlier page of memory.
    pub duplicate_pages: u64,
    /// Of the others, how many come from each layer.
    pub distinct_pages: Vec<u64>,
    /// What those take in their files, in bytes.
    pub packed_bytes: f64,
}

impl Image {
    /// Looks at its index, and at its memory in at most so many parts.
    pub fn inspect(&self, cells: u64) -> Inspection {
        let layers = &self.contents.layers;
        let pages = u64::from(self.contents.index.pages());
        let cell_pages = pages.div_ceil(cells.max(1));
        let empty = Cell { distinct_pages: vec![0; layers.len()], ..Cell::default() };
        let count = usize::try_from(pages.div_ceil(cell_pages)).unwrap_or(0);
        let mut cells = vec![empty; count];
        let mut used = vec![0; layers.len()];
        let mut seen = Seen::new(self.stored_pages());
        for span in self.contents.index.spans() {
            for nth in 0..span.count {
                let page = span.first + nth;
                let number = usize::try_from(u64::from(page) / cell_pages).unwrap_or(0);
                let Some(cell) = cells.get_mut(number) else { continue };
                let Kind::Stored(first) = span.kind else {
                    cell.zero_pages += 1;
                    continue;
                };
                let stored = first + nth;
                let layer = self.contents.layer_of(stored);
                used[layer] += 1;
                if seen.again(stored) {
                    cell.duplicate_pages += 1;
                } else {
                    cell.distinct_pages[layer] += 1;
                    cell.packed_bytes += packed_share(&layers[layer], stored);
                }
            }
        }
        let sum = |number: fn(&Cell) -> u64| cells.iter().map(number).sum();
        Inspection {
            memory_bytes: self.memory_bytes(),
            content: self.content(),
            zero_pages: sum(|cell| cell.zero_pages),
            duplicate_pages: sum(|cell| cell.duplicate_pages),
            distinct_pages: sum(|cell| cell.distinct_pages.iter().sum()),
            index_bytes: self.contents.index.runs().len() as u64 * size_of::<Run>() as u64,
            layers: layers.iter().zip(used).map(|(placed, used)| info(placed, used)).collect(),
            cells,
        }
    }

    fn stored_pages(&self) -> u32 {
        self.contents.layers.iter().map(|placed| placed.layer.record.stored_pages).sum()
    }
}

fn info(placed: &Placed, used_pages: u64) -> LayerInfo {
    let layer = &placed.layer;
    LayerInfo {
        path: layer.path.clone(),
        content: ContentId(layer.record.content),
        codec: layer.record.codec,
        frame_bytes: u64::from(layer.record.frame_pages) * PAGE,
        file_bytes: layer.file_bytes,
        packed_bytes: layer.frames.iter().map(|frame| u64::from(frame.len)).sum(),
        stored_pages: layer.record.stored_pages.into(),
        used_pages,
    }
}

/// A page's share of the bytes of its frame.
fn packed_share(placed: &Placed, stored: u32) -> f64 {
    let frame = (stored - placed.first_stored) / placed.layer.record.frame_pages;
    let pages = u32::try_from(placed.layer.raw_bytes(frame) / PAGE_BYTES).unwrap_or(1);
    f64::from(placed.layer.frames[frame as usize].len) / f64::from(pages)
}

/// Stored pages that were met, a bit each.
struct Seen(Vec<u64>);

impl Seen {
    fn new(pages: u32) -> Self {
        Self(vec![0; pages.div_ceil(64) as usize])
    }

    /// Whether a page was met before.
    fn again(&mut self, page: u32) -> bool {
        let (word, bit) = (&mut self.0[page as usize / 64], 1 << (page % 64));
        let again = *word & bit != 0;
        *word |= bit;
        again
    }
}

const _: () = assert!(size_of::<Run>() == RUN_BYTES, "what is said of the index holds");
