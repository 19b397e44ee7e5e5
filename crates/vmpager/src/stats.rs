//! What a session did, as numbers.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use vmpager_core::prefetch::ReplayCounts;

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// Every page is in place; the memory was unregistered.
    Filled,
    /// The process whose memory it was has exited.
    PeerExited,
    /// The pager was told to stop.
    Stopped,
    /// Serving failed, for the reason given.
    Failed(String),
}

impl std::fmt::Display for EndReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Filled => f.write_str("filled"),
            Self::PeerExited => f.write_str("peer exited"),
            Self::Stopped => f.write_str("stopped"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}

/// Counters of one served memory, kept by the thread that serves it.
#[derive(Clone, Debug)]
pub(crate) struct Counters {
    pub(crate) started: Instant,
    pub(crate) faults: u64,
    pub(crate) faults_vcpu: u64,
    pub(crate) faults_vmm: u64,
    pub(crate) faults_kernel: u64,
    pub(crate) faults_attached: u64,
    pub(crate) faults_queued: u64,
    pub(crate) faults_exit: u64,
    pub(crate) joined: u64,
    pub(crate) confirmed: u64,
    pub(crate) retried: u64,
    pub(crate) pages_demand: u64,
    pub(crate) pages_neighbour: u64,
    pub(crate) pages_fill: u64,
    pub(crate) pages_profile: u64,
    pub(crate) pages_zero: u64,
    pub(crate) pages_removed: u64,
    pub(crate) pages_poisoned: u64,
    pub(crate) pages_huge: u64,
    pub(crate) pages_moved: u64,
    pub(crate) bytes_read: u64,
    pub(crate) fill_took: Option<Duration>,
    pub(crate) profile_took: Option<Duration>,
    /// All stalls together, in ns.
    pub(crate) stall_nanos: u64,
    /// From when a fault can have come at the earliest to its page's install, in ns.
    stalls: Histogram<u64>,
}

impl Counters {
    pub(crate) fn new() -> Self {
        // Two digits, one nanosecond to ten minutes: 33 KiB.
        let stalls = Histogram::new_with_bounds(1, 600_000_000_000, 2);
        Self {
            started: Instant::now(),
            faults: 0,
            faults_vcpu: 0,
            faults_vmm: 0,
            faults_kernel: 0,
            faults_attached: 0,
            faults_queued: 0,
            faults_exit: 0,
            joined: 0,
            confirmed: 0,
            retried: 0,
            pages_demand: 0,
            pages_neighbour: 0,
            pages_fill: 0,
            pages_profile: 0,
            pages_zero: 0,
            pages_removed: 0,
            pages_poisoned: 0,
            pages_huge: 0,
            pages_moved: 0,
            bytes_read: 0,
            fill_took: None,
            profile_took: None,
            stall_nanos: 0,
            stalls: stalls.expect("the bounds are in order"),
        }
    }

    /// Adds what installers beside the worker have brought: pages from the
    /// source, their bytes, zero pages.
    pub(crate) fn brought_by_installers(&mut self, [pages, bytes, zeroes]: [u64; 3]) {
        self.faults_exit += pages + zeroes;
        self.pages_demand += pages;
        self.bytes_read += bytes;
        self.pages_zero += zeroes;
    }

    /// So many faults that can have come `since` then have their pages.
    pub(crate) fn stalled(&mut self, since: Instant, faults: u64) {
        let nanos = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.stalls.saturating_record_n(nanos, faults);
        self.stall_nanos += nanos.saturating_mul(faults);
    }

    pub(crate) fn stalls(&self) -> &Histogram<u64> {
        &self.stalls
    }

    /// Pages installed: demanded, their neighbours, of a profile, by the fill, zeroes.
    fn pages_installed(&self) -> [u64; 5] {
        [
            self.pages_demand,
            self.pages_neighbour,
            self.pages_profile,
            self.pages_fill,
            self.pages_zero,
        ]
    }
}

