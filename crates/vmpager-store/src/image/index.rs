//! Which page of memory is which stored page.

use std::ops::Range;

use super::layout::{MAX_STORED, PARENT, Run, ZERO};

/// What some neighbouring pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Zero,
    /// As in the layer below.
    Parent,
    /// Stored pages, from this one on.
    Stored(u32),
}

impl Kind {
    /// The kind of pages that are `pages` further on.
    fn after(self, pages: u32) -> Self {
        match self {
            Self::Stored(first) => Self::Stored(first + pages),
            other => other,
        }
    }
}

/// Pages of one kind that lie next to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: u32,
    pub(crate) count: u32,
    pub(crate) kind: Kind,
}

impl Span {
    pub(crate) fn pages(&self) -> Range<u32> {
        self.first..self.first + self.count
    }

    /// Its part within these pages.
    fn within(self, pages: &Range<u32>) -> Self {
        let first = self.first.max(pages.start);
        let end = (self.first + self.count).min(pages.end);
        let kind = self.kind.after(first - self.first);
        Self { first, count: end.saturating_sub(first), kind }
    }
}

/// The map from pages to stored pages: ascending runs, the first from page 0 on,
/// 8 bytes each. A search takes log2 of their number of steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageIndex {
    runs: Vec<Run>,
    pages: u32,
}

impl PageIndex {
    /// An index of runs read from a file: checked, or what is wrong with them.
    pub(crate) fn parse(
        runs: Vec<Run>,
        pages: u32,
        stored: u32,
        has_parent: bool,
    ) -> Result<Self, String> {
        if runs.first().is_none_or(|run| run.first != 0) {
            return Err("its page map does not begin with page 0".into());
        }
        let index = Self { runs, pages };
        for (number, run) in index.runs.iter().enumerate() {
            let end = index.runs.get(number + 1).map_or(pages, |next| next.first);
            if run.first >= end || end > pages {
                return Err(format!("its page map is out of order at entry {number}"));
            }
            let fits = match run.value {
                ZERO => true,
                PARENT => has_parent,
                value => {
                    value < MAX_STORED
                        && u64::from(value) + u64::from(end - run.first) <= stored.into()
                }
            };
            if !fits {
                return Err(format!(
                    "its page map sends pages {} to {end} outside: to {:#x} of {stored} stored pages",
                    run.first, run.value
                ));
            }
        }
        Ok(index)
    }

    pub(crate) fn pages(&self) -> u32 {
        self.pages
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// All pages, as spans of one kind.
    pub(crate) fn spans(&self) -> impl Iterator<Item = Span> + '_ {
        self.spans_of(0..self.pages)
    }

    /// These pages, as spans of one kind. Pages beyond the memory are left out.
    pub(crate) fn spans_of(&self, pages: Range<u32>) -> impl Iterator<Item = Span> + '_ {
        let from = self.runs.partition_point(|run| run.first <= pages.start).saturating_sub(1);
        let pages = pages.start..pages.end.min(self.pages);
        let until = pages.end;
        self.runs[from..]
            .iter()
            .take_while(move |run| run.first < until)
            .enumerate()
            .map(move |(nth, run)| self.span(from + nth, *run).within(&pages))
            .filter(|span| span.count > 0)
    }

    fn span(&self, number: usize, run: Run) -> Span {
        let end = self.runs.get(number + 1).map_or(self.pages, |next| next.first);
        let kind = match run.value {
            ZERO => Kind::Zero,
            PARENT => Kind::Parent,
            value => Kind::Stored(value),
        };
        Span { first: run.first, count: end - run.first, kind }
    }

    /// This index over that of the layer below: what it leaves to its parent is
    /// taken from there, and its own stored pages come after the parent's.
    pub(crate) fn over(&self, below: &Self, stored_below: u32) -> Self {
        let mut builder = IndexBuilder::new();
        for span in self.spans() {
            match span.kind {
                Kind::Parent => below.spans_of(span.pages()).for_each(|span| builder.push(span)),
                Kind::Stored(first) => {
                    builder.push(Span { kind: Kind::Stored(stored_below + first), ..span });
                }
                Kind::Zero => builder.push(span),
            }
        }
        builder.finish(self.pages)
    }
}

/// Takes the pages of a memory in order.
#[derive(Debug, Default)]
pub(crate) struct IndexBuilder {
    runs: Vec<Run>,
    /// The page the next span begins with.
    next: u32,
}

