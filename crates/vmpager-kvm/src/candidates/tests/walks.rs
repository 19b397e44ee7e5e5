//! Page tables and code.

use super::guest::{CODE, DATA, Guest, Mode, STACK};
use crate::candidates::{Access, CandidateFinder, Cause};

const PAGED: [Mode; 5] = [Mode::Paged32, Mode::Pae, Mode::Compat, Mode::Long4, Mode::Long5];
const ALL: [Mode; 7] =
    [Mode::Real, Mode::Protected, Mode::Paged32, Mode::Pae, Mode::Compat, Mode::Long4, Mode::Long5];

/// In all modes: the code page, then the operand's.
#[test]
fn operand_and_code() {
    for mode in ALL {
        let mut guest = Guest::new(mode);
        let data = if mode == Mode::Real {
            (guest.sregs.cs.base, guest.regs.rip) = (CODE, 0x123);
            (guest.sregs.ds.base, guest.regs.rbx) = (DATA, 0xffff_1234);
            guest.code(&[0x8b, 0x47, 0x10]); // mov ax, [bx+0x10]
            DATA + 0x1000
        } else {
            guest.regs.rbx = DATA + 0x1234;
            guest.code(&[0x8b, 0x43, 0x10]); // mov eax, [(r|e)bx+0x10]
            DATA + 0x1000
        };
        guest.map(data);
        let expected = [(Cause::Code, CODE, Access::Execute), (Cause::Operand, data, Access::Read)];
        assert_eq!(guest.touched(), expected, "{mode:?}");
    }
}

/// With everything missing, the first candidate is each time the next page on
/// the processor's way: the tables to the code from the top, the code, the
/// tables to the operand, the operand.
#[test]
fn everything_missing_comes_in_the_order_of_touching() {
    for mode in PAGED {
        let mut guest = Guest::new(mode);
        // No table but the highest in common with the code's.
        let data = if mode.is_long() { 0xc0_4030_2000_u64 } else { 0xc040_2000 };
        let data = if mode == Mode::Compat { 0xc040_2000 } else { data };
        guest.regs.rbx = data + 8;
        guest.code(&[0x8b, 0x03]); // mov eax, [rbx]
        let code_tables: Vec<u64> = guest.tables.iter().copied().collect();
        guest.map(data);
        let data_tables: Vec<u64> =
            guest.tables.iter().copied().filter(|table| !code_tables.contains(table)).collect();
        guest.memory.missing = guest.tables.clone();
        guest.take_away(&[CODE, data]);
        let expected = [&code_tables[..], &[CODE], &data_tables, &[data]].concat();
        assert_eq!(guest.resolve(), expected, "{mode:?}");
    }
}

#[test]
fn large_pages() {
    let cases: [(Mode, u32, u64, u64, u64); 7] = [
        (Mode::Paged32, 1, 0x8040_0000, 0x1_c000_0000, 0x3f_f123),
        (Mode::Pae, 1, 0x8020_0000, 0x4_4020_0000, 0x1f_f123),
        (Mode::Compat, 1, 0x8020_0000, 0x4_4020_0000, 0x1f_f123),
        (Mode::Long4, 1, 0x7fff_8020_0000, 0x4_4020_0000, 0x1f_f123),
        (Mode::Long4, 2, 0x7fff_8000_0000, 0x4_4000_0000, 0x3fff_f123),
        (Mode::Long5, 1, 0xff_ffff_8020_0000, 0x4_4020_0000, 0x1f_f123),
        (Mode::Long5, 2, 0xff_ffff_8000_0000, 0x4_4000_0000, 0x3fff_f123),
    ];
    for (mode, level, linear, gpa, offset) in cases {
        let mut guest = Guest::new(mode);
        guest.regs.rbx = linear + offset;
        guest.code(&[0x89, 0x03]); // mov [rbx], eax
        // Bits 32 to 39 of a 4 MiB page's address are its entry's bits 13 to 20.
        let entry = if mode == Mode::Paged32 { gpa & 0xffff_ffff | gpa >> 32 << 13 } else { gpa };
        // The attribute bit of large pages is no part of the address.
        guest.enter(linear, entry | 1 << 12, level);
        let last = *guest.all().last().expect("an operand");
        assert_eq!(last.page, (gpa + offset) & !0xfff, "{mode:?} level {level}");
        assert_eq!((last.cause, last.access), (Cause::Operand, Access::Write));
    }
}

#[test]
fn an_unmapped_operand_is_no_candidate() {
    for mode in PAGED {
        let mut guest = Guest::new(mode);
        guest.regs.rbx = 0x9000_0000;
        guest.code(&[0x8b, 0x03]);
        assert_eq!(guest.touched(), [(Cause::Code, CODE, Access::Execute)], "{mode:?}");
        assert!(!guest.missing().ends_early());
    }
}

