//! `vmpager doctor` as a program: its JSON, its exit status, and what it says
//! to a user without privileges.
#![allow(clippy::unwrap_used, reason = "a test ends in a panic")]

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use serde_json::Value;

/// Names programs rely on.
const IDS: &[&str] = &[
    "kernel.release",
    "userfaultfd.device",
    "userfaultfd.syscall",
    "userfaultfd.syscall_user_mode",
    "userfaultfd.kernel_faults",
    "userfaultfd.missing_hugetlbfs",
    "userfaultfd.missing_shmem",
    "userfaultfd.event_remove",
    "userfaultfd.event_unmap",
    "userfaultfd.event_fork",
    "userfaultfd.event_remap",
    "userfaultfd.poison",
    "userfaultfd.move",
    "userfaultfd.minor_shmem",
    "userfaultfd.minor_hugetlbfs",
    "userfaultfd.thread_id",
    "userfaultfd.exact_address",
    "userfaultfd.wp",
    "userfaultfd.wp_hugetlbfs_shmem",
    "userfaultfd.wp_unpopulated",
    "userfaultfd.wp_async",
    "userfaultfd.sigbus",
    "memory.hugepages_2m",
    "memory.hugepages_1g",
    "memory.thp",
    "memory.max_map_count",
    "memory.memlock",
    "kvm.device",
    "kvm.module",
    "kvm.ring0",
    "kvm.linux",
    "kvm.paging",
    "kvm.irqchip",
    "kvm.sync_regs",
    "kvm.memory_fault_info",
    "kvm.memory_attributes",
    "kvm.guest_memfd",
    "kvm.guest_memfd_flags",
    "kvm.vm_types",
    "kvm.msr_filter",
    "kvm.exception_payload",
    "kvm.exit_hypercall",
    "kvm.pre_fault_memory",
    "kvm.max_vcpus",
    "system.io_uring",
    "system.open_files",
    "system.pidfd",
    "system.peer_pidfd",
    "system.process_madvise",
    "system.cpus",
];

fn program() -> &'static str {
    env!("CARGO_BIN_EXE_vmpager")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("not JSON ({error}): {}", String::from_utf8_lossy(&output.stdout))
    })
}

fn check<'a>(report: &'a Value, id: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["id"] == id).unwrap_or_else(|| panic!("no check {id}"))
}

/// What holds on every machine and for every user.
fn assert_sound(output: &Output) -> Value {
    let report = json(output);
    let ids: Vec<&str> =
        report["checks"].as_array().unwrap().iter().map(|c| c["id"].as_str().unwrap()).collect();
    assert_eq!(ids.iter().collect::<HashSet<_>>(), IDS.iter().collect::<HashSet<_>>());
    for check in report["checks"].as_array().unwrap() {
        let state = check["state"].as_str().unwrap();
        assert!(["ok", "limited", "missing"].contains(&state), "{check}");
        assert_eq!(check["remedy"].is_null(), state == "ok", "{check}");
    }
    let usable = report["verdict"]["on_demand_restore"] != "no";
    assert_eq!(output.status.code(), Some(if usable { 0 } else { 1 }), "{report}");
    report
}

#[test]
fn json_is_one_object_with_every_id() {
    let output = Command::new(program()).args(["doctor", "--json"]).output().unwrap();
    let report = assert_sound(&output);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(report["kernel"], release.trim());
    let kvm_here = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !kvm_here {
        vmpager_testing::skipped("no /dev/kvm");
    }
    assert_eq!(check(&report, "kvm.device")["state"] == "ok", kvm_here);
}

#[test]
fn text_is_plain_in_a_pipe_and_ends_with_the_verdict() {
    let output = Command::new(program()).arg("doctor").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains('\x1b'), "colour in a pipe");
    let last = text.trim_end().rsplit("\n\n").next().unwrap();
    assert!(last.starts_with("this machine can run: on-demand restore "), "{last}");
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let mut child = Command::new(program())
        .arg("doctor")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!words.to_lowercase().contains("broken pipe"), "{words}");
}

#[test]
fn a_user_without_privileges_is_told_what_to_ask_for() {
    // The build directory may be closed to others: give them a copy.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("vmpager");
    fs::copy(program(), &copy).unwrap();
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--"];
    let allowed = Command::new("setpriv").args(nobody).arg(&copy).arg("--version").output();
    if !allowed.is_ok_and(|output| output.status.success()) {
        vmpager_testing::skipped("setpriv cannot change the user here");
        return;
    }
    let output = Command::new("setpriv")
        .args(nobody)
        .arg(&copy)
        .args(["doctor", "--json"])
        .output()
        .unwrap();
    let report = assert_sound(&output);

    for (id, path) in [("userfaultfd.device", "/dev/userfaultfd"), ("kvm.device", "/dev/kvm")] {
        let closed = fs::metadata(path)
            .is_ok_and(|meta| meta.permissions().mode() & 0o006 == 0 && owner(&meta) != 65_534);
        if closed {
            let check = check(&report, id);
            assert_eq!(check["state"], "missing", "{check}");
            let remedy = check["remedy"].as_str().unwrap();
            assert!(remedy.contains(&format!("setfacl -m u:$USER:rw {path}")), "{check}");
        } else {
            vmpager_testing::skipped(&format!("{path} is not closed to others"));
        }
    }
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    if sysctl.trim() == "0" && check(&report, "userfaultfd.syscall_user_mode")["state"] == "ok" {
        let check = check(&report, "userfaultfd.syscall");
        assert!(check["value"].as_str().unwrap().contains("no CAP_SYS_PTRACE"), "{check}");
        assert!(check["remedy"].as_str().unwrap().contains("vm.unprivileged_userfaultfd=1"));
    }
}

fn owner(meta: &fs::Metadata) -> u32 {
    std::os::unix::fs::MetadataExt::uid(meta)
}

/// A filter that is none is wrong usage, and said; nothing else is done.
#[test]
fn a_log_filter_that_is_none_is_refused() {
    let vmpager = |filter: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmpager"));
        command.arg("doctor").env("VMPAGER_LOG", filter).output().unwrap()
    };
    for filter in ["vmpager=loud", "info,vmpager=debug=trace"] {
        let refused = vmpager(filter);
        assert_eq!((refused.status.code(), refused.stdout.len()), (Some(2), 0), "{refused:?}");
        let error = String::from_utf8_lossy(&refused.stderr);
        assert!(error.contains("VMPAGER_LOG") && error.contains(filter), "{error}");
    }
    assert_ne!(vmpager("info,vmpager=debug").status.code(), Some(2));
}
