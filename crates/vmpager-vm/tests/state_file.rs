//! State files that cannot be used say why, by field.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use common::{config, cpus, snapshot};
use vmpager_vm::{Snapshot, VmError};

fn open_with(snapshot: &Snapshot, state: &str) -> String {
    fs::write(&snapshot.paths().state, state).unwrap();
    match Snapshot::open(snapshot.paths()) {
        Err(error @ VmError::State { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn unusable_state_is_refused_with_file_field_and_value() {
    for cpu in cpus() {
        let (_dir, snapshot) = snapshot(&config(cpu));
        let state = fs::read_to_string(&snapshot.paths().state).unwrap();
        let cases = [
            ("\"version\": 2", "\"version\": 9", "version is 9"),
            ("\"version\": 2,", "", "missing field `version`"),
            ("\"seed\"", "\"sead\"", "sead"),
            ("\"seed\": 11", "\"seed\": \"x\"", "invalid type: string \"x\", expected u64"),
            ("\"memory_bytes\": 16777216", "\"memory_bytes\": 16777217", "memory_bytes 16777217"),
            ("\"memory_bytes\": 16777216", "\"memory_bytes\": 8388608", "layout is"),
            ("\"vcpus\": 1", "\"vcpus\": 2000000000", "vcpus 2000000000"),
            ("\"code\": ", "\"code\": 1", "layout is"),
        ];
        for (from, to, expected) in cases {
            assert!(state.contains(from), "{from} in {state}");
            let error = open_with(&snapshot, &state.replacen(from, to, 1));
            assert!(error.contains(expected), "{to}: {error}");
            assert!(error.contains("state.json"), "{error}");
        }
        if state.contains("rip") {
            let error = open_with(&snapshot, &state.replacen("\"rip\"", "\"eip\"", 1));
            assert!(error.contains("eip"), "{error}");
        }
        fs::write(&snapshot.paths().state, &state).unwrap();
        assert!(Snapshot::open(snapshot.paths()).is_ok());
    }
}

#[test]
fn a_truncated_state_file_is_refused_wherever_it_ends() {
    let (_dir, snapshot) = snapshot(&config(vmpager_vm::Cpu::Auto));
    let state = fs::read_to_string(&snapshot.paths().state).unwrap();
    for len in (0..state.len()).step_by(state.len() / 100) {
        open_with(&snapshot, &state[..len]);
    }
}

#[test]
fn a_memory_file_of_another_size_is_refused() {
    let (_dir, snapshot) = snapshot(&config(vmpager_vm::Cpu::Threads));
    let file = fs::File::options().write(true).open(&snapshot.paths().memory).unwrap();
    file.set_len(snapshot.memory_bytes() - 4096).unwrap();
    let error = Snapshot::open(snapshot.paths()).unwrap_err();
    assert!(matches!(error, VmError::MemorySize { .. }));
    let text = error.to_string();
    assert!(text.contains("16773120") && text.contains("16777216"), "{text}");
}