/// Pointers with tags in their upper bits, and kernel addresses.
#[test]
fn bits_above_the_highest_table_do_not_count() {
    for (mode, bits) in [(Mode::Long4, 48), (Mode::Long5, 57)] {
        for high in [0, 0x5a, 0xff] {
            let mut guest = Guest::new(mode);
            let linear = 1 << (bits - 1) | 0x12_3000;
            guest.regs.rbx = linear | high << bits;
            guest.code(&[0x8b, 0x03]);
            guest.map(linear);
            assert_eq!(guest.touched_data(), [(Cause::Operand, linear, Access::Read)]);
        }
    }
}

#[test]
fn code_across_pages() {
    for split in 1..7 {
        let mut guest = Guest::new(Mode::Long4);
        guest.regs.rip = CODE + 0x1000 - split;
        guest.regs.rbx = DATA;
        guest.code(&[0x48, 0x81, 0x83, 0, 0, 0, 0]); // add qword [rbx], imm32 (11 bytes)
        guest.put(guest.regs.rip + 7, &[1, 2, 3, 4]);
        guest.map(DATA);
        guest.take_away(&[CODE, CODE + 0x1000, DATA]);
        assert_eq!(guest.missing().pages().len(), 1, "the second page is not known of yet");
        assert!(guest.missing().ends_early());
        assert_eq!(guest.resolve(), [CODE, CODE + 0x1000, DATA]);
    }
}

/// An instruction that ends with its page does not touch the next.
#[test]
fn code_up_to_the_end_of_a_page() {
    let mut guest = Guest::new(Mode::Long4);
    guest.regs.rip = CODE + 0xffe;
    guest.regs.rbx = DATA;
    guest.code(&[0x8b, 0x03]);
    guest.map(DATA);
    guest.take_away(&[CODE + 0x1000, DATA]);
    assert_eq!(guest.resolve(), [DATA]);
}

#[test]
fn what_is_no_instruction_touches_its_code_only() {
    let mut guest = Guest::new(Mode::Long4);
    guest.code(&[0x06]); // push es: not in 64-bit mode
    assert_eq!(guest.touched(), [(Cause::Code, CODE, Access::Execute)]);
    guest.code(&[0x66; 15]); // more prefixes than there may be
    assert_eq!(guest.touched(), [(Cause::Code, CODE, Access::Execute)]);
}

/// Changed code is decoded anew, the same bytes at another address too.
#[test]
fn the_cache_believes_bytes_only() {
    let mut guest = Guest::new(Mode::Long4);
    let mut finder = CandidateFinder::new();
    guest.regs.rbx = DATA;
    guest.regs.rcx = STACK;
    guest.take_away(&[DATA, STACK, DATA + 0x5000]);
    let mut first = |guest: &Guest| {
        let missing = finder.missing(&guest.registers(), &guest.memory, || None);
        missing.pages().first().map(|candidate| candidate.page)
    };
    for _ in 0..3 {
        guest.code(&[0x8b, 0x03]); // mov eax, [rbx]
        assert_eq!(first(&guest), Some(guest.map(DATA)));
        assert_eq!(first(&guest), Some(guest.map(DATA)));
        guest.code(&[0x8b, 0x01]); // mov eax, [rcx]
        assert_eq!(first(&guest), Some(guest.map(STACK)));
        // mov eax, [rip+...]: to the same place from any address
        for rip in [CODE, CODE + 0x40, CODE + 0x1000] {
            guest.regs.rip = rip;
            let relative = u32::try_from(DATA + 0x5000 - rip - 6).expect("near");
            guest.code(&[&[0x8b, 0x05], &relative.to_le_bytes()[..]].concat());
            assert_eq!(first(&guest), Some(guest.map(DATA + 0x5000)));
        }
        guest.regs.rip = CODE;
    }
}

/// Two addresses share a place in the cache, and the bytes, but not the operand.
#[test]
fn the_cache_believes_no_other_address() {
    let mut guest = Guest::new(Mode::Long4);
    let mut finder = CandidateFinder::new();
    guest.take_away(&[DATA, DATA + 0x1000]);
    for (rip, page) in [(CODE, DATA), (CODE + 0x41, DATA + 0x1000), (CODE, DATA)] {
        guest.regs.rip = rip;
        let relative = u32::try_from(DATA + 0xfe0 - CODE).expect("near");
        guest.code(&[&[0x8b, 0x05], &relative.to_le_bytes()[..]].concat());
        let missing = finder.missing(&guest.registers(), &guest.memory, || None);
        assert_eq!(missing.pages().first().map(|c| c.page), Some(guest.map(page)), "{rip:#x}");
    }
}

/// A page that is touched twice is named once, as it was first.
#[test]
fn each_missing_page_once() {
    let mut guest = Guest::new(Mode::Long4);
    (guest.regs.rsi, guest.regs.rdi) = (DATA, DATA + 0x10);
    guest.code(&[0xa4]); // movsb
    guest.take_away(&[DATA]);
    let missing = guest.missing();
    assert_eq!(missing.pages().len(), 1);
    assert_eq!(missing.pages()[0].access, Access::Read);
    assert!(!missing.ends_early(), "nothing else is to be found");
}
