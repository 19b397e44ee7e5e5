//! userfaultfd(2), with ioctls of our own: the outcomes that matter to a pager
//! (how far an install came, and why it stopped) are in the result, not lost
//! in an `errno`.
//!
//! Follows `Documentation/admin-guide/mm/userfaultfd.rst` and
//! ioctl_userfaultfd(2). Structures come from `linux-raw-sys`; their sizes and
//! the ioctl numbers built from them are checked at compile time.

mod message;
mod minor;
mod protect;
mod staging;

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, Updater, opcode};

pub use self::message::{Left, Message, Messages};
pub use self::staging::Staging;
use crate::memory::GuestRange;
use crate::peer::{fd_kind, is_userfaultfd};

const GROUP: u8 = 0xaa;
const API: Opcode = opcode::read_write::<raw::uffdio_api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<raw::uffdio_register>(GROUP, 0x00);
const UNREGISTER: Opcode = opcode::read::<raw::uffdio_range>(GROUP, 0x01);
const WAKE: Opcode = opcode::read::<raw::uffdio_range>(GROUP, 0x02);
const COPY: Opcode = opcode::read_write::<raw::uffdio_copy>(GROUP, 0x03);
const WRITEPROTECT: Opcode = opcode::read_write::<raw::uffdio_writeprotect>(GROUP, 0x06);
const POISON: Opcode = opcode::read_write::<raw::uffdio_poison>(GROUP, 0x08);
/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`.
const DEVICE_NEW: Opcode = opcode::none(GROUP, 0x00);

const _: () = {
    assert!(API == linux_raw_sys::ioctl::UFFDIO_API);
    assert!(REGISTER == linux_raw_sys::ioctl::UFFDIO_REGISTER);
    assert!(UNREGISTER == linux_raw_sys::ioctl::UFFDIO_UNREGISTER);
    assert!(WAKE == linux_raw_sys::ioctl::UFFDIO_WAKE);
    assert!(COPY == linux_raw_sys::ioctl::UFFDIO_COPY);
    assert!(WRITEPROTECT == linux_raw_sys::ioctl::UFFDIO_WRITEPROTECT);
    assert!(size_of::<raw::uffdio_poison>() == 32);
    assert!(size_of::<raw::uffd_msg>() == Message::BYTES);
};

/// A set of `UFFD_FEATURE_*` bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);
    /// The VMM's `madvise(MADV_DONTNEED)` and the like are reported.
    pub const EVENT_REMOVE: Self = Self(raw::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// The VMM's `munmap` is reported.
    pub const EVENT_UNMAP: Self = Self(raw::UFFD_FEATURE_EVENT_UNMAP as u64);
    /// Missing faults on hugetlb memory.
    pub const MISSING_HUGETLBFS: Self = Self(raw::UFFD_FEATURE_MISSING_HUGETLBFS as u64);
    /// Faults say which thread waits.
    pub const THREAD_ID: Self = Self(raw::UFFD_FEATURE_THREAD_ID as u64);
    /// `UFFDIO_POISON` exists.
    pub const POISON: Self = Self(raw::UFFD_FEATURE_POISON as u64);
    /// Minor faults on shared memory: on pages that its file has, and the mapping not.
    pub const MINOR_SHMEM: Self = Self(raw::UFFD_FEATURE_MINOR_SHMEM as u64);
    /// `UFFDIO_MOVE` exists.
    pub const MOVE: Self = Self(raw::UFFD_FEATURE_MOVE as u64);

    /// Whether all bits of `other` are in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits of both sets.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Why no userfaultfd could be made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Neither the device nor the system call gave one.
    #[error(
        "no userfaultfd: /dev/userfaultfd: {device}; userfaultfd(2): {syscall}. Give this user \
         access to /dev/userfaultfd, or CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"
    )]
    Unavailable {
        /// What opening the device said.
        device: io::Error,
        /// What the system call said.
        syscall: io::Error,
    },
    /// The kernel lacks a feature asked for.
    #[error("this kernel's userfaultfd lacks features {wanted:#x}: {error}")]
    Features {
        /// The bits asked for.
        wanted: u64,
        /// What `UFFDIO_API` said.
        error: io::Error,
    },
    /// A descriptor that was handed over is something else.
    #[error("the descriptor is no userfaultfd but {kind}")]
    NotUserfaultfd {
        /// What it is, as `/proc/self/fd` names it.
        kind: String,
    },
    /// Preparing a descriptor failed.
    #[error("preparing the userfaultfd: {0}")]
    Io(#[from] io::Error),
}

/// How an install ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Bytes installed from the start of the range.
    pub bytes: u64,
    /// Why it stopped before the end of the range; `None` if it did not.
    pub stop: Option<Stop>,
}

/// Why an install stopped at the first page it did not install.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// EEXIST: that page is present already (trap: its waiters still need a
    /// wake).
    Present,
    /// EAGAIN: the memory's layout is changing; read the events first.
    Changing,
    /// ENOENT: the range is not registered, or no longer mapped.
    Unmapped,
    /// ESRCH: the process is gone.
    Gone,
    /// ENOMEM or, for hugetlb, ENOSPC: no page to install into.
    NoMemory,
    /// EFAULT: the source address could not be read.
    SourceFault,
    /// Anything else.
    Other(Errno),
}

impl Stop {
    fn from_errno(errno: Errno) -> Self {
        match errno {
            Errno::EXIST => Self::Present,
            Errno::AGAIN => Self::Changing,
            Errno::NOENT => Self::Unmapped,
            Errno::SRCH => Self::Gone,
            Errno::NOMEM | Errno::NOSPC => Self::NoMemory,
            Errno::FAULT => Self::SourceFault,
            other => Self::Other(other),
        }
    }
}

/// A userfaultfd: of this process, or handed over by the process whose memory
/// it serves. Always non-blocking.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    features: Features,
    /// Whether reads can be told not to wait, as far as is known.
    nowait: AtomicBool,
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Userfaultfd {
    /// Makes a userfaultfd for this process's memory that also reports faults
    /// the kernel takes on its behalf, and negotiates exactly `features`.
    ///
    /// # Errors
    ///
    /// If this user may not have one, or the kernel lacks a feature.
    pub fn open(features: Features) -> Result<Self, OpenError> {
        let fd = match open_by_device() {
            Ok(fd) => fd,
            Err(device) => {
                open_by_syscall().map_err(|syscall| OpenError::Unavailable { device, syscall })?
            }
        };
        let mut api =
            raw::uffdio_api { api: raw::UFFD_API.into(), features: features.0, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one uffdio_api.
        let result = unsafe { update::<API, _>(&fd, &mut api) };
        result.map_err(|e| OpenError::Features { wanted: features.0, error: e.into() })?;
        Ok(Self { fd, features, nowait: AtomicBool::new(true) })
    }

    /// Takes over a userfaultfd made and negotiated by another process. Its
    /// features are read from its `fdinfo`, since the kernel negotiates once.
    ///
    /// # Errors
    ///
    /// If it is another kind of descriptor.
    pub fn adopt(fd: OwnedFd) -> Result<Self, OpenError> {
        if !is_userfaultfd(fd.as_fd()) {
            return Err(OpenError::NotUserfaultfd { kind: fd_kind(fd.as_fd()) });
        }
        // A blocking one reports EPOLLERR for ever.
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(io::Error::from)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        let features = Features(features_in_fdinfo(&info));
        Ok(Self { fd, features, nowait: AtomicBool::new(true) })
    }

    /// A second descriptor for the same userfaultfd, to hand to another
    /// process.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// The features negotiated.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Registers memory of this process for missing faults: until a page of it
    /// is installed, whoever touches it waits.
    ///
    /// # Errors
    ///
    /// If the range is not mapped, is registered elsewhere, or is of a kind
    /// that userfaultfd does not serve.
    pub fn register_missing(&self, range: &GuestRange) -> io::Result<()> {
        let mut args = raw::uffdio_register {
            range: raw::uffdio_range { start: range.hva(), len: range.len() },
            mode: 1, // UFFDIO_REGISTER_MODE_MISSING
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one uffdio_register; that
        // the range may fill up by itself is promised by GuestRange.
        let result = unsafe { update::<REGISTER, _>(&self.fd, &mut args) };
        Ok(result?)
    }

    /// Ends the registration of a range: waiters are woken, and pages still
    /// absent read as zeroes from then on.
    ///
    /// # Errors
    ///
    /// If the range is not registered with this userfaultfd.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = raw::uffdio_range { start, len };
        // SAFETY: UFFDIO_UNREGISTER reads one uffdio_range.
        let result = unsafe { update::<UNREGISTER, _>(&self.fd, &mut range) };
        Ok(result?)
    }

    /// Installs `len` bytes at `dst` from `src`, an address in **this**
    /// process that the kernel reads, and wakes the waiters of what it
    /// installed. Pages that are present are never overwritten.
    ///
    /// The kernel validates both addresses, so this cannot break this
    /// process's memory safety: `dst` must lie in a registered range, and an
    /// unreadable `src` ends in [`Stop::SourceFault`].
    pub fn copy(&self, dst: u64, src: usize, len: u64) -> Installed {
        self.copy_with(0, dst, src, len)
    }

    /// As [`copy`](Self::copy), but wakes nobody: [`wake`](Self::wake) must
    /// follow, and may do so for many copies at once.
    pub fn copy_without_waking(&self, dst: u64, src: usize, len: u64) -> Installed {
        self.copy_with(u64::from(raw::UFFDIO_COPY_MODE_DONTWAKE), dst, src, len)
    }

    fn copy_with(&self, mode: u64, dst: u64, src: usize, len: u64) -> Installed {
        let src = src as u64;
        install(len, |done| {
            let mut args = raw::uffdio_copy {
                dst: dst + done,
                src: src + done,
                len: len - done,
                mode,
                copy: 0,
            };
            // SAFETY: UFFDIO_COPY reads and writes one uffdio_copy.
            let result = unsafe { update::<COPY, _>(&self.fd, &mut args) };
            (result, args.copy)
        })
    }

    /// Marks absent pages as poisoned: touching one raises SIGBUS, or a
    /// machine check in a guest.
    pub fn poison(&self, start: u64, len: u64) -> Installed {
        install(len, |done| {
            let range = raw::uffdio_range { start: start + done, len: len - done };
            let mut args = raw::uffdio_poison { range, mode: 0, updated: 0 };
            // SAFETY: UFFDIO_POISON reads and writes one uffdio_poison.
            let result = unsafe { update::<POISON, _>(&self.fd, &mut args) };
            (result, args.updated)
        })
    }

    /// Wakes whoever waits in a range; those whose page is still absent fault
    /// again.
    ///
    /// # Errors
    ///
    /// If the range is misaligned or empty.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = raw::uffdio_range { start, len };
        // SAFETY: UFFDIO_WAKE reads one uffdio_range.
        let result = unsafe { update::<WAKE, _>(&self.fd, &mut range) };
        Ok(result?)
    }

    /// Whether the process whose memory this is still has it.
    pub fn is_alive(&self, start: u64, len: u64) -> bool {
        self.lift_protection(start, len) != Err(Errno::SRCH)
    }

    /// Whether an event is unread, or about to be sent: somebody waits for it to be
    /// read.
    pub fn is_changing(&self, start: u64, len: u64) -> bool {
        self.lift_protection(start, len) == Err(Errno::AGAIN)
    }

    /// Asks for write protection to be lifted where none is, which changes nothing.
    /// Fails with ESRCH if the memory is gone, with EAGAIN while its layout is
    /// changing, whatever the range.
    fn lift_protection(&self, start: u64, len: u64) -> rustix::io::Result<()> {
        let range = raw::uffdio_range { start, len };
        let mut args = raw::uffdio_writeprotect { range, mode: 0 };
        // SAFETY: UFFDIO_WRITEPROTECT reads one uffdio_writeprotect.
        unsafe { update::<WRITEPROTECT, _>(&self.fd, &mut args) }
    }

    /// Reads what is pending into `messages`, without waiting.
    ///
    /// Asks for that with each read where the kernel can (6.18 does):
    /// the process that handed the descriptor over shares its flags, and could
    /// clear `O_NONBLOCK` at any time.
    ///
    /// # Errors
    ///
    /// Anything but "nothing there", which leaves `messages` empty.
    pub fn read(&self, messages: &mut Messages) -> io::Result<()> {
        messages.clear();
        messages.fill(0);
        loop {
            match self.read_once(messages.buffer()) {
                Ok(bytes) => messages.fill(bytes),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {}
                Err(Errno::OPNOTSUPP | Errno::SPIPE | Errno::NOSYS)
                    if self.nowait.swap(false, Ordering::Relaxed) =>
                {
                    continue;
                }
                Err(e) => return Err(e.into()),
            }
            return Ok(());
        }
    }

    fn read_once(&self, to: &[AtomicU64]) -> rustix::io::Result<usize> {
        let len = to.len() * 8;
        let base = to.as_ptr().cast_mut().cast::<libc::c_void>();
        let fd = self.fd.as_raw_fd();
        let count = if self.nowait.load(Ordering::Relaxed) {
            let buffer = libc::iovec { iov_base: base, iov_len: len };
            // SAFETY: the kernel writes to these words alone, which are atomics:
            // others may look at them meanwhile. (An offset of -1 is none.)
            unsafe { libc::preadv2(fd, &raw const buffer, 1, -1, libc::RWF_NOWAIT) }
        } else {
            // SAFETY: as above.
            unsafe { libc::read(fd, base, len) }
        };
        usize::try_from(count)
            .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

/// Repeats an install ioctl until the range is done or it stops for a reason.
/// The kernel reports in three ways: an errno, a negative count in the
/// argument, or a count short of the range, from which to go on.
fn install(len: u64, mut step: impl FnMut(u64) -> (rustix::io::Result<()>, i64)) -> Installed {
    let mut done = 0;
    while done < len {
        let (result, count) = step(done);
        match (result, u64::try_from(count)) {
            (Ok(()), _) => done = len,
            (Err(_), Ok(part)) if part > 0 => done += part,
            (Err(errno), _) => {
                return Installed { bytes: done, stop: Some(Stop::from_errno(errno)) };
            }
        }
    }
    Installed { bytes: done, stop: None }
}

/// Calls an ioctl that reads, and may write, one `T`; what it wrote is in `args`
/// even if it failed.
///
/// # Safety
///
/// `OPCODE` must be an ioctl of userfaultfd with an argument of type `T`.
unsafe fn update<const OPCODE: Opcode, T>(fd: &OwnedFd, args: &mut T) -> rustix::io::Result<()> {
    // SAFETY: the caller matches opcode and type.
    let updater = unsafe { Updater::<OPCODE, T>::new(args) };
    // SAFETY: as above; none of these ioctls touches other memory of this
    // process but registered ranges, which may fill up by themselves.
    unsafe { ioctl::ioctl(fd, updater) }
}

fn open_by_device() -> io::Result<OwnedFd> {
    let device =
        rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let flags = (OFlags::CLOEXEC | OFlags::NONBLOCK).bits();
    // SAFETY: USERFAULTFD_IOC_NEW takes open flags and returns a descriptor.
    let result = unsafe { ioctl::ioctl(&device, NewByDevice(flags as usize)) };
    Ok(result?)
}

fn open_by_syscall() -> io::Result<OwnedFd> {
    use rustix::mm::{UserfaultfdFlags, userfaultfd};
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: creating a userfaultfd changes no memory.
    let result = unsafe { userfaultfd(flags) };
    Ok(result?)
}

/// `USERFAULTFD_IOC_NEW`: flags as the argument itself, a descriptor as the
/// return value.
struct NewByDevice(usize);

// SAFETY: the opcode takes its argument by value and has no output but the
// returned descriptor, which nobody else owns.
unsafe impl ioctl::Ioctl for NewByDevice {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        DEVICE_NEW
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(
        out: ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        // SAFETY: on success the kernel returns a new descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

/// `API: aa:<features>:<all features>` in `/proc/self/fdinfo/N`.
fn features_in_fdinfo(info: &str) -> u64 {
    info.lines()
        .find_map(|line| line.strip_prefix("API:"))
        .and_then(|api| api.trim().split(':').nth(1))
        .and_then(|features| u64::from_str_radix(features, 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_does_not_wait_though_the_peer_made_the_descriptor_blocking() {
        let uffd = match Userfaultfd::open(Features::NONE) {
            Ok(uffd) => uffd,
            Err(error) => return vmpager_testing::skipped(&error.to_string()),
        };
        let mut messages = Messages::new();
        uffd.read(&mut messages).expect("nothing there is no error");
        if !uffd.nowait.load(Ordering::Relaxed) {
            return vmpager_testing::skipped("this kernel's userfaultfd knows no RWF_NOWAIT");
        }
        rustix::fs::fcntl_setfl(&uffd.fd, OFlags::empty()).expect("flags can be set");
        uffd.read(&mut messages).expect("nothing there is no error");
        assert!(messages.is_empty());
    }

    #[test]
    fn features_are_read_from_fdinfo() {
        let info = "pos:\t0\nflags:\t02004002\npending:\t0\ntotal:\t0\nAPI:\taa:8:1ffff\n";
        assert!(Features(features_in_fdinfo(info)).contains(Features::EVENT_REMOVE));
        assert_eq!(features_in_fdinfo("pos:\t0\n"), 0);
        assert_eq!(features_in_fdinfo("API:\taa:zz"), 0);
    }

    #[test]
    fn an_install_goes_on_from_where_the_kernel_stopped() {
        // As EAGAIN, with a count short of the range, then EEXIST.
        let answers = [(Err(Errno::AGAIN), 4096), (Err(Errno::EXIST), -17)];
        let mut answers = answers.into_iter();
        let result = install(3 * 4096, |_| answers.next().expect("asked twice"));
        assert_eq!(result, Installed { bytes: 4096, stop: Some(Stop::Present) });
        // Older kernels leave the field alone.
        let result = install(4096, |_| (Err(Errno::AGAIN), 0));
        assert_eq!(result, Installed { bytes: 0, stop: Some(Stop::Changing) });
        let result =
            install(2 * 4096, |done| (Ok(()), i64::try_from(2 * 4096 - done).expect("small")));
        assert_eq!(result, Installed { bytes: 2 * 4096, stop: None });
    }
}
