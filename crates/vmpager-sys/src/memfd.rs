//! Memory that processes share by passing a descriptor: memfds sealed against
//! resizing, so that no mapping of one can ever fault for being beyond its end.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};

/// Makes a memfd of `len` zeroes, which cost memory only once written.
///
/// # Errors
///
/// If the kernel has no memory or descriptor left.
pub fn sealed(name: &str, len: u64) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let fd = match rustix::fs::memfd_create(name, flags) {
        // NOEXEC_SEAL is of Linux 6.3.
        Err(rustix::io::Errno::INVAL) => {
            rustix::fs::memfd_create(name, flags - MemfdFlags::NOEXEC_SEAL)?
        }
        other => other?,
    };
    rustix::fs::ftruncate(&fd, len)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    // Else any user could open it again by way of /proc.
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    Ok(fd)
}

/// The length of a memfd that nobody can make shorter.
///
/// # Errors
///
/// `InvalidInput` if it is something else.
pub fn sealed_len(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let seals = rustix::fs::fcntl_get_seals(fd);
    if !seals.is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        let kind = crate::peer::fd_kind(fd);
        let why = format!("{kind} is no memfd that is sealed against shrinking (F_SEAL_SHRINK)");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let len = rustix::fs::fstat(fd)?.st_size;
    u64::try_from(len).map_err(io::Error::other)
}

/// A second descriptor for the same memory, through which it can only be read.
///
/// # Errors
///
/// If `/proc` is not mounted or no descriptor is left.
pub fn read_only(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Gives the memory of some bytes back: they read as zeroes from then on, for
/// everybody (`FALLOC_FL_PUNCH_HOLE`). Of a memfd or a guest_memfd, in whole pages.
///
/// # Errors
///
/// What fallocate(2) says; some of it may be given back.
pub fn punch_hole(fd: BorrowedFd<'_>, bytes: Range<usize>) -> io::Result<()> {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let len = bytes.end.saturating_sub(bytes.start) as u64;
    Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(fd, how, bytes.start as u64, len))?)
}

/// Whether two descriptors are of the same file.
///
/// # Errors
///
/// What fstat(2) says.
pub fn is_same(a: impl AsFd, b: impl AsFd) -> io::Result<bool> {
    let (a, b) = (rustix::fs::fstat(a)?, rustix::fs::fstat(b)?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}
