//! What this kernel, this user and this machine can do: facts only. What they
//! mean for a restore, and what to do about them, is for the program to say.
//!
//! Every probe is harmless: it opens what it tries, looks, and closes it again;
//! it changes no setting, maps nothing that stays and never fails as a whole.
//! What could not be found out is `None`, or the errno it ended in.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use linux_raw_sys::general::{UFFD_API, UFFD_USER_MODE_ONLY, uffdio_api};
use linux_raw_sys::ioctl::UFFDIO_API;
use rustix::io::Errno;
use rustix::ioctl::{self, IoctlOutput, Opcode};
use rustix::mm::UserfaultfdFlags;
use rustix::process::{PidfdFlags, Resource};
use rustix::thread::CapabilitySet;

/// Whether something could be done, or the errno it failed with.
pub type Attempt = Result<(), Errno>;

/// Where the probe looks, so that a test can show it another machine.
#[derive(Clone, Debug)]
pub struct Roots {
    /// Usually `/dev`.
    pub dev: PathBuf,
    /// Usually `/proc`.
    pub proc: PathBuf,
    /// Usually `/sys`.
    pub sys: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { dev: "/dev".into(), proc: "/proc".into(), sys: "/sys".into() }
    }
}

/// Everything the probe learned, except about KVM.
#[derive(Clone, Debug)]
pub struct Host {
    /// The kernel's release, as `uname -r` prints it.
    pub kernel_release: String,
    /// The machine's architecture, as `uname -m` prints it.
    pub machine: String,
    /// Ways to create a userfaultfd, and its features.
    pub userfaultfd: Uffd,
    /// The hugetlb pools, by ascending page size.
    pub huge_pools: Vec<HugePool>,
    /// Transparent huge pages.
    pub thp: Thp,
    /// Ways to read in the background.
    pub io_uring: IoUring,
    /// `pidfd_open(2)` on the own process.
    pub pidfd_open: Attempt,
    /// `SO_PEERPIDFD` on a connected unix socket.
    pub peer_pidfd: Attempt,
    /// `process_madvise(2)` with `MADV_COLLAPSE`, on nothing.
    pub process_madvise: Attempt,
    /// `RLIMIT_MEMLOCK`, in bytes.
    pub memory_lock: Limit,
    /// `RLIMIT_NOFILE`, in descriptors.
    pub open_files: Limit,
    /// `vm.max_map_count`: mappings a process may hold.
    pub max_map_count: Option<u64>,
    /// The effective capabilities that matter here.
    pub capabilities: Capabilities,
    /// Whether a seccomp filter is in force: it may refuse calls that the
    /// kernel itself would grant.
    pub seccomp_filter: bool,
    /// CPUs this process may run on at once (affinity and cgroup quota
    /// counted).
    pub cpus: usize,
}

/// Ways to create a userfaultfd, each tried on its own.
#[derive(Clone, Debug)]
pub struct Uffd {
    /// By `/dev/userfaultfd`. Serves kernel-mode faults.
    pub device: Result<(), UffdDeviceError>,
    /// Who may open the device, if it is there.
    pub device_access: Option<FileAccess>,
    /// By `userfaultfd(2)`. Serves kernel-mode faults.
    pub syscall: Attempt,
    /// By `userfaultfd(2)` with `UFFD_USER_MODE_ONLY`.
    pub syscall_user_mode_only: Attempt,
    /// `vm.unprivileged_userfaultfd`, if the kernel has it.
    pub unprivileged_sysctl: Option<u64>,
    /// The `UFFD_FEATURE_*` bits the kernel offers; the errno if no
    /// userfaultfd could be created or it does not speak this API.
    pub features: Result<u64, Errno>,
}

impl Uffd {
    /// Whether a userfaultfd can be created in any way.
    pub fn usable(&self) -> bool {
        self.kernel_mode() || self.syscall_user_mode_only.is_ok()
    }

    /// Whether it can also serve faults the kernel itself takes, as KVM does
    /// on behalf of a guest.
    pub fn kernel_mode(&self) -> bool {
        self.device.is_ok() || self.syscall.is_ok()
    }

    /// Whether the kernel offers all these `UFFD_FEATURE_*` bits.
    pub fn has(&self, features: u32) -> bool {
        let wanted = u64::from(features);
        self.features.is_ok_and(|offered| offered & wanted == wanted)
    }
}

