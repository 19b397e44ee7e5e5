//! A snapshot as OpenMetrics text. What each metric means: `docs/metrics.md`.

use std::fmt::Error;
use std::time::{Duration, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::board::Snapshot;
use super::buckets::{Counts, ReadCounts, STALL_BOUNDS_NS, counts};

/// A snapshot as text.
pub(super) fn render(snapshot: Snapshot) -> Result<String, Error> {
    let mut registry = Registry::with_prefix("vmpager");
    registry.register_collector(Box::new(snapshot));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// Writes metrics, one family at a time.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut to = Writer(encoder);
        self.process(&mut to)?;
        self.sessions(&mut to)?;
        self.faults(&mut to)?;
        self.pages(&mut to)?;
        self.source(&mut to)
    }
}

impl Snapshot {
    fn process(&self, to: &mut Writer<'_>) -> Result<(), Error> {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        let build = to.0.encode_descriptor("build", "What this is", None, MetricType::Info);
        build?.encode_info(&version)?;
        let begun = self.begun.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let help = "When this worker process started, since 1970: counters began then";
        to.gauge("worker_start_time", help, Some(Unit::Seconds), begun)?;
        let help = "Threads that serve";
        to.gauge("worker_threads", help, None, self.workers)?;
        let help = "Worker processes that died and were replaced, in the keeper's life";
        to.counter("takeovers", help, None, self.takeovers)?;
        let help = "Time without a worker process that served, in the keeper's life";
        let unserved = self.unserved.as_secs_f64();
        to.counter_f64("unserved", help, Some(Unit::Seconds), unserved)
    }

    fn sessions(&self, to: &mut Writer<'_>) -> Result<(), Error> {
        let [filled, peer_exited, stopped, failed] = self.events.ended;
        to.gauge("sessions", "Sessions being served", None, self.sessions.len() as u64)?;
        let help = "Sessions that began, those taken over included";
        to.counter("sessions_started", help, None, self.events.started)?;
        let help = "Sessions taken over from another worker process";
        to.counter("sessions_taken_over", help, None, self.events.taken_over)?;
        to.counters(
            "sessions_ended",
            "Sessions that have ended, by why",
            None,
            "reason",
            &[
                ("filled", filled),
                ("peer_exited", peer_exited),
                ("stopped", stopped),
                ("failed", failed),
            ],
        )?;
        let [handshake, sessions, memory] = self.events.refused;
        to.counters(
            "refused",
            "Peers that were turned away, by why",
            None,
            "reason",
            &[("handshake", handshake), ("sessions", sessions), ("memory", memory)],
        )?;
        let bytes = Some(Unit::Bytes);
        let help = "Memory of the sessions being served";
        to.gauge("memory", help, bytes.clone(), self.live.memory_bytes())?;
        let help = "Of it, what is in place or was given back";
        to.gauge("resident", help, bytes.clone(), self.live.resident_bytes())?;
        let missing = self.live.memory_bytes().saturating_sub(self.live.resident_bytes());
        to.gauge("missing", "Of it, what is still to come", bytes, missing)
    }

    fn faults(&self, to: &mut Writer<'_>) -> Result<(), Error> {
        let of = self.all.totals();
        let named = [
            ("vcpu", of.faults_vcpu),
            ("vmm", of.faults_vmm),
            ("kernel", of.faults_kernel),
            ("attached", of.faults_attached),
            ("queued", of.faults_queued),
        ];
        let unknown = of.faults.saturating_sub(named.iter().map(|(_, count)| count).sum());
        let others = [("unknown", unknown), ("exit", of.faults_exit)];
        let origins: Vec<_> = named.into_iter().chain(others).collect();
        to.counters(
            "faults",
            "Faults on missing pages, by who missed them",
            None,
            "origin",
            &origins,
        )?;
        let brought = (of.faults + of.faults_exit).saturating_sub(of.joined + of.confirmed);
        to.counters(
            "fault_outcomes",
            "The same faults, by what they met",
            None,
            "outcome",
            &[("brought", brought), ("joined", of.joined), ("present", of.confirmed)],
        )?;
        let help = "Installs put off: the layout was changing, or no memory was free";
        to.counter("install_retries", help, None, of.retried)?;
        let help = "From when a fault was taken up until its page was in place";
        let took = (counts(of.stalls()), of.stall_nanos);
        to.histograms("stall_seconds", help, &[(None, took)])
    }

