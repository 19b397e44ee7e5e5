//! `vmpager profile`, `serve --profile` and `pack --profile` as their user meets
//! them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Guest, Served, eventually};
use serde_json::Value;
use tempfile::TempDir;
use vmpager_vm::{Filling, SnapshotPaths, Vm, VmConfig};

const VMPAGER: &str = env!("CARGO_BIN_EXE_vmpager");

/// A directory with the snapshot of a small built-in guest.
struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        let dir = Self(TempDir::new().unwrap());
        let filling = Filling::Generated { seed: 1, bytes: None };
        let config = VmConfig { memory_bytes: 16 << 20, filling, ..VmConfig::default() };
        let mut vm = Vm::build(&config).unwrap();
        vm.prepare().unwrap();
        vm.snapshot(&dir.snapshot()).unwrap();
        dir
    }

    fn snapshot(&self) -> SnapshotPaths {
        SnapshotPaths::in_dir(self.0.path())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn mem(&self) -> String {
        self.snapshot().memory.to_string_lossy().into_owned()
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(VMPAGER);
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn refusal(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        stderr(&output)
    }

    fn start(&self, args: &[&str]) -> Child {
        let child = Command::new(VMPAGER)
            .args(args)
            .current_dir(self.0.path())
            .env("VMPAGER_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while !self.path("sock").exists() {
            assert!(Instant::now() < until, "the socket did not appear");
            std::thread::sleep(Duration::from_millis(2));
        }
        child
    }

    /// Restores the guest over the socket, which touches pages by that seed.
    fn guest(&self, touches: &str, seed: &str) {
        let (state, memory) = (self.snapshot().state, self.mem());
        let output = self.run(&[
            "vm-process",
            "--restore",
            "pager",
            "--state",
            &state.to_string_lossy(),
            "--memory",
            &memory,
            "--socket",
            "sock",
            "--cpu",
            "threads",
            "--touches",
            touches,
            "--seed",
            seed,
            "--started-ns",
            "1",
        ]);
        assert!(output.status.success(), "{}", stderr(&output));
        let outcome: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&outcome["mismatches"], outcome["pages"].to_string()),
            (&0.into(), touches.into())
        );
    }

    /// One session of `serve`.
    fn session(&self, more: &[&str], touches: &str, seed: &str) -> Value {
        let args = [&["serve", "--socket", "sock", "--once", "--json"], more].concat();
        let pager = self.start(&args);
        self.guest(touches, seed);
        let output = pager.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["sessions"][0].clone()
    }

    fn record(&self, output: &str, touches: &str, seed: &str) -> Value {
        let memory = self.mem();
        let args = ["profile", "record", "--socket", "sock", "--memory", &memory];
        let pager = self.start(&[&args[..], &["--output", output, "--json"]].concat());
        self.guest(touches, seed);
        let output = pager.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

fn can_serve() -> bool {
    let can = vmpager_sys::probe::host().userfaultfd.kernel_mode();
    if !can {
        vmpager_testing::skipped("no userfaultfd for kernel-mode faults");
    }
    can
}

#[test]
fn a_profile_is_recorded_shown_packed_by_replayed_and_added_to() {
    if !can_serve() {
        return;
    }
    let dir = Dir::new();
    let recorded = dir.record("p", "500", "7");
    let pages = number(&recorded["pages"]);
    assert!(pages >= 500, "{recorded}");
    assert_eq!((&recorded["sessions"], &recorded["pages_always"]), (&1.into(), &pages.into()));

    let shown = dir.run(&["profile", "show", "p", "--svg", "p.svg"]);
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(text.contains(&format!("{pages} pages")) && text.contains('█'), "{text}");
    let svg = fs::read_to_string(dir.path("p.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.contains("fill-opacity"));

    let memory = dir.mem();
    let plain = dir.json(&["image", "pack", &memory, "plain"]);
    let packed = dir.json(&["image", "pack", &memory, "hot", "--profile", "p"]);
    assert_eq!(packed["content"], plain["content"]);
    assert_eq!(packed["stored_pages"], plain["stored_pages"]);

    for from in [["--memory", &memory], ["--image", "hot"]] {
        let plain = dir.session(&from, "500", "7");
        let from = [&from[..], &["--profile", "p", "--record", "more"]].concat();
        let session = dir.session(&from, "500", "7");
        assert!(number(&session["pages_profile"]) > 0, "{session}");
        assert!(number(&session["faults"]) < number(&plain["faults"]) / 2, "{session}");
        assert_eq!(session["profile_missed"], 0, "{session}");
    }
    // Other work: what the profile lacks is said, and learnt.
    let learning = ["--image", "hot", "--profile", "more", "--record", "more"];
    let waited_for = number(&dir.json(&["profile", "show", "more"])["pages"]);
    assert!(waited_for < pages / 2, "{waited_for} of {pages} were waited for all the same");
    dir.json(&["profile", "merge", "p", "more", "--output", "more"]);
    let session = dir.session(&learning, "300", "8");
    let missed = number(&session["profile_missed"]);
    assert!(missed > 0, "{session}");
    let learnt = dir.json(&["profile", "show", "more"]);
    assert!(number(&learnt["pages"]) > pages, "{learnt}");
    assert_eq!(learnt["sessions"], 4);
}

#[test]
fn profiles_of_other_memory_and_damaged_ones_are_refused() {
    if !can_serve() {
        return;
    }
    let dir = Dir::new();
    dir.record("p", "50", "7");
    let memory = dir.mem();
    let mut other = fs::read(&memory).unwrap();
    other.iter_mut().for_each(|byte| *byte ^= 1);
    fs::write(dir.path("other"), &other).unwrap();
    fs::write(dir.path("small"), &other[..8192]).unwrap();
    for (memory, word) in [("other", "contents differ"), ("small", "8192")] {
        for args in [
            vec!["serve", "--socket", "sock", "--memory", memory, "--profile", "p"],
            vec!["serve", "--socket", "sock", "--memory", memory, "--record", "p"],
            vec!["image", "pack", memory, "image", "--profile", "p"],
        ] {
            let error = dir.refusal(&args);
            assert!(error.contains(word) && error.contains("profile record"), "{error}");
        }
    }
    assert!(!Path::new("image").exists());
    let mut bytes = fs::read(dir.path("p")).unwrap();
    bytes[100] ^= 1;
    fs::write(dir.path("bad"), &bytes).unwrap();
    assert!(dir.refusal(&["profile", "show", "bad"]).contains("damaged"));
    assert!(dir.refusal(&["profile", "show", "other"]).contains("no profile"));
    assert!(dir.refusal(&["profile", "show", "absent"]).contains("absent"));
    assert!(dir.refusal(&["profile", "merge", "p", "bad", "--output", "x"]).contains("bad"));
    assert!(!dir.path("x").exists());
}

#[test]
fn every_command_teaches_by_its_help() {
    let dir = TempDir::new().unwrap();
    for command in ["record", "show", "merge"] {
        let mut run = Command::new(VMPAGER);
        let output = run.args(["profile", command, "--help"]).current_dir(&dir).output().unwrap();
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && help.contains("Example"), "{command}: {help}");
        assert!(help.contains("--json"), "{command}");
    }
}

/// A profile that is half replayed when its worker is killed: the next one brings the
/// rest, gives no memory to what was given back, and goes on learning.
#[test]
fn a_killed_workers_replay_and_learning_go_on() {
    if !can_serve() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let (known, more) = (at("known"), at("more"));
    let profile = |path: &str| {
        let show = ["profile", "show", path, "--json"];
        let output = Command::new(VMPAGER).args(show).output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_default()
    };
    let served = Served::start(&["--record", &known]);
    let guest = Guest::connect(&served.path("pager.sock"));
    guest.touch(0..200);
    served.stop();
    drop(guest);
    assert_eq!(profile(&known)["pages"], 200);

    // It takes some seconds.
    let more_args = ["--profile", &known, "--record", &more, "--bandwidth", "128K"];
    let served = Served::start(&more_args);
    let session = || {
        let page: Value = serde_json::from_str(&served.get("/sessions.json")).unwrap();
        page["sessions"][0].clone()
    };
    let guest = Guest::connect(&served.path("pager.sock"));
    eventually("a part of the profile", || session()["pages_profile"].as_u64() > Some(8));
    guest.touch(240..244);
    guest.give_back(150..160);
    guest.touch_zero(150);
    served.kill_worker();
    eventually("the rest of it", || session()["profile_ms"].is_number());
    let after = session();
    let brought = number(&after["pages_profile"]);
    assert!(brought > 0 && brought < 190 && after["profile_missed"] == 0, "{after}");
    let zeroes = number(&after["pages_zero"]);
    assert_eq!(zeroes, 0, "{zeroes} pages that were given back have memory: {after}");
    // All of the profile is there; other pages are waited for, and learnt.
    guest.touch(0..150);
    guest.touch(160..240);
    let faults = number(&session()["faults"]);
    assert!((40..50).contains(&faults), "{faults} faults on 40 pages");
    guest.touch(244..256);
    served.stop();
    drop(guest);
    // What the killed worker had noted ended with it.
    let learnt = profile(&more);
    assert_eq!((&learnt["pages"], &learnt["sessions"]), (&52.into(), &1.into()), "{learnt}");
}

/// The way that `bench restore` goes with profiles and layers: each byte right.
#[test]
fn restores_by_profiles_and_layers_are_measured() {
    if !can_serve() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let modes = "mmap,on-demand+profile,on-demand+wrong,packed+profile,layered";
    let output = Command::new(VMPAGER)
        .args(["bench", "restore", "--memory", "24M", "--touches", "1500", "--rounds", "1"])
        .args(["--cpu", "threads", "--modes", modes, "--json"])
        .current_dir(&dir)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 10, "{report}");
    for row in rows {
        assert!(row["workload_ms"].as_f64().unwrap() > 0.0, "{row}");
    }
}

/// The golden profile is a trace like any other.
#[test]
fn bench_prefetch_takes_profiles_as_traces() {
    let trace =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../vmpager-store/tests/golden/two-sessions.vmprof");
    let bench = |more: &[&str]| {
        let output = Command::new(VMPAGER)
            .args(["bench", "prefetch", "--trace", trace, "--json"])
            .args(more)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    for more in [&[][..], &["--latency-us", "300"]] {
        let report = bench(more);
        let rows = report["rows"].as_array().unwrap();
        let row = |policy: &str| rows.iter().find(|row| row["policy"] == policy).unwrap();
        let touches = row("off")["touches"].as_u64().unwrap();
        assert!(touches > 0 && row("off")["waits"] == touches && row("off")["ratio_off"] == 1.0);
        for policy in ["adaptive", "stride", "mixed", "profile", "fill"] {
            let of = |key: &str| row(policy)[key].as_u64().unwrap();
            assert_eq!(of("used") + of("waits"), touches, "{policy}: each came or was waited for");
        }
    }
    let one = bench(&["--policies", "stride"]);
    assert_eq!(
        (one["rows"].as_array().unwrap().len(), &one["rows"][0]["ratio_off"]),
        (1, &Value::Null)
    );
}
