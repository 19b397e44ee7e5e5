//! `vmpager report`: what is in the page, and that nothing else is.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{Guest, Served, VMPAGER, eventually, have_userfaultfd};
use serde_json::{Value, json};

fn report(args: &[&str]) -> Output {
    Command::new(VMPAGER).arg("report").args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Tags are closed in the order in which they were opened, no attribute is odd, and
/// there is nothing that runs or loads. Returns the text between the tags.
fn check(page: &str) -> String {
    // HTML leaves these open.
    const OPEN: [&str; 6] = ["!DOCTYPE", "meta", "th", "td", "h1", "p"];
    const KNOWN: [&str; 16] = [
        "html", "head", "title", "style", "body", "section", "h2", "h3", "table", "tr", "svg",
        "rect", "text", "h1", "p", "a",
    ];
    let (mut stack, mut said, mut rest) = (Vec::new(), String::new(), page);
    while let Some((before, after)) = rest.split_once('<') {
        said.push_str(before);
        let (tag, after) = after.split_once('>').unwrap();
        rest = after;
        let name = tag.trim_start_matches('/').split([' ', '\n']).next().unwrap();
        if let Some(closed) = tag.strip_prefix('/') {
            if !OPEN.contains(&closed) {
                assert_eq!(stack.pop(), Some(closed), "{before:?}");
            }
        } else if !tag.ends_with('/') && !OPEN.contains(&name) {
            assert!(KNOWN.contains(&name), "an unknown tag: <{tag}>");
            stack.push(name);
        }
        let attributes = tag.to_ascii_lowercase().replace("http://www.w3.org/2000/svg", "");
        for word in ["http:", "https:", "src=", "href", "url(", " on", "script"] {
            let harmless = word == " on" && !attributes.contains(" on=");
            let policy = attributes.contains("content-security-policy");
            assert!(!attributes.contains(word) || harmless || policy, "<{tag}>");
        }
    }
    assert!(stack.is_empty(), "{stack:?}");
    said + rest
}

#[test]
fn a_run_is_drawn_with_what_its_session_counted() {
    if !have_userfaultfd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (metrics, profile) = (at("run.json"), at("run.vmprof"));
    let options = ["--metrics-json", text(&metrics), "--record", text(&profile)];
    let served = Served::start(&options);
    let guest = Guest::connect(&served.path("pager.sock"));
    guest.touch(0..40);
    eventually("all are counted", || served.get("/sessions.json").contains("\"pages_demand\":40"));
    fs::write(at("now.json"), served.get("/sessions.json")).unwrap();
    served.stop();

    let html = at("run.html");
    let args = [text(&html), "--metrics-json", text(&metrics), "--profile", text(&profile)];
    let output = report(&[&args[..], &["--json"]].concat());
    assert!(output.status.success(), "{output:?}");
    let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&outcome["sessions"], &outcome["profile_pages"]), (&json!(1), &json!(40)));
    let page = fs::read_to_string(&html).unwrap();
    assert_eq!(outcome["bytes"].as_u64().unwrap(), page.len() as u64);
    let said = check(&page);
    for part in [
        "Addresses over time",
        "40 pages of 1.00 MiB",
        "demanded 160.00 KiB",
        "160.00 KiB in place or given back, 864.00 KiB still missing",
        "0 pages came before anybody asked; for 40 somebody had to wait",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    // Each stall is in a bar of its bucket.
    let summary: Value = serde_json::from_slice(&fs::read(&metrics).unwrap()).unwrap();
    for count in summary["sessions"][0]["stall_buckets"].as_array().unwrap() {
        assert!(page.contains(&format!("<title>{count} stalls of ")), "{count}");
    }
    assert_eq!(page.matches(" stalls of ").count(), 22);

    // A session that goes on, and nothing of a profile.
    let output = report(&[text(&html), "--metrics-json", text(&at("now.json")), "--session", "1"]);
    assert!(output.status.success(), "{output:?}");
    let said = check(&fs::read_to_string(&html).unwrap());
    assert!(said.contains("goes on") && !said.contains("Addresses over time"), "{said}");
    // Nothing is left beside it.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
}

/// Sessions as a file may have them that somebody else made.
fn hostile() -> Value {
    json!({"sessions": [{
        "session": u64::MAX, "peer_pid": -1,
        "reason": {"failed": "</td><script>alert(1)</script><img src=x onerror='a' \u{1b}[2J \"&"},
        "regions": 1, "memory_bytes": 0, "page_bytes": u64::MAX, "faults": u64::MAX,
        "faults_exit": u64::MAX, "faults_joined": 0, "faults_confirmed": 0, "retries": 0,
        "pages_demand": u64::MAX, "pages_neighbour": u64::MAX, "pages_fill": u64::MAX,
        "pages_profile": u64::MAX, "pages_zero": 1, "pages_removed": 0, "pages_poisoned": 0,
        "pages_missing": u64::MAX, "bytes_read": u64::MAX, "stall_p50_us": -1e308,
        "stall_p99_us": 1e308, "stall_max_us": 0.0, "duration_ms": -0.0, "fill_ms": null,
        "stall_buckets": vec![u64::MAX; 500],
    }]})
}

#[test]
fn what_comes_from_outside_stays_text() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a&<b>'\".json");
    let html = dir.path().join("x.html");
    fs::write(&file, hostile().to_string()).unwrap();
    let output = report(&[text(&html), "--metrics-json", text(&file)]);
    assert!(output.status.success(), "{output:?}");
    let page = fs::read_to_string(&html).unwrap();
    let said = check(&page);
    assert!(said.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "{said}");
    assert!(!page.contains('\u{1b}') && !page.contains("NaN") && !page.contains("inf"), "{page}");
    assert_eq!(page.matches(" stalls of ").count(), 22, "not of buckets that there are not");
}

#[test]
fn what_cannot_be_drawn_is_told_by_name_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let html = at("x.html");
    fs::write(at("other"), "{\"a\": 1}").unwrap();
    fs::write(at("one"), hostile().to_string()).unwrap();
    let (other, one, absent) = (at("other"), at("one"), at("absent"));
    for (args, code, words) in [
        (vec![], 2, vec!["--metrics-json", "--profile"]),
        (vec!["--metrics-json", text(&absent)], 1, vec!["absent", "No such file"]),
        (vec!["--metrics-json", text(&other)], 1, vec!["other", "vmpager serve --metrics-json"]),
        (vec!["--profile", text(&other)], 1, vec!["other", "profile"]),
        (vec!["--metrics-json", text(&one), "--session", "7"], 1, vec!["no session 7"]),
    ] {
        let output = report(&[&[text(&html)], &args[..]].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{args:?}: {said:?} does not say {word:?}");
        }
        assert!(!html.exists());
    }
    let output = report(&["/no/such/x.html", "--metrics-json", text(&one)]);
    assert_eq!(output.status.code(), Some(1));
    let help = String::from_utf8(report(&["--help"]).stdout).unwrap();
    assert!(help.contains("Example") && help.contains("--json"), "{help}");
}
