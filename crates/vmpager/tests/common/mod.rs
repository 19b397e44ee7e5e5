//! What the tests share: memory with known bytes, children, a watchdog.
#![allow(dead_code, reason = "each test binary uses a part")]

/// The name of the test that calls it, for its children.
macro_rules! this_test {
    () => {{
        fn here() {}
        let path = std::any::type_name_of_val(&here);
        path.strip_suffix("::here").unwrap().rsplit("::").next().unwrap()
    }};
}

/// What most tests begin with: where there is no userfaultfd nothing can be
/// tested, children do their part, and nobody takes longer than a minute.
#[allow(unused_macros, reason = "tests with children of other kinds begin otherwise")]
macro_rules! begin {
    () => {
        if !$crate::common::have_userfaultfd() || $crate::common::peer::run_if_peer() {
            return;
        }
        let _dog = $crate::common::watchdog(this_test!(), std::time::Duration::from_secs(180));
    };
}

pub(crate) mod child;
pub(crate) mod clean_vm;
pub(crate) mod daemon;
pub(crate) mod home;
pub(crate) mod kept;
pub(crate) mod log;
pub(crate) mod peer;
pub(crate) mod source;

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use vmpager::GuestRange;
use vmpager_store::{FaultySource, MemorySource};
use vmpager_sys::memory::Mapping;
use vmpager_sys::uffd::{Features, Userfaultfd};

pub(crate) const PAGE: usize = 4096;
pub(crate) const HUGE: usize = 2 << 20;

/// Whether this machine has a userfaultfd for us; says so if not.
pub(crate) fn have_userfaultfd() -> bool {
    match Userfaultfd::open(Features::EVENT_REMOVE) {
        Ok(_) => true,
        Err(error) => {
            vmpager_testing::skipped(&error.to_string());
            false
        }
    }
}

/// A source in which every word is its own offset plus one.
pub(crate) fn numbered(pages: usize) -> Arc<MemorySource> {
    Arc::new(MemorySource::numbered(pages as u64))
}

/// The same, made slow, failing or silent on demand, counting what is fetched.
pub(crate) fn faulty(pages: usize) -> Arc<FaultySource> {
    FaultySource::wrap(numbered(pages))
}

pub(crate) fn mapping(pages: usize) -> Arc<Mapping> {
    Arc::new(Mapping::anonymous(pages * PAGE).unwrap())
}

pub(crate) fn range(mapping: &Arc<Mapping>) -> GuestRange {
    GuestRange::of_mapping(mapping)
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    /// The source's bytes from some offset on, every one of them.
    Source(usize),
    /// Zeroes, all of them.
    Zero,
    /// All words the same, and not zero.
    Word(u64),
    /// Anything else: a bug. The first word, the first that disagrees and
    /// where it is.
    Mixed(u64, u64, usize),
}

/// What these bytes are.
pub(crate) fn classify(bytes: &[u8]) -> Holds {
    let words = bytes.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w));
    let words: Vec<u64> = words.collect();
    let step = u64::from(words.len() > 1 && words[1] != words[0]) * 8;
    let mut expected = words[0];
    for (i, word) in words.iter().enumerate() {
        if *word != expected {
            return Holds::Mixed(words[0], *word, i * 8);
        }
        expected = expected.wrapping_add(step);
    }
    match (step, words[0]) {
        (0, 0) => Holds::Zero,
        (0, word) => Holds::Word(word),
        (_, 0) => Holds::Mixed(0, words[1], 8),
        (_, first) => Holds::Source(usize::try_from(first - 1).unwrap()),
    }
}

/// What the page at an offset of a mapping holds, after touching all of it.
pub(crate) fn page(mapping: &Mapping, offset: usize) -> Holds {
    let mut bytes = [0; PAGE];
    mapping.read(offset, &mut bytes);
    classify(&bytes)
}

/// Reads every page of a mapping in an order that jumps about, and compares
/// every byte to the source from `source_offset` on.
pub(crate) fn assert_is_source(mapping: &Mapping, source_offset: usize) {
    let pages = mapping.len() / PAGE;
    for i in 0..pages {
        // An odd stride hits every page of a power of two; others are swept.
        let at = if pages.is_power_of_two() { i * 421 % pages } else { pages - 1 - i };
        assert_eq!(page(mapping, at * PAGE), Holds::Source(source_offset + at * PAGE), "page {at}");
    }
}

/// What the kernel makes of a page on this process's behalf: its contents, or
/// an error where a thread would get SIGBUS.
pub(crate) fn page_by_kernel(mapping: &Mapping, offset: usize) -> std::io::Result<Holds> {
    let mut bytes = [0_u8; PAGE];
    assert!(offset + PAGE <= mapping.len());
    let to = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: PAGE };
    let at = mapping.hva() + offset as u64;
    let from = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: PAGE };
    let pid = rustix::process::getpid().as_raw_pid();
    // (/proc/self/mem would not wait for a missing page.)
    // SAFETY: the kernel writes to `bytes` alone, and as much as it holds.
    let n = unsafe { libc::process_vm_readv(pid, &raw const to, 1, &raw const from, 1, 0) };
    match usize::try_from(n) {
        Ok(PAGE) => Ok(classify(&bytes)),
        Ok(n) => panic!("{n} bytes"),
        Err(_) => Err(std::io::Error::last_os_error()),
    }
}

/// Ends the whole process if it lives longer than a test may take: threads
/// that wait for a page cannot be ended otherwise.
#[derive(Debug)]
pub(crate) struct Watchdog {
    _alive: mpsc::Sender<()>,
}

pub(crate) fn watchdog(what: &'static str, limit: Duration) -> Watchdog {
    let (alive, ended) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        if ended.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
            // Past the test harness, which would show it to nobody.
            let _ = writeln!(std::io::stderr(), "{what} hangs: not done after {limit:?}");
            std::process::abort();
        }
    });
    Watchdog { _alive: alive }
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not after 10 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// CPU time this process has used.
pub(crate) fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap()
}

/// CPU time this process uses while nothing is asked of it for that long.
pub(crate) fn cpu_time_over(time: Duration) -> Duration {
    let before = cpu_time();
    std::thread::sleep(time);
    cpu_time() - before
}

/// That nothing uses the CPU while nothing is asked for.
pub(crate) fn assert_idle(what: &str) {
    std::thread::sleep(Duration::from_millis(50));
    let used = cpu_time_over(Duration::from_secs(1));
    println!("{what}: {used:?} of CPU time in a second");
    assert!(used <= Duration::from_millis(10), "{what}: {used:?} of CPU time in a second");
}

/// A random number generator that costs less than what it is used in.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 11) % end as u64).unwrap()
    }
}

/// The right to use the machine's pool of 2 MiB pages, so that tests which
/// drain it and tests which need it do not meet. None, and a line that says
/// so, if it has fewer pages than asked for.
#[derive(Debug)]
pub(crate) struct HugePool {
    _lock: File,
}

pub(crate) fn huge_pool(pages: usize) -> Option<HugePool> {
    let lock = File::create(concat!(env!("CARGO_TARGET_TMPDIR"), "/hugetlb.lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let free = free_huge_pages();
    if free < pages {
        let why = format!("{free} free huge pages of 2 MiB, {pages} needed (vm.nr_hugepages)");
        vmpager_testing::skipped(&why);
        return None;
    }
    Some(HugePool { _lock: lock })
}

pub(crate) fn free_huge_pages() -> usize {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}
