//! The built-in guest's program.
//!
//! It runs in ring 3, knows its parameter block by `r15`, and does one command
//! per round:
//!
//! ```text
//! out EVENT, started -> read the command -> prepare: table[p] = sum(p)
//!                                        -> work:    touch, time, verify
//!                                        -> convert: verify, convert, verify, fill
//! out EVENT, done    -> (the host has the results; the next entry goes on) -> start
//! ```
//!
//! A round begins with whatever entry follows the last `done`, so a snapshot
//! taken between rounds resumes with a new one.

use std::mem::offset_of;

use vmpager::core::convert::HC_MAP_GPA_RANGE;

use super::parameters::Parameters;
use crate::PAGE_BYTES;
use crate::checksum::{MULTIPLIER, ROTATION, SEEDS};
use crate::private::TO_PRIVATE;

/// The port of the guest's events.
pub(crate) const EVENT_PORT: u16 = 0xe9;
/// First event of a round.
pub(crate) const EVENT_STARTED: u8 = 1;
/// Last event of a round.
pub(crate) const EVENT_DONE: u8 = 2;

/// The port to ask by.
pub(super) const CONVERT_PORT: u16 = 0xea;

/// The machine code: position-independent, to be copied to the code page.
pub(crate) fn code() -> &'static [u8] {
    unsafe extern "C" {
        safe static vmpager_guest_start: u8;
        safe static vmpager_guest_end: u8;
    }
    let (start, end) = (&raw const vmpager_guest_start, &raw const vmpager_guest_end);
    let len = end as usize - start as usize;
    assert!(len <= PAGE_BYTES, "the program has one page");
    // SAFETY: the assembler put the bytes between the two labels into the
    // read-only data of this program.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// Where in the program a SYSCALL is to go, whose hypercalls are those of AMD's
/// processors, or of Intel's.
pub(super) fn gate_offset(is_amd: bool) -> u64 {
    unsafe extern "C" {
        safe static vmpager_guest_start: u8;
        safe static vmpager_guest_gate_amd: u8;
        safe static vmpager_guest_gate_intel: u8;
    }
    let gate = match is_amd {
        true => &raw const vmpager_guest_gate_amd,
        false => &raw const vmpager_guest_gate_intel,
    };
    gate as u64 - &raw const vmpager_guest_start as u64
}

