//! The report on simulated machines: what a user is told must follow from why
//! something failed.

use rustix::io::Errno;
use vmpager_kvm::probe::{KvmPaths, kvm_at};
use vmpager_sys::probe::{
    Capabilities, FileAccess, Host, HugePool, IoUring, Limit, Thp, Uffd, UffdDeviceError,
};

use super::render::Style;
use super::verdict::Guest;
use super::*;

/// A current machine as root sees it.
fn capable() -> Host {
    let limit = Limit { soft: Some(65_536), hard: Some(65_536) };
    Host {
        kernel_release: "6.12.1".into(),
        machine: "x86_64".into(),
        userfaultfd: Uffd {
            device: Ok(()),
            device_access: Some(FileAccess { mode: 0o600, uid: 0, gid: 0 }),
            syscall: Ok(()),
            syscall_user_mode_only: Ok(()),
            unprivileged_sysctl: Some(0),
            features: Ok(0x1_ffff),
        },
        huge_pools: vec![HugePool {
            page_bytes: 2 << 20,
            total: 8,
            free: 8,
            reserved: 0,
            overcommit: 0,
        }],
        thp: Thp { anonymous: Some("madvise".into()), shmem: Some("never".into()) },
        io_uring: IoUring { setup: Ok(()), disabled_sysctl: Some(0) },
        pidfd_open: Ok(()),
        peer_pidfd: Ok(()),
        process_madvise: Ok(()),
        memory_lock: Limit { soft: None, hard: None },
        open_files: limit,
        max_map_count: Some(65_530),
        capabilities: Capabilities { sys_ptrace: true, sys_nice: true, ipc_lock: true },
        seccomp_filter: false,
        cpus: 4,
    }
}

/// The same machine for a user without privileges.
fn unprivileged() -> Host {
    let mut host = capable();
    host.userfaultfd.device = Err(UffdDeviceError::Open(Errno::ACCESS));
    host.userfaultfd.syscall = Err(Errno::PERM);
    host.capabilities = Capabilities::default();
    host
}

/// As an unprivileged user in a container whose filter refuses the call.
fn filtered() -> Host {
    let mut host = unprivileged();
    host.userfaultfd.device = Err(UffdDeviceError::Open(Errno::NOENT));
    host.userfaultfd.device_access = None;
    host.userfaultfd.syscall_user_mode_only = Err(Errno::PERM);
    host.userfaultfd.features = Err(Errno::PERM);
    host.seccomp_filter = true;
    host.io_uring.setup = Err(Errno::PERM);
    host
}

fn report(host: &Host) -> Report {
    let paths = KvmPaths { device: "/nonexistent/kvm".into(), ..KvmPaths::default() };
    Report::new(host, &kvm_at(&paths), &paths)
}

impl Report {
    fn get(&self, id: &str) -> &Check {
        self.checks.iter().find(|check| check.id == id).unwrap_or_else(|| panic!("no check {id}"))
    }

    fn remedy(&self, id: &str) -> &str {
        self.get(id).remedy.as_deref().unwrap_or_else(|| panic!("{id} has no remedy"))
    }
}

#[test]
fn every_finding_that_is_not_ok_has_a_remedy_and_all_have_words() {
    for host in [capable(), unprivileged(), filtered()] {
        let report = report(&host);
        let mut ids: Vec<&str> = report.checks.iter().map(|check| check.id).collect();
        ids.sort_unstable();
        assert!(ids.windows(2).all(|pair| pair[0] != pair[1]), "an id occurs twice: {ids:?}");
        for check in &report.checks {
            assert!(!check.value.is_empty() && !check.consequence.is_empty(), "{check:?}");
            let remedy = check.remedy.as_deref().unwrap_or("");
            assert_eq!(check.state == State::Ok, remedy.is_empty(), "{check:?}");
        }
    }
}

#[test]
fn a_capable_user_is_told_yes() {
    let report = report(&capable());
    assert_eq!(report.verdict.on_demand_restore, Answer::Yes);
    assert_eq!(report.verdict.guest, Guest::Threads, "there is no KVM");
    assert!(report.checks.iter().filter(|c| c.group() != "kvm").all(|c| c.state == State::Ok));
}