impl IndexBuilder {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a span, which follows the one before.
    pub(crate) fn push(&mut self, span: Span) {
        debug_assert_eq!(span.first, self.next, "spans follow each other");
        let value = match span.kind {
            Kind::Zero => ZERO,
            Kind::Parent => PARENT,
            Kind::Stored(first) => first,
        };
        let goes_on = self.runs.last().is_some_and(|run| {
            let expected =
                if run.is_stored() { run.value + (span.first - run.first) } else { run.value };
            expected == value && run.is_stored() == matches!(span.kind, Kind::Stored(_))
        });
        if !goes_on {
            self.runs.push(Run { first: span.first, value });
        }
        self.next = span.first + span.count;
    }

    /// Adds pages of a kind.
    pub(crate) fn add(&mut self, count: u32, kind: Kind) {
        if count > 0 {
            self.push(Span { first: self.next, count, kind });
        }
    }

    /// The index of a memory of that many pages, all of which were added.
    pub(crate) fn finish(mut self, pages: u32) -> PageIndex {
        debug_assert_eq!(self.next, pages);
        self.runs.shrink_to_fit();
        PageIndex { runs: self.runs, pages }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kinds(stored: u32) -> impl Strategy<Value = Vec<Kind>> {
        let kind =
            prop_oneof![Just(Kind::Zero), Just(Kind::Parent), (0..stored).prop_map(Kind::Stored),];
        prop::collection::vec(kind, 40)
    }

    fn index(kinds: &[Kind]) -> PageIndex {
        let mut builder = IndexBuilder::new();
        kinds.iter().for_each(|kind| builder.add(1, *kind));
        builder.finish(u32::try_from(kinds.len()).unwrap())
    }

    fn plainly(index: &PageIndex, pages: Range<u32>) -> Vec<Kind> {
        let each = |span: Span| (0..span.count).map(move |n| span.kind.after(n));
        index.spans_of(pages).flat_map(each).collect()
    }

    #[test]
    fn neighbours_become_one_run() {
        let stored = |n| Kind::Stored(n);
        let kinds = [Kind::Zero, Kind::Zero, stored(5), stored(6), stored(8), Kind::Parent];
        let runs: Vec<_> = index(&kinds).runs().iter().map(|run| (run.first, run.value)).collect();
        assert_eq!(runs, [(0, ZERO), (2, 5), (4, 8), (5, PARENT)]);
    }

    #[test]
    fn what_points_outside_is_refused() {
        let run = |first, value| Run { first, value };
        for (runs, has_parent) in [
            (vec![], true),
            (vec![run(1, ZERO)], true),
            (vec![run(0, ZERO), run(0, ZERO)], true),
            (vec![run(0, ZERO), run(5, ZERO), run(3, ZERO)], true),
            (vec![run(0, ZERO), run(10, ZERO)], true),
            (vec![run(0, PARENT)], false),
            (vec![run(0, 0)], true),
            (vec![run(0, ZERO), run(9, 8)], true),
            (vec![run(0, MAX_STORED)], true),
            (vec![run(0, u32::MAX - 2)], true),
        ] {
            let result = PageIndex::parse(runs.clone(), 10, 8, has_parent);
            assert!(result.is_err(), "{runs:?}");
        }
        let fine = vec![run(0, PARENT), run(3, 7), run(4, ZERO)];
        assert!(PageIndex::parse(fine, 10, 8, true).is_ok());
    }

    proptest! {
        /// Against a list with an entry a page.
        #[test]
        fn an_index_says_what_was_put_in(kinds in kinds(30), from in 0..45_u32, count in 0..45_u32) {
            let index = index(&kinds);
            let to = (from + count).min(40);
            let from = from.min(to);
            let expected = &kinds[from as usize..to as usize];
            prop_assert_eq!(plainly(&index, from..to), expected);
            let parsed = PageIndex::parse(index.runs().to_vec(), 40, 30, true);
            prop_assert_eq!(parsed, Ok(index));
        }

        #[test]
        fn a_layer_hides_what_is_below(above in kinds(30), below in kinds(20)) {
            let both = index(&above).over(&index(&below), 20);
            let expected: Vec<_> = above.iter().zip(&below).map(|(above, below)| match above {
                Kind::Parent => *below,
                Kind::Stored(n) => Kind::Stored(n + 20),
                Kind::Zero => Kind::Zero,
            }).collect();
            prop_assert_eq!(plainly(&both, 0..40), expected);
        }
    }
}
