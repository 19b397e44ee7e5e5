//! The fault queue: faults of those who cannot leave the guest or be stopped by
//! a userfaultfd, for whoever resolves them, in words that may be shared
//! between processes.
//!
//! ```text
//!            request              take                 commit
//!   Empty ------------> Queued ---------> Taken by r ----------> Empty, next lap
//!                       | ^ |                  |
//!                       | | +-- abandon, or r died
//!                       | +--------------------+
//!                       +-- cancelled (nobody waits), resolved (page came) --> Empty, next lap
//! ```
//!
//! It is a ring of cells. Position `p` lies in cell `p % CELLS`, in lap
//! `p / CELLS`; a cell holds its lap, so that what one position was is never
//! taken for the next. **Each step is one compare-and-swap of one word**: who
//! dies, dies before or after it, and leaves nothing half done. There is no tail
//! to keep: requests go to the first empty position from the head on, which
//! everybody may advance.
//!
//! - FIFO: positions are taken in order; who abandons one, leaves it in place.
//! - Merged: a request looks at every position before the one it goes to, and
//!   joins the one that has its page. Two that look at the same time meet at the
//!   first empty position, which takes one of them.
//! - Bounded: [`CELLS`] positions from the head on. What then: [`Request::Full`],
//!   and the one who asked decides whether to wait.
//! - A waiter waits for its *position* to be over, then looks at its page again:
//!   committed, cancelled or disabled meanwhile, it finds out by itself.
//!
//! The lap has 20 bits. A thread that stops between its look at a word and its
//! compare-and-swap, for exactly 2^20 laps (2^28 faults) or a multiple, would be
//! mistaken; in this and only in this it trusts in luck.
//!
//! # Layout, in 64-bit words
//!
//! | words | what |
//! |---|---|
//! | 0 | magic, `b"VMPGFLT\0"` little-endian |
//! | 1 | version of this layout: 1 |
//! | 2 | number of cells: 256 |
//! | 3 | enabled: odd; disabled: even. Counts changes |
//! | 4 | head: no position below it is queued or taken |
//! | 5..8 | zero, reserved |
//! | 8.. | one word a cell: bits 0 and 1 state (0 empty, 1 queued, 2 taken), 2 to 7 reader, 8 to 27 lap, 28 to 63 page frame number |
//! | then | one word a cell: bits 0 to 31 waiters, 32 to 51 their lap |

mod cell;

use self::cell::{Cell, State, lap, next_lap};
use crate::page_map::Words;
use crate::sync::{AtomicU64, Ordering, fence};

/// How many faults the queue holds.
pub const CELLS: usize = if cfg!(loom) { 2 } else { 256 };
/// The most readers, numbered from 0.
pub const MAX_READERS: u64 = 64;
/// Frame numbers are below this: 256 TiB of guest-physical address space.
pub const MAX_GFN: u64 = 1 << 36;

const HEADER: usize = 8;
const MAGIC: u64 = u64::from_le_bytes(*b"VMPGFLT\0");
const VERSION: u64 = 1;
const ENABLED: usize = 3;
const HEAD: usize = 4;

/// How many words a queue needs.
pub const WORDS: usize = HEADER + 2 * CELLS;

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position(u64);

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// It is the first for its page. The readers are to be told.
    Queued(Position),
    /// The page was asked for already; the readers are to be told if `tell`.
    Merged {
        /// Where.
        position: Position,
        /// Whether no reader has taken it yet: whoever queued it may have died
        /// before telling them.
        tell: bool,
    },
    /// There is no room.
    Full,
    /// The queue is disabled.
    Disabled,
}

/// A fault that a reader has taken and not yet committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    position: Position,
    reader: u64,
    /// The page asked for, in units of the page size, from guest-physical 0.
    pub gfn: u64,
}

impl Taken {
    /// Where it lies, to wake its waiters.
    pub fn position(&self) -> Position {
        self.position
    }
}

/// Why words are no queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// They do not begin as a queue does.
    #[error("the fault queue begins with {0:#018x}, not with \"VMPGFLT\"")]
    Magic(u64),
    /// Another version, number of cells or length.
    #[error(
        "the fault queue has version {version}, {cells} cells and {words} words; this program \
         knows version {VERSION} with {CELLS} cells in at least {WORDS} words"
    )]
    Layout {
        /// Its version.
        version: u64,
        /// Its cells.
        cells: u64,
        /// Its words.
        words: usize,
    },
}

