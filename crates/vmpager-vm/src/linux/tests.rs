//! Kernels made up for the purpose, and what the loaded memory then says.

use std::io::Write;
use std::path::Path;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::*;

type Memory = GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const LOAD_AT: u64 = 16 * MIB;
const INIT_SIZE: u32 = 8 << 20;

fn memory(ranges: &[(u64, u64)]) -> Memory {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(gpa, bytes)| (GuestAddress(*gpa), usize::try_from(*bytes).unwrap()))
        .collect();
    Memory::from_ranges(&ranges).unwrap()
}

/// The header of a kernel that runs at 16 MiB, in 8 MiB.
fn header() -> setup_header {
    setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        xloadflags: 1,
        cmdline_size: 2047,
        payload_length: 64,
        pref_address: LOAD_AT,
        init_size: INIT_SIZE,
        ..setup_header::default()
    }
}

fn bzimage(header: setup_header) -> Vec<u8> {
    let mut image = vec![0; 2048];
    image[0x1f1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image[1024..].fill(0x90);
    image
}

/// An x86-64 ELF file with one segment of 16 bytes.
fn vmlinux(entry: u64, gpa: u64, memory_bytes: u64) -> Vec<u8> {
    let mut image = vec![0; 64 + 56];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    image[16..20].copy_from_slice(&[2, 0, 62, 0]);
    image[24..32].copy_from_slice(&entry.to_le_bytes());
    image[32] = 64; // program headers
    image[54] = 56; // each
    image[56] = 1; // one
    image[64] = 1; // to be loaded
    let mut word = |at: usize, word: u64| image[at..at + 8].copy_from_slice(&word.to_le_bytes());
    word(64 + 8, 64 + 56);
    word(64 + 24, gpa);
    word(64 + 32, 16);
    word(64 + 40, memory_bytes);
    image.extend([0x90; 16]);
    image
}

fn file(bytes: &[u8]) -> tempfile::TempPath {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file.into_temp_path()
}

fn boot(kernel: &Path, initrd: Option<&Path>) -> LinuxBoot {
    LinuxBoot {
        kernel: kernel.to_owned(),
        initrd: initrd.map(Path::to_owned),
        cmdline: "console=ttyS0".to_owned(),
    }
}

/// What loading such a kernel into so much memory fails with.
fn refused(kernel: &[u8], initrd: Option<&[u8]>, memory_bytes: u64) -> String {
    let kernel = file(kernel);
    let initrd = initrd.map(file);
    let boot = boot(&kernel, initrd.as_deref());
    load(&memory(&[(0, memory_bytes)]), &boot, 1).unwrap_err().to_string()
}

#[test]
fn a_bzimage_is_entered_behind_its_header_with_all_it_needs() {
    let (kernel, initrd) = (file(&bzimage(header())), file(&[7; 5000]));
    let memory = memory(&[(0, 256 * MIB)]);
    let entry = load(&memory, &boot(&kernel, Some(&initrd)), 2).unwrap();
    let regs = entry.regs();
    assert_eq!(regs.rip, LOAD_AT + 0x200);
    let params: boot_params = memory.read_obj(GuestAddress(regs.rsi)).unwrap();
    assert_eq!({ params.hdr.header }, 0x5372_6448);
    assert_eq!(params.hdr.type_of_loader, 0xff);
    assert_eq!(u64::from(params.hdr.code32_start), LOAD_AT);
    assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);

    let mut cmdline = [0; 14];
    memory.read_slice(&mut cmdline, GuestAddress(params.hdr.cmd_line_ptr.into())).unwrap();
    assert_eq!(&cmdline, b"console=ttyS0\0");
    // Two pages for 5000 bytes, the last two that there are.
    let (gpa, bytes) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    assert_eq!((u64::from(gpa), bytes), (256 * MIB - 8192, 5000));
    let mut seen = [0; 5001];
    memory.read_slice(&mut seen, GuestAddress(gpa.into())).unwrap();
    assert!(seen[..5000].iter().all(|byte| *byte == 7) && seen[5000] == 0);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(LOAD_AT + 1023)).unwrap(), 0x90, "its code");
}

