//! The kernel, memory settings and limits.

use rustix::io::Errno;
use vmpager_sys::probe::{Host, HugePool, Limit};

use super::{Check, errno_name, found, release_at_least};

const SIZE_2M: u64 = 2 << 20;
const SIZE_1G: u64 = 1 << 30;

/// The kernel itself.
pub(super) fn kernel_checks(host: &Host) -> Vec<Check> {
    let release = &host.kernel_release;
    let finding = found("kernel.release", "release", format!("{release} {}", host.machine));
    vec![if release_at_least(release, (6, 6)) {
        finding.ok("has what on-demand restore uses")
    } else if release_at_least(release, (5, 11)) {
        finding.limited(
            "restores, without /dev/userfaultfd before 6.1 and without poisoned pages before 6.6",
            "use Linux 6.6 or later",
        )
    } else {
        finding.limited("vmpager is not tested on it", "use Linux 6.6 or later")
    }]
}

/// Huge pages and mappings.
pub(super) fn memory_checks(host: &Host) -> Vec<Check> {
    vec![pool_2m(host), pool_1g(host), thp(host), map_count(host), memory_lock(host)]
}

/// What else the pager stands on.
pub(super) fn system_checks(host: &Host) -> Vec<Check> {
    vec![
        io_uring(host),
        open_files(host),
        pidfd(host),
        peer_pidfd(host),
        process_madvise(host),
        cpus(host),
    ]
}

fn pool(host: &Host, page_bytes: u64) -> Option<&HugePool> {
    host.huge_pools.iter().find(|pool| pool.page_bytes == page_bytes)
}

fn pool_words(pool: &HugePool) -> String {
    let HugePool { total, free, reserved, overcommit, .. } = *pool;
    let mut words = format!("{total} pages, {free} free");
    if reserved > 0 {
        words.push_str(&format!(", {reserved} of them reserved"));
    }
    if overcommit > 0 {
        words.push_str(&format!(", {overcommit} more on demand"));
    }
    words
}

fn pool_2m(host: &Host) -> Check {
    let finding = |value: String| found("memory.hugepages_2m", "hugetlb 2 MiB", value);
    let Some(pool) = pool(host, SIZE_2M) else {
        return finding("no such pool".to_owned()).missing(
            "VMs on hugetlb pages cannot run here",
            "use a kernel built with CONFIG_HUGETLBFS=y",
        );
    };
    let value = finding(pool_words(pool));
    let remedy = "sudo sysctl -w vm.nr_hugepages=N (N = guest memory / 2 MiB)";
    if pool.total + pool.overcommit == 0 {
        value.limited("VMs on hugetlb pages cannot start: the pool is empty", remedy)
    } else if pool.free.saturating_sub(pool.reserved) + pool.overcommit == 0 {
        value.limited("the next VM on hugetlb pages cannot start: none is free", remedy)
    } else {
        value.ok("VMs on hugetlb pages are restored page by page of 2 MiB")
    }
}

fn pool_1g(host: &Host) -> Check {
    let consequence = "not used: memory in 1 GiB pages is not restored on demand";
    let value = pool(host, SIZE_1G).map_or("no such pool".to_owned(), pool_words);
    // Nothing to be gained by a remedy: no state of this pool is a lack.
    found("memory.hugepages_1g", "hugetlb 1 GiB", value).ok(consequence)
}

