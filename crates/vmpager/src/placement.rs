//! Which CPU the worker fills on.
//!
//! A fault wakes the worker on the CPU of the thread that faulted, and for
//! serving it there is no better place. For filling there is no worse one: a
//! vCPU and a worker that both never sleep take turns of several milliseconds
//! on one CPU while another stays idle, and the scheduler leaves them there
//! (seen in its trace: up to 6 ms a turn). So a worker that finds itself
//! sharing while it fills moves to another CPU of those it may use.

use std::time::{Duration, Instant};

use rustix::thread::{sched_getaffinity, sched_getcpu, sched_setaffinity};
use tracing::debug;

/// A yield that takes longer has let somebody else run.
const SHARED: Duration = Duration::from_micros(20);

/// Lets others run between two pieces of the fill, and moves away from them.
#[derive(Debug)]
pub(crate) struct Placement {
    /// No move before that.
    next_move: Instant,
    /// Time to the next move, should this one be in vain.
    pause: Duration,
}

impl Placement {
    const SHORTEST: Duration = Duration::from_millis(1);
    const LONGEST: Duration = Duration::from_millis(256);

    pub(crate) fn new() -> Self {
        Self { next_move: Instant::now(), pause: Self::SHORTEST }
    }

    /// Gives the CPU to whoever waits for it: a vCPU just woken would wait
    /// for the scheduler's slice otherwise, not for a piece.
    pub(crate) fn make_room(&mut self) {
        let before = Instant::now();
        std::thread::yield_now();
        let after = Instant::now();
        if after - before >= SHARED && after >= self.next_move {
            self.note_move(after);
            move_away();
        }
    }

    /// Moves that follow each other closely find no CPU to be alone on.
    fn note_move(&mut self, now: Instant) {
        let in_vain = now < self.next_move + self.pause;
        self.pause = if in_vain { (self.pause * 2).min(Self::LONGEST) } else { Self::SHORTEST };
        self.next_move = now + self.pause;
    }
}

/// Moves the calling thread to another of the CPUs it may run on.
fn move_away() {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let mut others = allowed;
    others.unset(sched_getcpu());
    if others.count() == 0 {
        return;
    }
    // The first call moves the thread, the second takes nothing from it.
    let moved = sched_setaffinity(None, &others).and_then(|()| sched_setaffinity(None, &allowed));
    if let Err(error) = moved {
        debug!("moving to another CPU: {error}");
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::CpuSet;

    use super::*;

    #[test]
    fn moves_in_vain_become_rare_and_a_quiet_time_forgives() {
        let mut placement = Placement::new();
        let mut now = placement.next_move + Placement::SHORTEST * 2;
        placement.note_move(now);
        assert_eq!(placement.pause, Placement::SHORTEST);
        for _ in 0..20 {
            now = placement.next_move;
            placement.note_move(now);
        }
        assert_eq!(placement.pause, Placement::LONGEST);
        now = placement.next_move + placement.pause;
        placement.note_move(now);
        assert_eq!(placement.pause, Placement::SHORTEST);
    }

    #[test]
    fn moving_leaves_the_cpus_a_thread_may_use_as_they_were() {
        let allowed = || {
            sched_getaffinity(None)
                .map(|set| (0..CpuSet::MAX_CPU).filter(|c| set.is_set(*c)).collect::<Vec<_>>())
        };
        let before = allowed().unwrap();
        let from = sched_getcpu();
        move_away();
        assert_eq!(allowed().unwrap(), before);
        assert!(before.len() == 1 || before.contains(&from));
    }

    #[test]
    fn a_thread_bound_to_one_cpu_stays() {
        std::thread::spawn(|| {
            let mut one = CpuSet::new();
            one.set(sched_getcpu());
            sched_setaffinity(None, &one).unwrap();
            move_away();
            assert!(sched_getaffinity(None).unwrap() == one);
        })
        .join()
        .unwrap();
    }
}