#[test]
fn an_elf_kernel_is_entered_where_it_says() {
    let kernel = file(&vmlinux(LOAD_AT + 4, LOAD_AT, 2 * MIB));
    let memory = memory(&[(0, 32 * MIB)]);
    let entry = load(&memory, &boot(&kernel, None), 1).unwrap();
    assert_eq!(entry.regs().rip, LOAD_AT + 4);
    let params: boot_params = memory.read_obj(GuestAddress(entry.regs().rsi)).unwrap();
    assert_eq!({ params.hdr.ramdisk_size }, 0);
    assert_eq!({ params.hdr.boot_flag }, 0xaa55);
}

#[test]
fn the_memory_map_is_what_memory_there_is() {
    let kernel = file(&bzimage(header()));
    for (ranges, expected) in [
        (vec![(0, 64 * MIB)], vec![(MIB, 63 * MIB)]),
        (vec![(0, 3 * GIB), (4 * GIB, GIB)], vec![(MIB, 3 * GIB - MIB), (4 * GIB, GIB)]),
    ] {
        let memory = memory(&ranges);
        let entry = load(&memory, &boot(&kernel, None), 1).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(entry.regs().rsi)).unwrap();
        let count = usize::from(params.e820_entries);
        let table = params.e820_table;
        let map: Vec<_> = table[..count].iter().map(|e| (e.addr, e.size, e.r#type)).collect();
        assert_eq!(map[..2], [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2)], "below 1 MiB");
        let high: Vec<_> = map[2..].iter().map(|(gpa, bytes, _)| (*gpa, *bytes)).collect();
        assert_eq!(high, expected);
        assert!(map[2..].iter().all(|(_, _, kind)| *kind == 1));
    }
}

/// An initrd goes below the hole, where its 32-bit address and the kernel's
/// limit reach it, however much memory there is.
#[test]
fn the_initrd_stays_where_the_kernel_takes_it() {
    let (kernel, initrd) = (file(&bzimage(header())), file(&[7; 4096]));
    let memory = memory(&[(0, 3 * GIB), (4 * GIB, GIB)]);
    let entry = load(&memory, &boot(&kernel, Some(&initrd)), 1).unwrap();
    let params: boot_params = memory.read_obj(GuestAddress(entry.regs().rsi)).unwrap();
    assert_eq!({ params.hdr.ramdisk_image }, 0x7fff_f000);
}

/// Walks the page tables that CR3 points to, as a processor does.
#[test]
fn the_first_4_gib_are_mapped_one_to_one() {
    let kernel = file(&bzimage(header()));
    let memory = memory(&[(0, 64 * MIB)]);
    let entry = load(&memory, &boot(&kernel, None), 1).unwrap();
    let sregs = entry.sregs(kvm_bindings::kvm_sregs::default());
    let read = |table: u64, index: u64| {
        memory.read_obj::<u64>(GuestAddress((table & !0xfff) + index * 8)).unwrap()
    };
    for gpa in [0, 0x7000, LOAD_AT, 3 * GIB + 4096, 4 * GIB - 1] {
        let fourth = read(sregs.cr3, gpa >> 39);
        let third = read(fourth, gpa >> 30 & 511);
        let second = read(third, gpa >> 21 & 511);
        assert!([fourth, third, second].iter().all(|entry| entry & 3 == 3), "{gpa:#x}");
        assert_eq!(second & 0x80, 0x80, "2 MiB");
        assert_eq!(second & !0xfff | gpa & 0x1f_ffff, gpa);
    }
    assert_eq!(read(sregs.cr3, 1), 0, "nothing above");
    // What the GDT says is what the segment registers hold.
    let code = GuestAddress(sregs.gdt.base + u64::from(sregs.cs.selector));
    let descriptor = memory.read_obj::<u64>(code).unwrap();
    assert_eq!(descriptor >> 53 & 1, u64::from(sregs.cs.l), "64-bit code");
    assert_eq!(descriptor >> 40 & 0xf, u64::from(sregs.cs.type_));
}