/// At which step `/dev/userfaultfd` refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UffdDeviceError {
    /// Opening the device.
    Open(Errno),
    /// `USERFAULTFD_IOC_NEW` on it.
    Create(Errno),
}

/// Owner and permission bits of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileAccess {
    /// Permission bits, as in `chmod`.
    pub mode: u32,
    /// Owning user.
    pub uid: u32,
    /// Owning group.
    pub gid: u32,
}

impl FileAccess {
    /// Of the file at `path`; `None` if it is not there or not reachable.
    pub fn of(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        Some(Self { mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid() })
    }
}

/// One size's pool of hugetlb pages, on all NUMA nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePool {
    /// Bytes in a page.
    pub page_bytes: u64,
    /// Pages in the pool.
    pub total: u64,
    /// Pages nobody has.
    pub free: u64,
    /// Free pages already promised to a mapping.
    pub reserved: u64,
    /// Pages the kernel may add on demand.
    pub overcommit: u64,
}

/// The settings in force for transparent huge pages (the word in brackets).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thp {
    /// For anonymous memory: `always`, `madvise`, `never`.
    pub anonymous: Option<String>,
    /// For shared memory.
    pub shmem: Option<String>,
}

/// Whether io_uring works.
#[derive(Clone, Copy, Debug)]
pub struct IoUring {
    /// Setting up a ring of the smallest size.
    pub setup: Attempt,
    /// `kernel.io_uring_disabled`: 0 allowed, 1 for privileged users and a
    /// group, 2 for nobody.
    pub disabled_sysctl: Option<u64>,
}

/// A resource limit; `None` is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What is in force.
    pub soft: Option<u64>,
    /// How far the process may raise it.
    pub hard: Option<u64>,
}

/// Effective capabilities of this process (in its own user namespace).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// `CAP_SYS_PTRACE`: a userfaultfd for kernel-mode faults by syscall, and
    /// fork events.
    pub sys_ptrace: bool,
    /// `CAP_SYS_NICE`: `process_madvise` on other processes.
    pub sys_nice: bool,
    /// `CAP_IPC_LOCK`: no limit on locked memory.
    pub ipc_lock: bool,
}

/// Probes this machine.
pub fn host() -> Host {
    host_at(&Roots::default())
}

/// Probes this machine, with its devices and settings read below `roots`.
pub fn host_at(roots: &Roots) -> Host {
    let uname = rustix::system::uname();
    let max_map_count = read_number(&roots.proc.join("sys/vm/max_map_count"));
    let pidfd = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty());
    Host {
        kernel_release: uname.release().to_string_lossy().into_owned(),
        machine: uname.machine().to_string_lossy().into_owned(),
        userfaultfd: userfaultfd(roots),
        huge_pools: huge_pools(&roots.sys.join("kernel/mm/hugepages")),
        thp: thp(&roots.sys.join("kernel/mm/transparent_hugepage")),
        io_uring: io_uring(roots),
        peer_pidfd: peer_pidfd(),
        process_madvise: pidfd.as_ref().map_err(|e| *e).and_then(process_madvise),
        pidfd_open: pidfd.map(drop),
        memory_lock: limit(Resource::Memlock),
        open_files: limit(Resource::Nofile),
        max_map_count,
        capabilities: capabilities(),
        seccomp_filter: seccomp_filter(&roots.proc.join("self/status")),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
    }
}

fn userfaultfd(roots: &Roots) -> Uffd {
    let path = roots.dev.join("userfaultfd");
    let device = uffd_by_device(&path);
    let syscall = uffd_by_syscall(0);
    let user_mode = uffd_by_syscall(UFFD_USER_MODE_ONLY);
    let fd = device.as_ref().ok().or(syscall.as_ref().ok()).or(user_mode.as_ref().ok());
    let features = match (fd, &user_mode) {
        (Some(fd), _) => uffd_features(fd),
        (None, Err(errno)) => Err(*errno),
        (None, Ok(_)) => Err(Errno::NOSYS),
    };
    Uffd {
        features,
        device_access: FileAccess::of(&path),
        device: device.map(drop),
        syscall: syscall.map(drop),
        syscall_user_mode_only: user_mode.map(drop),
        unprivileged_sysctl: read_number(&roots.proc.join("sys/vm/unprivileged_userfaultfd")),
    }
}

