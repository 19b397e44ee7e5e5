//! A source made slow, failing or silent by a script, to test those who read.
//!
//! ```
//! # use std::{sync::Arc, time::Duration};
//! # use vmpager_core::{ByteRange, PageSource};
//! use vmpager_store::faulty::{ALL, FaultySource, Times};
//! use vmpager_store::MemorySource;
//!
//! let source = FaultySource::wrap(Arc::new(MemorySource::numbered(256)));
//! source
//!     .fail(ByteRange::new(0x4000, 0x1000), Times::Often(2))
//!     .hold(ByteRange::new(0x8000, 0x1000))
//!     .delay(ALL, Duration::from_millis(5));
//! let reader = Arc::clone(&source).open_reader()?;
//! # drop(reader);
//! source.release();
//! assert_eq!(source.fetches(0x8), 0);
//! # Ok::<(), vmpager_core::SourceError>(())
//! ```

mod reader;

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vmpager_core::{ByteRange, PageReader, PageSource, SourceError};

use crate::PAGE;
use crate::doorbell::Doorbell;

use reader::FaultyReader;

/// Every byte of any source.
pub const ALL: ByteRange = ByteRange::new(0, u64::MAX);

/// How often something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// So many times.
    Often(u32),
    /// Each time.
    Always,
}

/// Another source with faults of its own. The methods that script it may be
/// called at any time, from any thread, and concern the reads made from then
/// on; a rule touches every read that overlaps its range.
#[derive(Debug)]
pub struct FaultySource {
    inner: Arc<dyn PageSource>,
    rules: Mutex<Rules>,
    fetches: Box<[AtomicU32]>,
    bells: Mutex<Vec<Weak<Doorbell>>>,
}

#[derive(Debug, Default)]
struct Rules {
    fail: Vec<(ByteRange, Times)>,
    delay: Vec<(ByteRange, RangeInclusive<Duration>)>,
    hold: Vec<ByteRange>,
    never_at_hand: bool,
    /// How often [`FaultySource::release`] has been called.
    releases: u64,
    held: usize,
}

/// When a submitted read goes on to the source behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Now,
    At(Instant),
    /// At the release with this number.
    Release(u64),
}

fn overlap(a: ByteRange, b: ByteRange) -> bool {
    a.start < b.end() && b.start < a.end()
}

