//! userfaultfd: by which way this user gets one, and what it can do.

use rustix::io::Errno;
use vmpager_sys::probe::{Host, UffdDeviceError};

use super::{Check, State, errno_name, found};

const GRANT_DEVICE: &str = "sudo setfacl -m u:$USER:rw /dev/userfaultfd";
const ALLOW_SECCOMP: &str = "allow the call userfaultfd in the container's seccomp profile \
                             (docker: --security-opt seccomp=FILE)";
const MORE_DESCRIPTORS: &str = "ulimit -n 65536";
const BUILD_KERNEL: &str = "use a kernel built with CONFIG_USERFAULTFD=y";

/// All findings about userfaultfd.
pub(super) fn checks(host: &Host) -> Vec<Check> {
    let mut checks = vec![device(host), syscall(host), user_mode(host), kernel_faults(host)];
    checks.extend(FEATURES.iter().map(|feature| feature.check(host)));
    checks
}

/// What gives this user a userfaultfd, if it has none.
pub(super) fn remedy(host: &Host) -> Option<String> {
    let uffd = &host.userfaultfd;
    match uffd.features {
        Ok(_) => None,
        // Without the call there is no device either.
        Err(Errno::NOSYS) => user_mode(host).remedy,
        Err(_) => device(host).remedy.or_else(|| user_mode(host).remedy),
    }
}

fn device(host: &Host) -> Check {
    let uffd = &host.userfaultfd;
    let finding = |value: String| found("userfaultfd.device", "/dev/userfaultfd", value);
    let (errno, step) = match uffd.device {
        Ok(()) => {
            return finding("works".to_owned())
                .ok("gives a userfaultfd that serves KVM too; access is by file permission");
        }
        Err(UffdDeviceError::Open(errno)) => (errno, "opening it"),
        Err(UffdDeviceError::Create(errno)) => (errno, "USERFAULTFD_IOC_NEW"),
    };
    let access = uffd.device_access.map_or_else(String::new, |access| {
        format!("; mode {:o}, owner {}:{}", access.mode, access.uid, access.gid)
    });
    let value = finding(format!("{step} fails with {}{access}", errno_name(errno)));
    let remedy = match (errno, step) {
        (Errno::ACCESS, _) => GRANT_DEVICE,
        (Errno::PERM, _) => "let the container have the device (docker: --device /dev/userfaultfd)",
        (Errno::NOENT, _) => {
            "use Linux 6.1 or later; in a container, hand the device in (docker: --device \
             /dev/userfaultfd)"
        }
        (Errno::MFILE | Errno::NFILE, _) => MORE_DESCRIPTORS,
        (Errno::NOTTY, _) => "it is something else: remove it, and let devtmpfs make it anew",
        _ => BUILD_KERNEL,
    };
    if uffd.syscall.is_ok() {
        value.limited("nothing is lost for this user: the system call serves", remedy)
    } else {
        value.missing("VMMs of this user depend on the system call for their userfaultfd", remedy)
    }
}

fn syscall(host: &Host) -> Check {
    let uffd = &host.userfaultfd;
    let finding = |value: String| found("userfaultfd.syscall", "userfaultfd(2)", value);
    let Err(errno) = uffd.syscall else {
        let why = if uffd.unprivileged_sysctl == Some(1) {
            "works (vm.unprivileged_userfaultfd=1)"
        } else if host.capabilities.sys_ptrace {
            "works (CAP_SYS_PTRACE)"
        } else {
            "works"
        };
        return finding(why.to_owned()).ok("also serves VMMs that do not know the device");
    };
    let (why, remedy) = refusal(host, errno);
    let value = finding(format!("{}: {why}", errno_name(errno)));
    if uffd.device.is_ok() {
        value.limited("VMMs that do not know the device get no userfaultfd", remedy)
    } else {
        value.missing("VMMs of this user get no userfaultfd that serves KVM", remedy)
    }
}

/// Why the system call without `UFFD_USER_MODE_ONLY` fails, and the remedy.
fn refusal(host: &Host, errno: Errno) -> (String, String) {
    const SYSCTL: &str = "sudo sysctl -w vm.unprivileged_userfaultfd=1";
    let uffd = &host.userfaultfd;
    if errno == Errno::NOSYS {
        return no_such_call(host);
    }
    if matches!(errno, Errno::MFILE | Errno::NFILE) {
        return ("no descriptor is left".to_owned(), MORE_DESCRIPTORS.to_owned());
    }
    if errno != Errno::PERM {
        return ("the kernel refuses".to_owned(), BUILD_KERNEL.to_owned());
    }
    // The kernel itself never refuses user-mode-only descriptors with EPERM,
    // nor anybody once the sysctl is on.
    let filtered = uffd.syscall_user_mode_only == Err(Errno::PERM)
        || (uffd.unprivileged_sysctl == Some(1) && host.seccomp_filter);
    if filtered {
        return (
            "a seccomp filter or security module refuses".to_owned(),
            ALLOW_SECCOMP.to_owned(),
        );
    }
    let sysctl = uffd
        .unprivileged_sysctl
        .map_or("vm.unprivileged_userfaultfd unknown".to_owned(), |value| {
            format!("vm.unprivileged_userfaultfd={value}")
        });
    let capability = if host.capabilities.sys_ptrace {
        "CAP_SYS_PTRACE held in this user namespace only"
    } else {
        "no CAP_SYS_PTRACE"
    };
    (format!("{sysctl}, {capability}"), format!("{GRANT_DEVICE}; or for every user: {SYSCTL}"))
}

