//! `vmpager serve --metrics` as scrapers meet it, good ones and others.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use common::{Guest, PATIENCE, Served, VMPAGER, ask, eventually, have_userfaultfd};
use openmetrics_parser::openmetrics::parse_openmetrics;
use openmetrics_parser::{HistogramValue, MetricsExposition, OpenMetricsType, OpenMetricsValue};
use serde_json::Value;

/// What a scraper has understood.
struct Scrape(MetricsExposition<OpenMetricsType, OpenMetricsValue>);

impl Scrape {
    fn of(served: &Served) -> Self {
        Self(parse_openmetrics(&served.get("/metrics")).unwrap())
    }

    fn sample(&self, family: &str, label: &str) -> OpenMetricsValue {
        let family = self.0.families.get(&format!("vmpager_{family}")).unwrap();
        let of = |labels: &openmetrics_parser::LabelSet<'_>| {
            labels.iter_values().map(String::as_str).collect::<String>() == label
        };
        let mut samples = family.iter_samples();
        let sample = samples.find(|sample| of(&sample.get_labelset().unwrap()));
        sample.unwrap_or_else(|| panic!("{} {label:?}", family.family_name)).value.clone()
    }

    /// A number, by the value of its only label, or "".
    fn labelled(&self, family: &str, label: &str) -> f64 {
        match self.sample(family, label) {
            OpenMetricsValue::Counter(counter) => counter.value.as_f64(),
            OpenMetricsValue::Gauge(number) => number.as_f64(),
            other => panic!("{family} is {other:?}"),
        }
    }

    fn number(&self, family: &str) -> f64 {
        self.labelled(family, "")
    }

    fn histogram(&self, family: &str, label: &str) -> HistogramValue {
        match self.sample(family, label) {
            OpenMetricsValue::Histogram(histogram) => histogram,
            other => panic!("{family} is {other:?}"),
        }
    }

    /// All samples of a family together.
    fn sum(&self, family: &str) -> f64 {
        let family = self.0.families.get(&format!("vmpager_{family}")).unwrap();
        let numbers = family.iter_samples().map(|sample| match &sample.value {
            OpenMetricsValue::Counter(counter) => counter.value.as_f64(),
            other => panic!("{other:?}"),
        });
        numbers.sum()
    }
}

#[test]
fn a_scraper_sees_what_the_session_itself_counts() {
    if !have_userfaultfd() {
        return;
    }
    let served = Served::start(&[]);
    let idle = Scrape::of(&served);
    assert_eq!((idle.number("sessions"), idle.sum("faults")), (0.0, 0.0));
    let guest = Guest::connect(&served.path("pager.sock"));
    guest.touch(0..40);
    // The last fault is counted after its thread is woken.
    eventually("40 stalls", || {
        Scrape::of(&served).histogram("stall_seconds", "").count == Some(40)
    });
    let scrape = Scrape::of(&served);
    let page: Value = serde_json::from_str(&served.get("/sessions.json")).unwrap();
    let refused = UnixStream::connect(served.path("pager.sock")).unwrap();
    (&refused).write_all(b"nonsense").unwrap();
    eventually("a refusal", || Scrape::of(&served).labelled("refused", "handshake") == 1.0);
    assert_eq!(Scrape::of(&served).sum("refused"), 1.0);

    let output = served.stop();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let summary = &report["sessions"][0];
    let of = |key: &str| summary[key].as_f64().unwrap();
    assert_eq!(scrape.number("sessions"), 1.0);
    assert_eq!(scrape.sum("faults"), of("faults"));
    assert_eq!(scrape.sum("fault_outcomes"), of("faults"));
    assert_eq!(scrape.labelled("fault_outcomes", "joined"), of("faults_joined"));
    assert_eq!(scrape.labelled("installed_pages", "demand"), of("pages_demand"));
    assert_eq!(scrape.labelled("installed_bytes", "demand"), of("pages_demand") * 4096.0);
    assert_eq!(scrape.number("source_bytes"), of("bytes_read"));
    assert_eq!(scrape.number("memory_bytes"), of("memory_bytes"));
    assert_eq!(scrape.number("missing_bytes"), of("pages_missing") * 4096.0);
    assert_eq!(scrape.number("resident_bytes"), 40.0 * 4096.0);
    assert_eq!(scrape.number("sessions_started"), 1.0);
    assert_eq!((scrape.number("takeovers"), scrape.sum("sessions_ended")), (0.0, 0.0));

    let stalls = scrape.histogram("stall_seconds", "");
    let cumulative = summary["stall_buckets"].as_array().unwrap().iter().scan(0, |sum, count| {
        *sum += count.as_u64().unwrap();
        Some(*sum)
    });
    let counts: Vec<u64> = cumulative.collect();
    let scraped: Vec<_> = stalls.buckets.iter().map(|bucket| bucket.count.as_f64()).collect();
    assert_eq!(scraped, counts.iter().map(|count| *count as f64).collect::<Vec<_>>());
    let (sum, longest) = (stalls.sum.unwrap().as_f64(), of("stall_max_us") / 1e6);
    assert!(sum > 0.0 && sum <= 40.0 * longest * 1.01, "{sum} s, {longest} s at most");

    let session = &page["sessions"][0];
    for key in ["session", "peer_pid", "faults", "pages_demand", "bytes_read", "stall_p99_us"] {
        assert_eq!(session[key], summary[key], "{key}");
    }
    assert_eq!(session["resident_bytes"], 40 * 4096);
    assert_eq!(session["fill"], "off");
    guest.touch(0..40);
}