fn uffd_by_device(path: &Path) -> Result<OwnedFd, UffdDeviceError> {
    let device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        // The path may be anything: never wait for the other end of a FIFO.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| UffdDeviceError::Open(errno_of(&e)))?;
    // SAFETY: USERFAULTFD_IOC_NEW takes its argument by value and touches no
    // memory; a file that is no userfaultfd device answers ENOTTY.
    unsafe { ioctl::ioctl(&device, NewUserfaultfd) }.map_err(UffdDeviceError::Create)
}

fn uffd_by_syscall(extra: u32) -> Result<OwnedFd, Errno> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    let flags = flags | UserfaultfdFlags::from_bits_retain(extra);
    // SAFETY: nothing is registered with the descriptor, so it can not affect
    // any memory.
    unsafe { rustix::mm::userfaultfd(flags) }
}

fn uffd_features(fd: &OwnedFd) -> Result<u64, Errno> {
    // Asking for no feature makes the kernel report all it has.
    let mut api = uffdio_api { api: u64::from(UFFD_API), features: 0, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes exactly one uffdio_api.
    let call = unsafe { ioctl::Updater::<{ UFFDIO_API }, uffdio_api>::new(&mut api) };
    // SAFETY: the call matches its opcode, and the descriptor is a userfaultfd.
    unsafe { ioctl::ioctl(fd, call) }?;
    Ok(api.features)
}

/// `USERFAULTFD_IOC_NEW`: creates a userfaultfd through the device.
struct NewUserfaultfd;

const _: () = assert!(size_of::<uffdio_api>() == 24);

// SAFETY: opcode and argument follow linux/userfaultfd.h: `_IO(0xAA, 0x00)`,
// flags by value, a new descriptor as the result; no memory is read or written.
unsafe impl ioctl::Ioctl for NewUserfaultfd {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        ioctl::opcode::none(0xAA, 0x00)
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        std::ptr::without_provenance_mut(flags.bits() as usize)
    }

    unsafe fn output_from_ptr(
        fd: IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        // SAFETY: the call succeeded, so the kernel has just made this
        // descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

fn huge_pools(dir: &Path) -> Vec<HugePool> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut pools: Vec<HugePool> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let kib = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            let count = |file| read_number(&entry.path().join(file)).unwrap_or(0);
            Some(HugePool {
                page_bytes: kib.parse::<u64>().ok()?.checked_mul(1024)?,
                total: count("nr_hugepages"),
                free: count("free_hugepages"),
                reserved: count("resv_hugepages"),
                overcommit: count("nr_overcommit_hugepages"),
            })
        })
        .collect();
    pools.sort_by_key(|pool| pool.page_bytes);
    pools
}

fn thp(dir: &Path) -> Thp {
    let chosen = |file| {
        let text = fs::read_to_string(dir.join(file)).ok()?;
        let (_, rest) = text.split_once('[')?;
        rest.split_once(']').map(|(word, _)| word.to_owned())
    };
    Thp { anonymous: chosen("enabled"), shmem: chosen("shmem_enabled") }
}

fn io_uring(roots: &Roots) -> IoUring {
    IoUring {
        setup: io_uring::IoUring::new(2).map(drop).map_err(|e| errno_of(&e)),
        disabled_sysctl: read_number(&roots.proc.join("sys/kernel/io_uring_disabled")),
    }
}

fn peer_pidfd() -> Attempt {
    let (ours, _theirs) = UnixStream::pair().map_err(|e| errno_of(&e))?;
    let mut fd: libc::c_int = -1;
    let mut len: libc::socklen_t = 4;
    // SAFETY: both pointers are to live variables, and `len` is the size of
    // the one that is written.
    let result = unsafe {
        libc::getsockopt(
            ours.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(errno_of(&std::io::Error::last_os_error()));
    }
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the kernel has just made this descriptor for us.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

fn process_madvise(pidfd: &OwnedFd) -> Attempt {
    const NO_RANGES: usize = 0;
    // SAFETY: with no ranges the call reads no memory and advises none; it
    // only answers whether it exists and knows the advice.
    let result = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            pidfd.as_raw_fd(),
            std::ptr::null::<libc::iovec>(),
            NO_RANGES,
            libc::MADV_COLLAPSE,
            0,
        )
    };
    if result < 0 { Err(errno_of(&std::io::Error::last_os_error())) } else { Ok(()) }
}

