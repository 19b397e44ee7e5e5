//! Private mappings of a memfd that many processes share: pages that the file has are
//! mapped, not copied.
//!
//! What a process writes there is its own from then on, since the mapping is private;
//! until then the page is the file's. Linux says that minor faults are for shared
//! memory (`Documentation/admin-guide/mm/userfaultfd.rst`), and takes private mappings
//! of a memfd for such memory, too (seen on 6.18): `UFFDIO_CONTINUE` maps the file's
//! page there for reading, `UFFDIO_ZEROPAGE` zeroes, whatever the file has.

use std::io;

use linux_raw_sys::general as raw;
use rustix::ioctl::{Opcode, opcode};

use super::{GROUP, Installed, REGISTER, Userfaultfd, install, update};
use crate::memory::GuestRange;

const ZEROPAGE: Opcode = opcode::read_write::<raw::uffdio_zeropage>(GROUP, 0x04);
const CONTINUE: Opcode = opcode::read_write::<raw::uffdio_continue>(GROUP, 0x07);

const _: () = {
    assert!(ZEROPAGE == linux_raw_sys::ioctl::UFFDIO_ZEROPAGE);
    assert!(CONTINUE == linux_raw_sys::ioctl::UFFDIO_CONTINUE);
};

impl Userfaultfd {
    /// Registers memory of this process for missing faults and for minor ones: until a
    /// page of it is installed, whoever touches it waits, also where the file that it is
    /// a mapping of has that page.
    ///
    /// # Errors
    ///
    /// As [`register_missing`](Self::register_missing); also if the kernel knows no minor
    /// faults of such memory.
    pub fn register_minor(&self, range: &GuestRange) -> io::Result<()> {
        let mut args = raw::uffdio_register {
            range: raw::uffdio_range { start: range.hva(), len: range.len() },
            mode: 5, // UFFDIO_REGISTER_MODE_MISSING and _MINOR
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one uffdio_register; that
        // the range may fill up by itself is promised by GuestRange.
        let result = unsafe { update::<REGISTER, _>(&self.fd, &mut args) };
        Ok(result?)
    }

    /// Maps pages of the file that the range is a mapping of, which must be there
    /// ([`Stop::SourceFault`](super::Stop::SourceFault) if not). Pages that are mapped
    /// already stay as they are. Wakes the waiters if `wake` says so.
    pub fn map_file_pages(&self, start: u64, len: u64, wake: bool) -> Installed {
        let mode = if wake {
            0
        } else {
            1 /* UFFDIO_CONTINUE_MODE_DONTWAKE */
        };
        install(len, |done| {
            let range = raw::uffdio_range { start: start + done, len: len - done };
            let mut args = raw::uffdio_continue { range, mode, mapped: 0 };
            // SAFETY: UFFDIO_CONTINUE reads and writes one uffdio_continue.
            let result = unsafe { update::<CONTINUE, _>(&self.fd, &mut args) };
            (result, args.mapped)
        })
    }

    /// Maps zeroes, which take no memory until they are written to, where pages are
    /// absent. Not for hugetlb. Wakes the waiters if `wake` says so.
    pub fn map_zeroes(&self, start: u64, len: u64, wake: bool) -> Installed {
        let mode = if wake { 0 } else { u64::from(raw::UFFDIO_ZEROPAGE_MODE_DONTWAKE) };
        install(len, |done| {
            let range = raw::uffdio_range { start: start + done, len: len - done };
            let mut args = raw::uffdio_zeropage { range, mode, zeropage: 0 };
            // SAFETY: UFFDIO_ZEROPAGE reads and writes one uffdio_zeropage.
            let result = unsafe { update::<ZEROPAGE, _>(&self.fd, &mut args) };
            (result, args.zeropage)
        })
    }
}