#[test]
fn what_is_no_kernel_is_refused() {
    let too_old = setup_header { version: 0x20b, ..header() };
    let only_32_bit = setup_header { xloadflags: 0, ..header() };
    let low = setup_header { pref_address: 0x1000, ..header() };
    let cut = setup_header { payload_length: 1025, ..header() };
    let mut wrong_machine = vmlinux(LOAD_AT, LOAD_AT, 16);
    wrong_machine[18] = 183;
    let elsewhere = vmlinux(LOAD_AT + 4096, LOAD_AT, 16);
    let truncated = vmlinux(LOAD_AT, LOAD_AT, 16);
    for (kernel, why) in [
        (vec![], "HdrS"),
        (b"#!/bin/sh\n".to_vec(), "HdrS"),
        (vec![0xff; 4096], "HdrS"),
        (bzimage(too_old), "0x20b"),
        (bzimage(only_32_bit), "64-bit"),
        (bzimage(low), "0x1000"),
        (bzimage(cut), "2048 bytes and its header tells of 2049"),
        (b"\x7fELF".to_vec(), "another processor"),
        (wrong_machine, "another processor"),
        (elsewhere, "entry point 0x1001000"),
        (truncated[..truncated.len() - 1].to_vec(), "read kernel image"),
        (truncated[..70].to_vec(), "program header"),
    ] {
        let error = refused(&kernel, None, 64 * MIB);
        assert!(error.contains("is no kernel to boot") && error.contains(why), "{why}: {error}");
        assert!(error.contains("give a bzImage"), "{error}");
    }
}

#[test]
fn what_does_not_fit_is_refused_by_its_numbers() {
    let error = refused(&bzimage(header()), None, 24 * MIB - 4096);
    assert!(error.contains("0x1800000") && error.contains("0x17ff000"), "{error}");
    let huge = setup_header { init_size: u32::MAX, pref_address: u64::MAX - 5, ..header() };
    assert!(refused(&bzimage(huge), None, 64 * MIB).contains("more memory"));
    let error = refused(&vmlinux(LOAD_AT, LOAD_AT, 100 * MIB), None, 64 * MIB);
    assert!(error.contains("0x7400000"), "{error}");
    let error = refused(&vmlinux(LOAD_AT, 100 * MIB, 16), None, 64 * MIB);
    assert!(error.contains("0x6400010") && error.contains("0x4000000"), "{error}");
    let error = refused(&vmlinux(LOAD_AT, u64::MAX - 8, 16), None, 64 * MIB);
    assert!(error.contains("0xffffffffffffffff"), "{error}");
    // The kernel ends at 24 MiB: a page is left, and no more.
    let memory_bytes = 24 * MIB + 4096;
    let error = refused(&bzimage(header()), Some(&[1; 4097]), memory_bytes);
    assert!(error.contains("4097 bytes") && error.contains("4096 are left"), "{error}");
    let error = refused(&bzimage(header()), Some(&[]), memory_bytes);
    assert!(error.contains("is empty"), "{error}");
}

#[test]
fn missing_files_are_named() {
    let kernel = file(&bzimage(header()));
    let memory = memory(&[(0, 64 * MIB)]);
    let missing = Path::new("/no/such/file");
    let error = load(&memory, &boot(missing, None), 1).unwrap_err().to_string();
    assert!(error.contains("the kernel /no/such/file: No such file"), "{error}");
    let error = load(&memory, &boot(&kernel, Some(missing)), 1).unwrap_err().to_string();
    assert!(error.contains("the initrd /no/such/file: No such file"), "{error}");
    let directory = load(&memory, &boot(&std::env::temp_dir(), None), 1).unwrap_err();
    assert!(directory.to_string().contains("Is a directory"), "{directory}");
}

#[test]
fn command_lines_are_checked() {
    let kernel = file(&bzimage(setup_header { cmdline_size: 12, ..header() }));
    let memory = memory(&[(0, 64 * MIB)]);
    let mut boot = boot(&kernel, None);
    let error = load(&memory, &boot, 1).unwrap_err().to_string();
    assert!(error.contains("13 bytes") && error.contains("takes 12"), "{error}");
    boot.cmdline = "a\0b".to_owned();
    assert!(load(&memory, &boot, 1).unwrap_err().to_string().contains("NUL byte at 1"));
    boot.cmdline = "exactly so".to_owned();
    load(&memory, &boot, 1).unwrap();
}
