//! The zero page (`boot_params`): what the kernel is told at its entry.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::error::BootError;
use super::initrd::Initrd;
use super::kernel::Kernel;
use super::{CMDLINE_GPA, HIGH_MEMORY, acpi};

pub(super) const ZERO_PAGE_GPA: u64 = 0x7000;

/// Where low memory ends: above lie what firmware would keep for itself, the
/// display, and the ACPI tables.
const LOW_MEMORY_END: u64 = 0x9_fc00;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// "A boot loader without a number of its own."
const OTHER_LOADER: u8 = 0xff;

pub(super) fn write<M: GuestMemoryBackend>(
    memory: &M,
    kernel: &Kernel,
    initrd: Option<&Initrd>,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: kernel.header, ..boot_params::default() };
    params.hdr.type_of_loader = OTHER_LOADER;
    params.hdr.cmd_line_ptr = u32::try_from(CMDLINE_GPA).expect("it lies below 1 MiB");
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.gpa;
        params.hdr.ramdisk_size = initrd.bytes;
    }
    params.acpi_rsdp_addr = acpi::RSDP_GPA;
    let map = memory_map(memory);
    params.e820_entries = u8::try_from(map.len()).expect("a few entries");
    for (entry, (start, end, kind)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: start, size: end - start, r#type: kind };
    }
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE_GPA));
    LinuxBootConfigurator::write_bootparams(&params, memory).map_err(BootError::ZeroPage)
}

/// Ranges of guest memory, as (start, end, e820 type).
fn memory_map<M: GuestMemoryBackend>(memory: &M) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, LOW_MEMORY_END, E820_RAM), (LOW_MEMORY_END, HIGH_MEMORY, E820_RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(HIGH_MEMORY);
        map.push((start, region.last_addr().raw_value() + 1, E820_RAM));
    }
    map
}
