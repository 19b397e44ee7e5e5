//! What a guest touches, in which order, and what it does in between.

use std::path::Path;

use vmpager_store::profile::Profile;

use crate::image::shown;

/// The first touch of a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Touch {
    pub(super) page: u32,
    /// What the guest computes before it, in nanoseconds.
    pub(super) think_ns: u64,
}

/// The first touches of all pages that a guest touches.
#[derive(Clone, Debug)]
pub(super) struct Trace {
    pub(super) name: String,
    pub(super) memory_pages: u32,
    pub(super) touches: Vec<Touch>,
    /// What another guest touches, in its order, if that is known.
    other: Option<Vec<u32>>,
}

/// A Linux guest's, how it was made: `docs/profile.md`.
const LINUX: &[u8] = include_bytes!("linux.vmprof");

/// Pages of the generated traces' memory: 64 MiB.
const PAGES: u32 = 16_384;

/// Of a guest's random order, and of another guest's.
const SEED: u64 = 1;
const OTHER_SEED: u64 = 1000;

impl Trace {
    /// What a profile has recorded. Each of its touches was a fault, whose time,
    /// `fault_ns`, is no time in which the guest computed.
    pub(super) fn recorded(path: &Path, fault_ns: u64) -> anyhow::Result<Self> {
        let profile = Profile::open(path)?;
        let mut before = 0;
        let touches = profile.pages().iter().map(|page| {
            let passed = u64::from(page.first_us - before) * 1000;
            before = page.first_us;
            Touch { page: page.page, think_ns: passed.saturating_sub(fault_ns) }
        });
        let touches = touches.collect();
        let memory_pages = memory_pages(&profile);
        Ok(Self { name: shown(path), memory_pages, touches, other: None })
    }

    /// What a Linux guest touched after a restore. It was an emulated machine's, so
    /// that only the order is taken from it.
    fn linux(think_ns: u64) -> anyhow::Result<Self> {
        let profile = Profile::decode(LINUX, Path::new("linux.vmprof"))?;
        let touches = profile.pages().iter().map(|page| Touch { page: page.page, think_ns });
        let touches = touches.collect();
        let memory_pages = memory_pages(&profile);
        Ok(Self { name: "linux".into(), memory_pages, touches, other: None })
    }

    fn generated(name: &str, pages: impl Iterator<Item = u32>, think_ns: u64) -> Self {
        let mut seen = vec![false; PAGES as usize];
        let first = pages.filter(|page| !std::mem::replace(&mut seen[*page as usize], true));
        let touches = first.map(|page| Touch { page, think_ns }).collect();
        Self { name: name.into(), memory_pages: PAGES, touches, other: None }
    }

    /// So many pages anywhere. Another guest's are others by chance alone.
    fn dense(pages: u32, think_ns: u64) -> Self {
        let most = |seed| shuffled(seed).take(pages as usize);
        let other = Some(most(OTHER_SEED).collect());
        Self { other, ..Self::generated("dense", most(SEED), think_ns) }
    }

    /// A Linux guest, and generated ones of all kinds.
    pub(super) fn known(think_ns: u64) -> anyhow::Result<Vec<Self>> {
        let half = PAGES / 2;
        let random = shuffled(SEED);
        let streams = streams(2000);
        let mixed = streams.clone().zip(random.clone()).flat_map(|(a, b)| [a, b]);
        Ok(vec![
            Self::linux(think_ns)?,
            Self::generated("sequential", 0..half, think_ns),
            Self::generated("backward", (0..half).rev(), think_ns),
            Self::generated("strided", (0..PAGES).step_by(12), think_ns),
            Self::generated("streams", streams, think_ns),
            Self::generated("mixed", mixed, think_ns),
            Self::generated("sparse", random.clone().take(1000), think_ns),
            Self::dense(PAGES * 3 / 5, think_ns),
            Self::generated("random", random, think_ns),
        ])
    }

    /// What another guest touches: if nothing is known of one, as many pages, in the same
    /// order, elsewhere, without those that this one touches, too.
    pub(super) fn elsewhere(&self) -> Vec<u32> {
        if let Some(other) = &self.other {
            return other.clone();
        }
        let mut own = vec![false; self.memory_pages as usize];
        self.touches.iter().for_each(|touch| own[touch.page as usize] = true);
        let half = self.memory_pages / 2;
        let moved = self.touches.iter().map(|touch| (touch.page + half) % self.memory_pages);
        moved.filter(|page| !own[*page as usize]).collect()
    }
}

/// As many as 32 bits count.
fn memory_pages(profile: &Profile) -> u32 {
    u32::try_from(profile.memory().memory_bytes().div_ceil(4096)).unwrap_or(u32::MAX)
}

/// Four threads, each in a quarter of the memory: forward, backward, by steps of
/// three, forward.
fn streams(each: u32) -> impl Iterator<Item = u32> + Clone {
    let quarter = PAGES / 4;
    (0..each).flat_map(move |nth| {
        let by_steps = (nth < quarter / 3).then_some(2 * quarter + nth * 3);
        [Some(nth), Some(2 * quarter - 1 - nth), by_steps, Some(3 * quarter + nth)]
            .into_iter()
            .flatten()
    })
}

/// All pages in some random order, the same each time for one seed.
fn shuffled(seed: u64) -> impl Iterator<Item = u32> + Clone {
    let mut pages: Vec<u32> = (0..PAGES).collect();
    let mut state = seed;
    for i in (1..pages.len()).rev() {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let other = (state >> 33) % (i as u64 + 1);
        pages.swap(i, usize::try_from(other).unwrap_or(0));
    }
    pages.into_iter()
}
