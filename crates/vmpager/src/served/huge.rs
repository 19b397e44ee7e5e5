//! Huge pages under memory that is in place.
//!
//! A guest pays for its first touch of each page that the host maps on its own.
//! Two MiB whose pages have all arrived are therefore copied into one huge page
//! (`MADV_COLLAPSE`), also in another process. Whoever touches them meanwhile
//! waits, and so does every change of the process's mappings: it is done while
//! nobody has faulted for a while, piece by piece, with pauses.
//!
//! Memory of this process that is to be filled gets huge pages at once: 2 MiB are
//! prepared elsewhere and moved in whole (`UFFDIO_MOVE`). What cannot be moved is
//! copied page by page, like all else.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tracing::{info, warn};
use vmpager_core::{PageRun, PageSize};
use vmpager_sys::collapse::collapse;
use vmpager_sys::uffd::{Installed, Staging};

use super::Served;

/// How long nobody must have faulted.
const QUIET: Duration = Duration::from_millis(50);

/// A pause is so many times as long as the piece before it took: at most a
/// quarter of a CPU goes into it, and a quarter of the VM's time.
const PAUSE: u32 = 3;

/// After so many refusals in a row it is left at that.
const ENOUGH: u32 = 16;

/// Who has huge pages made of its memory.
#[derive(Debug)]
pub(super) struct Huge {
    /// The process that maps the memory.
    process: OwnedFd,
    refused_in_a_row: u32,
    not_before: Instant,
    /// Where pieces are prepared that can be moved in whole.
    staging: Option<Staging>,
}

/// Base pages in a piece.
pub(super) const PIECE: u64 = PageSize::Size2M.bytes() / PageSize::Size4K.bytes();

impl Served {
    /// Makes huge pages of what is in place in the process of that pidfd.
    pub(crate) fn making_huge_pages(mut self, process: OwnedFd) -> Self {
        self.engine.watch_for_whole_pieces();
        let not_before = Instant::now() + QUIET;
        self.huge = Some(Huge { process, refused_in_a_row: 0, not_before, staging: None });
        self
    }

    /// Moves whole pieces into this process's memory, if the kernel can.
    pub(crate) fn moving_pieces(mut self) -> Self {
        if let Some(huge) = &mut self.huge
            && self.uffd.can_move()
        {
            huge.staging = Staging::new()
                .inspect_err(|error| info!("pieces are copied, not moved: {error}"))
                .ok();
        }
        self
    }

    /// Whether pieces may be moved in whole.
    pub(super) fn moves_pieces(&self) -> bool {
        self.huge.as_ref().is_some_and(|huge| huge.staging.is_some())
    }

    /// Whether a claimed run is a piece that may be moved in whole.
    pub(super) fn is_movable(&self, run: PageRun) -> bool {
        let aligned = |hva: u64| hva.is_multiple_of(PageSize::Size2M.bytes());
        run.count == PIECE
            && self.moves_pieces()
            && !self.outside.frozen
            && self.engine.slots().slot_of(run.first).0.page_size == PageSize::Size4K
            && aligned(self.address(run).0.0)
    }

    /// Moves a movable run in, whose bytes are at `src`. `None` if they cannot be
    /// prepared.
    pub(super) fn move_in(&mut self, run: PageRun, src: usize) -> Option<Installed> {
        let (hva, _) = self.address(run);
        let huge = self.huge.as_mut()?;
        let staging = huge.staging.as_ref()?;
        // Who copies them instead finds out what is wrong with them.
        staging.load(src).ok()?;
        let moved = self.uffd.move_in(staging, hva.0);
        if moved.bytes > 0 {
            huge.refused_in_a_row = 0;
            return Some(moved);
        }
        huge.refused_in_a_row += 1;
        if huge.refused_in_a_row >= ENOUGH {
            info!("pieces are copied from now on: {:?}, {ENOUGH} times in a row", moved.stop);
            huge.staging = None;
            huge.refused_in_a_row = 0;
        }
        Some(moved)
    }

    /// When the next huge page may be made, if there may be one to make.
    pub(crate) fn huge_at(&self) -> Option<Instant> {
        let huge = self.huge.as_ref().filter(|_| self.engine.may_have_whole_pieces())?;
        Some(huge.not_before)
    }

    /// Somebody faulted at that time.
    pub(super) fn not_quiet(&mut self, at: Instant) {
        if let Some(huge) = &mut self.huge {
            huge.not_before = huge.not_before.max(at + QUIET);
        }
    }

    /// Makes one huge page, if there is one to make.
    pub(crate) fn make_huge(&mut self) {
        let Some(huge) = &self.huge else { return };
        let Some(piece) = self.engine.next_whole_piece() else { return };
        let (hva, len) = self.address(piece);
        let started = Instant::now();
        let result = collapse(huge.process.as_fd(), hva.0, len);
        self.made_huge(piece, started, result);
    }

    fn made_huge(&mut self, piece: PageRun, started: Instant, result: Result<(), Errno>) {
        let Some(huge) = &mut self.huge else { return };
        let now = Instant::now();
        huge.not_before = now + (now - started) * PAUSE;
        let Err(error) = result else {
            huge.refused_in_a_row = 0;
            self.counters.pages_huge += piece.count;
            return;
        };
        huge.refused_in_a_row += 1;
        match error {
            // Found out by others.
            Errno::SRCH => {}
            Errno::PERM | Errno::NOSYS => {
                warn!(
                    "no huge pages: {error}; making them in another process takes CAP_SYS_NICE, \
                     the right to trace it, and Linux 6.1"
                );
                self.huge = None;
            }
            _ if huge.refused_in_a_row >= ENOUGH => {
                info!("no more huge pages: {error}, {ENOUGH} times in a row");
                self.huge = None;
            }
            _ => {}
        }
    }
}