fn limit(resource: Resource) -> Limit {
    let limit = rustix::process::getrlimit(resource);
    Limit { soft: limit.current, hard: limit.maximum }
}

fn capabilities() -> Capabilities {
    let effective = rustix::thread::capabilities(None)
        .map_or(CapabilitySet::empty(), |capabilities| capabilities.effective);
    Capabilities {
        sys_ptrace: effective.contains(CapabilitySet::SYS_PTRACE),
        sys_nice: effective.contains(CapabilitySet::SYS_NICE),
        ipc_lock: effective.contains(CapabilitySet::IPC_LOCK),
    }
}

fn seccomp_filter(status: &Path) -> bool {
    const SECCOMP_MODE_FILTER: &str = "2";
    fs::read_to_string(status).is_ok_and(|text| {
        text.lines()
            .filter_map(|line| line.strip_prefix("Seccomp:"))
            .any(|mode| mode.trim() == SECCOMP_MODE_FILTER)
    })
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let host = host();
        assert!(!host.kernel_release.is_empty());
        assert!(host.cpus > 0);
        assert_eq!(host.userfaultfd.usable(), host.userfaultfd.features.is_ok());
        if let Ok(features) = host.userfaultfd.features {
            assert_ne!(features, 0, "features=0 asks for all of them");
        }
    }

    #[test]
    fn probing_leaves_no_descriptor_open() {
        // Other tests of this process open and close theirs meanwhile: only a
        // leak grows with every round.
        const ROUNDS: usize = 200;
        let open = || fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        for _ in 0..ROUNDS {
            host();
        }
        let after = open();
        assert!(after < before + ROUNDS / 2, "{before} descriptors open before, {after} after");
    }

    #[test]
    fn a_missing_device_is_told_from_one_that_is_something_else() {
        let dir = scratch("device");
        let absent = uffd_by_device(&dir.join("userfaultfd")).unwrap_err();
        assert_eq!(absent, UffdDeviceError::Open(Errno::NOENT));
        let other = uffd_by_device(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(other, UffdDeviceError::Create(_)), "{other:?}");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn pools_and_settings_are_read_from_sysfs() {
        let dir = scratch("sysfs");
        for (name, total, free) in [("hugepages-1048576kB", 0, 0), ("hugepages-2048kB", 8, 5)] {
            let pool = dir.join(name);
            fs::create_dir_all(&pool).unwrap();
            fs::write(pool.join("nr_hugepages"), format!("{total}\n")).unwrap();
            fs::write(pool.join("free_hugepages"), format!("{free}\n")).unwrap();
        }
        fs::create_dir_all(dir.join("not-a-pool")).unwrap();
        fs::write(dir.join("enabled"), "always [madvise] never\n").unwrap();
        fs::write(dir.join("shmem_enabled"), "garbage\n").unwrap();

        let pools = huge_pools(&dir);
        assert_eq!(pools.iter().map(|p| p.page_bytes).collect::<Vec<_>>(), [2 << 20, 1 << 30]);
        assert_eq!((pools[0].total, pools[0].free, pools[0].reserved), (8, 5, 0));
        assert_eq!(thp(&dir), Thp { anonymous: Some("madvise".into()), shmem: None });
        assert_eq!(huge_pools(&dir.join("nowhere")), []);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_empty_machine_yields_unknowns_instead_of_failing() {
        let nowhere = PathBuf::from("/nonexistent");
        let roots = Roots { dev: nowhere.clone(), proc: nowhere.clone(), sys: nowhere };
        let host = host_at(&roots);
        assert_eq!(host.userfaultfd.device, Err(UffdDeviceError::Open(Errno::NOENT)));
        assert_eq!(host.userfaultfd.device_access, None);
        assert_eq!(host.max_map_count, None);
        assert!(!host.seccomp_filter);
    }

    #[test]
    fn a_seccomp_filter_is_seen() {
        let dir = scratch("seccomp");
        let status = dir.join("status");
        fs::write(&status, "Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n").unwrap();
        assert!(seccomp_filter(&status));
        fs::write(&status, "Name:\tx\nSeccomp:\t0\nSeccomp_filters:\t2\n").unwrap();
        assert!(!seccomp_filter(&status));
        fs::remove_dir_all(dir).unwrap();
    }

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("vmpager-probe-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }
}
