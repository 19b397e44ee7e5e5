//! Reads that wait for their turn: the most urgent first, among equals the
//! oldest. Contains no synchronisation of its own.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

use vmpager_core::Priority;

/// Ascending order is the order of service.
type Turn = (Reverse<Priority>, u64);

#[derive(Debug)]
pub(crate) struct ReadQueue<K, T> {
    waiting: BTreeMap<Turn, (K, T)>,
    turns: HashMap<K, Turn>,
    arrivals: u64,
}

impl<K: Copy + Eq + Hash, T> ReadQueue<K, T> {
    pub(crate) fn new() -> Self {
        Self { waiting: BTreeMap::new(), turns: HashMap::new(), arrivals: 0 }
    }

    pub(crate) fn push(&mut self, key: K, priority: Priority, item: T) {
        let turn = (Reverse(priority), self.arrivals);
        self.arrivals += 1;
        self.turns.insert(key, turn);
        self.waiting.insert(turn, (key, item));
    }

    /// Raises a read's priority; it keeps its age. False if it does not wait
    /// here.
    pub(crate) fn promote(&mut self, key: K, priority: Priority) -> bool {
        let Some(turn) = self.turns.get_mut(&key) else { return false };
        if turn.0.0 < priority
            && let Some(read) = self.waiting.remove(turn)
        {
            turn.0 = Reverse(priority);
            self.waiting.insert(*turn, read);
        }
        true
    }

    /// The next read's priority and item.
    pub(crate) fn peek(&self) -> Option<(Priority, &T)> {
        let (turn, (_, item)) = self.waiting.first_key_value()?;
        Some((turn.0.0, item))
    }

    pub(crate) fn pop(&mut self) -> Option<(K, Priority, T)> {
        let (turn, (key, item)) = self.waiting.pop_first()?;
        // Should a key be in use twice, the younger read keeps it.
        if self.turns.get(&key) == Some(&turn) {
            self.turns.remove(&key);
        }
        Some((key, turn.0.0, item))
    }

    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&K, &T) -> bool) {
        self.waiting.retain(|_, (key, item)| {
            let kept = keep(key, item);
            if !kept {
                self.turns.remove(key);
            }
            kept
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn priority(n: u8) -> Priority {
        [Priority::Fill, Priority::Prefetch, Priority::Demand][usize::from(n % 3)]
    }

    #[test]
    fn promoted_reads_keep_their_age() {
        let mut queue = ReadQueue::new();
        queue.push(1, Priority::Fill, ());
        queue.push(2, Priority::Demand, ());
        queue.push(3, Priority::Prefetch, ());
        assert!(queue.promote(1, Priority::Demand));
        assert!(queue.promote(3, Priority::Fill), "never demoted");
        assert!(!queue.promote(4, Priority::Demand));
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|(key, ..)| key).collect();
        assert_eq!(order, [1, 2, 3]);
        assert!(queue.turns.is_empty());
    }

    proptest! {
        /// Against a list that is searched for the best entry each time.
        #[test]
        fn serves_as_a_searched_list_would(ops in prop::collection::vec((0..4_u8, any::<u8>()), 0..200)) {
            let mut queue = ReadQueue::new();
            let mut list: Vec<(u64, Priority)> = Vec::new();
            let mut next = 0_u64;
            for (op, n) in ops {
                match op {
                    0 | 1 => {
                        queue.push(next, priority(n), next);
                        list.push((next, priority(n)));
                        next += 1;
                    }
                    2 if next > 0 => {
                        let key = u64::from(n) % next;
                        let to = priority(n / 3);
                        let entry = list.iter_mut().find(|(k, _)| *k == key);
                        prop_assert_eq!(queue.promote(key, to), entry.is_some());
                        if let Some(entry) = entry {
                            entry.1 = entry.1.max(to);
                        }
                    }
                    _ => {
                        let best = list.iter().copied().min_by_key(|&(k, p)| (Reverse(p), k));
                        list.retain(|entry| Some(*entry) != best);
                        let popped = queue.pop().map(|(key, priority, item)| {
                            assert_eq!(key, item);
                            (key, priority)
                        });
                        prop_assert_eq!(popped, best);
                    }
                }
                prop_assert_eq!(queue.turns.len(), list.len());
            }
        }
    }
}
