//! Transparent huge pages for memory that is in place, of this process or
//! another: `process_madvise(2)` with `MADV_COLLAPSE` (Linux 6.1).

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

const MADV_COLLAPSE: libc::c_int = 25;

/// Copies the pages of a range into huge pages. Their contents stay what they
/// are; threads that touch them meanwhile wait. Takes about as long as copying,
/// twice.
///
/// `process` is a pidfd. For another process it takes the right to trace it and
/// `CAP_SYS_NICE`.
///
/// # Errors
///
/// `EINVAL` if a page is absent or the mapping may not have huge pages,
/// `EAGAIN` if a page is in use just now, `ENOMEM` and `EBUSY` if no huge page is
/// free or may be charged, `EPERM`, and `ESRCH` if the process is gone.
pub fn collapse(process: BorrowedFd<'_>, hva: u64, len: u64) -> Result<(), Errno> {
    let number = |value: u64| usize::try_from(value).map_err(|_| Errno::INVAL);
    let range = libc::iovec { iov_base: number(hva)? as *mut libc::c_void, iov_len: number(len)? };
    // SAFETY: the kernel reads one iovec, which outlives the call. Collapsing
    // changes which physical pages back the range, not what they hold.
    let done = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            process.as_raw_fd(),
            &raw const range,
            1,
            MADV_COLLAPSE,
            0,
        )
    };
    match done {
        ..0 => Err(last_errno()),
        _ => Ok(()),
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}
