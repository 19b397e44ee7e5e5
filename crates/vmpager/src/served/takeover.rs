//! Going on where another process was interrupted: killed at any instruction, or
//! told to make way. What it left is in its page map and its record; the
//! [`record`](super::record) says why that is enough.

use std::io;
use std::os::fd::BorrowedFd;

use tracing::{error, warn};
use vmpager_core::{Engine, Hva, MapError, PageSource, SlotError, SlotSet};
use vmpager_sys::uffd::{Left, Userfaultfd};

use super::outside::moved_view;
use super::{Flag, RecordError, ServeOptions, Served, State};
use crate::kill;
use crate::reads::MemoryId;

/// Why a memory cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeoverError {
    #[error("its record: {0}")]
    Record(#[from] RecordError),
    #[error("its record: {0}")]
    Slots(#[from] SlotError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("its page map: {0}")]
    Io(#[from] io::Error),
}

impl Served {
    /// Takes over a memory that another process served until it ended.
    ///
    /// # Errors
    ///
    /// If this version cannot read what it left. Nothing was done then.
    pub(crate) fn take_over(
        id: MemoryId,
        uffd: Userfaultfd,
        state: State,
        source: &dyn PageSource,
        options: &ServeOptions,
    ) -> Result<Self, TakeoverError> {
        let slots = SlotSet::new(&state.record.slots()?, source.len())?;
        let written = state.map.written()?;
        let mut engine = Engine::take_over(slots, state.map, &written, options.neighbours)?;
        if let Some(order) = &options.replay {
            engine.replay_rest(order);
        }
        let mut served = Self::over(id, uffd, engine, state.record, options);
        served.apply_what_was_left()?;
        kill::point("taken over");
        served.wake_everybody();
        Ok(served)
    }

    /// Applies the removals that were read and may not have been applied.
    fn apply_what_was_left(&mut self) -> Result<(), TakeoverError> {
        let view = self.record.view()?.map(|slots| SlotSet::new(&slots, u64::MAX)).transpose()?;
        let left: Vec<Left> = self.messages.left_behind().collect();
        for left in left {
            match (left, &view) {
                (Left::Removed { start, end }, None) => {
                    self.counters.pages_removed += self.engine.removed(Hva(start), Hva(end));
                }
                (Left::Removed { start, end }, Some(view)) => {
                    self.removed_in_view(view, Hva(start), Hva(end));
                }
                (Left::Moved, None) => {
                    error!("the VMM has moved guest memory, which is served no longer");
                    self.record.set(Flag::Failed);
                }
                (Left::Moved, Some(_)) => moved_view(),
                (Left::Forked, _) => warn!("a process had forked; the child reads zeroes"),
            }
        }
        kill::point("left applied");
        self.messages.clear();
        Ok(())
    }

    /// Faults that were read and not answered are told to nobody again, but by
    /// those who wait, once they are woken (trap 8). Waits outside every slot,
    /// too, are known by the kernel alone.
    pub(super) fn wake_everybody(&self) {
        // The most that every 64-bit process can map; where there is less, slots
        // must do.
        let (start, end) = (1 << 20, (1 << 47) - (1 << 12));
        let _ = self.uffd.wake(start, end - start);
        for slot in self.engine.slots().iter() {
            if let Err(error) = self.uffd.wake(slot.hva.0, slot.len) {
                error!("waking the waiters of {}: {error}", slot.hva);
            }
        }
    }

    /// Whether it can be served: if not, it must be held all the same.
    pub(crate) fn has_failed(&self) -> bool {
        self.record.has(Flag::Failed)
    }

    /// Says so, to successors too.
    pub(crate) fn fail(&self) {
        self.record.set(Flag::Failed);
    }

    /// What a successor needs: userfaultfd, page map and record.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.events(), self.engine.map().storage().memfd(), self.record.memfd()]
    }
}
