//! What the guest is asked to do.

use std::ops::Range;

use crate::contents::Rng;
use crate::error::VmError;

/// In which order pages are touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Each page at most once, in a random order.
    #[default]
    Random,
    /// From the first page on.
    Sequential,
}

/// What the guest does in one run: touch pages, time each touch, verify each
/// page.
#[derive(Clone, Debug, Default)]
pub struct Workload {
    /// The order of the touches.
    pub order: Order,
    /// How many pages to touch; `None` for all that have contents.
    pub touches: Option<u64>,
    /// Decides the random order.
    pub seed: u64,
    /// Every how many touches one is a write (that leaves the page as it is);
    /// 0 for never, 1 for all.
    pub write_every: u64,
}

impl Workload {
    /// The pages to touch, in order.
    pub(crate) fn pages(&self, of: Range<u64>) -> Result<Vec<u32>, VmError> {
        let available = of.end - of.start;
        let touches = self.touches.unwrap_or(available);
        if touches > available {
            return Err(VmError::Config {
                field: "touches",
                value: touches,
                remedy: "touch no more pages than the guest has with contents, or build a \
                         larger guest",
            });
        }
        let page = |p: u64| u32::try_from(p).expect("32 GiB have fewer than 2^32 pages");
        let mut pages: Vec<u32> = of.map(page).collect();
        let touches = usize::try_from(touches).expect("as many as are in a Vec at most");
        if self.order == Order::Random {
            // The first steps of a Fisher-Yates shuffle.
            let mut rng = Rng(self.seed);
            for i in 0..touches {
                let rest = pages.len() - i;
                let other = i + usize::try_from(rng.below(rest as u64)).expect("below a length");
                pages.swap(i, other);
            }
        }
        pages.truncate(touches);
        Ok(pages)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn random_touches_are_distinct_and_depend_on_the_seed() {
        let with_seed = |seed| Workload { touches: Some(500), seed, ..Workload::default() };
        let pages = with_seed(1).pages(100..1100).unwrap();
        assert_eq!(pages.len(), 500);
        assert_eq!(pages.iter().collect::<HashSet<_>>().len(), 500);
        assert!(pages.iter().all(|p| (100..1100).contains(p)));
        assert_ne!(pages, with_seed(2).pages(100..1100).unwrap());
        assert_eq!(pages, with_seed(1).pages(100..1100).unwrap());
    }

    #[test]
    fn sequential_starts_at_the_first_page_and_all_means_all() {
        let workload = Workload { order: Order::Sequential, ..Workload::default() };
        assert_eq!(workload.pages(5..8).unwrap(), [5, 6, 7]);
        let all: HashSet<u32> = Workload::default().pages(0..300).unwrap().into_iter().collect();
        assert_eq!(all.len(), 300);
    }

    #[test]
    fn too_many_touches_are_refused_by_name() {
        let workload = Workload { touches: Some(4), ..Workload::default() };
        let error = workload.pages(5..8).unwrap_err().to_string();
        assert!(error.contains("touches 4"), "{error}");
    }
}
