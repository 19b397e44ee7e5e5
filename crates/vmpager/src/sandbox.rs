//! What a worker gives up before it listens to anybody: rights it does not need, and
//! system calls.
//!
//! The filter (seccomp, `SECCOMP_SET_MODE_FILTER`) is a list of what is allowed. What
//! is not fails with EPERM, rather than end the process: a library that tries a
//! new system call and has another way must not cost VMs their pager. Calls whose
//! arguments matter are the rare ones, so that the kernel answers for the frequent
//! ones from a bitmap, without running the filter.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// Why a process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// This kernel was built without.
    #[error("this kernel has no {0}")]
    Lacking(&'static str),
    /// The rights of this process.
    #[error("giving up capabilities: {0}")]
    Capabilities(#[source] io::Error),
    /// The filter.
    #[error("filtering system calls: {0}; --no-seccomp goes without it")]
    Filter(String),
}

/// Gives up every capability that serving VMs does not take, and those that programs
/// it might start would have. What is left, of what there is: to read and write files
/// of others (a profile, doors) and lock memory; to see whether a VMM keeps its
/// userfaultfd (`CAP_SYS_PTRACE`); to pass descriptors to the keeper however many other
/// processes of this user have on their way (`CAP_SYS_RESOURCE`); and, if `collapse` is
/// to make huge pages in VMMs, `CAP_SYS_NICE`. For processes that have one thread yet.
///
/// # Errors
///
/// [`SandboxError::Lacking`] if the kernel has no capabilities, or if it refuses.
pub fn give_up_rights(collapse: bool) -> Result<(), SandboxError> {
    let mut kept = CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::IPC_LOCK
        | CapabilitySet::SYS_PTRACE
        | CapabilitySet::SYS_RESOURCE;
    kept.set(CapabilitySet::SYS_NICE, collapse);
    let give_up = || {
        rustix::thread::set_no_new_privs(true)?;
        let CapabilitySets { effective, permitted, .. } = capabilities(None)?;
        let (effective, permitted) = (effective & kept, permitted & kept);
        set_capabilities(
            None,
            CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() },
        )
    };
    give_up().map_err(|error| match error {
        Errno::NOSYS => SandboxError::Lacking("capabilities (CONFIG_MULTIUSER)"),
        error => SandboxError::Capabilities(error.into()),
    })
}

/// Allows all threads of this process, from now on and for good, what serving VMs
/// takes, and no other system call: no program is started, no process traced,
/// signalled or made, nothing becomes executable.
///
/// # Errors
///
/// [`SandboxError::Lacking`] if the kernel has no seccomp, or if it refuses.
pub fn filter_calls() -> Result<(), SandboxError> {
    let problem = |error: seccompiler::Error| match error {
        seccompiler::Error::Seccomp(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            SandboxError::Lacking("filters of system calls (CONFIG_SECCOMP_FILTER)")
        }
        error => SandboxError::Filter(error.to_string()),
    };
    // The C library makes threads by another call, whose flags can be seen, if the
    // kernel does not know this one.
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = errno(libc::ENOSYS);
    let no_clone3 = program(no_clone3, SeccompAction::Allow, unknown).map_err(problem)?;
    let rules = rules().map_err(|error| problem(error.into()))?;
    let allowed = program(rules, errno(libc::EPERM), SeccompAction::Allow).map_err(problem)?;
    seccompiler::apply_filter_all_threads(&no_clone3).map_err(problem)?;
    // Afterwards no further filter can be set.
    seccompiler::apply_filter_all_threads(&allowed).map_err(problem)
}

fn errno(error: i32) -> SeccompAction {
    SeccompAction::Errno(error.cast_unsigned())
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// A program that answers `listed` for calls with a rule that holds, and `others`.
fn program(
    rules: Rules,
    others: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, seccompiler::Error> {
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, others, listed, arch)?.try_into()?)
}

/// Calls that any argument is fine for.
const ALLOWED: &[c_long] = &[
    // Memory, and the page caches of others.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mremap,
    libc::SYS_munlock,
    libc::SYS_munmap,
    // Huge pages in VMMs, which takes the right to trace them.
    libc::SYS_process_madvise,
    // Descriptors and files.
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_eventfd2,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readahead,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
    // Reads in the background.
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    // Waiting, and the time.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_futex,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_restart_syscall,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // Peers, and images that are elsewhere.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    // This process and its threads; clone3 has a filter of its own.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_membarrier,
    libc::SYS_pidfd_open,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_setpriority,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// The older names of some of them, which the C library uses where there are any.
#[cfg(target_arch = "x86_64")]
const ALLOWED_TOO: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_getrlimit,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_open,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_select,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_TOO: &[c_long] = &[];

/// `PR_SET_VMA`: the C library names its memory.
const PR_SET_VMA: u64 = 0x5356_4d41;
/// `PR_GET_AUXV`: what the processor can do.
const PR_GET_AUXV: u64 = 0x4155_5856;

fn rules() -> Result<Rules, seccompiler::BackendError> {
    let always = ALLOWED.iter().chain(ALLOWED_TOO).map(|call| (*call, Vec::new()));
    let mut rules: Rules = always.collect();
    let own = u64::from(std::process::id());
    let number = |number: i32| u64::from(number.cast_unsigned());
    let (exec, thread) = (number(libc::PROT_EXEC), number(libc::CLONE_THREAD));
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    let eq = SeccompCmpOp::Eq;
    let conditions: Vec<(c_long, u8, SeccompCmpOp, Vec<u64>)> = vec![
        // Nothing that can be run.
        (libc::SYS_mmap, 2, SeccompCmpOp::MaskedEq(exec), vec![0]),
        (libc::SYS_mprotect, 2, SeccompCmpOp::MaskedEq(exec), vec![0]),
        // Threads, not processes.
        (libc::SYS_clone, 0, SeccompCmpOp::MaskedEq(thread), vec![thread]),
        // Signals to oneself.
        (libc::SYS_kill, 0, eq.clone(), vec![own]),
        (libc::SYS_tgkill, 0, eq.clone(), vec![own]),
        (libc::SYS_socket, 0, eq.clone(), families.map(number).into()),
        (libc::SYS_prctl, 0, eq.clone(), vec![number(libc::PR_SET_NAME), PR_SET_VMA, PR_GET_AUXV]),
        // Limits are looked at, not set.
        (libc::SYS_prlimit64, 2, eq, vec![0]),
    ];
    for (call, argument, operator, values) in conditions {
        let wide = call == libc::SYS_prlimit64 || call == libc::SYS_clone;
        let len = if wide { SeccompCmpArgLen::Qword } else { SeccompCmpArgLen::Dword };
        let alternatives = values.into_iter().map(|value| {
            let condition = SeccompCondition::new(argument, len.clone(), operator.clone(), value)?;
            SeccompRule::new(vec![condition])
        });
        rules.insert(call, alternatives.collect::<Result<_, _>>()?);
    }
    Ok(rules)
}
