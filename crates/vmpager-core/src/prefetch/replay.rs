//! The order of a profile: pages that an earlier run of the guest touched.

use super::{Pace, Prefetch};
use crate::addr::PageRun;

/// Brings in the pages of a profile, in its order.
///
/// A profile may be wrong: another workload, another input. What it costs then is
/// bounded by *patience*: each fault on a page that the profile lacks takes from
/// it, each fault on a page that it has, and that was not brought in yet, gives
/// some back. A guest that goes its own way soon ends the replay; one that goes
/// the profile's way, and elsewhere too, catches up with a replay that has
/// stopped, waits for a page of it, and so starts it again.
///
/// Its pieces are sized as those of the background fill ([`Pace`]): a guest that is
/// ahead of the replay faults again and again, and each time costs more than the
/// pages that one of its pieces brings.
#[derive(Debug)]
pub struct Replay {
    runs: Vec<PageRun>,
    /// The run whose turn it is.
    at: usize,
    /// A bit for each page of the page map: whether it is in the profile.
    members: Vec<u64>,
    patience: u32,
    pace: Pace,
    counts: ReplayCounts,
}

/// How well a profile fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplayCounts {
    /// Faults on pages that it lacks.
    pub missed: u64,
    /// Faults on pages that it has, which came before the replay did.
    pub late: u64,
}

impl Replay {
    /// How many faults on pages that the profile lacks end the replay.
    pub const PATIENCE: u32 = 16;
    /// How many of them a fault on one of its pages makes up for.
    pub const CREDIT: u32 = 8;

    /// Brings in these runs of a page map of so many pages, in this order. Costs
    /// a bit a page, and 16 bytes a run.
    pub fn new(runs: Vec<PageRun>, pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        let mut members = vec![0_u64; words];
        for page in runs.iter().flat_map(PageRun::pages) {
            if let Some((word, bit)) = place(&mut members, page) {
                *word |= bit;
            }
        }
        let counts = ReplayCounts::default();
        Self { runs, at: 0, members, patience: Self::PATIENCE, pace: Pace::new(), counts }
    }

    /// How many base pages to bring in before faults are looked for again.
    pub fn piece(&mut self) -> u64 {
        self.pace.next_pages()
    }

    /// Whether all pages have had their turn.
    pub fn is_done(&self) -> bool {
        self.at >= self.runs.len()
    }

    /// The runs that come after the one whose turn it is, without those that have
    /// had theirs.
    pub fn ahead(&self) -> &[PageRun] {
        self.runs.get(self.at..).unwrap_or_default()
    }

    /// How well the profile fits so far.
    pub fn counts(&self) -> ReplayCounts {
        self.counts
    }
}

impl Prefetch for Replay {
    fn faulted(&mut self, page: u64, _bounds: PageRun) {
        let has = place(&mut self.members, page).is_some_and(|(word, bit)| *word & bit != 0);
        if has {
            self.counts.late += 1;
            self.patience = (self.patience + Self::CREDIT).min(Self::PATIENCE);
        } else {
            self.counts.missed += 1;
            self.patience = self.patience.saturating_sub(1);
        }
    }

    fn interrupted(&mut self) {
        self.pace.demanded();
    }

    /// Nothing while there is no patience left, or when all have had their turn.
    fn next(&self) -> Option<PageRun> {
        self.runs.get(self.at).copied().filter(|_| self.patience > 0)
    }

    fn took(&mut self, until: u64) {
        if let Some(run) = self.runs.get_mut(self.at) {
            let until = until.clamp(run.first, run.end());
            *run = PageRun::new(until, run.end() - until);
            self.at += usize::from(run.count == 0);
        }
    }
}

fn place(members: &mut [u64], page: u64) -> Option<(&mut u64, u64)> {
    let word = members.get_mut(usize::try_from(page / 64).ok()?)?;
    Some((word, 1 << (page % 64)))
}
