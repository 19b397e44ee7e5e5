//! Whose turn it is: every memory that has faults gets some of them served, then the
//! next one does, so that one with many threads keeps nobody waiting for long.
//!
//! Memories that faulted a moment ago are asked again without asking the kernel which
//! of them have something, while they are few: an answer costs as much for one as for
//! many, and waking up costs more. Once they are many, it is the other way round.

use std::collections::HashSet;
use std::time::Instant;

use super::{Work, Worker};
use crate::reads::{MemoryId, Reads};
use crate::served::{Lost, Served, Turn};

/// So many memories are asked without knowing that they have something.
const FEW: usize = 4;

/// The memories whose turn comes.
#[derive(Debug)]
pub(super) struct Hot {
    queue: Vec<MemoryId>,
    queued: HashSet<MemoryId>,
    /// The most faults a turn has while others wait for theirs.
    turn: usize,
    /// There were many the last time round.
    crowded: bool,
}

impl Hot {
    pub(super) fn new(turn: usize) -> Self {
        Self { queue: Vec::new(), queued: HashSet::new(), turn: turn.max(1), crowded: false }
    }

    /// Its turn comes after that of all others.
    pub(super) fn add(&mut self, id: MemoryId) {
        if self.queued.insert(id) {
            self.queue.push(id);
        }
    }

    pub(super) fn remove(&mut self, id: MemoryId) {
        if self.queued.remove(&id) {
            self.queue.retain(|queued| *queued != id);
        }
    }

    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.queued.clear();
        self.crowded = false;
    }

    pub(super) fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// All have had their turn: which of them have one again though nobody says that
    /// they have something.
    fn end_round(&mut self, unfinished: &[MemoryId]) {
        self.crowded = self.queue.len() > FEW;
        if self.crowded {
            self.queue.clear();
            self.queued.clear();
            unfinished.iter().for_each(|id| self.add(*id));
        }
    }
}

impl Worker {
    pub(super) fn keep_looking(&self) -> bool {
        !self.hot.queue.is_empty() && !self.hot.crowded && self.polling.keep_looking()
    }

    /// A turn for each memory that faulted lately or has retries due.
    pub(super) fn serve_hot(&mut self) -> Work {
        let mut served = false;
        let mut unfinished = Vec::new();
        let turn = if self.hot.queue.len() > 1 { self.hot.turn } else { usize::MAX };
        self.each_hot(|id, memory, reads| {
            let Turn { any, more } = memory.serve(reads, turn)?;
            served |= any;
            if more {
                unfinished.push(id);
            }
            Ok(())
        });
        // Only while no fault is pending: a page somebody waits for goes first.
        let mut brought = false;
        if !served {
            self.each_hot(|id, memory, reads| {
                if memory.bring_neighbours(reads)? {
                    brought = true;
                    unfinished.push(id);
                }
                Ok(())
            });
        }
        self.hot.end_round(&unfinished);
        if !served && !brought {
            return Work::None;
        }
        self.polling.served(Instant::now());
        self.demanded |= served;
        Work::Served
    }

    /// Has the memories that faulted lately do something.
    fn each_hot(
        &mut self,
        mut work: impl FnMut(MemoryId, &mut Served, &mut Reads) -> Result<(), Lost>,
    ) {
        let mut index = 0;
        while let Some(&id) = self.hot.queue.get(index) {
            index += 1;
            let Some(memory) = self.memories.get_mut(&id) else { continue };
            match work(id, memory, &mut self.reads) {
                Ok(()) => self.note_retry(id),
                Err(lost) => {
                    self.lose(id, lost);
                    // Another one is in its place.
                    index -= 1;
                }
            }
        }
    }

    /// Remembers a memory that has something to be tried again later.
    pub(super) fn note_retry(&mut self, id: MemoryId) {
        let retries = self.memories.get(&id).is_some_and(|memory| memory.retry_at().is_some());
        if retries && !self.retrying.contains(&id) {
            self.retrying.push(id);
        }
    }

    /// What is to be tried again by now has its turn.
    pub(super) fn find_due(&mut self) {
        if self.retrying.is_empty() {
            return;
        }
        let now = Instant::now();
        let Self { retrying, memories, hot, .. } = self;
        retrying.retain(|id| {
            let at = memories.get(id).and_then(Served::retry_at);
            if at.is_some_and(|at| at <= now) {
                hot.add(*id);
            }
            at.is_some()
        });
    }

    /// When there is something to do though nobody says so.
    pub(super) fn next_due(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let fill = |id: &MemoryId| self.memories.get_mut(id).and_then(|it| it.fill_at(now));
        let fill = self.filling.iter().filter_map(fill).min();
        let memories = |ids: &[MemoryId]| -> Vec<&Served> {
            ids.iter().filter_map(|id| self.memories.get(id)).collect()
        };
        let retries = memories(&self.retrying).into_iter().filter_map(Served::retry_at);
        let huge = memories(&self.making_huge).into_iter().filter_map(Served::huge_at);
        let stop = self.stopping.as_ref().map(|(until, _)| *until);
        retries.chain(huge).chain(stop).chain(fill).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asking four memories that may have nothing is cheaper than sleeping; asking a
    /// hundred is not.
    #[test]
    fn many_are_asked_only_if_they_have_something() {
        let mut hot = Hot::new(16);
        (0..4).for_each(|id| hot.add(MemoryId(id)));
        hot.end_round(&[]);
        assert!(!hot.is_crowded() && hot.queue.len() == 4);
        hot.add(MemoryId(4));
        hot.add(MemoryId(4));
        assert_eq!(hot.queue.len(), 5, "each once");
        hot.end_round(&[MemoryId(3)]);
        assert!(hot.is_crowded());
        assert_eq!(hot.queue, [MemoryId(3)], "only who has more waits for a turn");
        hot.add(MemoryId(0));
        hot.end_round(&[]);
        assert!(!hot.is_crowded());
        hot.remove(MemoryId(3));
        assert_eq!(hot.queue, [MemoryId(0)]);
    }
}
