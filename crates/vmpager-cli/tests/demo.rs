//! `vmpager demo` and the benchmarks, small, by their JSON.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Stdio};

use serde_json::Value;

const VMPAGER: &str = env!("CARGO_BIN_EXE_vmpager");

/// The JSON a command printed; `None`, with a line that says so, if this host
/// has no userfaultfd that sees the kernel's own accesses.
fn json(args: &[&str]) -> Option<Value> {
    if !vmpager_sys::probe::host().userfaultfd.kernel_mode() {
        vmpager_testing::skipped("no userfaultfd for kernel-mode faults");
        return None;
    }
    let output = Command::new(VMPAGER).args(args).stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

fn check_demo(report: &Value, vm: &str) {
    assert_eq!(report["vm"], vm);
    assert_eq!(report["memory_bytes"], 32 << 20);
    assert_eq!(report["mismatches"], 0);
    // Guest and host, four times, nearly all of 8192 pages each.
    assert!(report["pages_verified"].as_u64().unwrap() > 8 * 8000);
    let runs = report["runs"].as_array().unwrap();
    let modes: Vec<&str> = runs.iter().map(|run| run["mode"].as_str().unwrap()).collect();
    assert_eq!(modes, ["eager", "mmap", "on-demand", "on-demand+fill"]);
    for run in runs {
        let number = |key: &str| run[key].as_f64().unwrap_or_else(|| panic!("{key} in {run}"));
        assert!(number("first_instruction_ms") > 0.0);
        assert!(number("workload_ms") > number("first_instruction_ms"));
        assert!(number("p50_us") <= number("p99_us") && number("p99_us") <= number("max_us"));
    }
    let faults = |run: usize| runs[run]["faults"].as_u64().unwrap();
    assert!(faults(2) > 0, "the pager served no fault");
    assert!(runs[3]["full_ms"].as_f64().unwrap() > 0.0);
}

/// Holes of the file, a third of it, are not read.
fn check_holes(report: &Value) {
    assert!(report["runs"][2]["bytes_read"].as_u64().unwrap() < (32 << 20) * 8 / 10);
}

#[test]
fn demo_on_host_threads_finds_every_page_right() {
    let Some(report) = json(&["demo", "--memory", "32M", "--cpu", "threads", "--json"]) else {
        return;
    };
    check_demo(&report, "threads");
    check_holes(&report);
}

/// Where many machines have their temporary files. Reading a hole there leaves
/// nothing in the page cache; touching it in a mapping, as the VM does, fills it.
#[test]
fn demo_runs_on_tmpfs() {
    let args = ["demo", "--memory", "32M", "--cpu", "threads", "--dir", "/dev/shm", "--json"];
    let Some(report) = json(&args) else { return };
    check_demo(&report, "threads");
}

#[test]
fn demo_on_kvm_finds_every_page_right() {
    if let Err(error) = vmpager_kvm::probe::kvm() {
        vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
        return;
    }
    let Some(report) = json(&["demo", "--memory", "32M", "--cpu", "kvm", "--json"]) else { return };
    check_demo(&report, "kvm");
    check_holes(&report);
}

#[test]
fn demo_tells_a_person_what_it_does() {
    if !vmpager_sys::probe::host().userfaultfd.kernel_mode() {
        vmpager_testing::skipped("no userfaultfd for kernel-mode faults");
        return;
    }
    let output = Command::new(VMPAGER).args(["demo", "--memory", "16M"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for word in ["userfaultfd", "vCPU", "snapshot", "on-demand+fill", " 0 mismatches"] {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
    assert!(output.stderr.is_empty(), "no progress in a pipe");
}

#[test]
fn bench_fault_has_the_keys_it_promises() {
    let args = ["bench", "fault", "--memory", "4M", "--fill", "8M", "--rounds", "1", "--json"];
    let Some(report) = json(&args) else { return };
    let threads = report["threads"].as_array().unwrap();
    let n: Vec<u64> = threads.iter().map(|row| row["n"].as_u64().unwrap()).collect();
    assert_eq!(n, [1, 2, 4, 8]);
    for key in [
        "floor_p50_us",
        "vmpager_p50_us",
        "p50_ratio",
        "floor_kfaults_s",
        "vmpager_kfaults_s",
        "rate_ratio",
    ] {
        assert!(threads.iter().all(|row| row[key].as_f64().unwrap() > 0.0), "{key}");
    }
    for key in ["copy_2m_ms", "vmpager_ms", "ratio", "max_touch_us"] {
        assert!(report["fill"][key].as_f64().unwrap() > 0.0, "{key}");
    }
}

/// VMs of two processes, whose worker is killed meanwhile: they check what they find.
#[test]
fn bench_sessions_has_the_keys_it_promises() {
    let args = ["bench", "sessions", "--sessions", "1,70", "--memory", "64M", "--busy-ms", "20"];
    let more = ["--idle-ms", "20", "--rounds", "1", "--kill", "--keeper", "--json"];
    let Some(report) = json(&[&args[..], &more].concat()) else { return };
    for key in ["kept_p50_us", "alone_p50_us", "ratio", "page_map_ns"] {
        assert!(report["keeper"][key].as_f64().unwrap() > 0.0, "{key}");
    }
    let rows = report["rows"].as_array().unwrap();
    for (row, sessions) in rows.iter().zip([1, 70]) {
        assert_eq!(row["sessions"], sessions);
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        assert!(number("kfaults_s") > 0.0 && number("rate_ratio") > 0.0);
        assert!(number("p50_us") <= number("p99_us"));
        assert!(number("fairness") > 0.0 && number("fairness") <= 1.0, "{row}");
        assert!(number("rss_mib") > 0.0 && number("takeover_ms") > 0.0, "{row}");
        assert!(row["idle_cpu_pct"].is_number(), "{row}");
    }
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0]["rate_ratio"], 1.0);
    assert!(rows[0]["session_kib"].is_null() && rows[1]["session_kib"].is_number());
}

#[test]
fn bench_exit_has_the_keys_it_promises() {
    let kvm = match vmpager_kvm::probe::kvm() {
        Ok(kvm) => kvm,
        Err(error) => {
            vmpager_testing::skipped(&format!("no /dev/kvm ({error})"));
            return;
        }
    };
    let args = ["bench", "exit", "--memory", "4M", "--rounds", "1", "--json"];
    let Some(report) = json(&args) else { return };
    let is_positive = |value: &Value| value.as_f64().is_some_and(|number| number > 0.0);
    assert!(is_positive(&report["exit_us"]), "{report:#}");
    for key in ["exit_us", "uffd_us", "measured_in_ms"] {
        assert!(is_positive(&report["auto"][key]), "{key}: {report:#}");
    }
    let share = report["auto"]["exit_share"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&share), "{share}");
    let rows = report["rows"].as_array().unwrap();
    let cells: Vec<_> = rows.iter().map(|row| (&row["lapic"], &row["vcpus"])).collect();
    assert_eq!(cells.len(), if kvm.irqchip { 8 } else { 4 }, "{cells:?}");
    for row in rows {
        for key in [
            "uffd_kfaults_s",
            "oracle_kfaults_s",
            "view_kfaults_s",
            "auto_kfaults_s",
            "ratio_view_uffd",
            "ratio_view_oracle",
            "ratio_auto_best",
        ] {
            assert!(is_positive(&row[key]), "{key}: {row}");
        }
        for key in
            ["attributes_kfaults_s", "attributes_oracle_kfaults_s", "ratio_attributes_oracle"]
        {
            assert_eq!(is_positive(&row[key]), kvm.exact_memory_faults(), "{key}: {row}");
        }
        assert!(row["fallback_share"].as_f64().is_some(), "{row}");
    }
}

#[test]
fn bench_restore_compares_with_mmap_and_the_naive_handler() {
    let args = [
        "bench",
        "restore",
        "--memory",
        "16M",
        "--touches",
        "1000",
        "--rounds",
        "1",
        "--cache",
        "warm",
        "--json",
    ];
    let Some(report) = json(&args) else { return };
    let rows = report["rows"].as_array().unwrap();
    let modes: Vec<&str> = rows.iter().map(|row| row["mode"].as_str().unwrap()).collect();
    let on_demand = ["on-demand", "on-demand+fill", "packed", "packed+fill"];
    let known = ["on-demand+profile", "on-demand+wrong", "packed+profile", "layered"];
    assert_eq!(modes.len(), 15, "{modes:?}");
    let others = ["naive", "mmap", "eager", "in-process+fill", "in-process+huge"];
    let remote = ["remote", "remote+profile"];
    for mode in others.iter().chain(&on_demand).chain(&known).chain(&remote) {
        assert!(modes.contains(mode), "no {mode} in {modes:?}");
    }
    for row in rows {
        assert_eq!(row["cache"], "warm");
        assert!(row["ratio_mmap"].as_f64().unwrap() > 0.0);
        assert!(row["ratio_naive"].as_f64().unwrap() > 0.0);
    }
    for row in rows.iter().filter(|row| row["mode"].as_str().unwrap().starts_with("on-demand")) {
        // 4 bits for each of 4096 pages, and 16 MiB.
        let rss = row["pager_rss_bytes"].as_f64().unwrap();
        assert!(rss < f64::from((16 << 20) + 2048), "the pager had {rss} bytes resident");
    }
    let faults = |mode: &str| {
        let row = rows.iter().find(|row| row["mode"] == mode).unwrap();
        row["faults"].as_f64().unwrap()
    };
    assert!(faults("on-demand") < faults("naive") / 2.0, "prefetch saved no faults");
}

#[test]
fn bench_restore_measures_several_sizes_of_sparse_memory() {
    let args = ["bench", "restore", "--memory", "16M,2G", "--filled", "4M", "--rounds", "1"];
    let rest = ["--cache", "warm", "--modes", "mmap,on-demand", "--json"];
    let Some(report) = json(&[&args[..], &rest].concat()) else { return };
    let rows = report["rows"].as_array().unwrap();
    let sizes: Vec<u64> = rows.iter().map(|row| row["memory_bytes"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [16 << 20, 16 << 20, 2 << 30, 2 << 30]);
    assert_eq!(report["touches"], 1024, "as many as there are");
    assert!(rows.iter().all(|row| row["first_instruction_ms"].as_f64().unwrap() > 0.0));
    let by_kvm = report["vm"] == "kvm";
    assert!(rows.iter().all(|row| row["memslot_ms"].as_f64().is_some_and(|ms| ms > 0.0) == by_kvm));
}

#[test]
fn bench_restore_takes_a_linux_guests_memory_where_linux_cannot_run() {
    if vmpager_kvm::probe::kvm().is_ok_and(|kvm| kvm.boots_linux()) {
        vmpager_testing::skipped("Linux guests run here, and are restored as such");
        return;
    }
    let dir = tempfile::TempDir::new().unwrap();
    let (state, memory) = (dir.path().join("state"), dir.path().join("memory"));
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/state_file/linux-file");
    std::fs::write(&state, &std::fs::read(corpus).unwrap()[1..]).unwrap();
    let bytes = b"a page of a kernel".repeat(100_000);
    std::fs::write(&memory, bytes).unwrap();
    let args =
        ["bench", "restore", "--rounds", "1", "--cache", "warm", "--modes", "mmap,on-demand"];
    let given = ["--state", state.to_str().unwrap(), "--memory-file", memory.to_str().unwrap()];

    let output = Command::new(VMPAGER).args(args).args(given).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("1800000 bytes"), "{error}");

    std::fs::File::options().write(true).open(&memory).unwrap().set_len(64 << 20).unwrap();
    let Some(report) = json(&[&args[..], &given, &["--json"]].concat()) else { return };
    assert_eq!(report["touches"], 16384, "every page of it");
    for row in report["rows"].as_array().unwrap() {
        assert_eq!(row["guest"], "built-in, with a Linux guest's memory");
    }
}
