//! What a guest says of its load.

use std::fmt;
use std::time::Duration;

/// How far the load is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Beat {
    /// Counts these lines.
    pub(super) number: u64,
    pub(super) written: u64,
    pub(super) read: u64,
    pub(super) passed: u64,
    /// The guest's monotonic clock, since the load began.
    pub(super) clock: Duration,
    /// How many things were not what they ought to be.
    pub(super) wrong: u64,
}

/// As the guest says it.
impl fmt::Display for Beat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, written, read, passed, clock, wrong } = self;
        let millis = clock.as_millis();
        write!(f, "load: beat n={number} written={written} read={read} ")?;
        write!(f, "passed={passed} clock_ms={millis} wrong={wrong}")
    }
}

/// The number after `key` in a line.
fn number(line: &str, key: &str) -> Option<u64> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))?.parse().ok()
}

impl Beat {
    /// Reads one from a line of the console.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let (_, line) = line.split_once("load: beat ")?;
        Some(Self {
            number: number(line, "n")?,
            written: number(line, "written")?,
            read: number(line, "read")?,
            passed: number(line, "passed")?,
            clock: Duration::from_millis(number(line, "clock_ms")?),
            wrong: number(line, "wrong")?,
        })
    }

    /// Whether every part of the load has done so much more than `before`.
    pub(super) fn has_done(&self, more: u64, before: &Self) -> bool {
        self.written >= before.written + more
            && self.read >= before.read + more
            // Two threads that sleep a millisecond, on a tick of four or more.
            && self.passed >= before.passed + more / 100
    }

    /// Whether a guest that is at `self` goes on from `before`, within some real
    /// time: nothing began anew, and the clock made no jump.
    pub(super) fn goes_on_from(&self, before: &Self, within: Duration) -> bool {
        // A line that was cut in two by the snapshot is not seen whole.
        (before.number + 1..=before.number + 2).contains(&self.number)
            && self.has_done(0, before)
            && self.clock >= before.clock
            && self.clock <= before.clock + within + Duration::from_secs(2)
    }
}

/// What a guest says at the end of its load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) is_right: bool,
    /// What was not, in words.
    pub(super) wrong: Vec<String>,
}

impl Verdict {
    /// Reads one from a line of the console.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let (_, line) = line.split_once("load: verdict ")?;
        let is_right = line.starts_with("right ") && number(line, "wrong") == Some(0);
        Some(Self { is_right, wrong: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "load: beat n=7 written=100 read=200 passed=30 clock_ms=1750 wrong=0";

    #[test]
    fn a_beat_is_read_whole_or_not_at_all() {
        let beat = Beat::parse(LINE).expect("a beat");
        assert_eq!((beat.number, beat.written, beat.read, beat.passed), (7, 100, 200, 30));
        assert_eq!((beat.clock, beat.wrong), (Duration::from_millis(1750), 0));
        assert_eq!(beat.to_string(), LINE);
        for cut in 12..LINE.len() {
            assert_eq!(Beat::parse(&LINE[..cut]), None, "{}", &LINE[..cut]);
        }
    }

    #[test]
    fn a_guest_that_began_anew_is_told_from_one_that_went_on() {
        let before = Beat::parse(LINE).expect("a beat");
        let within = Duration::from_secs(1);
        let next = |change: fn(&mut Beat)| {
            let mut beat = Beat { number: 8, clock: Duration::from_secs(2), ..before };
            change(&mut beat);
            beat.goes_on_from(&before, within)
        };
        assert!(next(|_| ()));
        assert!(next(|beat| beat.number = 9));
        assert!(!next(|beat| beat.number = 1));
        assert!(!next(|beat| beat.number = 20));
        assert!(!next(|beat| beat.written = 99));
        assert!(!next(|beat| beat.clock = Duration::from_secs(1)));
        assert!(!next(|beat| beat.clock = Duration::from_secs(60)));
    }

    #[test]
    fn a_verdict_is_right_or_wrong() {
        let right = Verdict::parse("load: verdict right written=1 read=2 passed=3 wrong=0");
        assert!(right.expect("a verdict").is_right);
        let wrong = Verdict::parse("load: verdict wrong written=1 read=2 passed=3 wrong=2");
        assert!(!wrong.expect("a verdict").is_right);
        assert_eq!(Verdict::parse(LINE), None);
    }
}