#[test]
fn refusals_are_counted_by_limit() {
    if !have_userfaultfd() {
        return;
    }
    for (limits, reason) in
        [(["--max-sessions", "1"], "sessions"), (["--max-memory", "64K"], "memory")]
    {
        let served = Served::start(&limits);
        let guests = [(); 2].map(|()| Guest::connect(&served.path("pager.sock")));
        let refused = if reason == "memory" { 2.0 } else { 1.0 };
        eventually(reason, || Scrape::of(&served).labelled("refused", reason) == refused);
        assert_eq!(Scrape::of(&served).sum("refused"), refused, "{limits:?}");
        drop(guests);
        served.stop();
    }
}

#[test]
fn sessions_that_end_are_counted_by_how() {
    if !have_userfaultfd() {
        return;
    }
    let served = Served::start(&["--background-fill"]);
    let guests = [(); 2].map(|()| Guest::connect(&served.path("pager.sock")));
    guests.iter().for_each(|guest| guest.touch(7..9));
    eventually("both are filled", || {
        Scrape::of(&served).labelled("sessions_ended", "filled") == 2.0
    });
    let scrape = Scrape::of(&served);
    assert_eq!((scrape.number("sessions"), scrape.number("memory_bytes")), (0.0, 0.0));
    let report: Value = serde_json::from_slice(&served.stop().stdout).unwrap();
    let sessions = report["sessions"].as_array().unwrap();
    let all = |key: &str| sessions.iter().map(|of| of[key].as_f64().unwrap()).sum::<f64>();
    assert_eq!(scrape.labelled("installed_pages", "fill"), all("pages_fill"));
    assert_eq!(scrape.sum("faults"), all("faults"));
    assert_eq!(scrape.number("source_bytes"), all("bytes_read"));
    guests.iter().for_each(|guest| guest.touch(0..common::PAGES));
}

#[test]
fn the_endpoint_survives_its_worker_and_counts_the_takeover() {
    if !have_userfaultfd() {
        return;
    }
    let served = Served::start(&[]);
    let guest = Guest::connect(&served.path("pager.sock"));
    guest.touch(0..3);
    // Comes to the socket while nobody may be there to answer, and is answered.
    for takeovers in 1..=3 {
        served.kill_worker();
        let scrape = Scrape::of(&served);
        assert_eq!(scrape.number("takeovers"), f64::from(takeovers));
        assert!(scrape.number("unserved_seconds") > 0.0);
        eventually("the session is back", || Scrape::of(&served).number("sessions") == 1.0);
        let scrape = Scrape::of(&served);
        assert_eq!(scrape.number("sessions_taken_over"), 1.0);
        guest.touch(0..usize::try_from(10 * takeovers).unwrap());
        eventually("its faults", || Scrape::of(&served).sum("faults") >= 7.0);
    }
    served.stop();
}

#[test]
fn a_daemon_that_replaces_another_goes_on_at_its_endpoint() {
    if !have_userfaultfd() {
        return;
    }
    let mut served = Served::start(&[]);
    let guest = Guest::connect(&served.path("pager.sock"));
    guest.touch(0..3);
    let before = Scrape::of(&served).number("worker_start_time_seconds");
    served.replace();
    let scrape = Scrape::of(&served);
    assert!(scrape.number("worker_start_time_seconds") > before);
    eventually("the session is back", || Scrape::of(&served).number("sessions") == 1.0);
    guest.touch(0..6);
    served.stop();
}

