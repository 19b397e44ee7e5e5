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
use vmpager_core::{PageRun, PageSize, WholePiece};
use vmpager_sys::collapse::collapse;
use vmpager_sys::uffd::{Installed, Staging};

use super::{Served, at_hand};
use crate::reads::Reads;

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

impl Served {
    /// Makes huge pages of what is in place in the process of that pidfd.
    pub(crate) fn making_huge_pages(mut self, process: OwnedFd) -> Self {
        self.engine.watch_for_whole_pieces();
        let not_before = Instant::now() + QUIET;
        self.huge = Some(Huge { process, refused_in_a_row: 0, not_before, staging: None });
        self
    }

    /// Moves whole pieces into this process's memory.
    pub(crate) fn moving_pieces(mut self) -> Self {
        if let Some(huge) = &mut self.huge {
            huge.staging = Staging::new()
                .inspect_err(|error| info!("pieces are copied, not moved: {error}"))
                .ok();
        }
        self
    }

    /// Whether pieces may be moved in whole.
    pub(super) fn moves_pieces(&self) -> bool {
        !self.outside.frozen && self.huge.as_ref().is_some_and(|huge| huge.staging.is_some())
    }

    /// Brings in a whole piece that is claimed, if its bytes are at hand. What
    /// cannot be moved is given back. Returns the pages that are in place.
    pub(super) fn bring_piece(&mut self, whole: &WholePiece, reads: &mut Reads) -> u64 {
        let (hva, _) = self.address(whole.piece);
        let prepared = self.prepare(whole, reads).is_some();
        let staging = self.huge.as_ref().and_then(|huge| huge.staging.as_ref());
        let moved = match staging.filter(|_| prepared) {
            Some(staging) => self.uffd.move_in(staging, hva.0),
            None => Installed { bytes: 0, stop: None },
        };
        let done = PageRun::new(whole.piece.first, moved.bytes >> PageSize::Size4K.shift());
        self.installed(done);
        for run in &whole.reads {
            let first = run.first.max(done.end());
            let left = PageRun::new(first, run.end().saturating_sub(first));
            self.engine.released(left);
        }
        self.tell_installers();
        if prepared {
            self.moved(&moved);
        }
        self.counters.pages_moved += done.count;
        let read = |run: &PageRun| run.end().min(done.end()).saturating_sub(run.first);
        let pages: u64 = whole.reads.iter().map(read).sum();
        self.took(pages << PageSize::Size4K.shift(), 0);
        done.count
    }

    /// Has all bytes of a piece in the staging memory. `None` if they are not at
    /// hand, or cannot be had: who brings them otherwise finds out why.
    fn prepare(&mut self, whole: &WholePiece, reads: &mut Reads) -> Option<()> {
        let piece = self.address(whole.piece).0;
        let staging = self.huge.as_mut()?.staging.as_mut()?;
        staging.clear().ok()?;
        for run in &whole.reads {
            let (hva, range) = self.engine.slots().locate(*run);
            let data = at_hand(&mut *reads.reader, range).ok()??;
            let offset = usize::try_from(hva.0 - piece.0).ok()?;
            staging.load(offset, data.address(), data.len()).ok()?;
        }
        Some(())
    }

    /// How a move ended.
    fn moved(&mut self, moved: &Installed) {
        let Some(huge) = &mut self.huge else { return };
        if moved.bytes > 0 {
            huge.refused_in_a_row = 0;
            return;
        }
        huge.refused_in_a_row += 1;
        if huge.refused_in_a_row >= ENOUGH {
            info!("pieces are copied from now on: {:?}, {ENOUGH} times in a row", moved.stop);
            huge.staging = None;
            huge.refused_in_a_row = 0;
        }
    }

    /// Whether huge pages are made of it.
    pub(crate) fn makes_huge(&self) -> bool {
        self.huge.is_some()
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
