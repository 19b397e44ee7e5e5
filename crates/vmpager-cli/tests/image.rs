//! `vmpager image` and `serve --image` as their user meets them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const VMPAGER: &str = env!("CARGO_BIN_EXE_vmpager");

/// A directory with a memory file of 300 pages: text, zeroes, duplicates.
struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        let dir = Self(TempDir::new().unwrap());
        fs::write(dir.path("mem"), memory(|_| false)).unwrap();
        dir
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `vmpager image`, in this directory.
    fn image(&self, args: &[&str]) -> Output {
        let mut command = Command::new(VMPAGER);
        command.arg("image").args(args).current_dir(self.0.path()).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.image(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        assert!(output.stderr.is_empty(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn refusal(&self, args: &[&str]) -> String {
        let output = self.image(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        stderr(&output)
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn memory(is_new: impl Fn(usize) -> bool) -> Vec<u8> {
    let page = |n: usize| match n {
        _ if is_new(n) => format!("{n} is new; ").repeat(600),
        100..200 => "\0".repeat(4096),
        200.. => "the same; ".repeat(500),
        _ => format!("page {n}; ").repeat(600),
    };
    (0..300).flat_map(|n| page(n).into_bytes()[..4096].to_vec()).collect()
}

#[test]
fn an_image_is_packed_shown_verified_and_unpacked() {
    let dir = Dir::new();
    let packed = dir.json(&["pack", "mem", "mem.vmimg"]);
    assert_eq!(packed["memory_bytes"], 300 * 4096);
    assert_eq!(packed["zero_pages"], 100);
    assert_eq!((&packed["stored_pages"], &packed["duplicate_pages"]), (&101.into(), &99.into()));
    assert!(packed["ratio"].as_f64().unwrap() < 0.1, "{packed}");
    assert_eq!(packed["image_bytes"], fs::metadata(dir.path("mem.vmimg")).unwrap().len());

    let inspected = dir.json(&["inspect", "mem.vmimg", "--svg", "mem.svg"]);
    assert_eq!(inspected["content"], packed["content"]);
    assert_eq!(inspected["distinct_pages"], 101);
    assert_eq!(inspected["layers"][0]["codec"], "zstd");
    let svg = fs::read_to_string(dir.path("mem.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    let text = dir.image(&["inspect", "mem.vmimg"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("duplicate") && text.contains('█') && text.contains('·'), "{text}");

    let verified = dir.json(&["verify", "mem.vmimg"]);
    assert_eq!(verified["damage"], Value::Array(Vec::new()));
    dir.json(&["unpack", "mem.vmimg", "back"]);
    assert_eq!(fs::read(dir.path("back")).unwrap(), memory(|_| false));
    assert!(dir.refusal(&["unpack", "mem.vmimg", "back"]).contains("--force"));
    assert!(dir.refusal(&["pack", "mem", "mem.vmimg"]).contains("--force"));
    dir.json(&["pack", "mem", "mem.vmimg", "--force", "--codec", "lz4", "--frame-size", "16K"]);
}

#[test]
fn layers_are_made_named_and_flattened() {
    let dir = Dir::new();
    dir.json(&["pack", "mem", "base.vmimg"]);
    let new = memory(|n| n % 50 == 7);
    fs::write(dir.path("new"), &new).unwrap();
    let layer = dir.json(&["diff", "base.vmimg", "new", "layer.vmimg"]);
    assert_eq!(layer["stored_pages"], 6);
    assert_eq!(dir.json(&["inspect", "layer.vmimg"])["layers"].as_array().unwrap().len(), 2);
    let flat = dir.json(&["flatten", "layer.vmimg", "flat.vmimg"]);
    assert_eq!(flat["content"], layer["content"]);
    // The same layer again, of an image.
    let same = dir.json(&["diff", "base.vmimg", "flat.vmimg", "same.vmimg", "--packed"]);
    assert_eq!(same["content"], layer["content"]);

    fs::create_dir(dir.path("away")).unwrap();
    fs::rename(dir.path("base.vmimg"), dir.path("away/base.vmimg")).unwrap();
    let error = dir.refusal(&["unpack", "layer.vmimg", "back"]);
    assert!(error.contains("base.vmimg") && error.contains("--parent"), "{error}");
    let error = dir.refusal(&["unpack", "layer.vmimg", "back", "--parent", "flat.vmimg"]);
    assert!(error.contains("flat.vmimg"), "{error}");
    dir.json(&["unpack", "layer.vmimg", "back", "--parent", "away/base.vmimg"]);
    assert_eq!(fs::read(dir.path("back")).unwrap(), new);
}

#[test]
fn damage_is_told_with_its_place() {
    let dir = Dir::new();
    dir.json(&["pack", "mem", "mem.vmimg"]);
    let mut file = fs::read(dir.path("mem.vmimg")).unwrap();
    file[100] ^= 4;
    fs::write(dir.path("mem.vmimg"), &file).unwrap();
    let output = dir.image(&["verify", "mem.vmimg", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let damage = &report["damage"][0];
    assert!(damage["what"].as_str().unwrap().contains("frame 0"), "{damage}");
    assert_eq!(damage["memory_bytes"][0], serde_json::json!([0, 65536]));
    let error = dir.refusal(&["unpack", "mem.vmimg", "back"]);
    assert!(error.contains("damaged") && error.contains("frame 0"), "{error}");
    assert!(!dir.path("back").exists());
    fs::write(dir.path("mem.vmimg"), &file[..1000]).unwrap();
    assert!(dir.refusal(&["inspect", "mem.vmimg"]).contains("cut short"));
    assert!(dir.refusal(&["inspect", "mem"]).contains("no packed image"));
    assert!(dir.refusal(&["pack", "gone", "x"]).contains("gone"));
    assert!(dir.refusal(&["pack", "mem", "x", "--frame-size", "5K"]).contains("power of two"));
    assert!(!dir.path("x").exists());
}

/// A VM restored from an image, in the ways a raw file is.
#[test]
fn vms_are_served_from_images_with_every_page_right() {
    if !vmpager_sys::probe::host().userfaultfd.kernel_mode() {
        vmpager_testing::skipped("no userfaultfd for kernel-mode faults");
        return;
    }
    for codec in ["lz4", "zstd"] {
        let output = Command::new(VMPAGER)
            .args(["bench", "restore", "--memory", "32M", "--rounds", "1", "--cpu", "threads"])
            .args(["--modes", "mmap,packed,packed+fill", "--codec", codec, "--json"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let rows = report["rows"].as_array().unwrap();
        let modes: Vec<_> = rows.iter().map(|row| row["mode"].as_str().unwrap()).collect();
        assert_eq!(modes, ["mmap", "packed", "packed+fill"].repeat(2), "warm, then cold");
        assert!(rows[1]["faults"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn the_benchmark_measures_every_codec_beside_the_raw_file() {
    if !vmpager_sys::probe::host().userfaultfd.kernel_mode() {
        vmpager_testing::skipped("no userfaultfd for kernel-mode faults");
        return;
    }
    let output = Command::new(VMPAGER)
        .args(["bench", "image", "--memory", "16M", "--rounds", "1", "--touches", "50", "--json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let codecs: Vec<_> = rows.iter().map(|row| row["codec"].as_str().unwrap()).collect();
    assert_eq!(codecs, ["raw file", "none", "lz4", "zstd"]);
    for row in rows {
        assert!(row["fill_mb_s"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["fault_p50_us"].as_f64().unwrap() > 0.0, "{row}");
    }
    let ratio = |row: usize| rows[row]["ratio"].as_f64().unwrap();
    assert!(ratio(3) < ratio(2) && ratio(2) < ratio(1), "{report}");
}
