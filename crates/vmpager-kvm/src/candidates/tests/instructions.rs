//! Instruction by instruction: which bytes, to the byte.

use super::guest::{CODE, DATA, GDT, Guest, Mode, STACK};
use crate::candidates::{Access, VectorRegisters, XsaveLayout};

use Access::{Read, Write};
use Mode::{Compat, Long4, Pae, Protected};

/// Has an instruction touch memory from this address on, as its operand, and
/// anything elsewhere.
type Set = fn(&mut Guest, u64);

/// The operand under test lies around here.
const PLACE: u64 = 0x0090_4000;

/// Name, mode, how to set it up, bytes touched, how.
#[rustfmt::skip]
const CASES: &[(&str, Mode, Set, u64, Access)] = &[
    ("mov eax,[rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x8b\x03") }, 4, Read),
    ("mov [rbx],al", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x88\x03") }, 1, Write),
    ("mov [r13+r12*8-16],r9", Long4, |g, at| {
        (g.regs.r13, g.regs.r12) = (at - 0x2000, 0x402);
        g.code(b"\x4f\x89\x4c\xe5\xf0");
    }, 8, Write),
    ("mov rax,[rip+x]", Long4, |g, at| {
        g.code(&[b"\x48\x8b\x05", &u32_of(at - CODE - 7)[..]].concat());
    }, 8, Read),
    ("mov eax,[eip+x]", Long4, |g, at| {
        g.code(&[b"\x67\x8b\x05", &u32_of(at - CODE - 7)[..]].concat());
    }, 4, Read),
    ("mov rax,[moffs64]", Long4, |g, at| {
        g.code(&[b"\x48\xa1", &at.to_le_bytes()[..]].concat());
    }, 8, Read),
    ("mov [moffs32],al", Pae, |g, at| g.code(&[b"\xa2", &u32_of(at)[..]].concat()), 1, Write),
    ("mov eax,fs:[rbx]", Long4, |g, at| {
        (g.sregs.fs.base, g.regs.rbx) = (0x5000, at - 0x5000);
        g.code(b"\x64\x8b\x03");
    }, 4, Read),
    ("mov eax,ds:[rbx], whose base does not count", Long4, |g, at| {
        (g.sregs.ds.base, g.regs.rbx) = (0x5000, at);
        g.code(b"\x3e\x8b\x03");
    }, 4, Read),
    ("mov eax,gs:[ebx]", Long4, |g, at| {
        (g.sregs.gs.base, g.regs.rbx) = (0x10_0000, 0xdead_beef_0000_0000 | (at - 0x10_0000));
        g.code(b"\x65\x67\x8b\x03");
    }, 4, Read),
    ("mov eax,[ebx+ecx*2], which wraps", Long4, |g, at| {
        (g.regs.rbx, g.regs.rcx) = (0xffff_0000, (1 << 63) + (at + 0x1_0000) / 2);
        if at % 2 == 1 { g.regs.rbx += 1; }
        g.code(b"\x67\x8b\x04\x4b");
    }, 4, Read),
    ("mov eax,es:[ebx], which wraps", Pae, |g, at| {
        (g.sregs.es.base, g.regs.rbx) = (0xffff_f000, at + 0x1000);
        g.code(b"\x26\x8b\x03");
    }, 4, Read),
    ("mov eax,[bx]", Pae, |g, at| {
        (g.sregs.ds.base, g.regs.rbx) = (at & !0xffff, 0xabcd_0000 | at & 0xffff);
        g.code(b"\x67\x8b\x07");
    }, 4, Read),
    ("movaps xmm0,[rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\x28\x03") }, 16, Read),
    ("vmovups ymm0,[rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\xc5\xfc\x10\x03") }, 32, Read),
    ("vmovups [rbx+64],zmm0", Long4, |g, at| {
        g.regs.rbx = at - 64;
        g.code(b"\x62\xf1\x7c\x48\x11\x43\x01");
    }, 64, Write),
    ("vaddps zmm0,zmm0,[rbx]{1to16}", Long4, |g, at| {
        g.regs.rbx = at;
        g.code(b"\x62\xf1\x7c\x58\x58\x03");
    }, 4, Read),
    ("lock add [rbx],eax", Long4, |g, at| { g.regs.rbx = at; g.code(b"\xf0\x01\x03") }, 4, Write),
    ("cmpxchg16b [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x48\x0f\xc7\x0b") }, 16, Write),
    ("fxsave [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\xae\x03") }, 512, Write),
    ("fxrstor [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\xae\x0b") }, 512, Read),
    ("fnsave [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\xdd\x33") }, 108, Write),
    ("fldenv [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\xd9\x23") }, 28, Read),
    ("fld tbyte [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\xdb\x2b") }, 10, Read),
    ("xsave [rbx]", Long4, |g, at| {
        (g.regs.rbx, g.xsave_bytes) = (at, 2696);
        g.code(b"\x0f\xae\x23");
    }, 2696, Write),
    ("xsavec [rbx], size not known", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\xc7\x23") }, 576, Write),
    ("xrstor64 [rbx], tiles included", Long4, |g, at| {
        (g.regs.rbx, g.xsave_bytes) = (at, 11008);
        g.code(b"\x48\x0f\xae\x2b");
    }, 11008, Read),
    ("rep movsq, from", Long4, |g, at| {
        (g.regs.rsi, g.regs.rdi, g.regs.rcx) = (at, DATA, 100);
        g.code(b"\xf3\x48\xa5");
    }, 8, Read),
    ("rep movsq, to", Long4, |g, at| {
        (g.regs.rsi, g.regs.rdi, g.regs.rcx) = (DATA, at, 100);
        g.code(b"\xf3\x48\xa5");
    }, 8, Write),
    ("movsb fs:, from", Long4, |g, at| {
        (g.sregs.fs.base, g.regs.rsi, g.regs.rdi) = (0x1000, at - 0x1000, DATA);
        g.code(b"\x64\xa4");
    }, 1, Read),
    ("rep stosd", Long4, |g, at| { g.regs.rdi = at; g.code(b"\xf3\xab") }, 4, Write),
    ("lodsw with edi's width", Long4, |g, at| { g.regs.rsi = 7 << 40 | at; g.code(b"\x67\x66\xad") }, 2, Read),
    ("repne scasw", Long4, |g, at| { g.regs.rdi = at; g.code(b"\xf2\x66\xaf") }, 2, Read),
    ("repe cmpsb, first", Long4, |g, at| {
        (g.regs.rsi, g.regs.rdi) = (at, DATA);
        g.code(b"\xf3\xa6");
    }, 1, Read),
    ("repe cmpsb, second", Long4, |g, at| {
        (g.regs.rsi, g.regs.rdi) = (DATA, at);
        g.code(b"\xf3\xa6");
    }, 1, Read),
    ("push rax", Long4, |g, at| { g.regs.rsp = at + 8; g.code(b"\x50") }, 8, Write),
    ("push ax", Long4, |g, at| { g.regs.rsp = at + 2; g.code(b"\x66\x50") }, 2, Write),
    ("push [rbx], read", Long4, |g, at| { g.regs.rbx = at; g.code(b"\xff\x33") }, 8, Read),
    ("push [rbx], pushed", Long4, |g, at| {
        (g.regs.rsp, g.regs.rbx) = (at + 8, DATA);
        g.code(b"\xff\x33");
    }, 8, Write),
    ("pop rax", Long4, |g, at| { g.regs.rsp = at; g.code(b"\x58") }, 8, Read),
    ("pop [rsp+8], whose rsp is that after", Long4, |g, at| {
        g.regs.rsp = at - 16;
        // The value comes from elsewhere on the page, or the page before.
        g.code(b"\x8f\x84\x24\x00\x00\x00\x00");
        g.regs.rsp = STACK;
        g.code(&[b"\x8f\x84\x24", &u32_of(at - STACK - 8)[..]].concat());
    }, 8, Write),
    ("pushfq", Long4, |g, at| { g.regs.rsp = at + 8; g.code(b"\x9c") }, 8, Write),
    ("popfq", Long4, |g, at| { g.regs.rsp = at; g.code(b"\x9d") }, 8, Read),
    ("call rel32", Long4, |g, at| { g.regs.rsp = at + 8; g.code(b"\xe8\0\0\0\0") }, 8, Write),
    ("call [rbx], read", Long4, |g, at| { g.regs.rbx = at; g.code(b"\xff\x13") }, 8, Read),
    ("call [rbx], pushed", Long4, |g, at| {
        (g.regs.rsp, g.regs.rbx) = (at + 8, DATA);
        g.code(b"\xff\x13");
    }, 8, Write),
    ("jmp [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\xff\x23") }, 8, Read),
    ("ret", Long4, |g, at| { g.regs.rsp = at; g.code(b"\xc3") }, 8, Read),
    ("ret 8", Long4, |g, at| { g.regs.rsp = at; g.code(b"\xc2\x08\x00") }, 8, Read),
    ("retf", Long4, |g, at| { g.regs.rsp = at; g.code(b"\xcb") }, 8, Read),
    ("retfq", Long4, |g, at| { g.regs.rsp = at; g.code(b"\x48\xcb") }, 16, Read),
    ("iretq", Long4, |g, at| { g.regs.rsp = at; g.code(b"\x48\xcf") }, 40, Read),
    ("call far [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x48\xff\x1b") }, 10, Read),
    ("enter 16,0, and the frame's end", Long4, |g, at| {
        g.regs.rsp = at + 24;
        g.code(b"\xc8\x10\x00\x00");
    }, 24, Write),
    ("enter 0,31, pushed", Long4, |g, at| {
        (g.regs.rsp, g.regs.rbp) = (at + 256, DATA + 0x800);
        g.code(b"\xc8\x00\x00\x1f");
    }, 256, Write),
    ("enter 0,31, read", Long4, |g, at| {
        (g.regs.rsp, g.regs.rbp) = (STACK + 0x800, at + 240);
        g.code(b"\xc8\x00\x00\x1f");
    }, 240, Read),
    ("leave", Long4, |g, at| { g.regs.rbp = at; g.code(b"\xc9") }, 8, Read),
    ("bt [rbx],rax", Long4, |g, at| {
        (g.regs.rbx, g.regs.rax) = (at - 0x1000, 0x8000 + 63);
        g.code(b"\x48\x0f\xa3\x03");
    }, 8, Read),
    ("bts [rbx],eax, before it", Long4, |g, at| {
        (g.regs.rbx, g.regs.rax) = (at + 4, 0xffff_ffff);
        g.code(b"\x0f\xab\x03");
    }, 4, Write),
    ("btr [rbx],ax, before it", Long4, |g, at| {
        (g.regs.rbx, g.regs.rax) = (at + 0x1000, 0x8000);
        g.code(b"\x66\x0f\xb3\x03");
    }, 2, Write),
    ("btc [rbx],eax, after it", Long4, |g, at| {
        (g.regs.rbx, g.regs.rax) = (at - 4, 32);
        g.code(b"\x0f\xbb\x03");
    }, 4, Write),
    ("bt [rbx],255, in it", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\xba\x23\xff") }, 4, Read),
    ("xlatb", Long4, |g, at| {
        (g.regs.rbx, g.regs.rax) = (at - 0x80, 0xff80);
        g.code(b"\xd7");
    }, 1, Read),
    ("maskmovdqu xmm0,xmm1", Long4, |g, at| { g.regs.rdi = at; g.code(b"\x66\x0f\xf7\xc1") }, 16, Write),
    ("maskmovq mm0,mm1", Long4, |g, at| { g.regs.rdi = at; g.code(b"\x0f\xf7\xc1") }, 8, Write),
    ("movdir64b rax,[rbx], from", Long4, |g, at| {
        (g.regs.rax, g.regs.rbx) = (DATA, at);
        g.code(b"\x66\x0f\x38\xf8\x03");
    }, 64, Read),
    ("movdir64b rax,[rbx], to", Long4, |g, at| {
        (g.regs.rax, g.regs.rbx) = (at, DATA);
        g.code(b"\x66\x0f\x38\xf8\x03");
    }, 64, Write),
    ("enqcmd rax,[rbx]", Long4, |g, at| {
        (g.regs.rax, g.regs.rbx) = (DATA, at);
        g.code(b"\xf2\x0f\x38\xf8\x03");
    }, 64, Read),
    ("lgdt [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\x01\x13") }, 10, Read),
    ("sidt [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\x01\x0b") }, 10, Write),
    ("clflush [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\xae\x3b") }, 1, Read),
    ("lea eax,[rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x8d\x03") }, 0, Read),
    ("nop [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\x1f\x03") }, 0, Read),
    ("prefetcht0 [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\x18\x0b") }, 0, Read),
    ("invlpg [rbx]", Long4, |g, at| { g.regs.rbx = at; g.code(b"\x0f\x01\x3b") }, 0, Read),
    ("pusha", Compat, |g, at| { g.regs.rsp = at + 32; g.code(b"\x60") }, 32, Write),
    ("popa", Pae, |g, at| { g.regs.rsp = at; g.code(b"\x61") }, 32, Read),
    ("push es", Pae, |g, at| { g.regs.rsp = at + 4; g.code(b"\x06") }, 4, Write),
    ("bound eax,[ebx]", Pae, |g, at| { g.regs.rbx = at; g.code(b"\x62\x03") }, 8, Read),
    ("les eax,[ebx]", Pae, |g, at| { g.regs.rbx = at; g.code(b"\xc4\x03") }, 6, Read),
    ("arpl [ebx],ax", Pae, |g, at| { g.regs.rbx = at; g.code(b"\x63\x03") }, 2, Write),
    ("iretd", Pae, |g, at| { g.regs.rsp = at; g.code(b"\xcf") }, 12, Read),
    ("call 0:0", Pae, |g, at| { g.regs.rsp = at + 8; g.code(b"\x9a\0\0\0\0\0\0") }, 8, Write),
    ("retf 4", Pae, |g, at| { g.regs.rsp = at; g.code(b"\xca\x04\0") }, 8, Read),
    ("push ax by 16-bit code on a 32-bit stack", Protected, |g, at| {
        (g.sregs.cs.db, g.regs.rsp) = (0, at + 2);
        g.code(b"\x50");
    }, 2, Write),
    ("ret by 32-bit code on a 16-bit stack", Protected, |g, at| {
        (g.sregs.ss.db, g.sregs.ss.base) = (0, at & !0xffff);
        g.regs.rsp = 0x55_0000 | at & 0xffff;
        g.code(b"\xc3");
    }, 4, Read),
    ("push eax, esp wrapping", Compat, |g, at| {
        (g.regs.rsp, g.sregs.ss.base) = (2, at.wrapping_sub(0xffff_fffe));
        g.code(b"\x50");
    }, 4, Write),
];

