//! What a worker does for those who wait for a read, and for nobody.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use vmpager_core::SourceError;

use super::{Event, Worker};
use crate::reads::{MemoryId, Read};
use crate::served::{Filled, Served};
use crate::shared::Serving;
use crate::stats::EndReason;

impl Worker {
    pub(super) fn complete_reads(&mut self) {
        let Self { reads, memories, .. } = self;
        let mut failed: Vec<(Read, SourceError)> = Vec::new();
        let mut put_off = Vec::new();
        let mut lost = Vec::new();
        let mut ended = Vec::new();
        reads.complete(|read, result| {
            ended.push(read.memory);
            let Some(memory) = memories.get_mut(&read.memory) else { return };
            match result {
                Ok(data) if data.len() as u64 == read.range.len => {
                    let mut left = Vec::new();
                    if let Err(why) = memory.read_done(read, data, &mut left) {
                        lost.push((read.memory, why));
                    }
                    put_off.extend(left.into_iter().map(|left| (read.memory, left)));
                }
                Ok(data) => {
                    // A reader that breaks its contract must not be believed.
                    let error = io::Error::other(format!("{} bytes came", data.len()));
                    let name = Arc::from("the source");
                    let error = Arc::new(error);
                    failed.push((read, SourceError::Io { name, range: read.range, error }));
                }
                Err(error) => failed.push((read, error)),
            }
        });
        for (id, left) in put_off {
            if let Some(memory) = memories.get_mut(&id)
                && let Err(why) = memory.put_off(left, reads)
            {
                lost.push((id, why));
            }
        }
        for (read, error) in failed {
            if let Some(memory) = memories.get_mut(&read.memory)
                && let Err(why) = memory.read_failed(read, &error, reads)
            {
                lost.push((read.memory, why));
            }
        }
        for id in &ended {
            // Others may have waited for their turn to be read.
            if let Some(memory) = memories.get_mut(id)
                && let Err(why) = memory.read_queued(reads)
            {
                lost.push((*id, why));
            }
        }
        ended.into_iter().for_each(|id| self.note_retry(id));
        for (id, why) in lost {
            self.lose(id, why);
        }
    }

    /// One step of the background fill, for the memory whose turn it is. `idle`: nothing
    /// was done for those who fault.
    pub(super) fn fill(&mut self, idle: bool) -> bool {
        // On a busy machine it takes milliseconds until the worker runs again.
        let Self { filling, memories, .. } = self;
        if filling.iter().filter_map(|id| memories.get(id)).any(Served::brings_much) {
            self.placement.make_room();
        }
        for _ in 0..self.filling.len() {
            self.fill_turn = (self.fill_turn + 1) % self.filling.len();
            let id = self.filling[self.fill_turn];
            let Some(memory) = self.memories.get_mut(&id) else { continue };
            if std::mem::take(&mut self.demanded) {
                memory.others_wait();
            }
            let filled = memory.fill(idle, &mut self.reads);
            self.note_retry(id);
            match filled {
                Ok(Filled::Some) => return true,
                Ok(Filled::Wait) => {}
                // The list has changed: go round again.
                Ok(Filled::All) => {
                    self.end_filled(id);
                    return true;
                }
                Ok(Filled::Enough) => {
                    self.filling.retain(|filling| *filling != id);
                    return true;
                }
                Ok(Filled::Kept) => {
                    self.filling.retain(|filling| *filling != id);
                    self.tell(Event::Complete(id));
                    return true;
                }
                Err(lost) => {
                    self.lose(id, lost);
                    return true;
                }
            }
        }
        false
    }

    /// Makes one huge page of what is in place, if it is time for that. False if
    /// it is not.
    pub(super) fn make_huge(&mut self) -> bool {
        if self.stopping.is_some() {
            return false;
        }
        if self.making_huge.is_empty() {
            return false;
        }
        let now = Instant::now();
        let is_due = |memory: &Served| memory.huge_at().is_some_and(|at| at <= now);
        let due = self.making_huge.iter().find(|id| self.memories.get(id).is_some_and(is_due));
        let Some(id) = due.copied() else { return false };
        self.memories.get_mut(&id).into_iter().for_each(Served::make_huge);
        self.note_retry(id);
        true
    }

    fn end_filled(&mut self, id: MemoryId) {
        if let Some(mut memory) = self.forget(id) {
            memory.end_sharing(Serving::Filled);
            let numbers = Box::new(memory.numbers());
            let reason = EndReason::Filled;
            self.tell(Event::Ended { memory: id, reason, numbers, held: None });
        }
    }
}