/// How a walk over the positions in use ended.
enum Search<T> {
    Found(T),
    /// It saw all of them.
    Through,
    /// The head has moved on by a lap meanwhile.
    Stale,
}

/// How often a walk is begun again. Each time the head has moved by a lap
/// meanwhile, or whoever shares the words has spoilt them.
const TRIES: usize = 100;

/// The fault queue. See the [module](self).
#[derive(Debug)]
pub struct FaultQueue<W> {
    words: W,
}

impl<W: Words> FaultQueue<W> {
    /// Makes a queue, disabled, in zeroed words.
    ///
    /// # Panics
    ///
    /// If there are fewer words than [`WORDS`].
    pub fn new(words: W) -> Self {
        assert!(words.words().len() >= WORDS, "{WORDS} words are needed");
        for (i, value) in [MAGIC, VERSION, CELLS as u64].into_iter().enumerate() {
            words.words()[i].store(value, Ordering::Relaxed);
        }
        Self { words }
    }

    /// A queue that somebody else made.
    ///
    /// # Errors
    ///
    /// If it is not one of this version.
    pub fn open(words: W) -> Result<Self, QueueError> {
        let len = words.words().len();
        let word = |i: usize| words.words().get(i).map_or(0, |w| w.load(Ordering::Acquire));
        let (magic, version, cells) = (word(0), word(1), word(2));
        if magic != MAGIC {
            return Err(QueueError::Magic(magic));
        }
        if version != VERSION || cells != CELLS as u64 || len < WORDS {
            return Err(QueueError::Layout { version, cells, words: len });
        }
        Ok(Self { words })
    }

    /// The memory it lies in.
    pub fn storage(&self) -> &W {
        &self.words
    }