    fn pages(&self, to: &mut Writer<'_>) -> Result<(), Error> {
        let of = self.all.totals();
        let causes = ["demand", "neighbour", "profile", "fill", "zero"];
        let pages =
            [of.pages_demand, of.pages_neighbour, of.pages_profile, of.pages_fill, of.pages_zero];
        let pages: Vec<_> = causes.into_iter().zip(pages).collect();
        to.counters("installed_pages", "Pages installed, by why", None, "cause", &pages)?;
        let bytes: Vec<_> = causes.into_iter().zip(self.all.installed_bytes()).collect();
        let unit = Some(Unit::Bytes);
        to.counters("installed", "Bytes installed, by why", unit, "cause", &bytes)?;
        let help = "Pages that guests gave back";
        to.counter("removed_pages", help, None, of.pages_removed)?;
        let help = "Pages that could not be had, and were poisoned";
        to.counter("poisoned_pages", help, None, of.pages_poisoned)?;
        let help = "Base pages that came to lie in huge pages";
        to.counter("huge_pages", help, None, of.pages_huge)?;
        let help = "Faults on pages of the profile, or that it lacks";
        let replay = self.all.replay();
        to.counters(
            "profile_faults",
            help,
            None,
            "was",
            &[("missed", replay.missed), ("late", replay.late)],
        )
    }

    fn source(&self, to: &mut Writer<'_>) -> Result<(), Error> {
        let help = "Bytes taken from the source";
        to.counter("source", help, Some(Unit::Bytes), self.all.totals().bytes_read)?;
        let took = |reads: &ReadCounts| (reads.took, reads.nanos);
        let help = "Reads of the source that had to wait for it, by what for";
        to.histograms(
            "source_read_seconds",
            help,
            &[
                (Some(("priority", "demand")), took(&self.source.demand)),
                (Some(("priority", "prefetch")), took(&self.source.prefetch)),
                (Some(("priority", "fill")), took(&self.source.fill)),
            ],
        )?;
        let help = "Of them, those that failed, tried again or not";
        to.counter("source_read_failures", help, None, self.source.failed)
    }
}

/// A label and its value.
type Label<'a> = (&'a str, &'a str);

impl Writer<'_> {
    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        value: impl prometheus_client::encoding::EncodeGaugeValue,
    ) -> Result<(), Error> {
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        metric.encode_gauge(&value)
    }

    fn counter(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        value: u64,
    ) -> Result<(), Error> {
        let mut metric =
            self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn counter_f64(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        value: f64,
    ) -> Result<(), Error> {
        let mut metric =
            self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, f64>(&value, None)
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        label: &str,
        values: &[(&str, u64)],
    ) -> Result<(), Error> {
        let mut metric =
            self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (value, count) in values {
            let labels = [(label, *value)];
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(count, None)?;
        }
        Ok(())
    }

    /// Histograms of seconds, of so many nanoseconds in all. The unit is in their name
    /// alone: not every parser takes a `# UNIT` of a histogram.
    fn histograms(
        &mut self,
        name: &str,
        help: &str,
        of: &[(Option<Label<'_>>, (Counts, u64))],
    ) -> Result<(), Error> {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        let bounds = STALL_BOUNDS_NS.map(|bound| Duration::from_nanos(bound).as_secs_f64());
        for (label, (counts, nanos)) in of {
            let sum = Duration::from_nanos(*nanos).as_secs_f64();
            let count = counts.iter().sum();
            let ends = bounds.into_iter().chain([f64::INFINITY]);
            let buckets: Vec<(f64, u64)> = ends.zip(*counts).collect();
            match label {
                None => metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?,
                Some(label) => {
                    let labels = [*label];
                    let mut metric = metric.encode_family(&labels)?;
                    metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
                }
            }
        }
        Ok(())
    }
}
