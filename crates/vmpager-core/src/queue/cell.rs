//! One word of the ring: what a cell says, and of which lap.

use super::{CELLS, MAX_READERS};

const LAPS: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Empty,
    Queued,
    Taken(u64),
}

/// What a cell's word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) state: State,
    pub(super) lap: u64,
    pub(super) gfn: u64,
}

impl Cell {
    pub(super) fn word(self) -> u64 {
        let state = match self.state {
            State::Empty => 0,
            State::Queued => 1,
            State::Taken(reader) => 2 | reader << 2,
        };
        state | self.lap << 8 | self.gfn << 28
    }

    pub(super) fn of(word: u64) -> Self {
        let state = match word & 0b11 {
            0 => State::Empty,
            1 => State::Queued,
            _ => State::Taken(word >> 2 & (MAX_READERS - 1)),
        };
        Self { state, lap: word >> 8 & (LAPS - 1), gfn: word >> 28 }
    }

    pub(super) fn empty(lap: u64) -> Self {
        Self { state: State::Empty, lap: lap & (LAPS - 1), gfn: 0 }
    }
}

/// The lap of the position that comes next in the same cell.
pub(super) fn next_lap(position: u64) -> u64 {
    (lap(position) + 1) % LAPS
}

/// The lap of a position.
pub(super) fn lap(position: u64) -> u64 {
    (position / CELLS as u64) % LAPS
}