#[test]
fn an_unprivileged_user_is_pointed_to_the_device_and_the_sysctl() {
    let report = report(&unprivileged());
    assert!(report.remedy("userfaultfd.device").contains("setfacl -m u:$USER:rw /dev/userfaultfd"));
    let syscall = report.get("userfaultfd.syscall");
    assert_eq!(syscall.state, State::Missing);
    assert!(syscall.value.contains("vm.unprivileged_userfaultfd=0, no CAP_SYS_PTRACE"));
    assert!(report.remedy("userfaultfd.syscall").contains("vm.unprivileged_userfaultfd=1"));
    assert_eq!(report.get("userfaultfd.kernel_faults").state, State::Missing);
    assert_eq!(report.get("userfaultfd.syscall_user_mode").state, State::Ok);
    assert_eq!(report.verdict.on_demand_restore, Answer::Limited);
    assert_eq!(report.verdict.kvm_guest_restore, Answer::No);
}

#[test]
fn an_opened_device_makes_up_for_the_syscall() {
    let mut host = unprivileged();
    host.userfaultfd.device = Ok(());
    let report = report(&host);
    assert_eq!(report.get("userfaultfd.syscall").state, State::Limited);
    assert_eq!(report.get("userfaultfd.kernel_faults").state, State::Ok);
    assert_eq!(report.verdict.on_demand_restore, Answer::Yes);
}

#[test]
fn a_filter_is_told_from_a_setting() {
    let host = filtered();
    let report = report(&host);
    for id in ["userfaultfd.syscall", "userfaultfd.syscall_user_mode", "system.io_uring"] {
        assert!(report.remedy(id).contains("seccomp"), "{:?}", report.get(id));
    }
    assert_eq!(report.verdict.on_demand_restore, Answer::No);
    assert!(userfaultfd::remedy(&host).is_some());

    let mut host = unprivileged();
    host.io_uring = IoUring { setup: Err(Errno::PERM), disabled_sysctl: Some(2) };
    let report = super::tests::report(&host);
    assert!(report.remedy("system.io_uring").contains("kernel.io_uring_disabled=0"));
}

#[test]
fn a_kernel_without_userfaultfd_is_the_remedy() {
    let mut host = filtered();
    host.seccomp_filter = false;
    host.userfaultfd.syscall = Err(Errno::NOSYS);
    host.userfaultfd.syscall_user_mode_only = Err(Errno::NOSYS);
    host.userfaultfd.features = Err(Errno::NOSYS);
    let remedy = userfaultfd::remedy(&host).unwrap();
    assert!(remedy.contains("CONFIG_USERFAULTFD"), "{remedy}");
}

#[test]
fn the_absence_of_event_remove_limits_the_restore() {
    let mut host = capable();
    host.userfaultfd.features = Ok(0x1_ffff & !(1 << 3));
    let report = report(&host);
    assert_eq!(report.get("userfaultfd.event_remove").state, State::Limited);
    assert_eq!(report.verdict.on_demand_restore, Answer::Limited);
    assert_eq!(report.verdict.removed_pages, Answer::No);
}

#[test]
fn empty_and_taken_huge_page_pools_differ() {
    let mut host = capable();
    host.huge_pools[0].free = 0;
    assert!(report(&host).get("memory.hugepages_2m").consequence.contains("none is free"));
    host.huge_pools[0].total = 0;
    assert!(report(&host).get("memory.hugepages_2m").consequence.contains("empty"));
    assert_eq!(report(&host).verdict.hugetlb_restore, Answer::Limited);
    host.huge_pools.clear();
    assert_eq!(report(&host).get("memory.hugepages_2m").state, State::Missing);
}

#[test]
fn text_fits_its_width_and_ends_with_the_verdict() {
    for width in [60, 80, 120] {
        let mut out = Vec::new();
        render::write(&report(&filtered()), Style::plain(width), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        for line in text.lines() {
            let fits = line.chars().count() <= width;
            assert!(fits, "longer than {width}: {line}");
        }
        let last = text.trim_end().rsplit("\n\n").next().unwrap();
        assert!(last.starts_with("this machine can run: on-demand restore no"), "{last}");
        assert!(!text.contains('\x1b'));
    }
}

#[test]
fn json_has_the_keys_programs_rely_on() {
    let mut out = Vec::new();
    report(&unprivileged()).write_json(&mut out).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
    assert_eq!(json["kernel"], "6.12.1");
    let check = &json["checks"][0];
    for key in ["id", "group", "state", "value", "consequence", "remedy"] {
        assert!(check.get(key).is_some(), "no {key} in {check}");
    }
    assert_eq!(json["verdict"]["on_demand_restore"], "limited");
    assert_eq!(json["verdict"]["guest"], "threads");
}

#[test]
fn releases_compare_by_number() {
    assert!(release_at_least("6.12.3-cloud-amd64", (6, 6)));
    assert!(!release_at_least("5.10.0-28", (5, 11)));
    assert!(release_at_least("10.0", (6, 6)));
    assert!(release_at_least("custom", (6, 6)));
}
