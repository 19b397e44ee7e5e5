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
/// How much is given back depends on how much such a fault proves. A guest that has
/// nothing to do with the profile hits its pages too, the more often the more of
/// memory they are; but seldom those whose turn is near.
///
/// Its pieces are sized as those of the background fill ([`Pace`]): a guest that is
/// ahead of the replay faults again and again, and each time costs more than the
/// pages that one of its pieces brings. That is so as long as these pages are what the
/// guest would fault on next. Where they are not, each fault waits for a piece in vain, and
/// where chance alone hits the profile often, patience lasts for many faults. So pieces
/// also need *trust*: a fault on a page that the profile lacks makes them the smallest
/// there are, others let them grow again; and while they are the smallest, none comes
/// after a fault that was just served ([`is_trusted`](Self::is_trusted)).
#[derive(Debug)]
pub struct Replay {
    runs: Vec<PageRun>,
    /// The run whose turn it is.
    at: usize,
    /// A bit for each page of the page map: whether it is in the profile.
    members: Vec<u64>,
    /// In parts of [`WHOLE`].
    patience: u32,
    /// What a fault on a page that is not near its turn gives back.
    far_credit: u32,
    /// Since patience ran out, and until there is [`CREDIT`](Self::CREDIT) again.
    has_stopped: bool,
    /// In parts of [`WHOLE`]: each doubles the largest piece there may be.
    trust: u32,
    pace: Pace,
    counts: ReplayCounts,
}

/// Parts of which patience is made: one fault's.
const WHOLE: u32 = 256;
/// How many pages are near: as many as can be looked through at each fault.
const NEAR: u64 = 256;
/// What a fault on one of them gives back at least: a third of all faults on pages
/// that the profile has, in its order, is enough to go on.
const NEAR_CREDIT: u32 = 2 * WHOLE;

/// log2 of the pages of a piece without any trust: a wait of some 4 to 15 us.
const LEAST_SHIFT: u32 = 2;
/// All the trust there is, in parts of [`WHOLE`]: pieces as large as any.
const FULL_TRUST: u32 = (Pace::MAX_SHIFT - LEAST_SHIFT) * WHOLE;
/// How many times what it gives back of patience a fault gives of trust. One on a page that
/// the profile lacks takes all of it.
const TRUST_CREDIT: u32 = 2;

/// How well a profile fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplayCounts {
    /// Faults on pages that it lacks.
    pub missed: u64,
    /// Faults on pages that it has, which came before the replay did.
    pub late: u64,
}

impl Replay {
    /// How many faults on pages that the profile lacks end the replay of one that has
    /// proved right; of another, [`CREDIT`](Self::CREDIT) do.
    pub const PATIENCE: u32 = 16;
    /// How many of them a fault on one of its pages makes up for, at most.
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
        let known = members.iter().map(|word| u64::from(word.count_ones())).sum();
        let far_credit = far_credit(known, pages);
        let (patience, counts) = (Self::CREDIT * WHOLE, ReplayCounts::default());
        // Nobody has waited.
        let (has_stopped, trust, pace) = (false, FULL_TRUST, Pace::new());
        Self { runs, at: 0, members, patience, far_credit, has_stopped, trust, pace, counts }
    }

    /// Whether a piece may come even while others fault, one after the other. If not,
    /// it waits until nothing else is to be done.
    pub fn is_trusted(&self) -> bool {
        self.trust >= WHOLE
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

    /// Whether the page is one of the next [`NEAR`].
    fn is_near(&self, page: u64) -> bool {
        let mut left = NEAR;
        for run in self.ahead() {
            if run.pages().contains(&page) {
                return true;
            }
            left = left.saturating_sub(run.count);
            if left == 0 {
                return false;
            }
        }
        false
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
            let proves_more = self.far_credit < NEAR_CREDIT && self.is_near(page);
            let credit = if proves_more { NEAR_CREDIT } else { self.far_credit };
            self.patience = (self.patience + credit).min(Self::PATIENCE * WHOLE);
            self.has_stopped &= self.patience < Self::CREDIT * WHOLE;
            self.trust = (self.trust + credit * TRUST_CREDIT).min(FULL_TRUST);
        } else {
            self.counts.missed += 1;
            self.patience = self.patience.saturating_sub(WHOLE);
            self.has_stopped |= self.patience == 0;
            self.trust = 0;
        }
        self.pace.limit(LEAST_SHIFT + self.trust / WHOLE);
    }

    fn interrupted(&mut self) {
        self.pace.demanded();
    }

    /// Nothing while it has stopped, or when all have had their turn.
    fn next(&self) -> Option<PageRun> {
        self.runs.get(self.at).copied().filter(|_| !self.has_stopped)
    }

    fn took(&mut self, until: u64) {
        if let Some(run) = self.runs.get_mut(self.at) {
            let until = until.clamp(run.first, run.end());
            *run = PageRun::new(until, run.end() - until);
            self.at += usize::from(run.count == 0);
        }
    }
}

/// A half of what a guest loses meanwhile that touches pages at random: it ends a
/// replay of `known` of all `pages`, however many they are.
fn far_credit(known: u64, pages: u64) -> u32 {
    let most = Replay::CREDIT * WHOLE;
    let lacking = pages.saturating_sub(known).saturating_mul(WHOLE.into());
    let credit = lacking.checked_div(known.saturating_mul(2)).unwrap_or_default();
    u32::try_from(credit).map_or(most, |credit| credit.min(most))
}

fn place(members: &mut [u64], page: u64) -> Option<(&mut u64, u64)> {
    let word = members.get_mut(usize::try_from(page / 64).ok()?)?;
    Some((word, 1 << (page % 64)))
}
