//! Where the serial port's output goes: to the caller's writer, past an eye
//! that knows a Linux kernel's panic when it sees one.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};

/// What `panic()` prints last if the kernel is to stay as it is.
const LAST: &[u8] = b"---[ end Kernel panic - not syncing";
/// What it prints first: the end of [`LAST`], so that one window serves both.
const FIRST: &[u8] = LAST.split_at(LAST.len() - b"Kernel panic - not syncing".len()).1;

/// What it prints once it has stopped the other processors, whose output can
/// tear [`FIRST`] apart.
const OFFSET: &[u8] = b"Kernel Offset: ";

/// How far a panic has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Panic {
    None,
    /// It has begun.
    First,
    /// In its last line.
    Last,
    /// Beyond its last line.
    Reported,
}

/// A writer that watches for panics.
pub(super) struct Console {
    output: Box<dyn Write + Send>,
    /// The bytes that came last, as many as there are in [`LAST`].
    window: VecDeque<u8>,
    panic: Panic,
}

impl Console {
    /// A console whose guest has, or has not, panicked before.
    pub(super) fn new(output: Box<dyn Write + Send>, panicked: bool) -> Self {
        let panic = if panicked { Panic::First } else { Panic::None };
        Self { output, window: VecDeque::with_capacity(LAST.len()), panic }
    }

    pub(super) fn has_panicked(&self) -> bool {
        self.panic >= Panic::First
    }

    pub(super) fn has_reported_panic(&self) -> bool {
        self.panic == Panic::Reported
    }

    fn watch(&mut self, byte: u8) {
        if self.window.len() == LAST.len() {
            self.window.pop_front();
        }
        self.window.push_back(byte);
        let seen = match byte {
            b'\n' if self.panic == Panic::Last => Panic::Reported,
            // Most bytes are not the last one of any of them.
            b'g' if self.ends_with(LAST) => Panic::Last,
            b'g' if self.ends_with(FIRST) => Panic::First,
            b' ' if self.ends_with(OFFSET) => Panic::First,
            _ => return,
        };
        self.panic = self.panic.max(seen);
    }

    fn ends_with(&self, text: &[u8]) -> bool {
        self.window.iter().rev().take(text.len()).eq(text.iter().rev())
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Watched whether or not anybody takes it: the serial port writes byte
        // by byte, and drops what fails.
        bytes.iter().for_each(|byte| self.watch(*byte));
        self.output.write_all(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("panic", &self.panic).finish_non_exhaustive()
    }
}