#[test]
fn hostile_scrapers_delay_nobody() {
    if !have_userfaultfd() {
        return;
    }
    let served = Served::start(&[]);
    let guest = Guest::connect(&served.path("pager.sock"));
    let connect = || UnixStream::connect(served.path("metrics.sock")).unwrap();
    eventually("the session", || Scrape::of(&served).number("sessions") == 1.0);
    let first = Scrape::of(&served);

    // More than there are places, all of which could be held for 5 s: silent ones,
    // ones in the middle of a request, ones that take no answer.
    let mut held = Vec::new();
    for round in 0..12 {
        for what in ["", "GET /metrics HTTP/1.1\r\nA: ", "GET /metrics HTTP/1.1\r\n\r\n"] {
            held.extend((0..20).map(|_| {
                let mut peer = connect();
                // It may have had to make way already.
                let _ = peer.write_all(what.as_bytes());
                peer
            }));
        }
        assert_eq!(Scrape::of(&served).number("sessions"), 1.0, "round {round}");
        guest.touch(round..round + 1);
    }
    // A header of 1 MiB: refused, however much of it is taken.
    let mut long = connect();
    long.set_read_timeout(Some(PATIENCE)).unwrap();
    long.set_write_timeout(Some(PATIENCE)).unwrap();
    let _ = long.write_all(b"GET /metrics HTTP/1.1\r\nA: ");
    let _ = long.write_all(&vec![b'a'; 1 << 20]);
    let mut answer = [0; 12];
    long.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 431");
    for (request, status) in [
        ("\x16\x03\x01\x02\0\r\n\r\n", "400"),
        ("GET /metrics HTTP/9.9\r\n\r\n", "400"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
        ("GET /../etc/passwd HTTP/1.1\r\n\r\n", "404"),
    ] {
        let (head, _) = served.ask(request);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {head}");
    }
    let (head, body) = served.ask("HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && body.is_empty(), "{head}{body}");

    let worker = served.worker().unwrap();
    let open = std::fs::read_dir(format!("/proc/{worker}/fd")).unwrap().count();
    assert!(open < 150, "{open} descriptors, {} peers", held.len());
    let last = Scrape::of(&served);
    let begun = "worker_start_time_seconds";
    assert_eq!(first.number(begun), last.number(begun), "the same worker");
    served.stop();
}

#[test]
fn endpoints_that_cannot_be_had_are_refused_by_name_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let memory = dir.path().join("memory");
    std::fs::write(&memory, [7; 8192]).unwrap();
    let serve = |metrics: &str| {
        let output = Command::new(VMPAGER)
            .args(["serve", "--metrics", metrics, "--memory"])
            .arg(&memory)
            .arg("--socket")
            .arg(dir.path().join("pager.sock"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let no_dir = format!("unix:{}", dir.path().join("no/metrics.sock").display());
    let no_socket = format!("unix:{}", memory.display());
    for (metrics, code, words) in [
        ("9464", 2, vec!["\"9464\"", "127.0.0.1:9464", "unix:PATH"]),
        ("unix:", 2, vec!["unix:PATH"]),
        (&taken, 1, vec![&taken[..], "another port"]),
        ("192.0.2.1:9464", 1, vec!["192.0.2.1:9464", "ip address"]),
        (&no_dir, 1, vec!["does not exist", "create"]),
        (&no_socket, 1, vec!["no socket", "another path"]),
    ] {
        let (status, text) = serve(metrics);
        assert_eq!(status, Some(code), "{metrics}: {text}");
        for word in words {
            assert!(text.contains(word), "{metrics}: {text:?} does not say {word:?}");
        }
    }
}

#[test]
fn a_tcp_endpoint_says_where_it_is_and_answers_curl() {
    let dir = tempfile::tempdir().unwrap();
    let memory = dir.path().join("memory");
    std::fs::write(&memory, [7; 8192]).unwrap();
    let log = dir.path().join("log");
    let mut child = Command::new(VMPAGER)
        .args(["serve", "--metrics", "[::1]:0", "--memory"])
        .arg(&memory)
        .arg("--socket")
        .arg(dir.path().join("pager.sock"))
        .stdin(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut at = None;
    eventually("its address", || {
        let log = std::fs::read_to_string(&log).unwrap();
        let line = log.lines().find(|line| line.contains("metrics are shown"));
        at = line.and_then(|line| line.split("at=").nth(1)).map(|at| at.trim().to_owned());
        at.is_some() || log.contains("Cannot assign") || log.contains("no such address")
    });
    if let Some(at) = at {
        let request = "GET /metrics?x=y HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n";
        let (head, body) = ask(TcpStream::connect(at).unwrap(), request);
        assert!(head.contains("application/openmetrics-text; version=1.0.0"), "{head}");
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
        assert!(body.ends_with("# EOF\n"));
        common::kill(child.id(), rustix::process::Signal::TERM);
    } else {
        vmpager_testing::skipped("no IPv6 loopback");
    }
    child.wait().unwrap();
}

/// Each metric has its row in the table, and each row its metric.
#[test]
fn every_metric_is_documented() {
    if !have_userfaultfd() {
        return;
    }
    let served = Served::start(&[]);
    let text = served.get("/metrics");
    served.stop();
    let shown: BTreeSet<(String, String)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect();
    let documented: BTreeSet<(String, String)> = include_str!("../../../docs/metrics.md")
        .lines()
        .filter(|line| line.starts_with("| `vmpager_"))
        .map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let name = cells.next().unwrap().trim_matches('`').split('{').next().unwrap();
            (name.to_owned(), cells.next().unwrap().to_owned())
        })
        .collect();
    assert_eq!(shown, documented);
}
