//! Instructions that ring 3 may execute, with their operands on missing pages.

use super::Setup;

pub(crate) const CODE: u64 = 0x10_0100;
/// Where jumps, calls and returns go.
pub(crate) const LANDING: u64 = 0x11_0000;
pub(crate) const STACK: u64 = 0x30_0800;
const A: u64 = 0x20_0000;
const B: u64 = 0x28_0000;

/// What a processor must have for a case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Nothing,
    Avx2,
}

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) code: &'static [u8],
    pub(crate) needs: Needs,
    /// Whether the order of its pages is more than candidates promise.
    pub(crate) any_order: bool,
    pub(crate) set: fn(&mut Setup),
}

const fn case(name: &'static str, code: &'static [u8], set: fn(&mut Setup)) -> Case {
    Case { name, code, needs: Needs::Nothing, any_order: false, set }
}

const fn avx2(name: &'static str, code: &'static [u8], set: fn(&mut Setup)) -> Case {
    Case { name, code, needs: Needs::Avx2, any_order: false, set }
}

/// A nested frame's reads and writes alternate.
const fn any_order(name: &'static str, code: &'static [u8], set: fn(&mut Setup)) -> Case {
    Case { any_order: true, ..case(name, code, set) }
}

#[rustfmt::skip]
pub(crate) const CASES: &[Case] = &[
    case("mov eax,[rbx]", b"\x8b\x03", |s| s.regs.rbx = A),
    case("mov [rbx],al", b"\x88\x03", |s| s.regs.rbx = A + 0xfff),
    case("mov rax,[rbx] across pages", b"\x48\x8b\x03", |s| s.regs.rbx = A + 0xffd),
    case("mov [rbx],rax across pages", b"\x48\x89\x03", |s| s.regs.rbx = A + 0xffd),
    case("mov [r13+r12*8-16],r9", b"\x4f\x89\x4c\xe5\xf0", |s| {
        (s.regs.r13, s.regs.r12) = (A - 0x2000, 0x402);
    }),
    case("mov rax,[rip+0x1000]", b"\x48\x8b\x05\x00\x10\x00\x00", |_| {}),
    case("mov eax,[eip+0x1000]", b"\x67\x8b\x05\x00\x10\x00\x00", |_| {}),
    case("mov rax,[moffs64]", b"\x48\xa1\x08\x20\x20\0\0\0\0\0", |_| {}),
    case("mov eax,fs:[rbx]", b"\x64\x8b\x03", |s| {
        (s.sregs.fs.base, s.regs.rbx) = (0x5000, A - 0x5000);
    }),
    case("mov eax,gs:[ebx]", b"\x65\x67\x8b\x03", |s| {
        (s.sregs.gs.base, s.regs.rbx) = (0x10_0000, 0xdead_beef_0000_0000 | (A - 0x10_0000));
    }),
    case("mov eax,[ebx+ecx*2] wrapping", b"\x67\x8b\x04\x4b", |s| {
        (s.regs.rbx, s.regs.rcx) = (0xffff_0000, (1 << 63) + (A + 0x1_0000) / 2);
    }),
    case("code across pages", b"\x48\x81\x83\0\0\0\0\x01\x02\x03\x04", |s| {
        (s.regs.rip, s.regs.rbx) = (0x10_0ffc, A);
    }),
    case("code that ends with its page", b"\x8b\x03", |s| {
        (s.regs.rip, s.regs.rbx) = (0x10_0ffe, A);
    }),
    case("movups xmm0,[rbx]", b"\x0f\x10\x03", |s| s.regs.rbx = A + 0xff8),
    case("movups [rbx],xmm0", b"\x0f\x11\x03", |s| s.regs.rbx = A + 0xff8),
    case("movntdq [rbx],xmm0", b"\x66\x0f\xe7\x03", |s| s.regs.rbx = A + 0xff0),
    case("lock add [rbx],eax", b"\xf0\x01\x03", |s| s.regs.rbx = A + 0xffc),
    case("xchg [rbx],eax", b"\x87\x03", |s| s.regs.rbx = A),
    case("cmpxchg [rbx],edx", b"\x0f\xb1\x13", |s| s.regs.rbx = A),
    case("cmpxchg16b [rbx]", b"\x48\x0f\xc7\x0b", |s| s.regs.rbx = A + 0xff0),
    case("fxsave [rbx]", b"\x0f\xae\x03", |s| s.regs.rbx = A),
    case("fxsave across pages", b"\x0f\xae\x03", |s| s.regs.rbx = A + 0xf00),
    case("fxrstor across pages", b"\x0f\xae\x0b", |s| s.regs.rbx = A + 0xf00),
    case("fnsave across pages", b"\xdd\x33", |s| s.regs.rbx = A + 0xfa0),
    case("fldenv across pages", b"\xd9\x23", |s| s.regs.rbx = A + 0xff0),
    case("fld tbyte [rbx]", b"\xdb\x2b", |s| s.regs.rbx = A + 0xff6),
    case("movsb", b"\xa4", |s| (s.regs.rsi, s.regs.rdi) = (A, B)),
    case("rep movsq over pages", b"\xf3\x48\xa5", |s| {
        (s.regs.rsi, s.regs.rdi, s.regs.rcx) = (A + 0x7f0, B + 0xff0, 1400);
    }),
    case("rep movsb backwards", b"\xfd\xf3\xa4\xfc", |s| {
        (s.regs.rsi, s.regs.rdi, s.regs.rcx) = (A + 0x2010, B + 0x1005, 0x1800);
    }),
    case("rep stosd over pages", b"\xf3\xab", |s| {
        (s.regs.rdi, s.regs.rcx) = (A + 0xffe, 0x800);
    }),
    case("rep stosb, none", b"\xf3\xaa\x8b\x03", |s| {
        (s.regs.rdi, s.regs.rcx, s.regs.rbx) = (A, 0, A);
    }),
    case("lodsw", b"\x66\xad", |s| s.regs.rsi = A + 0xfff),
    case("repne scasb over pages", b"\xf2\xae", |s| {
        (s.regs.rdi, s.regs.rcx, s.regs.rax) = (A + 0xf00, 0x1800, 1);
    }),
    case("repe cmpsb over pages", b"\xf3\xa6", |s| {
        (s.regs.rsi, s.regs.rdi, s.regs.rcx) = (A + 0xf00, B + 0x800, 0x1800);
    }),
    case("push rax", b"\x50", |_| {}),
    case("push rax, at the start of a page", b"\x50", |s| s.regs.rsp = STACK & !0xfff),
    case("push rax across pages", b"\x50", |s| s.regs.rsp = (STACK & !0xfff) + 4),
    case("push [rbx]", b"\xff\x33", |s| s.regs.rbx = A),
    case("pop rax", b"\x58", |_| {}),
    case("pop [rbx]", b"\x8f\x03", |s| s.regs.rbx = A),
    case("pop [rsp+0xff8]", b"\x8f\x84\x24\xf8\x0f\0\0", |s| s.regs.rsp = STACK & !0xfff),
    case("pushfq; popfq", b"\x9c\x9d", |_| {}),
    case("call rel32", b"\xe8\xfb\xfe\x00\x00", |_| {}),
    case("call [rbx]", b"\xff\x13", |s| {
        s.regs.rbx = A;
        s.put(A, &LANDING.to_le_bytes());
    }),
    case("jmp [rbx]", b"\xff\x23", |s| {
        s.regs.rbx = A;
        s.put(A, &LANDING.to_le_bytes());
    }),
    case("ret", b"\xc3", |s| s.put(STACK, &LANDING.to_le_bytes())),
    case("ret 8", b"\xc2\x08\0", |s| s.put(STACK, &LANDING.to_le_bytes())),
    case("enter 16,0", b"\xc8\x10\0\0", |s| s.regs.rsp = (STACK & !0xfff) + 8),
    case("enter 0x2000,0", b"\xc8\x00\x20\0", |s| s.regs.rsp = (STACK & !0xfff) + 0x10),
    any_order("enter 0,4", b"\xc8\0\0\x04", |s| {
        (s.regs.rsp, s.regs.rbp) = ((STACK & !0xfff) + 0x10, A + 0x8);
    }),
    case("leave", b"\xc9", |s| s.regs.rbp = A),
    case("bt [rbx],rax", b"\x48\x0f\xa3\x03", |s| (s.regs.rbx, s.regs.rax) = (A, 0x8000 * 3 + 63)),
    case("bts [rbx],eax, before it", b"\x0f\xab\x03", |s| {
        (s.regs.rbx, s.regs.rax) = (A, 0xffff_ffff);
    }),
    case("lock btc [rbx],ax", b"\xf0\x66\x0f\xbb\x03", |s| {
        (s.regs.rbx, s.regs.rax) = (A, 0x8000);
    }),
    case("bt [rbx],255", b"\x0f\xba\x23\xff", |s| s.regs.rbx = A + 0xffc),
    case("xlatb", b"\xd7", |s| (s.regs.rbx, s.regs.rax) = (A - 0x10, 0xff10)),
    case("maskmovdqu xmm0,xmm1", b"\x66\x0f\x76\xc9\x66\x0f\xf7\xc1", |s| s.regs.rdi = A),
    case("lea, nop, prefetch; mov", b"\x8d\x03\x0f\x1f\x03\x0f\x18\x0b\x8b\x01", |s| {
        (s.regs.rbx, s.regs.rcx) = (A, B);
    }),
    case("clflush [rbx]", b"\x0f\xae\x3b", |s| s.regs.rbx = A),
    avx2("xsave across pages", b"\x0f\xae\x23", |s| {
        (s.regs.rbx, s.regs.rax) = (A + 0xe00, 7);
    }),
    avx2("xrstor across pages", b"\x0f\xae\x2b", |s| {
        (s.regs.rbx, s.regs.rax) = (A + 0xe00, 7);
    }),
    avx2("vmovdqu ymm0,[rbx]", b"\xc5\xfe\x6f\x03", |s| s.regs.rbx = A + 0xff0),
    // vmovdqu ymm1,[rcx]; vpcmpeqd ymm2,ymm2,ymm2; vgatherdps ymm0,[rbx+ymm1*4],ymm2
    avx2("vgatherdps", b"\xc5\xfe\x6f\x09\xc5\xed\x76\xd2\xc4\xe2\x6d\x92\x04\x8b", |s| {
        (s.regs.rcx, s.regs.rbx) = (A, B);
        let indices = [0, 0x400, -0x400, 0x7ff, 0x1000, 0, 0x1400, 0x1800_i32];
        s.put(A, &indices.map(i32::to_le_bytes).concat());
    }),
    // The same with vpgatherqq ymm0,[rbx+ymm1*8],ymm2
    avx2("vpgatherqq", b"\xc5\xfe\x6f\x09\xc5\xed\x76\xd2\xc4\xe2\xed\x91\x04\xcb", |s| {
        (s.regs.rcx, s.regs.rbx) = (A, B);
        s.put(A, &[0, -0x200, 0x1ff, 0x600_i64].map(i64::to_le_bytes).concat());
    }),
];
