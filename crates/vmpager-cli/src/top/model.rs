//! What `vmpager top` knows: what it saw, and what that makes of the time between.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;
use vmpager::metrics::{STALL_BOUNDS_NS, SessionNow, SessionsPage};

/// What sessions are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    #[default]
    Session,
    Memory,
    Resident,
    Faults,
    Stall,
    Bytes,
}

impl Sort {
    pub(super) const ALL: [Self; 6] =
        [Self::Session, Self::Memory, Self::Resident, Self::Faults, Self::Stall, Self::Bytes];

    fn next(self) -> Self {
        let mut after = Self::ALL.into_iter().cycle().skip_while(|sort| *sort != self);
        after.nth(1).unwrap_or_default()
    }
}

/// A session, and what it did lately.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    #[serde(flatten)]
    pub(super) now: SessionNow,
    /// Faults per second; absent as long as it is not known.
    pub(super) faults_per_s: Option<f64>,
    /// The 99th percentile of its stalls lately, in microseconds; absent if there
    /// were none.
    pub(super) recent_p99_us: Option<f64>,
    /// Bytes installed per second.
    pub(super) bytes_per_s: Option<f64>,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Report<'a> {
    version: &'a str,
    source: &'a str,
    workers: u64,
    uptime_ms: u64,
    takeovers: u64,
    sessions_started: u64,
    sessions_ended: u64,
    refused: u64,
    interval_s: f64,
    sessions: &'a [Row],
}

/// What is known, and shown.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// What was seen last, and when.
    seen: Option<(SessionsPage, Instant)>,
    interval: Duration,
    rows: Vec<Row>,
    sort: Sort,
    reversed: bool,
    /// The number of the session that is selected.
    selected: Option<u64>,
    pub(super) inspecting: bool,
    /// Why nothing new is seen.
    pub(super) problem: Option<String>,
}

impl Model {
    /// The daemon said this.
    pub(super) fn saw(&mut self, page: SessionsPage, at: Instant) {
        let before = self.seen.take();
        self.problem = None;
        self.interval = before.as_ref().map_or(Duration::ZERO, |(_, then)| at - *then);
        let seconds = self.interval.as_secs_f64();
        // Another worker process counts anew.
        let before = before.filter(|(then, _)| then.uptime_ms <= page.uptime_ms);
        let row = |now: &SessionNow| {
            let then = before.as_ref().map(|(page, _)| &page.sessions);
            let then = then.and_then(|then| {
                then.iter().find(|then| then.summary.session == now.summary.session)
            });
            Row::new(now, then, seconds)
        };
        self.rows = page.sessions.iter().map(row).collect();
        self.seen = Some((page, at));
        self.put_in_order();
    }

    /// The daemon did not answer, for this reason.
    pub(super) fn missed(&mut self, problem: String) {
        self.problem = Some(problem);
    }

    pub(super) fn page(&self) -> Option<&SessionsPage> {
        self.seen.as_ref().map(|(page, _)| page)
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub(super) fn sort(&self) -> (Sort, bool) {
        (self.sort, self.reversed)
    }

    pub(super) fn sort_by_next(&mut self) {
        self.sort = self.sort.next();
        self.put_in_order();
    }

    pub(super) fn reverse(&mut self) {
        self.reversed = !self.reversed;
        self.put_in_order();
    }

    /// Where the selected session is shown.
    pub(super) fn selected(&self) -> Option<usize> {
        self.rows.iter().position(|row| Some(row.now.summary.session) == self.selected)
    }

    pub(super) fn inspected(&self) -> Option<&Row> {
        let row = self.selected().and_then(|at| self.rows.get(at));
        row.filter(|_| self.inspecting)
    }

    /// Selects another session: the next one, or the one before.
    pub(super) fn select(&mut self, down: bool) {
        let last = self.rows.len().saturating_sub(1);
        let at = match (self.selected(), down) {
            (None, _) => 0,
            (Some(at), true) => (at + 1).min(last),
            (Some(at), false) => at.saturating_sub(1),
        };
        self.selected = self.rows.get(at).map(|row| row.now.summary.session);
    }

    /// Numbers begin with the largest, the oldest session comes first.
    fn put_in_order(&mut self) {
        let (sort, reversed) = self.sort();
        let number = |value: Option<f64>| value.unwrap_or(-1.0);
        self.rows.sort_by(|a, b| {
            let order = match sort {
                Sort::Session => Ordering::Equal,
                Sort::Memory => b.now.summary.memory_bytes.cmp(&a.now.summary.memory_bytes),
                Sort::Resident => b.resident().total_cmp(&a.resident()),
                Sort::Faults => number(b.faults_per_s).total_cmp(&number(a.faults_per_s)),
                Sort::Stall => number(b.recent_p99_us).total_cmp(&number(a.recent_p99_us)),
                Sort::Bytes => number(b.bytes_per_s).total_cmp(&number(a.bytes_per_s)),
            };
            let order = order.then(a.now.summary.session.cmp(&b.now.summary.session));
            if reversed { order.reverse() } else { order }
        });
    }

    pub(super) fn report(&self) -> Option<Report<'_>> {
        let page = self.page()?;
        Some(Report {
            version: &page.version,
            source: &page.source,
            workers: page.workers,
            uptime_ms: page.uptime_ms,
            takeovers: page.takeovers,
            sessions_started: page.sessions_started,
            sessions_ended: page.sessions_ended,
            refused: page.refused,
            interval_s: self.interval.as_secs_f64(),
            sessions: &self.rows,
        })
    }
}

