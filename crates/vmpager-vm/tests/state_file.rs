//! Snapshots that cannot be used say why, by file and field.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;

use common::{config, cpus, snapshot};
use vmpager_vm::{MAX_STATE_BYTES, Snapshot, VmError, VmState};

fn open_with(snapshot: &Snapshot, state: &str) -> String {
    fs::write(&snapshot.paths().state, state).unwrap();
    match Snapshot::open(snapshot.paths()) {
        Err(error @ VmError::State { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// The state file with that change to its body, and the checksum to fit.
fn edited(state: &str, from: &str, to: &str) -> String {
    const BODY: &str = "\"body\": ";
    assert!(state.contains(from), "{from} in {state}");
    let (head, body) = state.split_once(BODY).unwrap();
    let body = body.trim_end().strip_suffix('}').unwrap().trim_end();
    let sealed = |body: &str| format!("\"{:#010x}\"", crc32c::crc32c(body.as_bytes()));
    let after = body.replacen(from, to, 1);
    assert!(head.contains(&sealed(body)), "{head}");
    format!("{}{BODY}{after}\n}}\n", head.replace(&sealed(body), &sealed(&after)))
}

#[test]
fn unusable_state_is_refused_with_file_field_and_value() {
    for cpu in cpus() {
        let (_dir, snapshot) = snapshot(&config(cpu));
        let state = fs::read_to_string(&snapshot.paths().state).unwrap();
        let cases = [
            ("\"seed\"", "\"sead\"", "sead"),
            ("\"seed\": 11", "\"seed\": \"x\"", "invalid type: string \"x\", expected u64"),
            ("\"memory_bytes\": 16777216", "\"memory_bytes\": 16777217", "memory_bytes: 16777217"),
            ("\"memory_bytes\": 16777216", "\"memory_bytes\": 8388608", "memslots: "),
            ("\"len\": 16777216", "\"len\": 8388608", "memslots: "),
            ("\"vcpus\": 1,", "\"vcpus\": 2000000000,", "vcpus 2000000000"),
            ("\"code\": ", "\"code\": 1", "guest.builtin.layout: "),
        ];
        for (from, to, expected) in cases {
            let error = open_with(&snapshot, &edited(&state, from, to));
            assert!(error.contains(expected), "{to}: {error}");
            assert!(error.contains("state.json"), "{error}");
        }
        if state.contains("rip") {
            let error = open_with(&snapshot, &edited(&state, "\"rip\"", "\"eip\""));
            assert!(error.contains("kvm.vcpus[0].regs.eip"), "{error}");
        }
        let other_version = state.replacen("\"version\": ", "\"version\": 9", 1);
        assert!(open_with(&snapshot, &other_version).contains("version is 9"));
        let changed = state.replacen("\"seed\": 11", "\"seed\": 12", 1);
        assert!(open_with(&snapshot, &changed).contains("crc32c is 0x"));
        fs::write(&snapshot.paths().state, &state).unwrap();
        assert!(Snapshot::open(snapshot.paths()).is_ok());
        assert_eq!(VmState::parse(state.as_bytes()).unwrap().encode(), state.as_bytes());
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
fn a_memory_file_in_place_of_the_state_is_refused_without_being_read_whole() {
    let (_dir, snapshot) = snapshot(&config(vmpager_vm::Cpu::Threads));
    let file = fs::File::options().write(true).open(&snapshot.paths().state).unwrap();
    file.set_len(1 << 40).unwrap();
    let error = Snapshot::open(snapshot.paths()).unwrap_err().to_string();
    assert!(error.contains(&MAX_STATE_BYTES.to_string()), "{error}");
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