fn no_such_call(host: &Host) -> (String, String) {
    if host.seccomp_filter {
        ("a seccomp filter hides it, or the kernel lacks it".to_owned(), ALLOW_SECCOMP.to_owned())
    } else {
        ("the kernel lacks it".to_owned(), BUILD_KERNEL.to_owned())
    }
}

fn user_mode(host: &Host) -> Check {
    let finding = |value: String| found("userfaultfd.syscall_user_mode", "… USER_MODE_ONLY", value);
    let Err(errno) = host.userfaultfd.syscall_user_mode_only else {
        return finding("works".to_owned())
            .ok("restores memory that only user-mode code touches: threads, not KVM guests");
    };
    let (why, remedy) = match errno {
        Errno::NOSYS => no_such_call(host),
        Errno::MFILE | Errno::NFILE => {
            ("no descriptor is left".to_owned(), MORE_DESCRIPTORS.to_owned())
        }
        Errno::INVAL => {
            ("the kernel does not know the flag".to_owned(), "use Linux 5.11 or later".to_owned())
        }
        _ => ("a seccomp filter or security module refuses".to_owned(), ALLOW_SECCOMP.to_owned()),
    };
    let value = finding(format!("{}: {why}", errno_name(errno)));
    if host.userfaultfd.kernel_mode() {
        value.limited("nothing is lost: a userfaultfd for all faults can be had", remedy)
    } else {
        value.missing("no userfaultfd at all: nothing can be restored on demand", remedy)
    }
}

fn kernel_faults(host: &Host) -> Check {
    let uffd = &host.userfaultfd;
    let finding = |value: &str| found("userfaultfd.kernel_faults", "kernel-mode faults", value);
    if uffd.kernel_mode() {
        return finding("served")
            .ok("memory can also be brought in when KVM or a system call touches it");
    }
    let remedy = if uffd.usable() {
        GRANT_DEVICE.to_owned()
    } else {
        remedy(host).unwrap_or_else(|| BUILD_KERNEL.to_owned())
    };
    finding("not served").missing(
        "a KVM guest, and read(2) into absent memory, fail with EFAULT instead of waiting",
        remedy,
    )
}

/// A feature bit, and the words for both cases.
struct Feature {
    bit: u32,
    id: &'static str,
    label: &'static str,
    /// What vmpager does with it.
    with: &'static str,
    /// What it cannot do without it.
    without: &'static str,
    /// The state if it is not offered.
    absent: State,
    /// Where it is offered.
    remedy: &'static str,
}

impl Feature {
    fn check(&self, host: &Host) -> Check {
        let uffd = &host.userfaultfd;
        let finding = |value: &str| found(self.id, self.label, value);
        if uffd.features.is_err() {
            return finding("unknown").missing(self.without, "make userfaultfd work first");
        }
        if !uffd.has(self.bit) {
            let remedy = (self.absent != State::Ok).then(|| self.remedy.to_owned());
            return finding("not offered").check(self.absent, self.without.to_owned(), remedy);
        }
        if self.bit == EVENT_FORK && !host.capabilities.sys_ptrace {
            return finding("refused without CAP_SYS_PTRACE").limited(
                self.without,
                "not needed: vmpager does not ask for it; else sudo setcap cap_sys_ptrace+ep VMM",
            );
        }
        finding("offered").ok(self.with)
    }
}

const EVENT_FORK: u32 = 1 << 1;

