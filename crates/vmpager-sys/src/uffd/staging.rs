//! Whole pieces of memory prepared elsewhere, then moved into place
//! (`UFFDIO_MOVE`, Linux 6.8).

use std::io;
use std::mem::size_of;
use std::ops::Range;

use linux_raw_sys::general as raw;
use rustix::ioctl::{Opcode, opcode};

use super::{Features, GROUP, Installed, Userfaultfd, install, update};
use crate::memory::Mapping;

const MOVE: Opcode = opcode::read_write::<raw::uffdio_move>(GROUP, 0x05);

const _: () = assert!(size_of::<raw::uffdio_move>() == 40);

/// Memory of this process in which 2 MiB are prepared, in a huge page if the
/// kernel has one, to become guest memory without being copied again.
#[derive(Debug)]
pub struct Staging {
    mapping: Mapping,
}

impl Staging {
    /// Its size: 2 MiB.
    pub const BYTES: usize = 2 << 20;

    /// Address space; memory comes when it is loaded.
    ///
    /// # Errors
    ///
    /// If there is no address space left, or the kernel has no transparent huge
    /// pages.
    pub fn new() -> io::Result<Self> {
        Ok(Self { mapping: Self::fresh()? })
    }

    fn fresh() -> io::Result<Mapping> {
        let mapping = Mapping::for_pager(Self::BYTES)?;
        mapping.want_huge_pages()?;
        Ok(mapping)
    }

    /// Makes it all zeroes.
    ///
    /// # Errors
    ///
    /// If there is no address space left.
    pub fn clear(&mut self) -> io::Result<()> {
        // Where the last piece was moved page by page, page tables are left, and
        // with them no huge page would come.
        self.mapping = Self::fresh()?;
        Ok(())
    }

    /// Has the kernel copy `len` bytes from `src`, an address of this process.
    ///
    /// # Errors
    ///
    /// `EFAULT` if not all of them can be read (the end of a mapped file, say);
    /// `ENOMEM`.
    ///
    /// # Panics
    ///
    /// If they reach beyond the end.
    pub fn load(&mut self, offset: usize, src: usize, len: usize) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            done += self.load_part(src + done, offset + done..offset + len)?;
        }
        Ok(())
    }

    fn load_part(&self, src: usize, to: Range<usize>) -> io::Result<usize> {
        let into = libc::iovec { iov_base: self.mapping.pointer(to.clone()), iov_len: to.len() };
        let from = libc::iovec { iov_base: src as *mut libc::c_void, iov_len: to.len() };
        let me = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: `into` lies in a mapping that nobody else accesses, and the
        // kernel checks `from` as it checks addresses of other processes.
        let read = unsafe { libc::process_vm_readv(me, &raw const into, 1, &raw const from, 1, 0) };
        match usize::try_from(read) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => Ok(read),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

impl Userfaultfd {
    /// Whether [`move_in`](Self::move_in) was negotiated.
    pub fn can_move(&self) -> bool {
        self.features().contains(Features::MOVE)
    }

    /// Moves what was loaded to `dst`, all of whose pages must be absent, and
    /// wakes their waiters. The memory must be this process's own, private and
    /// anonymous, and allow the same access as the staging memory: all.
    ///
    /// Pages stay huge where the kernel has no page table yet, so not where
    /// somebody has faulted, unless the memory [wants huge
    /// pages](crate::memory::GuestRange::want_huge_pages).
    ///
    /// What was not moved (`bytes` tells how much was) is to be installed
    /// otherwise.
    pub fn move_in(&self, staging: &Staging, dst: u64) -> Installed {
        let len = Staging::BYTES as u64;
        install(len, |done| {
            let mut args = raw::uffdio_move {
                dst: dst + done,
                src: staging.mapping.hva() + done,
                len: len - done,
                mode: 0,
                move_: 0,
            };
            // SAFETY: UFFDIO_MOVE reads and writes one uffdio_move. It takes
            // pages from the staging memory, which nobody has a reference to.
            let result = unsafe { update::<MOVE, _>(&self.fd, &mut args) };
            (result, args.move_)
        })
    }
}
