//! Memory that is a private mapping of clean pages ([`crate::clean`]).
//!
//! Three things differ from anonymous memory:
//!
//! - **Mapped pages may go away.** The kernel may take a page of the memfd out of a
//!   mapping at any time (to swap it out, say), and tells nobody; the next touch is a
//!   fault on a page that the page map calls present. It is answered by mapping the page
//!   again. What a guest has written is anonymous memory, and does not go away so.
//! - **What is absent is not zero.** Where a guest gave memory back, its mapping shows
//!   what the memfd has as soon as nobody answers its faults. So the memory stays
//!   registered for as long as the VM lives, also when all of it is in place.
//! - **Zeroes are the kernel's**, mapped and not copied, for they take no memory then.
//!
//! Why a present page that was missed is not one that was given back: the page map is
//! told of a removal before the kernel carries it out, since whoever gives memory back
//! waits until its event was read (that is why `UFFD_FEATURE_EVENT_REMOVE` is asked for).
//! From then on its content is `Zero`, for ever.

use std::sync::Arc;

use vmpager_core::{Content, PageRun};
use vmpager_sys::uffd::{Features, Stop};

use super::install::Put;
use super::{Lost, Served};
use crate::clean::CleanPages;
use crate::reads::{Reads, Waiter};

impl Served {
    /// Serves memory that is a private mapping of these, from the start; `id` is their
    /// name, for successors.
    pub(crate) fn of_clean_pages(mut self, clean: Arc<CleanPages>, id: u64) -> Self {
        self.record.set_clean_pages(id);
        self.clean = Some(clean);
        self
    }

    /// What its userfaultfd can do.
    pub(crate) fn features(&self) -> Features {
        self.uffd.features()
    }

    /// Answers a fault on a page that is in place, if it is one of the memfd's: it is
    /// mapped again. Whether it was answered.
    pub(super) fn confirm_clean(
        &mut self,
        waiter: Waiter,
        reads: &mut Reads,
    ) -> Result<bool, Lost> {
        let one = PageRun::new(waiter.page, 1);
        let (_, range) = self.engine.slots().locate(one);
        let Some(clean) = &self.clean else { return Ok(false) };
        if self.engine.map().content(waiter.page) == Content::Zero || !clean.has(range) {
            return Ok(false);
        }
        let address = clean.address(range);
        let end = self.put(one, Put::Bytes(address))?;
        self.settle(waiter, end, reads)?;
        Ok(true)
    }

    /// Before its faults are answered no more: puts zeroes where memory was given back.
    /// False if that failed.
    pub(super) fn put_zeroes_for_good(&mut self) -> bool {
        let Some(clean) = self.clean.clone() else { return true };
        let mut page = 0;
        while page < self.engine.map().pages() {
            let (_, slot) = self.engine.slots().slot_of(page);
            let map = self.engine.map();
            let run = PageRun::new(page, map.alike_from(page, slot.end() - page));
            let absent = map.content(page) == Content::Zero && !map.is_present(page);
            page = run.end();
            let (_, range) = self.engine.slots().locate(run);
            // What the memfd lacks is zero there.
            if !absent || clean.lacks_all(range) {
                continue;
            }
            match self.put(run, Put::Zeroes) {
                Ok(end) if end.rest.is_none() => {}
                Ok(end) if matches!(end.rest, Some((_, Stop::Gone))) => return true,
                Ok(_) | Err(Lost::Failed(_)) => return false,
                Err(Lost::PeerGone) => return true,
            }
        }
        true
    }
}
