//! Write protection by userfaultfd: whoever writes waits until it is lifted.

use std::io;

use linux_raw_sys::general as raw;

use super::{Installed, REGISTER, Userfaultfd, WRITEPROTECT, update};

impl Userfaultfd {
    /// Registers memory that is registered for missing pages for write
    /// protection as well. `start` and `len` lie in the process the userfaultfd
    /// belongs to.
    ///
    /// # Errors
    ///
    /// If the range is not registered, or of a kind the kernel does not protect
    /// (shared memory needs Linux 5.19).
    pub fn register_protection(&self, start: u64, len: u64) -> io::Result<()> {
        let range = raw::uffdio_range { start, len };
        // MODE_MISSING and MODE_WP: what it is registered for already stays.
        let mut args = raw::uffdio_register { range, mode: 3, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes one uffdio_register. The range
        // is registered already: that it fills up by itself is settled.
        let result = unsafe { update::<REGISTER, _>(&self.fd, &mut args) };
        Ok(result?)
    }

    /// From the return of this call on, nobody writes to a range through the
    /// mapping it is registered for: whoever does waits. Pages not there yet
    /// are protected too, where the memory is shared.
    ///
    /// # Errors
    ///
    /// `WouldBlock` while the memory's layout is changing: read the events.
    pub fn protect(&self, start: u64, len: u64) -> io::Result<()> {
        self.set_protection(start, len, 1) // UFFDIO_WRITEPROTECT_MODE_WP
    }

    /// Lifts the protection, and lets those go on who waited for it.
    ///
    /// # Errors
    ///
    /// As [`protect`](Self::protect).
    pub fn unprotect(&self, start: u64, len: u64) -> io::Result<()> {
        self.set_protection(start, len, 0)
    }

    fn set_protection(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        let range = raw::uffdio_range { start, len };
        let mut args = raw::uffdio_writeprotect { range, mode };
        // SAFETY: UFFDIO_WRITEPROTECT reads one uffdio_writeprotect.
        let result = unsafe { update::<WRITEPROTECT, _>(&self.fd, &mut args) };
        Ok(result?)
    }

    /// As [`copy`](Self::copy), but the pages are write-protected from the
    /// first moment on.
    pub fn copy_protected(&self, dst: u64, src: usize, len: u64) -> Installed {
        self.copy_with(u64::from(raw::UFFDIO_COPY_MODE_WP), dst, src, len)
    }
}