    /// Lets faults be queued from now on.
    pub fn enable(&self) {
        let enabled = &self.words.words()[ENABLED];
        let _ = enabled.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| {
            (n % 2 == 0).then_some(n.wrapping_add(1))
        });
    }

    /// Whether faults may be queued.
    pub fn is_enabled(&self) -> bool {
        self.words.words()[ENABLED].load(Ordering::SeqCst) % 2 == 1
    }

    /// Ends every fault queued or taken, and lets none be queued from now on.
    /// `wake` is called with every position whose waiters are to be woken; they
    /// find the queue disabled.
    pub fn disable(&self, mut wake: impl FnMut(Position)) {
        let enabled = &self.words.words()[ENABLED];
        let _ = enabled.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| {
            (n % 2 == 1).then_some(n.wrapping_add(1))
        });
        // Pairs with the fence in `request`: either this sees what was queued
        // there, or that sees the queue disabled.
        fence(Ordering::SeqCst);
        for position in in_use(self.head()) {
            let mut seen = self.cell(position).load(Ordering::Acquire);
            while Cell::of(seen).state != State::Empty {
                let next = Cell::empty(Cell::of(seen).lap + 1).word();
                match self.swap(position, seen, next) {
                    Ok(()) => {
                        wake(Position(position));
                        break;
                    }
                    Err(now) => seen = now,
                }
            }
        }
        self.advance();
    }

    /// Asks for a page, on behalf of somebody who will wait
    /// ([`leave`](Self::leave) must follow, or [`is_over`](Self::is_over) be
    /// seen) or, without `waits`, who will ask again.
    pub fn request(&self, gfn: u64, waits: bool) -> Request {
        debug_assert!(gfn < MAX_GFN, "{gfn:#x}");
        if !self.is_enabled() {
            return Request::Disabled;
        }
        let request = self.find_or_queue(gfn);
        if let Request::Queued(position) | Request::Merged { position, .. } = request {
            if waits {
                self.count_waiter(position);
            }
            // Pairs with the fence in `disable`.
            fence(Ordering::SeqCst);
            if !self.is_enabled() {
                self.end(position, |cell| cell.state == State::Queued);
                return Request::Disabled;
            }
        }
        request
    }

    fn find_or_queue(&self, gfn: u64) -> Request {
        for _ in 0..TRIES {
            let head = self.advance();
            match self.find_or_queue_from(head, gfn) {
                Search::Found(request) => return request,
                Search::Through if self.head() == head => return Request::Full,
                Search::Through | Search::Stale => {}
            }
        }
        Request::Full
    }

    fn find_or_queue_from(&self, head: u64, gfn: u64) -> Search<Request> {
        for at in in_use(head) {
            let mut seen = self.cell(at).load(Ordering::Acquire);
            loop {
                let cell = Cell::of(seen);
                let position = Position(at);
                match cell.state {
                    _ if cell.lap == next_lap(at) => break,
                    _ if cell.lap != lap(at) => return Search::Stale,
                    State::Empty => {
                        let new = Cell { state: State::Queued, lap: cell.lap, gfn };
                        match self.swap(at, seen, new.word()) {
                            Ok(()) => return Search::Found(Request::Queued(position)),
                            // Somebody else was faster: look who.
                            Err(now) => seen = now,
                        }
                    }
                    state if cell.gfn == gfn => {
                        let tell = state == State::Queued;
                        return Search::Found(Request::Merged { position, tell });
                    }
                    _ => break,
                }
            }
        }
        Search::Through
    }

    /// Whether nothing more will come of a position: its waiters shall look at
    /// their page.
    pub fn is_over(&self, position: Position) -> bool {
        Cell::of(self.word_at(position)).lap != lap(position.0)
    }

    /// The oldest position that is not over: where there is no room, there is
    /// once it is.
    pub fn oldest(&self) -> Position {
        Position(self.advance())
    }

    /// Every position that may be in use, for whoever must wake all waiters.
    pub fn positions(&self) -> impl Iterator<Item = Position> {
        in_use(self.head()).map(Position)
    }

    /// The word to sleep on, and what it is while the position is not over:
    /// its low half tells any change of state.
    pub fn word_at(&self, position: Position) -> u64 {
        self.cell(position.0).load(Ordering::SeqCst)
    }

    /// The word to sleep on.
    pub fn futex(&self, position: Position) -> &AtomicU64 {
        self.cell(position.0)
    }

    /// A waiter waits no longer, whatever the reason. If it was the last one
    /// and no reader has taken the fault, the fault is gone. True if so; others
    /// may have joined in that moment, and are to be woken.
    pub fn leave(&self, position: Position) -> bool {
        let lap = lap(position.0);
        let left =
            self.waiters(position.0).fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                (word >> 32 == lap && low(word) > 0).then(|| word - 1)
            });
        match left {
            Ok(before) if low(before) == 1 => {
                self.end(position, |cell| cell.state == State::Queued)
            }
            _ => false,
        }
    }

    fn count_waiter(&self, position: Position) {
        let lap = lap(position.0);
        // A count of an earlier lap is of waiters that died.
        let _ =
            self.waiters(position.0).fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                Some(if word >> 32 == lap { word + 1 } else { lap << 32 | 1 })
            });
    }

    /// The oldest fault that nobody has taken.
    pub fn take(&self, reader: u64) -> Option<Taken> {
        debug_assert!(reader < MAX_READERS, "{reader}");
        (0..TRIES).find_map(|_| match self.take_from(self.advance(), reader) {
            Search::Found(taken) => Some(taken),
            Search::Through => Some(None),
            Search::Stale => None,
        })?
    }

    fn take_from(&self, head: u64, reader: u64) -> Search<Option<Taken>> {
        for at in in_use(head) {
            let mut seen = self.cell(at).load(Ordering::Acquire);
            loop {
                let cell = Cell::of(seen);
                match cell.state {
                    _ if cell.lap == next_lap(at) => break,
                    _ if cell.lap != lap(at) => return Search::Stale,
                    State::Empty => return Search::Through,
                    State::Taken(_) => break,
                    State::Queued => {
                        let taken = Cell { state: State::Taken(reader), ..cell };
                        match self.swap(at, seen, taken.word()) {
                            Ok(()) => {
                                let position = Position(at);
                                let taken = Taken { position, reader, gfn: cell.gfn };
                                return Search::Found(Some(taken));
                            }
                            Err(now) => seen = now,
                        }
                    }
                }
            }
        }
        Search::Through
    }

    /// Whether there is a fault to take.
    pub fn has_queued(&self) -> bool {
        for position in in_use(self.head()) {
            let cell = Cell::of(self.cell(position).load(Ordering::SeqCst));
            match cell.state {
                State::Queued => return true,
                State::Empty if cell.lap == lap(position) => return false,
                _ => {}
            }
        }
        false
    }

    /// A fault is dealt with: its page is in place or cannot be had. True if it
    /// was still this reader's; its waiters are to be woken.
    pub fn commit(&self, taken: &Taken) -> bool {
        self.end(taken.position, |cell| cell.state == State::Taken(taken.reader))
    }

    /// A fault could not be delivered: it is the oldest again. True if it was
    /// still this reader's; the readers are to be told.
    pub fn abandon(&self, taken: &Taken) -> bool {
        let (lap, gfn) = (lap(taken.position.0), taken.gfn);
        let seen = Cell { state: State::Taken(taken.reader), lap, gfn };
        let new = Cell { state: State::Queued, lap, gfn };
        self.swap(taken.position.0, seen.word(), new.word()).is_ok()
    }

    /// A reader has died: what it had taken is queued again, where it was.
    /// Returns how many. The readers are to be told and all waiters to be woken
    /// **in any case**: it may have died between hearing of a fault and taking
    /// it, or between its commit and the wake. The latter is true of any other
    /// process that dies, too.
    pub fn recover(&self, reader: u64) -> usize {
        let cells = (0..CELLS as u64).filter(|&at| {
            let seen = self.cell(at).load(Ordering::Acquire);
            let cell = Cell::of(seen);
            let queued = Cell { state: State::Queued, ..cell };
            // Nobody else moves what this reader had.
            cell.state == State::Taken(reader) && self.swap(at, seen, queued.word()).is_ok()
        });
        cells.count()
    }

    /// A page came without the queue's doing. Returns the position of a fault
    /// for it that nobody had taken, which is gone; its waiters are to be
    /// woken. (One that a reader has taken ends with that reader's commit.)
    pub fn resolved(&self, gfn: u64) -> Option<Position> {
        in_use(self.head()).map(Position).find(|&position| {
            self.end(position, |cell| cell.state == State::Queued && cell.gfn == gfn)
        })
    }

    /// Ends a position if it is not over and its cell is as `which` says.
    fn end(&self, position: Position, which: impl Fn(Cell) -> bool) -> bool {
        let mut seen = self.cell(position.0).load(Ordering::Acquire);
        loop {
            let cell = Cell::of(seen);
            if cell.lap != lap(position.0) || !which(cell) {
                return false;
            }
            match self.swap(position.0, seen, Cell::empty(cell.lap + 1).word()) {
                Ok(()) => {
                    self.advance();
                    return true;
                }
                Err(now) => seen = now,
            }
        }
    }

    /// Moves the head over what is over. Returns it.
    fn advance(&self) -> u64 {
        let mut head = self.head();
        while Cell::of(self.cell(head).load(Ordering::Acquire)).lap == next_lap(head) {
            let next = head.wrapping_add(1);
            head = match self.words.words()[HEAD].compare_exchange(
                head,
                next,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => next,
                Err(now) => now,
            };
        }
        head
    }

    fn head(&self) -> u64 {
        self.words.words()[HEAD].load(Ordering::Acquire)
    }

    fn swap(&self, position: u64, from: u64, to: u64) -> Result<(), u64> {
        let cell = self.cell(position);
        cell.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).map(|_| ())
    }

    fn cell(&self, position: u64) -> &AtomicU64 {
        &self.words.words()[HEADER + index(position)]
    }

    fn waiters(&self, position: u64) -> &AtomicU64 {
        &self.words.words()[HEADER + CELLS + index(position)]
    }
}

fn index(position: u64) -> usize {
    // CELLS fits: it came from a usize.
    usize::try_from(position % CELLS as u64).unwrap_or(0)
}

/// The positions that may be in use: as many as there are cells, from the head on.
fn in_use(head: u64) -> impl Iterator<Item = u64> {
    (0..CELLS as u64).map(move |i| head.wrapping_add(i))
}

/// The number of waiters in a word that counts them.
fn low(word: u64) -> u64 {
    word & u64::from(u32::MAX)
}