fn u32_of(value: u64) -> [u8; 4] {
    u32::try_from(value).expect("a distance that fits").to_le_bytes()
}

/// Each instruction with its operand up to the end of a page, one byte further,
/// from the start of one, and in the middle.
#[test]
fn every_byte_of_an_operand_and_no_other() {
    for (name, mode, set, bytes, access) in CASES {
        let end = PLACE + 0x4000;
        for start in [end - bytes, end - bytes + 1, end, end + 0x700] {
            let mut guest = Guest::new(*mode);
            set(&mut guest, start);
            for page in [DATA, STACK, GDT] {
                guest.map(page);
            }
            guest.map_all(PLACE, PLACE + 0x1_0000);
            let mut touched: Vec<u64> = guest
                .touched_data()
                .into_iter()
                .filter(|(_, page, _)| (PLACE..PLACE + 0x1_0000).contains(page))
                .inspect(|(.., how)| assert_eq!(how, access, "{name}"))
                .map(|(_, page, _)| page)
                .collect();
            touched.sort_unstable();
            let pages: Vec<u64> =
                (start & !0xfff..start + bytes).step_by(0x1000).filter(|_| *bytes > 0).collect();
            assert_eq!(touched, pages, "{name} at {start:#x}");
        }
    }
}

/// What is read is wanted before what is written.
#[test]
fn reads_come_before_writes() {
    for code in [&b"\xa4"[..], b"\xff\x33", b"\x8f\x03", b"\x66\x0f\x38\xf8\x03"] {
        let mut guest = Guest::new(Long4);
        (guest.regs.rsi, guest.regs.rdi) = (DATA, STACK);
        (guest.regs.rbx, guest.regs.rax, guest.regs.rsp) = (DATA, STACK, STACK + 0x100);
        if code == b"\x8f\x03" {
            (guest.regs.rbx, guest.regs.rsp) = (STACK, DATA);
        }
        guest.code(code);
        guest.take_away(&[DATA, STACK]);
        let pages: Vec<u64> = guest.missing().pages().iter().map(|c| c.page).collect();
        assert_eq!(pages, [guest.map(DATA), guest.map(STACK)], "{code:x?}");
    }
}