const FEATURES: &[Feature] = &[
    Feature {
        bit: 1 << 4,
        id: "userfaultfd.missing_hugetlbfs",
        label: "MISSING_HUGETLBFS",
        with: "restores memory in hugetlb pages",
        without: "memory in hugetlb pages cannot be restored on demand",
        absent: State::Missing,
        remedy: "use Linux 4.11 or later, built with CONFIG_HUGETLBFS=y",
    },
    Feature {
        bit: 1 << 5,
        id: "userfaultfd.missing_shmem",
        label: "MISSING_SHMEM",
        with: "restores memory in a memfd or in shared memory",
        without: "only private anonymous memory can be restored on demand",
        absent: State::Missing,
        remedy: "use Linux 4.11 or later, built with CONFIG_SHMEM=y",
    },
    Feature {
        bit: 1 << 3,
        id: "userfaultfd.event_remove",
        label: "EVENT_REMOVE",
        with: "pages a guest gave back (balloon, free-page reporting) read zero from then on",
        without: "a page the guest gave back would read old snapshot bytes: keep balloon and \
                  free-page reporting off",
        absent: State::Limited,
        remedy: "use Linux 4.11 or later",
    },
    Feature {
        bit: 1 << 6,
        id: "userfaultfd.event_unmap",
        label: "EVENT_UNMAP",
        with: "memory that the VMM unmaps is no longer filled",
        without: "memory that the VMM unmaps is noticed only when filling it fails",
        absent: State::Limited,
        remedy: "use Linux 4.11 or later",
    },
    Feature {
        bit: 1 << 14,
        id: "userfaultfd.poison",
        label: "POISON",
        with: "a page that cannot be had gives a memory error, not a hang or wrong bytes",
        without: "a page that cannot be had leaves its vCPU waiting until the session is ended",
        absent: State::Limited,
        remedy: "use Linux 6.6 or later",
    },
    Feature {
        bit: 1 << 16,
        id: "userfaultfd.move",
        label: "MOVE",
        with: "not used yet: moves whole huge pages into a guest of the same process",
        without: "not used yet: a guest of the same process would get huge pages only by collapse",
        absent: State::Missing,
        remedy: "use Linux 6.8 or later",
    },
    Feature {
        bit: 1 << 10,
        id: "userfaultfd.minor_shmem",
        label: "MINOR_SHMEM",
        with: "not used yet: publishes shared pages written through another mapping",
        without: "not used yet: shared memory is filled by copying into it",
        absent: State::Missing,
        remedy: "use Linux 5.14 or later on x86-64 or arm64",
    },
    Feature {
        bit: 1 << 9,
        id: "userfaultfd.minor_hugetlbfs",
        label: "MINOR_HUGETLBFS",
        with: "not used yet: the same for hugetlb pages",
        without: "not used yet: hugetlb memory is filled by copying into it",
        absent: State::Missing,
        remedy: "use Linux 5.13 or later on x86-64 or arm64",
    },
    Feature {
        bit: 1 << 8,
        id: "userfaultfd.thread_id",
        label: "THREAD_ID",
        with: "not used yet: names the thread that faulted",
        without: "not used yet: reports cannot name the thread that faulted",
        absent: State::Missing,
        remedy: "use Linux 4.14 or later",
    },
    Feature {
        bit: 1 << 11,
        id: "userfaultfd.exact_address",
        label: "EXACT_ADDRESS",
        with: "not used yet: gives the byte that was touched, not only its page",
        without: "not used yet: reports know the page that was touched, not the byte",
        absent: State::Missing,
        remedy: "use Linux 5.18 or later",
    },
    Feature {
        bit: 1 << 0,
        id: "userfaultfd.wp",
        label: "PAGEFAULT_FLAG_WP",
        with: "not used yet: sees writes, for a snapshot while the VM runs",
        without: "not used yet: no snapshot while the VM runs",
        absent: State::Missing,
        remedy: "use Linux 5.7 or later on x86-64, arm64 or riscv64",
    },
    Feature {
        bit: 1 << 12,
        id: "userfaultfd.wp_hugetlbfs_shmem",
        label: "WP_HUGETLBFS_SHMEM",
        with: "not used yet: the same for shared and hugetlb memory",
        without: "not used yet: sees writes to private anonymous memory only",
        absent: State::Missing,
        remedy: "use Linux 5.19 or later, built with CONFIG_PTE_MARKER_UFFD_WP=y",
    },
    Feature {
        bit: 1 << 13,
        id: "userfaultfd.wp_unpopulated",
        label: "WP_UNPOPULATED",
        with: "not used yet: also sees first writes to pages never touched",
        without: "not used yet: first writes to pages never touched go unseen",
        absent: State::Missing,
        remedy: "use Linux 6.4 or later",
    },
    Feature {
        bit: 1 << 15,
        id: "userfaultfd.wp_async",
        label: "WP_ASYNC",
        with: "not used yet: collects written pages without stopping the writer",
        without: "not used yet: each first write to a page would stop the writer",
        absent: State::Missing,
        remedy: "use Linux 6.7 or later",
    },
    Feature {
        bit: EVENT_FORK,
        id: "userfaultfd.event_fork",
        label: "EVENT_FORK",
        with: "not used: a VMM that forks keeps its memory to itself",
        without: "not used: children of a VMM are not served",
        absent: State::Ok,
        remedy: "",
    },
    Feature {
        bit: 1 << 2,
        id: "userfaultfd.event_remap",
        label: "EVENT_REMAP",
        with: "not used: VMMs do not move guest memory",
        without: "not used: VMMs do not move guest memory",
        absent: State::Ok,
        remedy: "",
    },
    Feature {
        bit: 1 << 7,
        id: "userfaultfd.sigbus",
        label: "SIGBUS",
        with: "never used: it breaks guests under KVM (spins, wrong page faults)",
        without: "never used: it breaks guests under KVM",
        absent: State::Ok,
        remedy: "",
    },
];