/// A session's numbers, as logged and as JSON. Sessions with several
/// userfaultfds add them up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionSummary {
    /// The session's number in this daemon, from 1.
    pub session: u64,
    /// The peer's process id, 0 for the pager's own process.
    pub peer_pid: i32,
    /// Why it ended; absent while it lives.
    pub reason: Option<EndReason>,
    /// Memory regions.
    pub regions: u64,
    /// Bytes in them.
    pub memory_bytes: u64,
    /// The size of a page, or the mean size, in bytes: what `pages_...` are counted in.
    #[serde(default)]
    pub page_bytes: u64,
    /// Faults the pager served, however they came.
    pub faults: u64,
    /// Of them, those of threads of vCPUs, exits included whose threads left the page
    /// to the pager's. Like the next two, 0 where the VMM's userfaultfd does not name
    /// threads (`UFFD_FEATURE_THREAD_ID`).
    #[serde(default)]
    pub faults_vcpu: u64,
    /// Of them, those of the VMM's other threads.
    #[serde(default)]
    pub faults_vmm: u64,
    /// Of them, those of the kernel on the VM's behalf: of its own threads and,
    /// where vCPUs leave the guest on missing pages, KVM's on a vCPU's thread.
    /// Elsewhere the kernel does not tell KVM's from the guest's.
    #[serde(default)]
    pub faults_kernel: u64,
    /// Of them, those of other processes that map the memory (see
    /// [`attach`](crate::attach)).
    #[serde(default)]
    pub faults_attached: u64,
    /// Of them, those that came by the fault queue: exits of vCPUs whose pager
    /// is another process, and others who must not wait in the kernel.
    #[serde(default)]
    pub faults_queued: u64,
    /// Beside them, exits of vCPUs whose threads installed the page themselves
    /// ([`Installer`](crate::Installer)).
    #[serde(default)]
    pub faults_exit: u64,
    /// Of them, those whose page was in flight already.
    pub faults_joined: u64,
    /// Of them, those whose page was in place already, or given back unseen.
    pub faults_confirmed: u64,
    /// Installs put off because the memory's layout was changing, or no memory
    /// was free.
    pub retries: u64,
    /// Pages installed because somebody waited for them.
    pub pages_demand: u64,
    /// Pages installed because a neighbour was demanded.
    pub pages_neighbour: u64,
    /// Pages installed by the background fill.
    pub pages_fill: u64,
    /// Pages installed because a profile said so.
    #[serde(default)]
    pub pages_profile: u64,
    /// Faults on pages that the profile lacks.
    #[serde(default)]
    pub profile_missed: u64,
    /// Faults on pages of the profile that came before it brought them.
    #[serde(default)]
    pub profile_late: u64,
    /// Zero pages installed.
    pub pages_zero: u64,
    /// Pages given back by the guest.
    pub pages_removed: u64,
    /// Pages that could not be had.
    pub pages_poisoned: u64,
    /// Base pages that lie in huge pages made of them.
    #[serde(default)]
    pub pages_huge: u64,
    /// Pages that were not copied into place but moved, in whole pieces of
    /// 2 MiB.
    #[serde(default)]
    pub pages_moved: u64,
    /// Pages whose bytes were still to come at the end.
    pub pages_missing: u64,
    /// Bytes taken from the source.
    pub bytes_read: u64,
    /// Median time that somebody waited for a page, in microseconds: from the last
    /// look that found nobody, to the install.
    pub stall_p50_us: f64,
    /// Its 99th percentile.
    pub stall_p99_us: f64,
    /// Its maximum.
    pub stall_max_us: f64,
    /// How many stalls lie between each two of the bounds 0,
    /// [`STALL_BOUNDS_NS`](crate::metrics::STALL_BOUNDS_NS), infinity.
    #[serde(default)]
    pub stall_buckets: Vec<u64>,
    /// How long the background fill took, in milliseconds.
    pub fill_ms: Option<f64>,
    /// How long it took until all pages of the profile had been asked for, in
    /// milliseconds; absent if it was given up.
    #[serde(default)]
    pub profile_ms: Option<f64>,
    /// How long the session lasted, in milliseconds.
    pub duration_ms: f64,
}