const LAYOUT: XsaveLayout =
    XsaveLayout { ymm_high: 576, masks: 1088, zmm_high: 1152, zmm_16_to_31: 1664 };

/// An area of `xsave` with these values in a register's dwords, and k1.
fn vectors(register: usize, dwords: &[u32], k1: u64, sign: Option<usize>) -> VectorRegisters {
    let mut area = vec![0; 2688];
    area[512] = 0xe7;
    let mut put = |register: usize, i: usize, value: u32| {
        let at = match (register, i) {
            (16.., _) => 1664 + (register - 16) * 64 + i * 4,
            (_, 0..4) => 160 + register * 16 + i * 4,
            (_, 4..8) => 576 + register * 16 + (i - 4) * 4,
            _ => 1152 + register * 32 + (i - 8) * 4,
        };
        area[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    for (i, value) in dwords.iter().enumerate() {
        put(register, i, *value);
        if let Some(mask) = sign {
            put(mask, i, if k1 >> i & 1 != 0 { 0x8000_0000 } else { 0x7fff_ffff });
        }
    }
    area[1096..1104].copy_from_slice(&k1.to_le_bytes());
    VectorRegisters::from_xsave(&area, &LAYOUT)
}

fn gathered(code: &[u8], vectors: VectorRegisters) -> Vec<(u64, Access)> {
    let mut guest = Guest::new(Long4);
    guest.regs.rbx = PLACE + 0x8000;
    guest.code(code);
    guest.map_all(PLACE, PLACE + 0x1_8000);
    guest.vectors = Some(vectors);
    let touched = guest.touched_data().into_iter();
    touched.map(|(_, page, access)| ((page - PLACE) >> 12, access)).collect()
}

#[test]
fn gathers_and_scatters() {
    let r = |pages: &[u64]| pages.iter().map(|p| (*p, Read)).collect::<Vec<_>>();
    let w = |pages: &[u64]| pages.iter().map(|p| (*p, Write)).collect::<Vec<_>>();
    let negative = (-0x1000_i32).cast_unsigned();
    let indices: Vec<u32> =
        [negative, 0, 0x400, 0x7ff * 4 / 4 + 0x400, 0x1000, 0x1400, 0x1800, 0x1c00]
            .into_iter()
            .chain((0..8).map(|i| 0x2000 + i * 0x400))
            .collect();
    // vgatherdps ymm0,[rbx+ymm1*4],ymm2; all, then every other one
    let dps = b"\xc4\xe2\x6d\x92\x04\x8b";
    let of = |k| vectors(1, &indices, k, Some(2));
    assert_eq!(gathered(dps, of(0xff)), r(&[4, 8, 9, 10, 12, 13, 14, 15]));
    assert_eq!(gathered(dps, of(0x55)), r(&[4, 9, 12, 14]));
    // vgatherdpd ymm0,[rbx+xmm1*4],ymm2: four indices of a dword
    let qwords = vectors(1, &indices, 0xff, Some(2));
    assert_eq!(gathered(b"\xc4\xe2\xed\x92\x04\x8b", qwords), r(&[4, 8, 9, 10, 11]));
    // vgatherqps xmm0,[rbx+ymm1*4],xmm2: four indices of a qword
    let wide: Vec<u32> = [0, 0x400, 0x800, 0xc00].into_iter().flat_map(|low| [low, 0]).collect();
    let wide = vectors(1, &wide, 0xff, Some(2));
    assert_eq!(gathered(b"\xc4\xe2\x6d\x93\x04\x8b", wide), r(&[8, 9, 10, 11]));
    // vgatherdps zmm0{k1},[rbx+zmm1*4]
    let evex = b"\x62\xf2\x7d\x49\x92\x04\x8b";
    let plain = |register, k| vectors(register, &indices, k, None);
    let all: Vec<u64> = [4, 8, 9, 10].into_iter().chain(12..24).collect();
    assert_eq!(gathered(evex, plain(1, 0xffff)), r(&all));
    assert_eq!(gathered(evex, plain(1, 0x8001)), r(&[4, 23]));
    // vgatherdps zmm0{k1},[rbx+zmm17*4]
    assert_eq!(gathered(b"\x62\xf2\x7d\x41\x92\x04\x8b", plain(17, 0x8001)), r(&[4, 23]));
    // vscatterdps [rbx+zmm1*4]{k1},zmm0
    assert_eq!(gathered(b"\x62\xf2\x7d\x49\xa2\x04\x8b", plain(1, 0x8001)), w(&[4, 23]));
}

/// Registers that are not there are not guessed at.
#[test]
fn a_gather_without_vector_registers() {
    let mut guest = Guest::new(Long4);
    guest.regs.rbx = DATA;
    guest.code(b"\xc4\xe2\x6d\x92\x04\x8b");
    guest.map(DATA);
    assert_eq!(guest.touched_data(), []);
}

/// `tileloadd tmm0,[rbx+rcx*2]`: rows, rcx times the scale apart.
#[test]
fn tiles() {
    let mut guest = Guest::new(Long4);
    (guest.regs.rbx, guest.regs.rcx) = (PLACE, 0x800);
    guest.code(b"\xc4\xe2\x7b\x4b\x04\x4b");
    guest.map_all(PLACE, PLACE + 0x1_0000);
    let pages: Vec<u64> = guest.touched_data().iter().map(|(_, page, _)| *page).collect();
    let expected: Vec<u64> = (PLACE..PLACE + 0x1_0000).step_by(0x1000).collect();
    assert_eq!(pages, expected);
}
