//! The initrd, as high in memory as the kernel takes it.

use std::fs::File;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::error::BootError;
use super::kernel::Kernel;
use crate::PAGE_SIZE;

/// An initrd in guest memory: below 4 GiB, as its address and size are 32-bit
/// numbers in the zero page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    pub(super) gpa: u32,
    pub(super) bytes: u32,
}

pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    path: &Path,
    kernel: &Kernel,
    low_end: u64,
) -> Result<Initrd, BootError> {
    let file_error = |error| BootError::File { what: "initrd", path: path.to_owned(), error };
    let mut file = File::open(path).map_err(file_error)?;
    let size = file.metadata().map_err(file_error)?.len();
    if size == 0 {
        return Err(BootError::InitrdEmpty { path: path.to_owned() });
    }
    let limit = low_end.min(u64::from(kernel.header.initrd_addr_max) + 1);
    let lowest = kernel.end.next_multiple_of(PAGE_SIZE);
    let gpa = limit.checked_sub(size).map(|gpa| gpa / PAGE_SIZE * PAGE_SIZE);
    let place = gpa.filter(|gpa| *gpa >= lowest);
    let place = place.and_then(|gpa| Some((u32::try_from(gpa).ok()?, u32::try_from(size).ok()?)));
    let Some((gpa, bytes)) = place else {
        return Err(BootError::InitrdTooLarge {
            path: path.to_owned(),
            bytes: size,
            available: limit.saturating_sub(lowest),
            limit,
        });
    };
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(gpa.into()), &mut file, length)
        .map_err(|error| BootError::Memory { what: "the initrd", gpa: gpa.into(), error })?;
    Ok(Initrd { gpa, bytes })
}