/// A delay for a page: any within the bounds, always the same.
fn within(bounds: &RangeInclusive<Duration>, page: u64) -> Duration {
    // Multiplied by an odd number, the high bits depend on all of the page's.
    let at = page.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44;
    let spread = *bounds.end() - *bounds.start();
    *bounds.start() + spread.mul_f64(at as f64 / f64::from(1 << 20))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FaultySource {
    /// Wraps a source. Without a script it only counts.
    pub fn wrap(inner: Arc<dyn PageSource>) -> Arc<Self> {
        let pages = inner.len().div_ceil(PAGE);
        Arc::new(Self {
            inner,
            rules: Mutex::default(),
            fetches: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            bells: Mutex::default(),
        })
    }

    /// Fails reads with EIO.
    pub fn fail(&self, range: ByteRange, times: Times) -> &Self {
        lock(&self.rules).fail.push((range, times));
        self
    }

    /// Makes reads wait this long before they begin; the longest delay counts.
    /// They are not at hand.
    pub fn delay(&self, range: ByteRange, delay: Duration) -> &Self {
        self.delay_between(range, delay..=delay)
    }

    /// The same, each page with a delay of its own within these bounds: that of a
    /// read is its first page's. So reads end in another order than they began.
    pub fn delay_between(&self, range: ByteRange, delay: RangeInclusive<Duration>) -> &Self {
        lock(&self.rules).delay.push((range, delay));
        self
    }

    /// Makes reads wait for [`release`](Self::release). They are not at hand.
    pub fn hold(&self, range: ByteRange) -> &Self {
        lock(&self.rules).hold.push(range);
        self
    }

    /// Makes every read one that has to be submitted.
    pub fn never_at_hand(&self) -> &Self {
        lock(&self.rules).never_at_hand = true;
        self
    }

    /// Lets all held reads begin, and holds none from now on.
    pub fn release(&self) {
        let mut rules = lock(&self.rules);
        rules.hold.clear();
        rules.releases += 1;
        drop(rules);
        let mut bells = lock(&self.bells);
        bells.retain(|bell| bell.strong_count() > 0);
        for bell in bells.iter().filter_map(Weak::upgrade) {
            bell.ring();
        }
    }

    /// Ends all failures that have been scripted.
    pub fn heal(&self) {
        lock(&self.rules).fail.clear();
    }

    /// Number of submitted reads that wait for [`release`](Self::release).
    pub fn held(&self) -> usize {
        lock(&self.rules).held
    }

    /// How often a 4 KiB page of the source has been fetched: read at hand, or
    /// submitted, whatever came of it.
    pub fn fetches(&self, page: u64) -> u32 {
        let count = usize::try_from(page).ok().and_then(|page| self.fetches.get(page));
        count.map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// [`fetches`](Self::fetches) of every page, in order.
    pub fn all_fetches(&self) -> Vec<u32> {
        self.fetches.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    fn count(&self, range: ByteRange) {
        for page in range.start / PAGE..range.end().div_ceil(PAGE) {
            if let Some(count) = usize::try_from(page).ok().and_then(|page| self.fetches.get(page))
            {
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Whether reads of a range may be at hand.
    fn may_be_at_hand(&self, range: ByteRange) -> bool {
        let rules = lock(&self.rules);
        !(rules.never_at_hand
            || rules.hold.iter().any(|&held| overlap(held, range))
            || rules.delay.iter().any(|(slow, _)| overlap(*slow, range)))
    }

    /// The failure a read meets now, if any; takes one off its count.
    fn failure(&self, range: ByteRange) -> Option<SourceError> {
        let mut rules = lock(&self.rules);
        let (_, times) = rules
            .fail
            .iter_mut()
            .find(|(bad, times)| overlap(*bad, range) && !matches!(times, Times::Often(0)))?;
        if let Times::Often(left) = times {
            *left -= 1;
        }
        Some(SourceError::Io {
            name: self.name(),
            range,
            error: Arc::new(rustix::io::Errno::IO.into()),
        })
    }

    /// When a read submitted now begins; counts it if it is held.
    fn due(&self, range: ByteRange) -> Due {
        let mut rules = lock(&self.rules);
        if rules.hold.iter().any(|&held| overlap(held, range)) {
            rules.held += 1;
            return Due::Release(rules.releases + 1);
        }
        let delays = rules.delay.iter().filter(|(slow, _)| overlap(*slow, range));
        delays
            .map(|(_, delay)| within(delay, range.start / PAGE))
            .max()
            .map_or(Due::Now, |delay| Due::At(Instant::now() + delay))
    }

    fn is_due(&self, due: Due, now: Instant) -> bool {
        match due {
            Due::Now => true,
            Due::At(at) => at <= now,
            Due::Release(number) => lock(&self.rules).releases >= number,
        }
    }

    fn end_hold(&self, due: Due) {
        if matches!(due, Due::Release(_)) {
            lock(&self.rules).held -= 1;
        }
    }
}

impl PageSource for FaultySource {
    fn name(&self) -> Arc<str> {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn fingerprint(&self) -> u64 {
        self.inner.fingerprint()
    }

    fn visit_zero_ranges(&self, visit: &mut dyn FnMut(ByteRange)) {
        self.inner.visit_zero_ranges(visit);
    }

    fn open_reader(self: Arc<Self>) -> Result<Box<dyn PageReader>, SourceError> {
        let inner = Arc::clone(&self.inner).open_reader()?;
        let name = self.name();
        let range = ByteRange::new(0, self.len());
        let reader = FaultyReader::new(self, inner).map_err(|error| SourceError::Io {
            name,
            range,
            error: Arc::new(error),
        })?;
        Ok(Box::new(reader))
    }
}
