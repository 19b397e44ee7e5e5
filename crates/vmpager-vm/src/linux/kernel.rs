//! The kernel: a bzImage or an ELF vmlinux, brought into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Address, ByteValued, GuestAddress, GuestMemoryBackend};

use super::HIGH_MEMORY;
use super::error::BootError;

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    /// Its 64-bit entry point.
    pub(super) entry: u64,
    /// Where the memory ends that it needs before it reads the memory map.
    pub(super) end: u64,
    /// The header it came with, or one made for it.
    pub(super) header: setup_header,
    /// The longest command line it takes.
    pub(super) max_cmdline: usize,
}

/// Where a bzImage keeps its header.
const HEADER_AT: u64 = 0x1f1;
/// `HdrS`, the header's magic.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// The first version of the protocol whose header tells of a 64-bit entry.
const PROTOCOL_2_12: u16 = 0x20c;
/// `xloadflags`: the 64-bit entry point is there.
const XLF_KERNEL_64: u16 = 1;
/// From the start of a bzImage's protected-mode code to its 64-bit entry.
const ENTRY_64: u64 = 0x200;
/// `COMMAND_LINE_SIZE` of x86, without the end.
const MAX_CMDLINE: u32 = 2047;

/// `CONFIG_PHYSICAL_ALIGN` of most kernels.
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// ELF: `EI_CLASS` and `e_machine`.
const CLASS_AT: usize = 4;
const CLASS_64: u8 = 2;
const MACHINE_AT: usize = 18;
const MACHINE_X86_64: [u8; 2] = [62, 0];
/// ELF: the header's length, and in it `e_phoff` and `e_phnum`.
const ELF_HEADER: usize = 64;
const PHOFF_AT: usize = 32;
const PHNUM_AT: usize = 56;
/// ELF: a program header's length, and the type of those to load. Their address
/// is at 24, their length in memory at 40.
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: [u8; 4] = [1, 0, 0, 0];

pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    path: &Path,
    low_end: u64,
) -> Result<Kernel, BootError> {
    let file_error = |error| BootError::File { what: "kernel", path: path.to_owned(), error };
    let mut file = File::open(path).map_err(file_error)?;
    let mut start = Vec::new();
    (&mut file).take(64).read_to_end(&mut start).map_err(file_error)?;
    file.rewind().map_err(file_error)?;
    if start.starts_with(b"\x7fELF") {
        load_elf(memory, path, &start, &mut file, low_end)
    } else {
        load_bzimage(memory, path, &mut file, low_end)
    }
}

fn load_bzimage<M: GuestMemoryBackend>(
    memory: &M,
    path: &Path,
    file: &mut File,
    low_end: u64,
) -> Result<Kernel, BootError> {
    let (header, file_bytes) = read_header(path, file)?;
    let load_at = header.pref_address;
    // It unpacks itself around where it was put, within `init_size`.
    let needed = u64::from(header.init_size).max(file_bytes);
    let end = fits(path, load_at.saturating_add(needed), low_end)?;
    let loaded = BzImage::load(memory, Some(GuestAddress(load_at)), file, None)
        .map_err(|error| no_kernel(path, error))?;
    Ok(Kernel {
        entry: load_at + ENTRY_64,
        end,
        // As loaded: `code32_start` says where it was put.
        header: loaded.setup_header.unwrap_or(header),
        max_cmdline: to_length(header.cmdline_size),
    })
}