impl Row {
    fn new(now: &SessionNow, then: Option<&SessionNow>, seconds: f64) -> Self {
        let rate = |of: fn(&SessionNow) -> u64| {
            let more = of(now).checked_sub(of(then?))?;
            (seconds > 0.0).then(|| approximately(more) / seconds)
        };
        let stalls = then.and_then(|then| {
            let (now, then) = (&now.summary.stall_buckets, &then.summary.stall_buckets);
            now.iter().zip(then).map(|(now, then)| now.checked_sub(*then)).collect()
        });
        Self {
            faults_per_s: rate(|session| session.summary.faults + session.summary.faults_exit),
            recent_p99_us: stalls.and_then(|stalls: Vec<u64>| quantile_us(&stalls, 0.99)),
            bytes_per_s: rate(|session| session.installed_bytes),
            now: now.clone(),
        }
    }

    /// How much of its memory is in place, 0 to 1.
    pub(super) fn resident(&self) -> f64 {
        let of = approximately(self.now.summary.memory_bytes.max(1));
        (approximately(self.now.resident_bytes) / of).clamp(0.0, 1.0)
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people to look at")]
pub(super) fn approximately(number: u64) -> f64 {
    number as f64
}

/// A quantile of stalls in microseconds, by how many lie in each bucket: as if they
/// were spread evenly there.
pub(super) fn quantile_us(counts: &[u64], quantile: f64) -> Option<f64> {
    let all: u64 = counts.iter().sum();
    let rank = approximately(all) * quantile;
    let (mut below, mut lower) = (0.0, 0.0);
    for (count, bound) in counts.iter().zip(STALL_BOUNDS_NS) {
        let (count, upper) = (approximately(*count), approximately(bound) / 1e3);
        if count > 0.0 && below + count >= rank {
            return Some(lower + (upper - lower) * ((rank - below) / count).clamp(0.0, 1.0));
        }
        below += count;
        lower = upper;
    }
    (all > 0).then_some(lower)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A daemon with sessions of so many faults and bytes.
    pub(in crate::top) fn page(uptime_ms: u64, sessions: &[(u64, u64)]) -> SessionsPage {
        let session = |(number, (faults, mib)): (u64, &(u64, u64))| {
            let mut buckets = [0; 22];
            buckets[if number == 3 { 4 } else { 2 }] = *faults;
            serde_json::json!({
                "session": number, "peer_pid": 4000 + number, "reason": null, "regions": 1,
                "memory_bytes": number << 28, "faults": faults, "faults_vcpu": faults,
                "faults_joined": 1, "faults_confirmed": 0, "retries": 0, "pages_demand": faults,
                "pages_neighbour": 0, "pages_fill": 0, "pages_zero": 0, "pages_removed": 0,
                "pages_poisoned": 0, "pages_missing": 0, "bytes_read": mib << 20,
                "stall_p50_us": 8.0, "stall_p99_us": 44.0, "stall_max_us": 120.0,
                "stall_buckets": buckets,
                "fill_ms": null, "duration_ms": 1234.5,
                "resident_bytes": mib << 20, "installed_bytes": mib << 20,
                "fill": if number % 2 == 0 { "filling" } else { "off" },
                "taken_over": number == 3,
            })
        };
        let sessions: Vec<_> = (1..).zip(sessions).map(session).collect();
        serde_json::from_value(serde_json::json!({
            "version": "0.1.0", "source": "/snap/mem", "workers": 2, "uptime_ms": uptime_ms,
            "takeovers": 1, "sessions_started": 5, "sessions_ended": 2, "refused": 0,
            "sessions": sessions,
        }))
        .expect("a page")
    }

    /// A model that has seen three sessions for a second.
    pub(in crate::top) fn model() -> Model {
        let mut model = Model::default();
        let then = Instant::now();
        model.saw(page(60_000, &[(100, 64), (10, 128), (1000, 768)]), then);
        let now = then + Duration::from_secs(1);
        model.saw(page(61_000, &[(350, 128), (10, 192), (3000, 768)]), now);
        model
    }

    fn order(model: &Model) -> Vec<u64> {
        model.rows().iter().map(|row| row.now.summary.session).collect()
    }

    #[test]
    fn what_happened_in_between_is_told_by_second() {
        let model = model();
        let [first, second, third] = model.rows() else { panic!("three sessions") };
        assert_eq!(
            (first.faults_per_s, first.bytes_per_s),
            (Some(250.0), Some(f64::from(64 << 20)))
        );
        assert_eq!((second.faults_per_s, second.recent_p99_us), (Some(0.0), None));
        assert_eq!(third.bytes_per_s, Some(0.0));
        // All of them between 5 and 10 us.
        let p99 = first.recent_p99_us.expect("there were stalls");
        assert!((9.9..10.0).contains(&p99), "{p99}");
        assert!((first.resident() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_worker_that_took_over_counts_anew() {
        let mut model = model();
        model.missed("nobody answers".into());
        assert!(model.problem.is_some());
        model.saw(page(10, &[(5, 1), (5, 1)]), Instant::now() + Duration::from_secs(2));
        assert!(model.problem.is_none() && model.rows().len() == 2);
        assert!(model.rows().iter().all(|row| row.faults_per_s.is_none()));
        assert!(model.rows().iter().all(|row| row.recent_p99_us.is_none()));
    }

    #[test]
    fn sessions_are_sorted_and_a_selected_one_stays_selected() {
        let mut model = model();
        assert_eq!(order(&model), [1, 2, 3]);
        model.select(true);
        model.select(true);
        assert_eq!(model.selected(), Some(1));
        let mut orders = Vec::new();
        for _ in Sort::ALL {
            model.sort_by_next();
            orders.push(order(&model));
            let at = model.selected().expect("it is there");
            assert_eq!(order(&model)[at], 2);
        }
        let faults = vec![3, 1, 2];
        assert_eq!(
            orders,
            [vec![3, 2, 1], vec![3, 1, 2], faults.clone(), faults, vec![1, 2, 3], vec![1, 2, 3],]
        );
        model.reverse();
        assert_eq!(order(&model), [3, 2, 1]);
        for _ in 0..5 {
            model.select(false);
        }
        assert_eq!(model.selected(), Some(0));
        assert!(model.inspected().is_none());
        model.inspecting = true;
        assert_eq!(model.inspected().map(|row| row.now.summary.session), Some(3));
        model.saw(page(62_000, &[]), Instant::now() + Duration::from_secs(2));
        assert!(model.selected().is_none() && model.inspected().is_none());
        model.select(true);
        assert!(model.selected().is_none());
    }

    #[test]
    fn quantiles_are_those_of_the_buckets() {
        assert_eq!(quantile_us(&[0; 22], 0.5), None);
        assert_eq!(quantile_us(&[10], 1.0), Some(2.0));
        assert_eq!(quantile_us(&[50, 50], 0.5), Some(2.0));
        assert_eq!(quantile_us(&[0, 100], 0.5), Some(3.5));
        let mut longest = [0; 22];
        longest[21] = 1;
        assert_eq!(quantile_us(&longest, 0.99), Some(1e7), "what is longer than all bounds");
    }
}
