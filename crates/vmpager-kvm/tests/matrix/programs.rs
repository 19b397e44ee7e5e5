//! Instructions beside those of 64-bit ring 3: other modes, other rings, events.

use super::modes::{CODE_3, DATA_3, GATE, Mode, OTHER, TSS, call_gate, on_event};
use super::{END_CODE, Setup};

pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) code: &'static [u8],
    pub(crate) set: fn(&mut Setup, Mode),
}

const fn program(name: &'static str, code: &'static [u8], set: fn(&mut Setup, Mode)) -> Program {
    Program { name, code, set }
}

const A: u64 = 0x20_0000;
const B: u64 = 0x28_0000;
const STACK: u64 = 0x30_0800;
const LANDING: u64 = 0x11_0000;
/// A handler of events, in a page of its own.
const HANDLER: u64 = 0x12_0000;

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn quads(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A far pointer of 32 bits to [`LANDING`] in ring 3.
fn far() -> Vec<u8> {
    words(&[0x11_0000, CODE_3.into()])
}

/// 32-bit code in ring 3.
#[rustfmt::skip]
pub(crate) const PROTECTED: &[Program] = &[
    program("mov eax,[ebx]", b"\x8b\x03", |s, _| s.regs.rbx = A),
    program("mov [ebx],eax across pages", b"\x89\x03", |s, _| s.regs.rbx = A + 0xffe),
    program("mov eax,[moffs32]", b"\xa1\x08\x20\x20\0", |_, _| {}),
    program("mov eax,[ebx+ecx*2] wrapping", b"\x8b\x04\x4b", |s, _| {
        (s.regs.rbx, s.regs.rcx) = (0xffff_0000, (A + 0x1_0000) / 2);
    }),
    program("mov eax,fs:[ebx]", b"\x64\x8b\x03", |s, _| {
        (s.sregs.fs.base, s.regs.rbx) = (0x5000, A - 0x5000);
    }),
    program("mov ax,[bx+si], 16-bit address", b"\x67\x66\x8b\x00", |s, _| {
        (s.regs.rbx, s.regs.rsi) = (0x12_ff00, 0x34_0200);
    }),
    program("code across pages", b"\x81\x83\0\0\0\0\x01\x02\x03\x04", |s, _| {
        (s.regs.rip, s.regs.rbx) = (0x10_0ffc, A);
    }),
    program("movups xmm0,[ebx]", b"\x0f\x10\x03", |s, _| s.regs.rbx = A + 0xff8),
    program("fxsave across pages", b"\x0f\xae\x03", |s, _| s.regs.rbx = A + 0xf00),
    program("fldenv across pages", b"\xd9\x23", |s, _| s.regs.rbx = A + 0xff0),
    program("lock add [ebx],eax", b"\xf0\x01\x03", |s, _| s.regs.rbx = A + 0xffc),
    program("cmpxchg8b [ebx]", b"\x0f\xc7\x0b", |s, _| s.regs.rbx = A + 0xff8),
    program("movsb", b"\xa4", |s, _| (s.regs.rsi, s.regs.rdi) = (A, B)),
    program("rep movsd over pages", b"\xf3\xa5", |s, _| {
        (s.regs.rsi, s.regs.rdi, s.regs.rcx) = (A + 0x7f0, B + 0xff0, 1400);
    }),
    program("rep movsb backwards", b"\xfd\xf3\xa4\xfc", |s, _| {
        (s.regs.rsi, s.regs.rdi, s.regs.rcx) = (A + 0x2010, B + 0x1005, 0x1800);
    }),
    program("rep stosd over pages", b"\xf3\xab", |s, _| {
        (s.regs.rdi, s.regs.rcx) = (A + 0xffe, 0x800);
    }),
    program("repe cmpsb over pages", b"\xf3\xa6", |s, _| {
        (s.regs.rsi, s.regs.rdi, s.regs.rcx) = (A + 0xf00, B + 0x800, 0x1800);
    }),
    program("repne scasb over pages", b"\xf2\xae", |s, _| {
        (s.regs.rdi, s.regs.rcx, s.regs.rax) = (A + 0xf00, 0x1800, 1);
    }),
    program("push eax across pages", b"\x50", |s, _| s.regs.rsp = (STACK & !0xfff) + 2),
    program("push [ebx]", b"\xff\x33", |s, _| s.regs.rbx = A),
    program("pop [ebx]", b"\x8f\x03", |s, _| s.regs.rbx = A),
    program("pusha; popa", b"\x60\x61", |s, _| s.regs.rsp = (STACK & !0xfff) + 0x10),
    program("pushf; popf", b"\x9c\x9d", |_, _| {}),
    program("push es; pop ds", b"\x06\x1f", |_, _| {}),
    program("call rel32", b"\xe8\xfb\xfe\x00\x00", |_, _| {}),
    program("call [ebx]", b"\xff\x13", |s, _| {
        s.regs.rbx = A;
        s.put(A, &words(&[0x11_0000]));
    }),
    program("jmp [ebx]", b"\xff\x23", |s, _| {
        s.regs.rbx = A;
        s.put(A, &words(&[0x11_0000]));
    }),
    program("ret 8", b"\xc2\x08\0", |s, _| s.put(STACK, &words(&[0x11_0000]))),
    program("enter 16,0", b"\xc8\x10\0\0", |s, _| s.regs.rsp = (STACK & !0xfff) + 4),
    program("leave", b"\xc9", |s, _| s.regs.rbp = A),
    program("bts [ebx],eax, before it", b"\x0f\xab\x03", |s, _| {
        (s.regs.rbx, s.regs.rax) = (A, 0xffff_ffff);
    }),
    program("xlatb", b"\xd7", |s, _| (s.regs.rbx, s.regs.rax) = (A - 0x10, 0xff10)),
    program("bound eax,[ebx]", b"\x62\x03", |s, _| s.regs.rbx = A + 0xffc),
    program("mov ds,ax", b"\x8e\xd8", |s, _| s.regs.rax = OTHER.into()),
    program("lds eax,[ebx]", b"\xc5\x03", |s, _| {
        s.regs.rbx = A + 0xffe;
        s.put(A + 0xffe, &words(&[7, OTHER.into()]));
    }),
    program("lar eax,ecx", b"\x0f\x02\xc1", |s, _| s.regs.rcx = OTHER.into()),
    program("jmp far", b"\xea\0\0\x11\0\x33\0", |_, _| {}),
    program("call far", b"\x9a\0\0\x11\0\x33\0", |_, _| {}),
    program("call far [ebx]", b"\xff\x1b", |s, _| {
        s.regs.rbx = A + 0xffd;
        s.put(A + 0xffd, &far());
    }),
    program("retf", b"\xcb", |s, _| s.put(STACK, &far())),
    program("iret", b"\xcf", |s, _| {
        s.put(STACK, &[far(), words(&[0x3202])].concat());
    }),
];

/// Events and changes of the ring, from 32-bit code in ring 3.
#[rustfmt::skip]
pub(crate) const PROTECTED_EVENTS: &[Program] = &[
    program("int 0x80; iret", b"\xcd\x80", |s, mode| {
        on_event(s, mode, 0x80, HANDLER, 0);
        s.put(HANDLER, if mode.is_long() { b"\x48\xcf" } else { b"\xcf" });
    }),
    program("divide error", b"\xf7\xf1", |s, mode| handled(s, mode, 0)),
    program("invalid opcode", b"\x0f\x0b", |s, mode| handled(s, mode, 6)),
    program("general protection", b"\x8e\xd8", |s, mode| {
        s.regs.rax = 0xfffb;
        handled(s, mode, 13);
    }),
    program("call gate", b"\x9a\0\0\0\0\x63\0", |s, _| {
        call_gate(s, HANDLER);
        s.put(HANDLER, &END_CODE);
    }),
];

/// Events and changes of the ring, from 64-bit code in ring 3.
#[rustfmt::skip]
pub(crate) const LONG_EVENTS: &[Program] = &[
    program("int 0x80; iretq", b"\xcd\x80", |s, mode| {
        on_event(s, mode, 0x80, HANDLER, 0);
        s.put(HANDLER, b"\x48\xcf");
    }),
    program("int 0x80 by the interrupt stack table", b"\xcd\x80", |s, mode| {
        on_event(s, mode, 0x80, HANDLER, 1);
        s.put(HANDLER, b"\x48\xcf");
    }),
    program("int3", b"\xcc", |s, mode| {
        on_event(s, mode, 3, HANDLER, 0);
        s.put(HANDLER, b"\x48\xcf");
    }),
    program("divide error", b"\xf7\xf1", |s, mode| handled(s, mode, 0)),
    program("invalid opcode", b"\x0f\x0b", |s, mode| handled(s, mode, 6)),
    program("page fault of the guest's", b"\x8b\x03", |s, mode| {
        s.regs.rbx = 0x4000_0000;
        handled(s, mode, 14);
    }),
    program("page fault, the code unmapped", b"\xff\xe3", |s, mode| {
        s.regs.rbx = 0x4000_0000;
        handled(s, mode, 14);
    }),
    program("general protection", b"\x8e\xd8", |s, mode| {
        s.regs.rax = 0xfffb;
        handled(s, mode, 13);
    }),
    program("call gate", b"\xff\x1b", |s, _| {
        s.regs.rbx = A;
        s.put(A, &words(&[0, GATE.into()]));
        call_gate(s, HANDLER);
        s.put(HANDLER, &END_CODE);
    }),
    program("mov ds,ax", b"\x8e\xd8", |s, _| s.regs.rax = OTHER.into()),
    program("lar eax,ecx", b"\x0f\x02\xc1", |s, _| s.regs.rcx = OTHER.into()),
    program("retfq", b"\x48\xcb", |s, _| s.put(STACK, &quads(&[LANDING, CODE_3.into()]))),
    program("jmp far [rbx]", b"\xff\x2b", |s, _| {
        s.regs.rbx = A + 0xffd;
        s.put(A + 0xffd, &far());
    }),
];

/// 64-bit code in ring 0.
#[rustfmt::skip]
pub(crate) const RING_0: &[Program] = &[
    program("iretq to ring 3", b"\x48\xcf", |s, _| {
        s.put(STACK, &quads(&[LANDING, CODE_3.into(), 0x3202, B + 8, DATA_3.into()]));
    }),
    program("retfq to ring 3", b"\x48\xcb", |s, _| {
        s.put(STACK, &quads(&[LANDING, CODE_3.into(), B + 8, DATA_3.into()]));
    }),
    program("int 0x80; iretq", b"\xcd\x80", |s, mode| {
        on_event(s, mode, 0x80, HANDLER, 0);
        s.put(HANDLER, b"\x48\xcf");
    }),
    program("page fault of the guest's", b"\x8b\x03", |s, mode| {
        s.regs.rbx = 0x4000_0000;
        handled(s, mode, 14);
    }),
    program("lgdt [rbx]", b"\x0f\x01\x13", |s, _| {
        s.regs.rbx = A + 0xffc;
        s.put(A + 0xffc, &[&[0x7f, 0][..], &quads(&[0x8000])].concat());
    }),
    program("lidt [rbx]", b"\x0f\x01\x1b", |s, _| {
        s.regs.rbx = A + 0xffc;
        s.put(A + 0xffc, &[&[0xff, 0xf][..], &quads(&[0xa000])].concat());
    }),
    program("sgdt [rbx]", b"\x0f\x01\x03", |s, _| s.regs.rbx = A + 0xffc),
    program("sidt [rbx]", b"\x0f\x01\x0b", |s, _| s.regs.rbx = A + 0xffc),
    program("ltr ax", b"\x0f\x00\xd8", |s, _| {
        s.regs.rax = (OTHER & !3).into();
        s.word(0x8000 + u64::from(OTHER & !7), 0x0000_8900_0000_0067 | (TSS << 16));
    }),
    program("lldt ax", b"\x0f\x00\xd0", |s, _| {
        s.regs.rax = (OTHER & !3).into();
        s.word(0x8000 + u64::from(OTHER & !7), 0x0000_8200_0000_000f | (A << 16));
    }),
    program("mov cr3,rax", b"\x0f\x22\xd8\x8b\x03", |s, _| {
        // Another root, the same tables below.
        (s.regs.rax, s.regs.rbx) = (0x13_0000, A);
        s.word(0x13_0000, 0x2067);
    }),
    program("push rax", b"\x50", |_, _| {}),
    program("rep movsb over pages", b"\xf3\xa4", |s, _| {
        (s.regs.rsi, s.regs.rdi, s.regs.rcx) = (A + 0xf00, B + 0xff0, 0x1800);
    }),
];

/// 16-bit code. Segments are 64 KiB apart: cs at 0x10000, ds, es, ss, fs, gs.
#[rustfmt::skip]
pub(crate) const REAL: &[Program] = &[
    program("mov ax,[bx]", b"\x8b\x07", |s, _| s.regs.rbx = 0x3000),
    program("mov [bx],eax across pages", b"\x66\x89\x07", |s, _| s.regs.rbx = 0x3ffe),
    program("mov ax,es:[di]", b"\x26\x8b\x05", |s, _| s.regs.rdi = 0x5000),
    program("mov eax,[ebx]", b"\x67\x66\x8b\x03", |s, _| s.regs.rbx = 0x3000),
    program("mov ax,[bp]", b"\x8b\x46\0", |s, _| s.regs.rbp = 0x3000),
    program("code across pages", b"\x81\x87\0\0\x01\x02", |s, _| {
        (s.regs.rip, s.regs.rbx) = (0xffe, 0x3000);
    }),
    program("lock add [bx],ax", b"\xf0\x01\x07", |s, _| s.regs.rbx = 0x3000),
    program("bt [bx],ax", b"\x0f\xa3\x07", |s, _| (s.regs.rbx, s.regs.rax) = (0x3000, 0x7fff)),
    program("xlatb", b"\xd7", |s, _| (s.regs.rbx, s.regs.rax) = (0x3ff8, 0x10)),
    program("push ax across pages", b"\x50", |s, _| s.regs.rsp = 0x1001),
    program("pop [bx]", b"\x8f\x07", |s, _| s.regs.rbx = 0x3000),
    program("pusha; popa", b"\x60\x61", |s, _| s.regs.rsp = 0x1008),
    program("enter 16,0", b"\xc8\x10\0\0", |s, _| s.regs.rsp = 0x1002),
    program("movsb", b"\xa4", |s, _| (s.regs.rsi, s.regs.rdi) = (0x3000, 0x4000)),
    program("rep movsw over pages", b"\xf3\xa5", |s, _| {
        (s.regs.rsi, s.regs.rdi, s.regs.rcx) = (0x3f00, 0x4ff1, 0x900);
    }),
    program("rep stosb over pages", b"\xf3\xaa", |s, _| {
        (s.regs.rdi, s.regs.rcx) = (0x4ff1, 0x900);
    }),
    program("call near", b"\xe8\xfd\x7e", |_, _| {}),
    program("call far", b"\x9a\0\0\0\x78", |_, _| {}),
    program("call far [bx]", b"\xff\x1f", |s, _| {
        s.regs.rbx = 0x3ffd;
        s.put(0x2_3ffd, b"\0\0\0\x78");
    }),
    program("retf", b"\xcb", |s, _| s.put(0x4_0800, b"\0\0\0\x78")),
    program("iret", b"\xcf", |s, _| s.put(0x4_0800, b"\0\0\0\x78\x02\x30")),
    program("lds si,[bx]", b"\xc5\x37", |s, _| s.regs.rbx = 0x3000),
    program("int 0x80; iret", b"\xcd\x80", |s, mode| {
        on_event(s, mode, 0x80, 0x7_0000, 0);
        s.put(0x7_0000, b"\xcf");
    }),
    program("divide error", b"\xf7\xf1", |s, mode| {
        on_event(s, mode, 0, 0x7_0000, 0);
        s.put(0x7_0000, &END_CODE);
    }),
];

/// Has an event end the program.
fn handled(setup: &mut Setup, mode: Mode, vector: u64) {
    on_event(setup, mode, vector, HANDLER, 0);
    setup.put(HANDLER, &END_CODE);
}
