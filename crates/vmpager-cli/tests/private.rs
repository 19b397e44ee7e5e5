//! `vmpager vm run --private-memory` and `vmpager bench convert`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Output};

use serde_json::Value;

fn vmpager(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmpager")).args(args).output().unwrap()
}

/// What it prints as JSON; `None` without KVM.
fn json(args: &[&str]) -> Option<Value> {
    let output = vmpager(args);
    let error = String::from_utf8_lossy(&output.stderr);
    if error.contains("/dev/kvm") {
        vmpager_testing::skipped(&error);
        return None;
    }
    assert!(output.status.success(), "{args:?}: {error}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

const RUN: [&str; 5] = ["vm", "run", "--guest", "builtin", "--memory"];

#[test]
fn a_guest_converts_its_pages_and_finds_every_byte() {
    for place in ["--private-memory", "--private-memory=in-place"] {
        let more = ["16M", "--vcpus", "2", "--conversions", "30", "--json", place];
        let Some(report) = json(&[&RUN[..], &more].concat()) else { return };
        let conversions = &report["conversions"];
        for (key, wanted) in [("conversions", 60), ("mismatches", 0), ("host_mismatches", 0)] {
            assert_eq!(conversions[key], wanted, "{key}: {report:#}");
        }
        assert_eq!(report["mismatches"], 0, "{report:#}");
        eprintln!("by {}", conversions["backend"]);
    }
}

/// What is logged comes to the page, with what it was and what came of it.
#[test]
fn the_log_of_conversions_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let [log, html] = ["log.json", "log.html"].map(|name| dir.path().join(name));
    let (log, html) = (log.to_str().unwrap(), html.to_str().unwrap());
    let more = ["16M", "--conversions", "30", "--json", "--private-memory=in-place"];
    let run = [&RUN[..], &more, &["--conversions-json", log]].concat();
    if json(&run).is_none() {
        return;
    }
    let logged: Value = serde_json::from_slice(&std::fs::read(log).unwrap()).unwrap();
    let latest = logged["latest"].as_array().unwrap();
    assert_eq!(logged["explicit"], 30, "{logged:#}");
    assert!(!latest.is_empty() && latest.iter().all(|each| each["outcome"] == "done"));
    let reported = json(&["report", html, "--conversions-json", log, "--json"]).unwrap();
    assert_eq!(reported["conversions"], latest.len());
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.contains("30 conversions were asked for by hypercalls"), "{page}");
    assert_eq!(page.matches("<td>hypercall<td>0x").count(), latest.len());

    std::fs::write(log, "{\"latest\": []}").unwrap();
    let refused = vmpager(&["report", html, "--conversions-json", log]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{error}");
    assert!(error.contains("no JSON of conversions") && error.contains("vm run"), "{error}");
}

#[test]
fn a_range_of_sizes_is_measured_against_the_bare_calls() {
    let small = ["--conversions", "4", "--rounds", "1", "--faults", "200", "--json"];
    let Some(report) = json(&[&["bench", "convert"][..], &small].concat()) else { return };
    let rows = report["rows"].as_array().unwrap();
    let sizes: Vec<_> = rows.iter().take(5).map(|row| row["bytes"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [4096, 65_536, 524_288, 2 << 20, (2 << 20) + 4096]);
    for row in rows {
        for key in ["conversion_us", "bare_us", "ratio_bare", "others_p99_us", "ratio_others"] {
            assert!(row[key].as_f64().is_some_and(|number| number > 0.0), "{key}: {row}");
        }
    }
    let never = report["never_converting"].as_array().unwrap();
    assert!(!never.is_empty());
    for row in never {
        for key in ["kfaults_s", "plain_memfd_kfaults_s", "plain_anonymous_kfaults_s"] {
            assert!(row[key].as_f64().is_some_and(|number| number > 0.0), "{key}: {row}");
        }
    }
}

#[test]
fn options_that_need_each_other_are_told() {
    for args in [
        &["vm", "run", "--guest", "builtin", "--preserve"][..],
        &["vm", "run", "--guest", "builtin", "--private-memory", "--most-pages", "514"],
        &["vm", "run", "--kernel", "none", "--private-memory"],
    ] {
        assert_eq!(vmpager(args).status.code(), Some(2), "{args:?}");
    }
}
