//! The built-in guest's program.
//!
//! It runs in ring 3, knows its parameter block by `r15`, and does one command
//! per round:
//!
//! ```text
//! out EVENT, started -> read the command -> prepare: table[p] = sum(p)
//!                                        -> work:    touch, time, verify
//! out EVENT, done    -> (the host has the results; the next entry goes on) -> start
//! ```
//!
//! A round begins with whatever entry follows the last `done`, so a snapshot
//! taken between rounds resumes with a new one.

use std::mem::offset_of;

use vmpager_sys::memory::Mapping;

use crate::checksum::{MULTIPLIER, ROTATION, SEEDS};
use crate::layout::DEVICE_GPA;
use crate::{PAGE_BYTES, PAGE_SIZE};

/// The port of the guest's events.
pub(super) const EVENT_PORT: u16 = 0xe9;
/// First event of a round.
pub(super) const EVENT_STARTED: u8 = 1;
/// Last event of a round.
pub(super) const EVENT_DONE: u8 = 2;

/// What a round does.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub(crate) enum Command {
    /// Computes the checksums of `count` pages from `first`.
    Prepare = 0,
    /// Touches and verifies `count` pages in the order given.
    Work = 1,
}

/// A vCPU's parameter block, in the device memory; see the assembly for its use.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parameters {
    /// A [`Command`].
    pub(crate) command: u64,
    /// Prepare: the first page.
    pub(crate) first: u64,
    /// Number of pages.
    pub(crate) count: u64,
    /// Gpa of the page numbers to touch, u32 each.
    pub(crate) order: u64,
    /// Gpa where to put each touch's cycles, u32 each.
    pub(crate) stalls: u64,
    /// Gpa of the checksum table.
    pub(crate) sums: u64,
    /// Every how many touches one is a write; 0 for never.
    pub(crate) write_every: u64,
    /// Result: pages whose checksum was wrong.
    pub(crate) mismatches: u64,
    /// Result: the first of them.
    pub(crate) first_mismatch: u64,
}

const WORDS: usize = size_of::<Parameters>() / 8;

impl Parameters {
    fn words(&self) -> [u64; WORDS] {
        [
            self.command,
            self.first,
            self.count,
            self.order,
            self.stalls,
            self.sums,
            self.write_every,
            self.mismatches,
            self.first_mismatch,
        ]
    }

    /// Writes the block of a vCPU into the device memory.
    pub(crate) fn store(&self, device: &Mapping, vcpu: usize) {
        for (i, word) in self.words().into_iter().enumerate() {
            device.write_u64(vcpu * PAGE_BYTES + i * 8, word);
        }
    }

    /// The results in the block of a vCPU: mismatches, first of them.
    pub(crate) fn load_results(device: &Mapping, vcpu: usize) -> (u64, u64) {
        let word = |offset| device.read_u64(vcpu * PAGE_BYTES + offset);
        (word(offset_of!(Parameters, mismatches)), word(offset_of!(Parameters, first_mismatch)))
    }
}

/// Where a vCPU's parameter block is.
pub(super) fn parameters_gpa(vcpu: u64) -> u64 {
    DEVICE_GPA + vcpu * PAGE_SIZE
}

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
    "    cmp qword ptr [r15 + {command}], 0",
    "    jne 20f",

    // prepare: sums[page] = checksum(page)
    "    mov rbx, [r15 + {first}]",
    "    mov r12, [r15 + {count}]",
    "10: test r12, r12",
    "    jz 90f",
    "    mov rsi, rbx",
    "    shl rsi, 12",
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
    "    mov rsi, rbx",
    "    shl rsi, 12",
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
);
