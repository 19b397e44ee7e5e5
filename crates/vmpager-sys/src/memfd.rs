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
    let fd = unsized_yet(name)?;
    size_and_seal(fd.as_fd(), len)?;
    // Else any user could open it again by way of /proc.
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    Ok(fd)
}

/// Makes an empty memfd, for [`size_and_seal`] to give it a length.
///
/// # Errors
///
/// If the kernel has no memory or descriptor left.
pub fn unsized_yet(name: &str) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let fd = match rustix::fs::memfd_create(name, flags) {
        // NOEXEC_SEAL is of Linux 6.3.
        Err(rustix::io::Errno::INVAL) => {
            rustix::fs::memfd_create(name, flags - MemfdFlags::NOEXEC_SEAL)?
        }
        other => other?,
    };
    // Other users shall not open it by way of /proc.
    rustix::fs::fchmod(&fd, Mode::RUSR)?;
    Ok(fd)
}

/// Gives a memfd its length for good, unless somebody has done so before.
///
/// # Errors
///
/// `InvalidInput` if it has another length for good.
pub fn size_and_seal(fd: BorrowedFd<'_>, len: u64) -> io::Result<()> {
    if sealed_len(fd).is_ok_and(|has| has != len) {
        let why = format!("it has another length than {len:#x} for good");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    if sealed_len(fd).is_ok() {
        return Ok(());
    }
    rustix::fs::ftruncate(fd, len)?;
    Ok(rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?)
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

/// Whether all of a range of a process's memory is a shared mapping of a file,
/// from `offset` in it on, as `/proc` has it at the moment.
///
/// # Errors
///
/// If this user may not see the mappings of that process.
pub fn is_mapped_at(
    file: BorrowedFd<'_>,
    offset: u64,
    pid: i32,
    hva: u64,
    len: u64,
) -> io::Result<bool> {
    let stat = rustix::fs::fstat(file)?;
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let file = format!("{major:02x}:{minor:02x} {}", stat.st_ino);
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let (mut at, end) = (hva, hva.saturating_add(len));
    for part in maps.lines().filter_map(|line| shared_part(line, &file)) {
        if at < end && (part.start..part.end).contains(&at) {
            if part.offset + (at - part.start) != offset + (at - hva) {
                return Ok(false);
            }
            at = part.end;
        }
    }
    Ok(at >= end)
}

/// A shared mapping of the file that is looked for.
#[derive(Debug)]
struct Part {
    start: u64,
    end: u64,
    offset: u64,
}

/// A line of `/proc/PID/maps`: `start-end perms offset dev inode path`.
fn shared_part(line: &str, file: &str) -> Option<Part> {
    let mut words = line.splitn(4, ' ');
    let (range, permissions) = (words.next()?, words.next()?);
    let (start, end) = range.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let offset = number(words.next()?)?;
    let rest = words.next()?.strip_prefix(file)?;
    let is_whole = rest.is_empty() || rest.starts_with(' ');
    (permissions.ends_with('s') && is_whole).then_some(Part {
        start: number(start)?,
        end: number(end)?,
        offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Mapping;

    #[test]
    fn a_mapping_is_told_from_others() {
        const PAGE: usize = 4096;
        let file = sealed("looked-for", 8 * PAGE as u64).expect("a memfd");
        let other = sealed("looked-for", 8 * PAGE as u64).expect("a memfd");
        let mapped = Mapping::file_shared_at(file.as_fd(), PAGE as u64, 4 * PAGE).expect("mapped");
        let private = Mapping::file_private(file.as_fd(), 8 * PAGE).expect("mapped");
        let own = rustix::process::getpid().as_raw_pid();
        let at = |fd: &OwnedFd, offset: usize, hva: u64, len: usize| {
            is_mapped_at(fd.as_fd(), offset as u64, own, hva, len as u64).expect("readable")
        };
        assert!(at(&file, PAGE, mapped.hva(), 4 * PAGE));
        assert!(at(&file, 2 * PAGE, mapped.hva() + PAGE as u64, PAGE), "a part of it");
        assert!(!at(&file, 0, mapped.hva(), 4 * PAGE), "another place of the file");
        assert!(!at(&file, PAGE, mapped.hva(), 400 * PAGE), "more than there is");
        assert!(!at(&other, PAGE, mapped.hva(), 4 * PAGE), "another file of that name");
        assert!(!at(&file, 0, private.hva(), 8 * PAGE), "a copy");
    }
}