fn thp(host: &Host) -> Check {
    let (anonymous, shmem) = (&host.thp.anonymous, &host.thp.shmem);
    let word = |setting: &Option<String>| setting.clone().unwrap_or_else(|| "unknown".to_owned());
    let value = format!("{}; shared memory: {}", word(anonymous), word(shmem));
    let finding = found("memory.thp", "huge pages (THP)", value);
    match anonymous.as_deref() {
        Some("never") => finding.limited(
            "guests stay on 4 KiB pages after a restore: more stage-2 faults, more TLB misses",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(_) => finding.ok("memory that is filled completely can become huge pages again"),
        None => finding.limited(
            "guests stay on 4 KiB pages after a restore: more stage-2 faults, more TLB misses",
            "use a kernel built with CONFIG_TRANSPARENT_HUGEPAGE=y",
        ),
    }
}

fn map_count(host: &Host) -> Check {
    const DEFAULT: u64 = 65_530;
    let value = host.max_map_count.map_or("unknown".to_owned(), |count| count.to_string());
    let finding = found("memory.max_map_count", "vm.max_map_count", value);
    if host.max_map_count.is_some_and(|count| count < DEFAULT) {
        finding.limited(
            "a VMM whose memory is split in many mappings meets the limit (ENOMEM)",
            format!("sudo sysctl -w vm.max_map_count={DEFAULT}"),
        )
    } else {
        finding.ok("enough mappings for a VMM whose memory is registered in pieces")
    }
}

/// A limit in units of `unit` bytes (1 for plain counts).
fn limit_words(limit: Limit, unit: u64, name: &str) -> String {
    let word = |value: Option<u64>| match value {
        None => "unlimited".to_owned(),
        Some(value) => format!("{}{name}", value / unit),
    };
    if limit.soft == limit.hard {
        word(limit.soft)
    } else {
        format!("{}, at most {}", word(limit.soft), word(limit.hard))
    }
}

fn memory_lock(host: &Host) -> Check {
    const ENOUGH: u64 = 8 << 20;
    let limit = host.memory_lock;
    let finding =
        found("memory.memlock", "locked memory", limit_words(limit, 1024, " KiB (ulimit -l)"));
    if host.capabilities.ipc_lock || limit.soft.is_none_or(|bytes| bytes >= ENOUGH) {
        finding.ok("enough for rings and buffers; guest memory is never locked")
    } else {
        finding.limited(
            "io_uring may get no rings (ENOMEM, Linux before 5.12) or buffers",
            format!("ulimit -l {}; for a service: LimitMEMLOCK=8M", ENOUGH / 1024),
        )
    }
}

fn io_uring(host: &Host) -> Check {
    let finding = |value: String| found("system.io_uring", "io_uring", value);
    let Err(errno) = host.io_uring.setup else {
        return finding("works".to_owned())
            .ok("reads that wait for storage run in the background, many at a time");
    };
    let sysctl = host.io_uring.disabled_sysctl;
    let (why, remedy) = match (errno, sysctl) {
        (Errno::PERM, Some(1 | 2)) => (
            format!("kernel.io_uring_disabled={}", sysctl.unwrap_or(0)),
            "sudo sysctl -w kernel.io_uring_disabled=0; for one group only: =1 and \
             kernel.io_uring_group=GID",
        ),
        (Errno::NOSYS, _) if !host.seccomp_filter => {
            ("the kernel lacks it".to_owned(), "use Linux 5.6 or later, with CONFIG_IO_URING=y")
        }
        (Errno::NOMEM, _) => ("no memory may be locked".to_owned(), "ulimit -l 8192"),
        (Errno::MFILE | Errno::NFILE, _) => ("no descriptor is left".to_owned(), "ulimit -n 65536"),
        _ => (
            "a seccomp filter or security module refuses".to_owned(),
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's \
             seccomp profile (docker: --security-opt seccomp=FILE)",
        ),
    };
    finding(format!("{}: {why}", errno_name(errno)))
        .limited("reads that wait for storage are done by threads, with a handoff each", remedy)
}

fn open_files(host: &Host) -> Check {
    const ENOUGH: u64 = 4096;
    let limit = host.open_files;
    let finding = found("system.open_files", "open files", limit_words(limit, 1, " (ulimit -n)"));
    if limit.soft.is_none_or(|count| count >= ENOUGH) {
        finding.ok("enough descriptors for hundreds of VMs in one daemon")
    } else {
        let remedy = if limit.hard.is_none_or(|count| count >= ENOUGH) {
            "ulimit -n $(ulimit -Hn); for a service: LimitNOFILE=65536"
        } else {
            "raise nofile in /etc/security/limits.conf; for a service: LimitNOFILE=65536"
        };
        finding.limited("a daemon runs out of descriptors at some hundred VMs", remedy)
    }
}

fn pidfd(host: &Host) -> Check {
    let finding = |value: String| found("system.pidfd", "pidfd_open(2)", value);
    match host.pidfd_open {
        Ok(()) => finding("works".to_owned()).ok("the end of a VMM is noticed at once"),
        Err(errno) => finding(errno_name(errno)).missing(
            "the end of a VMM is noticed only by its socket, or the next failing install",
            "use Linux 5.3 or later, or allow pidfd_open in the seccomp profile",
        ),
    }
}

fn peer_pidfd(host: &Host) -> Check {
    let finding = |value: String| found("system.peer_pidfd", "SO_PEERPIDFD", value);
    match host.peer_pidfd {
        Ok(()) => finding("works".to_owned())
            .ok("a session belongs to the process that connected, for sure"),
        Err(errno) => finding(errno_name(errno)).limited(
            "a VMM is known by its pid, which another process can have a moment later",
            "use Linux 6.5 or later",
        ),
    }
}

fn process_madvise(host: &Host) -> Check {
    let finding = |value: String| found("system.process_madvise", "process_madvise(2)", value);
    let lost = "a restored VMM's memory becomes huge pages only when khugepaged comes by";
    match host.process_madvise {
        Ok(()) if host.capabilities.sys_nice => {
            finding("works".to_owned()).ok("not used yet: makes huge pages in a restored VMM")
        }
        Ok(()) => finding("own process only: no CAP_SYS_NICE".to_owned()).limited(
            format!("not used yet: {lost}"),
            "sudo setcap cap_sys_nice+ep $(command -v vmpager)",
        ),
        Err(errno) => finding(errno_name(errno)).missing(
            format!("not used yet: {lost}"),
            "use Linux 6.1 or later, or allow process_madvise in the seccomp profile",
        ),
    }
}

fn cpus(host: &Host) -> Check {
    let finding = found("system.cpus", "CPUs", host.cpus.to_string());
    if host.cpus > 1 {
        finding.ok("vCPUs run on while faults are served")
    } else {
        finding.limited(
            "vCPUs and pager take turns on one CPU: correct, but slower",
            "give it more: taskset -c, cgroup cpu.max, or the hypervisor's setting",
        )
    }
}
