//! What can be wrong with what a guest is to boot.

use std::io;
use std::path::PathBuf;

use linux_loader::configurator;
use vm_memory::GuestMemoryError;

/// Why a Linux guest could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("cannot read the {what} {path}: {error}")]
    File {
        /// What it should be: `kernel` or `initrd`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file is not a kernel that this VM can boot.
    #[error("{path} is no kernel to boot: {problem}; give a bzImage or an x86-64 ELF vmlinux")]
    NotAKernel {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The kernel does not fit.
    #[error(
        "{path} needs guest memory up to {needed:#x}, and the guest's ends at {available:#x} \
         (below 4 GiB); give the VM more memory"
    )]
    KernelTooLarge {
        /// Which file.
        path: PathBuf,
        /// Where the memory it needs ends.
        needed: u64,
        /// Where the guest's ends.
        available: u64,
    },
    /// The initrd does not fit.
    #[error(
        "the initrd {path} has {bytes} bytes, and {available} are left for it between the kernel \
         and {limit:#x}; give the VM more memory or a smaller initrd"
    )]
    InitrdTooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Bytes left.
        available: u64,
        /// Where memory ends that can hold it.
        limit: u64,
    },
    /// The initrd is empty, or not a file.
    #[error("the initrd {path} is empty; give a cpio archive, or no initrd")]
    InitrdEmpty {
        /// Which file.
        path: PathBuf,
    },
    /// The command line is too long for the kernel.
    #[error("the command line has {length} bytes, and the kernel takes {max}; shorten it")]
    CmdlineLength {
        /// Its length.
        length: usize,
        /// The most this kernel takes.
        max: usize,
    },
    /// The command line holds what would end it.
    #[error("the command line has a NUL byte at {at}; remove it")]
    CmdlineNul {
        /// Where.
        at: usize,
    },
    /// Guest memory could not be written.
    #[error("cannot write {what} to guest memory at {gpa:#x}: {error}; give the VM more memory")]
    Memory {
        /// What was written.
        what: &'static str,
        /// Where.
        gpa: u64,
        /// What is wrong there.
        error: GuestMemoryError,
    },
    /// The zero page could not be written.
    #[error("cannot write the zero page to guest memory: {0}; give the VM more memory")]
    ZeroPage(configurator::Error),
}
