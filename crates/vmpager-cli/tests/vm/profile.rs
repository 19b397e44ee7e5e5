//! Restores with a profile, and what they tell of it.

use std::fs;

use serde_json::Value;
use tempfile::TempDir;
use vmpager_store::image::MemoryInput;
use vmpager_store::profile::{Profile, Touch};

use super::{controlled, failure, has_kvm, has_userfaultfd, restore, text};

/// A profile of the first MiB of a memory.
fn profile(memory: &str, dir: &TempDir) -> String {
    let identity = MemoryInput::raw(memory).unwrap().identity().unwrap();
    let mut profile = Profile::new(identity);
    let touches: Vec<Touch> = (0..256).map(|page| Touch { page, at_us: page }).collect();
    profile.add_session(&touches);
    let path = dir.path().join("hot.vmprof");
    fs::write(&path, profile.encode()).unwrap();
    path.to_string_lossy().into_owned()
}

#[test]
fn what_a_profile_came_to_is_told() {
    if !has_kvm() || !has_userfaultfd() {
        return;
    }
    let mut vm = controlled();
    let files = vm.snapshot(&["--stop"]);
    assert!(vm.child.wait().unwrap().success());
    let path = profile(&files[3], &vm.dir);
    let told = |more: &[&str]| {
        let mode = [&["--profile", &path, "--json"][..], more].concat();
        let output = restore(&files, &mode).wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(text(&output.stderr).contains("kk"), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let summary = told(&[]);
    assert!(summary["huge_bytes"].as_u64().is_some_and(|bytes| bytes <= 16 << 20), "{summary}");
    assert!(summary.get("stage2_faults").is_some(), "{summary}");
    match summary["mapped_ahead"].as_object() {
        Some(mapped) => assert_eq!(mapped["refused"], 0, "{summary}"),
        None => vmpager_testing::skipped("this KVM maps no pages ahead"),
    }
    assert_eq!(told(&["--map-ahead", "0"])["mapped_ahead"], Value::Null);

    // Only of this memory, only while some of it is missing.
    let [_, state, _, memory] = &files;
    let of_it = ["restore", "--state", state, "--memory", memory, "--profile", &path];
    let error = failure(&[&of_it[..], &["--memory-mode", "mmap"]].concat());
    assert!(error.contains("--profile needs --memory-mode on-demand"), "{error}");
    fs::OpenOptions::new().write(true).open(memory).unwrap().set_len(8 << 20).unwrap();
    assert!(failure(&of_it).contains("hot.vmprof"));
    let without = ["restore", "--state", state, "--memory", memory, "--map-ahead", "5"];
    assert_eq!(super::vm(&without).status.code(), Some(2));
}