/// Adds up memories, of a session or of all.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    totals: Counters,
    profile: ReplayCounts,
    regions: u64,
    memory_bytes: u64,
    pages_missing: u64,
    pages: u64,
    missing_bytes: u64,
    installed_bytes: [u64; 5],
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            totals: Counters::new(),
            profile: ReplayCounts::default(),
            regions: 0,
            memory_bytes: 0,
            pages_missing: 0,
            pages: 0,
            missing_bytes: 0,
            installed_bytes: [0; 5],
        }
    }

    /// Adds one memory's numbers.
    pub(crate) fn add(&mut self, end: &MemoryNumbers) {
        let (to, from) = (&mut self.totals, &end.counters);
        to.started = to.started.min(from.started);
        to.faults += from.faults;
        to.faults_vcpu += from.faults_vcpu;
        to.faults_vmm += from.faults_vmm;
        to.faults_kernel += from.faults_kernel;
        to.faults_attached += from.faults_attached;
        to.faults_queued += from.faults_queued;
        to.faults_exit += from.faults_exit;
        to.joined += from.joined;
        to.confirmed += from.confirmed;
        to.retried += from.retried;
        to.pages_demand += from.pages_demand;
        to.pages_neighbour += from.pages_neighbour;
        to.pages_fill += from.pages_fill;
        to.pages_profile += from.pages_profile;
        to.pages_zero += from.pages_zero;
        to.pages_removed += from.pages_removed;
        to.pages_poisoned += from.pages_poisoned;
        to.pages_huge += from.pages_huge;
        to.pages_moved += from.pages_moved;
        to.bytes_read += from.bytes_read;
        to.fill_took = to.fill_took.max(from.fill_took);
        to.profile_took = to.profile_took.max(from.profile_took);
        to.stall_nanos += from.stall_nanos;
        to.stalls.add(&from.stalls).expect("all histograms have the same bounds");
        self.profile.missed += end.profile.missed;
        self.profile.late += end.profile.late;
        self.regions += end.regions;
        self.memory_bytes += end.memory_bytes;
        self.pages_missing += end.pages_missing;
        self.pages += end.memory_bytes / end.page_bytes.max(1);
        self.missing_bytes += end.pages_missing * end.page_bytes;
        for (bytes, pages) in self.installed_bytes.iter_mut().zip(from.pages_installed()) {
            *bytes += pages * end.page_bytes;
        }
    }

    pub(crate) fn totals(&self) -> &Counters {
        &self.totals
    }

    pub(crate) fn replay(&self) -> ReplayCounts {
        self.profile
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Bytes in place, or given back.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(self.missing_bytes)
    }

    /// Bytes installed: demanded, their neighbours, of a profile, by the fill,
    /// zeroes.
    pub(crate) fn installed_bytes(&self) -> [u64; 5] {
        self.installed_bytes
    }

    /// The numbers so far.
    pub(crate) fn summary(
        &self,
        session: u64,
        peer_pid: i32,
        reason: Option<EndReason>,
    ) -> SessionSummary {
        let totals = &self.totals;
        SessionSummary {
            session,
            peer_pid,
            reason,
            regions: self.regions,
            memory_bytes: self.memory_bytes,
            page_bytes: self.memory_bytes / self.pages.max(1),
            faults: totals.faults,
            faults_vcpu: totals.faults_vcpu,
            faults_vmm: totals.faults_vmm,
            faults_kernel: totals.faults_kernel,
            faults_attached: totals.faults_attached,
            faults_queued: totals.faults_queued,
            faults_exit: totals.faults_exit,
            faults_joined: totals.joined,
            faults_confirmed: totals.confirmed,
            retries: totals.retried,
            pages_demand: totals.pages_demand,
            pages_neighbour: totals.pages_neighbour,
            pages_fill: totals.pages_fill,
            pages_profile: totals.pages_profile,
            profile_missed: self.profile.missed,
            profile_late: self.profile.late,
            pages_zero: totals.pages_zero,
            pages_removed: totals.pages_removed,
            pages_poisoned: totals.pages_poisoned,
            pages_huge: totals.pages_huge,
            pages_moved: totals.pages_moved,
            pages_missing: self.pages_missing,
            bytes_read: totals.bytes_read,
            stall_p50_us: micros(totals.stalls.value_at_quantile(0.5)),
            stall_p99_us: micros(totals.stalls.value_at_quantile(0.99)),
            stall_max_us: micros(totals.stalls.max()),
            stall_buckets: crate::metrics::counts(&totals.stalls).to_vec(),
            fill_ms: totals.fill_took.map(|took| took.as_secs_f64() * 1e3),
            profile_ms: totals.profile_took.map(|took| took.as_secs_f64() * 1e3),
            duration_ms: totals.started.elapsed().as_secs_f64() * 1e3,
        }
    }
}

/// Nanoseconds as microseconds, to the nearest tenth.
#[expect(clippy::cast_precision_loss, reason = "a stall of 2^53 ns is 104 days")]
fn micros(nanos: u64) -> f64 {
    (nanos as f64 / 100.0).round() / 10.0
}

/// One memory's numbers, as its worker reports them.
#[derive(Clone, Debug)]
pub(crate) struct MemoryNumbers {
    pub(crate) counters: Counters,
    pub(crate) profile: ReplayCounts,
    pub(crate) regions: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) pages_missing: u64,
    /// The size of a page; the mean one, if there are several.
    pub(crate) page_bytes: u64,
}
