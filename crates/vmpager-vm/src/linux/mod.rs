//! Booting Linux without firmware, by the 64-bit boot protocol of
//! `Documentation/arch/x86/boot.rst`.
//!
//! [`load`] puts everything a kernel expects into fresh guest memory and says
//! how the boot vCPU enters it:
//!
//! ```text
//!       0x500  GDT                       registers.rs
//!      0x7000  zero page, with e820      zero_page.rs
//!      0x8ff0  stack, growing down
//!      0x9000  page tables, 4 GiB        registers.rs
//!     0x20000  command line
//!     0xe0000  ACPI tables               acpi.rs
//!    0x100000  kernel, from here up      kernel.rs
//!         ...  initrd, as high as below 4 GiB the kernel takes it
//! ```

mod acpi;
mod error;
mod initrd;
mod kernel;
mod registers;
mod zero_page;

use std::path::PathBuf;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub use error::BootError;
pub(crate) use registers::{Entry, INITIAL_MSRS};

use crate::error::VmError;

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxBoot {
    /// A bzImage, or a 64-bit ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The initial file system, if there is one.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl LinuxBoot {
    /// A command line that suits this machine: the console on its serial port,
    /// and no waiting after a panic.
    pub const CMDLINE: &str = "console=ttyS0 panic=-1";
}

/// The most vCPUs a Linux guest has here.
pub const MAX_VCPUS: u8 = 8;

const CMDLINE_GPA: u64 = 0x2_0000;
/// Below this is real-mode memory, above it the kernel.
const HIGH_MEMORY: u64 = 0x10_0000;

/// Loads kernel, initrd, command line and tables into guest memory, which
/// reads as zeroes, and says how the boot vCPU enters the kernel. The others
/// wait for it to start them (INIT, SIPI).
///
/// # Errors
///
/// [`BootError`] if a file is missing, is no kernel, or does not fit.
pub(crate) fn load<M: GuestMemoryBackend>(
    memory: &M,
    boot: &LinuxBoot,
    vcpus: u8,
) -> Result<Entry, VmError> {
    let low_end = low_memory_end(memory);
    let kernel = kernel::load(memory, &boot.kernel, low_end)?;
    let initrd = match &boot.initrd {
        Some(path) => Some(initrd::load(memory, path, &kernel, low_end)?),
        None => None,
    };
    load_cmdline(memory, &boot.cmdline, kernel.max_cmdline)?;
    write(memory, "the ACPI tables", acpi::RSDP_GPA, &acpi::tables(vcpus))?;
    zero_page::write(memory, &kernel, initrd.as_ref())?;
    registers::write_tables(memory)?;
    Ok(Entry::new(kernel.entry))
}

/// Where the memory that starts at 0 ends: below the hole under 4 GiB.
fn low_memory_end<M: GuestMemoryBackend>(memory: &M) -> u64 {
    let region = memory.find_region(GuestAddress(0));
    region.map_or(0, |region| region.last_addr().raw_value() + 1)
}

fn load_cmdline<M: GuestMemoryBackend>(
    memory: &M,
    cmdline: &str,
    max: usize,
) -> Result<(), BootError> {
    if cmdline.len() > max {
        return Err(BootError::CmdlineLength { length: cmdline.len(), max });
    }
    if let Some(at) = cmdline.find('\0') {
        return Err(BootError::CmdlineNul { at });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(memory, "the command line", CMDLINE_GPA, &bytes)
}

fn write<M: GuestMemoryBackend>(
    memory: &M,
    what: &'static str,
    gpa: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(gpa)).map_err(|error| BootError::Memory {
        what,
        gpa,
        error,
    })
}

#[cfg(test)]
mod tests;