/// The header of a bzImage that can be entered in 64-bit mode, and the size of
/// the file.
fn read_header(path: &Path, file: &mut File) -> Result<(setup_header, u64), BootError> {
    let file_error = |error| BootError::File { what: "kernel", path: path.to_owned(), error };
    let file_bytes = file.metadata().map_err(file_error)?.len();
    let mut header = setup_header::default();
    let read =
        file.seek(SeekFrom::Start(HEADER_AT)).and_then(|_| file.read_exact(header.as_mut_slice()));
    match read {
        Ok(()) if { header.header } == HEADER_MAGIC => {}
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
            return Err(file_error(error));
        }
        Ok(()) | Err(_) => {
            return Err(no_kernel(path, "it has no ELF magic, and no HdrS at 0x202"));
        }
    }
    let version = header.version;
    if version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        let problem = format!("boot protocol {version:#x}, without an entry point in 64-bit mode");
        return Err(no_kernel(path, problem));
    }
    let load_at = header.pref_address;
    if load_at < HIGH_MEMORY {
        return Err(no_kernel(path, format!("it prefers to run at {load_at:#x}, below 1 MiB")));
    }
    let payload_at = (u64::from(header.setup_sects.max(1)) + 1) * 512;
    let payload = u64::from(header.payload_offset) + u64::from(header.payload_length);
    if payload_at + payload > file_bytes {
        let needed = payload_at + payload;
        let problem = format!("it has {file_bytes} bytes and its header tells of {needed}");
        return Err(no_kernel(path, problem));
    }
    Ok((header, file_bytes))
}

fn load_elf<M: GuestMemoryBackend>(
    memory: &M,
    path: &Path,
    start: &[u8],
    file: &mut File,
    low_end: u64,
) -> Result<Kernel, BootError> {
    let is_x86_64 = start.get(CLASS_AT) == Some(&CLASS_64)
        && start.get(MACHINE_AT..MACHINE_AT + 2) == Some(&MACHINE_X86_64[..]);
    if !is_x86_64 {
        return Err(no_kernel(path, "an ELF file of another processor"));
    }
    let file_error = |error| BootError::File { what: "kernel", path: path.to_owned(), error };
    // Before it is loaded: the loader's error would not tell memory that ends
    // from a file that does.
    let end = fits(path, elf_end(start, file).map_err(file_error)?, low_end)?;
    let loaded = Elf::load(memory, None, file, Some(GuestAddress(HIGH_MEMORY)))
        .map_err(|error| no_kernel(path, error))?;
    let entry = loaded.kernel_load.raw_value();
    if entry >= end {
        return Err(no_kernel(path, format!("its entry point {entry:#x} is outside of it")));
    }
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL_2_12,
        kernel_alignment: KERNEL_ALIGNMENT,
        initrd_addr_max: u32::MAX,
        cmdline_size: MAX_CMDLINE,
        ..setup_header::default()
    };
    Ok(Kernel { entry, end, header, max_cmdline: to_length(MAX_CMDLINE) })
}

/// Where the memory ends that an ELF file's segments take. What is wrong with
/// its program headers is for the loader to say.
fn elf_end(start: &[u8], file: &mut File) -> io::Result<u64> {
    let word = |bytes: &[u8], at| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let Some(start) = start.first_chunk::<ELF_HEADER>() else { return Ok(0) };
    let count = u16::from_le_bytes([start[PHNUM_AT], start[PHNUM_AT + 1]]);
    file.seek(SeekFrom::Start(word(start, PHOFF_AT)))?;
    let mut headers = Vec::new();
    file.take(u64::from(count) * PROGRAM_HEADER as u64).read_to_end(&mut headers)?;
    let (headers, _) = headers.as_chunks::<PROGRAM_HEADER>();
    let loaded = headers.iter().filter(|header| header[..4] == PT_LOAD);
    let ends = loaded.map(|header| word(header, 24).saturating_add(word(header, 40)));
    Ok(ends.max().unwrap_or(0))
}

/// `end`, if memory reaches that far.
fn fits(path: &Path, end: u64, low_end: u64) -> Result<u64, BootError> {
    if end <= low_end {
        return Ok(end);
    }
    Err(BootError::KernelTooLarge { path: path.to_owned(), needed: end, available: low_end })
}

fn no_kernel(path: &Path, problem: impl ToString) -> BootError {
    BootError::NotAKernel { path: path.to_owned(), problem: problem.to_string() }
}

fn to_length(cmdline_size: u32) -> usize {
    usize::try_from(cmdline_size).unwrap_or(usize::MAX)
}
