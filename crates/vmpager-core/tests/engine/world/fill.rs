//! Holes of the source, and what is brought in though nobody waits for it:
//! neighbours, and the background fill.

use vmpager_core::{ByteRange, Content, FillPlan, PageRun, PageSize, Piece};

use super::{Memory, Page, World, at};

/// Pages of the largest hole that is given memory.
const SMALL_HOLE: u64 = 511;

impl World {
    pub(crate) fn known_zero(&mut self, range: ByteRange) {
        let mut first = 0;
        while let Some(page) = self.pages.get(at(first)) {
            let slot = page.slot;
            let inside: Vec<u64> = slot.pages().filter(|&page| self.lies_in(page, range)).collect();
            let small = page.size == PageSize::Size4K && inside.len() as u64 <= SMALL_HOLE;
            for page in inside {
                let p = &mut self.pages[at(page)];
                (p.must_be_zero, p.hole) = (true, small);
                (p.present, p.content) = (false, Content::Zero);
            }
            first = slot.end();
        }
        self.engine.known_zero(range);
    }

    fn lies_in(&self, page: u64, range: ByteRange) -> bool {
        let p = &self.pages[at(page)];
        let start = p.source_offset;
        range.start <= start && start + p.size.bytes() <= range.end()
    }

    /// One piece, as the pager does it: several runs, or none.
    pub(crate) fn fill_piece(&mut self) {
        let piece = self.engine.fill_piece();
        assert_eq!(piece, self.pace.next_pages());
        let mut done = 0;
        while done < piece && !self.refuses_installs() {
            match self.fill(piece - done) {
                FillPlan::Bring(piece) => done += piece.run().count,
                FillPlan::Wait | FillPlan::Complete => break,
            }
        }
    }

    /// One run, `most` base pages at most.
    pub(crate) fn fill(&mut self, most: u64) -> FillPlan {
        let expected = self.next_fill(most);
        let plan = self.engine.next_fill(most);
        assert_eq!(plan, expected, "{most} at most");
        match plan {
            FillPlan::Bring(piece) => self.bring(piece),
            FillPlan::Wait => assert!(!self.reads.is_empty(), "nothing to wait for"),
            FillPlan::Complete => (),
        }
        plan
    }

    /// One run near a page somebody waited for.
    pub(crate) fn neighbours(&mut self, most: u64) {
        let mut expected = None;
        while let Some(window) = self.owed.pop_front() {
            expected = self.next_piece(window, most);
            if let Some(piece) = expected {
                let end = piece.run().end();
                if end < window.end() {
                    self.owed.push_front(PageRun::new(end, window.end() - end));
                }
                break;
            }
        }
        let piece = self.engine.next_neighbours(most).map(|near| near.piece);
        assert_eq!(piece, expected, "{most} at most");
        piece.into_iter().for_each(|piece| self.bring(piece));
    }

    fn bring(&mut self, piece: Piece) {
        match piece {
            Piece::Fetch(run) => self.claim(run),
            Piece::Zero(run) => self.fill_zero(run),
        }
    }

    /// What the engine should say.
    fn next_fill(&self, most: u64) -> FillPlan {
        match self.next_piece(PageRun::new(0, self.pages.len() as u64), most) {
            Some(piece) => FillPlan::Bring(piece),
            None if self.outstanding() == 0 => FillPlan::Complete,
            None => FillPlan::Wait,
        }
    }

    /// The first pages of a run that nobody brings in.
    fn next_piece(&self, within: PageRun, most: u64) -> Option<Piece> {
        let free = |p: &Page| !p.present && p.content == Content::Source;
        let first = within.pages().find(|&i| {
            let p = &self.pages[at(i)];
            free(p) || p.hole
        })?;
        let p = self.pages[at(first)];
        let most = if p.size == PageSize::Size2M { 1 } else { most };
        let end = p.slot.end().min(within.end()).min(first.saturating_add(most));
        let run = |end: u64, alike: &dyn Fn(&Page) -> bool| {
            let alike = (first..end).take_while(|&i| alike(&self.pages[at(i)]));
            PageRun::new(first, alike.count() as u64)
        };
        // A hole is found a word of the map at a time, and a read ends with
        // its 2 MiB.
        let word = first / 64 * 64 + 64;
        let read = first / 512 * 512 + 512;
        Some(if p.hole {
            Piece::Zero(run(end.min(word), &|p| p.hole))
        } else {
            Piece::Fetch(run(end.min(read), &free))
        })
    }

    fn fill_zero(&mut self, run: PageRun) {
        let done = run.pages().take_while(|&page| self.install(page, Memory::Zero)).count() as u64;
        let (done, rest) =
            (PageRun::new(run.first, done), PageRun::new(run.first + done, run.count - done));
        self.engine.installed(done);
        for page in done.pages() {
            self.has_memory(page);
        }
        if rest.count > 0 {
            self.engine.released(rest);
        }
    }
}