// rdi  MULTIPLIER              r12  index of the touch, or pages left
// rbx  page number             r13  touches until the next write
// rsi  the page's address      r15  the parameter block
// rax, rcx, rdx, r8-r11 are scratch
std::arch::global_asm!(
    ".pushsection .rodata.vmpager_guest, \"a\"",
    ".globl vmpager_guest_start",
    ".hidden vmpager_guest_start",
    ".globl vmpager_guest_end",
    ".hidden vmpager_guest_end",
    "vmpager_guest_start:",
    "    mov al, {started}",
    "    out {port}, al",
    "    movabs rdi, {multiplier}",
    "    cmp qword ptr [r15 + {command}], 1",
    "    je 20f",
    "    ja 30f",

    // prepare: sums[page] = checksum(page)
    "    mov rbx, [r15 + {first}]",
    "    mov r12, [r15 + {count}]",
    "10: test r12, r12",
    "    jz 90f",
    "    call 55f",
    "    call 50f",
    "    mov rdx, [r15 + {sums}]",
    "    mov [rdx + rbx*8], rax",
    "    inc rbx",
    "    dec r12",
    "    jmp 10b",

    // work
    "20: xor r12d, r12d",
    "    mov r13, [r15 + {write_every}]",
    "21: cmp r12, [r15 + {count}]",
    "    jae 90f",
    "    mov rdx, [r15 + {order}]",
    "    mov ebx, [rdx + r12*4]",
    "    call 55f",
    // The instruction after RDTSC waits for it, and it waits for the touch.
    "    lfence",
    "    rdtsc",
    "    lfence",
    "    shl rdx, 32",
    "    lea r8, [rax + rdx]",
    // A write_every of 0 wraps, and would reach 0 after 2^64 touches.
    "    dec r13",
    "    jz 22f",
    "    mov rax, [rsi]",
    "    jmp 23f",
    "22: lock add qword ptr [rsi], 0", // a write that changes nothing
    "    mov r13, [r15 + {write_every}]",
    "23: lfence",
    "    rdtsc",
    "    lfence",
    "    shl rdx, 32",
    "    add rax, rdx",
    "    sub rax, r8",
    // more than 32 bits of cycles: about two seconds
    "    mov ecx, 0xffffffff",
    "    cmp rax, rcx",
    "    cmova rax, rcx",
    "    mov rdx, [r15 + {stalls}]",
    "    mov [rdx + r12*4], eax",
    "    call 50f",
    "    mov rdx, [r15 + {sums}]",
    "    cmp rax, [rdx + rbx*8]",
    "    je 25f",
    "    cmp qword ptr [r15 + {mismatches}], 0",
    "    jne 24f",
    "    mov [r15 + {first_mismatch}], rbx",
    "24: inc qword ptr [r15 + {mismatches}]",
    "25: inc r12",
    "    jmp 21b",

    // convert: r13 is the conversion: page, pages, flags, tag (and in the end cycles)
    "30: xor r12d, r12d",
    "31: cmp r12, [r15 + {count}]",
    "    jae 90f",
    "    mov r13, r12",
    "    shl r13, 4",
    "    add r13, [r15 + {ops}]",
    "    call 80f",
    "    call 85f",
    "32: call 60f",
    "    inc rbx",
    "    cmp rbx, r14",
    "    jb 32b",
    "    lfence",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rdx, rax",
    "    push rdx",
    "    call 85f",
    "    cmp qword ptr [r15 + {gate}], 1",
    "    ja 39f",
    "    shl rbx, 12",
    "    mov r8d, [r13 + 4]",
    "    mov edx, [r13 + 8]",
    "    cmp qword ptr [r15 + {gate}], 0",
    "    jne 33f",
    "    mov eax, {map_gpa_range}",
    "    syscall",
    "    jmp 34f",
    "33: mov [r15 + {call}], rbx",
    "    mov [r15 + {call} + 8], r8",
    "    mov [r15 + {call} + 16], rdx",
    "    mov al, 1",
    "    out {convert_port}, al",
    "    mov rax, [r15 + {call} + 24]",
    "34: mov r8, rax",
    "    lfence",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    pop rdx",
    "    sub rax, rdx",
    "    mov [r15 + {cycles}], rax",
    "    test r8, r8",
    "    jz 35f",
    "    mov [r15 + {failed}], r8",
    "    jmp 90f",
    // What the pages hold now, the kind they have, and something new in them.
    "35: call 85f",
    "36: mov rdx, [r15 + {tags}]",
    "    mov eax, [rdx + rbx*4]",
    "    mov ecx, [r13 + 8]",
    "    shl ecx, 27", // private: bit 4 there, bit 31 here
    "    xor ecx, eax",
    "    jns 38f",
    "    cmp qword ptr [r15 + {preserves}], 0",
    "    jne 37f",
    "    and eax, 0x80000000",
    "37: xor eax, 0x80000000",
    "    mov [rdx + rbx*4], eax",
    "38: call 60f",
    "    call 70f",
    "    inc rbx",
    "    cmp rbx, r14",
    "    jb 36b",
    "    call 80f",
    // how long it took, in place of its tag
    "    mov rax, [r15 + {cycles}]",
    "    mov ecx, 0xffffffff",
    "    cmp rax, rcx",
    "    cmova rax, rcx",
    "    mov [r13 + 12], eax",
    "    inc r12",
    "    jmp 31b",

    // touches each page as of the kind it is to have
    "39: mov rsi, rbx",
    "    shl rsi, 12",
    "    test byte ptr [r13 + 8], {to_private}",
    "    jnz 41f",
    "    add rsi, [r15 + {shared_at}]",
    "41: mov rax, [rsi]",
    "    add rsi, 4096",
    "    inc rbx",
    "    cmp rbx, r14",
    "    jb 41b",
    "    xor eax, eax",
    "    jmp 34b",

    // checks page rbx, or this vCPU's part of it, against its tag
    "60: mov rdx, [r15 + {tags}]",
    "    mov eax, [rdx + rbx*4]",
    "    and eax, 0x7fffffff",
    "    cmp eax, 0x7fffffff",
    "    je 62f",
    "    call 75f",
    "61: mov rax, r8",
    "    imul rax, r9",
    "    mov rdx, [rsi]",
    "    cmp rax, rdx",
    "    je 65f",
    // Read once: another vCPU may just have had it zeroed.
    "    test rdx, rdx",
    "    jnz 63f",
    "    cmp qword ptr [r15 + {may_be_zero}], 0",
    "    je 63f",
    "65: add r9, 2",
    "    add rsi, 8",
    "    dec ecx",
    "    jnz 61b",
    "62: ret",
    "63: cmp qword ptr [r15 + {mismatches}], 0",
    "    jne 64f",
    "    mov [r15 + {first_mismatch}], rbx",
    "64: inc qword ptr [r15 + {mismatches}]",
    "    ret",

    // gives page rbx the conversion's tag, and fills it
    "70: mov rdx, [r15 + {tags}]",
    "    and dword ptr [rdx + rbx*4], 0x80000000",
    "    mov eax, [r13 + 12]",
    "    or [rdx + rbx*4], eax",
    "    call 75f",
    "71: mov rax, r8",
    "    imul rax, r9",
    "    mov [rsi], rax",
    "    add r9, 2",
    "    add rsi, 8",
    "    dec ecx",
    "    jnz 71b",
    "    ret",

    // of tag eax and page rbx: ecx words of the part, from rsi on, of which word k of
    // the page is r8 * (rdi + 2k), and r9 the first one's factor; none for tag 0
    "75: mov r8, rax",
    "    shl r8, 32",
    "    jz 76f",
    "    or r8, rbx",
    "76: call 55f",
    "    mov rcx, [r15 + {part}]",
    "    lea r9, [rdi + rcx*2]",
    "    lea rsi, [rsi + rcx*8]",
    "    mov ecx, [r15 + {part_words}]",
    "    ret",

    // rsi: the address of page rbx, as of the kind it has
    "55: mov rsi, rbx",
    "    shl rsi, 12",
    "    mov rdx, [r15 + {shared_at}]",
    "    test rdx, rdx",
    "    jz 56f",
    "    mov rcx, [r15 + {tags}]",
    "    cmp dword ptr [rcx + rbx*4], 0",
    "    jl 56f",
    "    add rsi, rdx",
    "56: ret",

    // checks the pages on either side, if they are this vCPU's
    "80: mov ebx, [r13]",
    "    cmp rbx, [r15 + {first}]",
    "    jbe 81f",
    "    dec rbx",
    "    call 60b",
    "81: call 85f",
    "    mov rbx, r14",
    "    cmp rbx, [r15 + {end}]",
    "    jb 60b",
    "    ret",

    // rbx, r14: the conversion's first page, and the one after its last
    "85: mov ebx, [r13]",
    "    mov r14d, [r13 + 4]",
    "    add r14, rbx",
    "    ret",

    // In ring 0. SYSCALL has left the way back in rcx, where an argument belongs.
    ".globl vmpager_guest_gate_amd",
    ".hidden vmpager_guest_gate_amd",
    "vmpager_guest_gate_amd:",
    "    mov r10, rcx",
    "    mov rcx, r8",
    "    vmmcall",
    "    mov rcx, r10",
    "    sysretq",
    ".globl vmpager_guest_gate_intel",
    ".hidden vmpager_guest_gate_intel",
    "vmpager_guest_gate_intel:",
    "    mov r10, rcx",
    "    mov rcx, r8",
    "    vmcall",
    "    mov rcx, r10",
    "    sysretq",

    // rax = checksum of the page at rsi
    "50: movabs r8, {seed0}",
    "    movabs r9, {seed1}",
    "    movabs r10, {seed2}",
    "    movabs r11, {seed3}",
    "    mov ecx, 4096 / 32",
    "51: xor r8, [rsi]",
    "    xor r9, [rsi + 8]",
    "    xor r10, [rsi + 16]",
    "    xor r11, [rsi + 24]",
    "    imul r8, rdi",
    "    imul r9, rdi",
    "    imul r10, rdi",
    "    imul r11, rdi",
    "    rol r8, {rotation}",
    "    rol r9, {rotation}",
    "    rol r10, {rotation}",
    "    rol r11, {rotation}",
    "    add rsi, 32",
    "    dec ecx",
    "    jnz 51b",
    "    mov rax, r8",
    "    xor rax, r9",
    "    imul rax, rdi",
    "    rol rax, {rotation}",
    "    xor rax, r10",
    "    imul rax, rdi",
    "    rol rax, {rotation}",
    "    xor rax, r11",
    "    imul rax, rdi",
    "    rol rax, {rotation}",
    "    mov rdx, rax",
    "    shr rdx, 32",
    "    xor rax, rdx",
    "    ret",

    "90: mov al, {done}",
    "    out {port}, al",
    "    jmp vmpager_guest_start",
    "vmpager_guest_end:",
    ".popsection",
    started = const EVENT_STARTED,
    done = const EVENT_DONE,
    port = const EVENT_PORT,
    multiplier = const MULTIPLIER,
    rotation = const ROTATION,
    seed0 = const SEEDS[0],
    seed1 = const SEEDS[1],
    seed2 = const SEEDS[2],
    seed3 = const SEEDS[3],
    command = const offset_of!(Parameters, command),
    first = const offset_of!(Parameters, first),
    count = const offset_of!(Parameters, count),
    order = const offset_of!(Parameters, order),
    stalls = const offset_of!(Parameters, stalls),
    sums = const offset_of!(Parameters, sums),
    write_every = const offset_of!(Parameters, write_every),
    mismatches = const offset_of!(Parameters, mismatches),
    first_mismatch = const offset_of!(Parameters, first_mismatch),
    ops = const offset_of!(Parameters, ops),
    tags = const offset_of!(Parameters, tags),
    end = const offset_of!(Parameters, end),
    preserves = const offset_of!(Parameters, preserves),
    gate = const offset_of!(Parameters, gate),
    shared_at = const offset_of!(Parameters, shared_at),
    to_private = const TO_PRIVATE,
    failed = const offset_of!(Parameters, failed),
    call = const offset_of!(Parameters, call),
    cycles = const offset_of!(Parameters, cycles),
    part = const offset_of!(Parameters, part),
    part_words = const offset_of!(Parameters, part_words),
    may_be_zero = const offset_of!(Parameters, may_be_zero),
    convert_port = const CONVERT_PORT,
    map_gpa_range = const HC_MAP_GPA_RANGE,
);

/// What a page with that tag holds, word by word; as the program fills it.
pub(crate) fn pattern(tag: u32, page: u64) -> impl Iterator<Item = u64> {
    let seed = if tag == 0 { 0 } else { u64::from(tag) << 32 | page };
    (0..PAGE_BYTES as u64 / 8).map(move |k| seed.wrapping_mul(MULTIPLIER.wrapping_add(2 * k)))
}
