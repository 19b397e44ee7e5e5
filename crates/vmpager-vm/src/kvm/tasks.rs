//! A guest that runs another task while one waits for a page: as small a kernel as
//! that takes.
//!
//! ```text
//!   the first task that is runnable, walkers before the one that computes
//!     page fault, flags = 1   it sleeps on the token in CR2      -> the next task
//!     ready                   who sleeps on the token is runnable -> the next task
//!     ended                   the host says so, asked by it       -> the next task
//!   none: halts with interrupts on;  all have ended: out EVENT, done
//! ```
//!
//! Tasks run in ring 3 and use four registers, so that a switch is short also where
//! ring 0 is emulated. The kernel knows its data by `r15` and its stack by `r14`; no
//! task touches either, nor `r8` to `r11`.

use kvm_bindings::{kvm_dtable, kvm_msi, kvm_regs, kvm_segment, kvm_sregs};

use super::Machine;
use super::machine::Parts;
use super::program::{EVENT_DONE, EVENT_PORT, EVENT_STARTED};
use super::refused;
use super::registers::{INTERRUPTS, IOPL_3, initial_sregs};
use super::vcpu::Vcpu;
use crate::device::to_usize;
use crate::error::VmError;
use crate::layout::{Layout, TSS_OFFSET};
use crate::{PAGE_BYTES, PAGE_SIZE};

/// What the kernel was not told of has happened.
pub(crate) const EVENT_LOST: u8 = 3;

/// The task that runs has ended.
pub(crate) const EVENT_TASK_ENDED: u8 = 4;

/// The first word of a page, exclusive-ored with its address.
pub(crate) const KEY: u32 = 0x51a7_93e5;

/// Tasks: the first computes.
pub(crate) const TASKS: u64 = 8;

const PAGE_FAULT: u8 = 14;
const VECTOR: u8 = 0xf3;
/// A task has ended. Where ring 0 is emulated ring 3 has no instruction for that:
/// the host raises it, asked by the port of events.
const ENDED_VECTOR: u8 = 0x81;
const X2APIC: u64 = 1 << 10;

// The kernel's data: the area of asynchronous page faults, then these.
const CURRENT: u64 = 0x40;
const LEFT: u64 = 0x48;
const WRONG: u64 = 0x50;
const FIRST_TASK: u64 = 0x100;
const TASK_BYTES: u64 = 64;
// A task.
const RIP: u64 = 0;
const FLAGS: u64 = 8;
const RBX: u64 = 24;
const RCX: u64 = 32;
const TOKEN: u64 = 48;
const STATE: u64 = 56;
const RUNNABLE: u64 = 1;
const ASLEEP: u64 = 2;

/// Where a page with the kernel's data is, and its table of interrupts.
fn data(layout: &Layout) -> u64 {
    layout.sums * PAGE_SIZE
}

fn interrupts(layout: &Layout) -> u64 {
    data(layout) + PAGE_SIZE
}

/// The pages before the contents.
pub(crate) fn task_pages(layout: &Layout) -> Vec<[u8; PAGE_BYTES]> {
    const CODE_0: u64 = 0x00af_9b00_0000_ffff;
    const DATA_0: u64 = 0x00cf_9300_0000_ffff;
    let mut pages = layout.fixed_pages(code());
    let mut put = |gpa: u64, value: u64| {
        let (page, at) = (to_usize(gpa / PAGE_SIZE), gpa % PAGE_SIZE);
        pages.resize(pages.len().max(page + 1), [0; PAGE_BYTES]);
        let at = to_usize(at);
        pages[page][at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    let descriptors = layout.gdt * PAGE_SIZE;
    put(descriptors + 0x08, CODE_0);
    put(descriptors + 0x10, DATA_0);
    put(descriptors + TSS_OFFSET + 4, layout.stack_top(0));
    let base = layout.code * PAGE_SIZE;
    let gates = [(PAGE_FAULT, Label::Fault), (VECTOR, Label::Ready), (ENDED_VECTOR, Label::Ended)];
    for (vector, label) in gates {
        let to = base + offset(label);
        let gate = to & 0xffff | 0x08 << 16 | 0x8e << 40 | (to & 0xffff_0000) << 32;
        put(interrupts(layout) + u64::from(vector) * 16, gate);
        put(interrupts(layout) + u64::from(vector) * 16 + 8, to >> 32);
    }
    pages
}

/// What a task does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Task {
    /// So many steps.
    Compute(u64),
    /// Reads so many pages from this address on.
    Walk(u64, u64),
}

/// Makes a machine with this guest, and these tasks. Brings the pages that the guest
/// itself needs.
pub(crate) fn task_machine(
    parts: &Parts<'_>,
    layout: &Layout,
    tasks: &[Task],
) -> Result<Machine, VmError> {
    let machine = Machine::new(parts)?;
    let memory = &parts.memory.mapping;
    let word = |gpa: u64, value: u64| memory.write_u64(to_usize(gpa), value);
    let data = data(layout);
    for (number, task) in (0..TASKS).zip(tasks) {
        let at = data + FIRST_TASK + number * TASK_BYTES;
        let (label, rbx, rcx) = match task {
            Task::Compute(steps) => (Label::Compute, 0, *steps),
            Task::Walk(from, pages) => (Label::Walk, *from, *pages),
        };
        word(at + RIP, layout.code * PAGE_SIZE + offset(label));
        word(at + FLAGS, INTERRUPTS | IOPL_3 | 2);
        word(at + RBX, rbx);
        word(at + RCX, rcx);
        word(at + STATE, RUNNABLE);
    }
    word(data + LEFT, tasks.len() as u64);
    (0..layout.first).for_each(|page| {
        memory.read_u64(to_usize(page * PAGE_SIZE));
    });
    machine.vcpus.iter().try_for_each(|vcpu| start(vcpu, layout))?;
    Ok(machine)
}

/// What says to the guest that its task has ended.
pub(crate) fn ending(machine: &Machine) -> impl Fn() -> Result<(), VmError> + use<> {
    const MSI_ADDRESS: u32 = 0xfee0_0000;
    let vm = machine.vm.clone();
    move || {
        let msi =
            kvm_msi { address_lo: MSI_ADDRESS, data: ENDED_VECTOR.into(), ..Default::default() };
        vm.signal_msi(msi).map(drop).map_err(refused("raise an interrupt"))
    }
}

/// How many pages the guest has found wrong.
pub(crate) fn wrong_pages(parts: &Parts<'_>, layout: &Layout) -> u64 {
    parts.memory.mapping.read_u64(to_usize(data(layout) + WRONG))
}

/// In ring 0, with a local APIC whose registers are MSRs.
fn start(vcpu: &Vcpu, layout: &Layout) -> Result<(), VmError> {
    let first = vcpu.fd.get_sregs().map_err(refused("read system registers"))?;
    let apic_base = first.apic_base | X2APIC;
    let sregs = initial_sregs(layout, first);
    let sregs = kvm_sregs {
        cs: kvm_segment { selector: 0x08, dpl: 0, ..sregs.cs },
        ss: kvm_segment { selector: 0x10, dpl: 0, ..sregs.ss },
        idt: kvm_dtable { base: interrupts(layout), limit: 0xfff, ..Default::default() },
        apic_base,
        ..sregs
    };
    let regs = kvm_regs {
        rip: layout.code * PAGE_SIZE,
        rsp: layout.stack_top(0),
        r14: layout.stack_top(0),
        r15: data(layout),
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_registers(&regs, &sregs)
}

#[derive(Clone, Copy, Debug)]
enum Label {
    Fault,
    Ready,
    Ended,
    Compute,
    Walk,
}

unsafe extern "C" {
    safe static vmpager_tasks_start: u8;
    safe static vmpager_tasks_fault: u8;
    safe static vmpager_tasks_ready: u8;
    safe static vmpager_tasks_ended: u8;
    safe static vmpager_tasks_compute: u8;
    safe static vmpager_tasks_walk: u8;
    safe static vmpager_tasks_end: u8;
}

fn offset(label: Label) -> u64 {
    let at = match label {
        Label::Fault => &raw const vmpager_tasks_fault,
        Label::Ready => &raw const vmpager_tasks_ready,
        Label::Ended => &raw const vmpager_tasks_ended,
        Label::Compute => &raw const vmpager_tasks_compute,
        Label::Walk => &raw const vmpager_tasks_walk,
    };
    at as u64 - &raw const vmpager_tasks_start as u64
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const vmpager_tasks_start, &raw const vmpager_tasks_end);
    let len = end as usize - start as usize;
    assert!(len <= PAGE_BYTES, "the program has one page");
    // SAFETY: the assembler put the bytes between the two labels into the
    // read-only data of this program.
    unsafe { std::slice::from_raw_parts(start, len) }
}

std::arch::global_asm!(
    ".pushsection .rodata.vmpager_tasks, \"a\"",
    ".macro vmpager_tasks_label name",
    ".globl vmpager_tasks_\\name",
    ".hidden vmpager_tasks_\\name",
    "vmpager_tasks_\\name:",
    ".endm",
    // the interrupted task's registers, to the task in r8
    ".macro vmpager_tasks_save",
    "    mov r9, [rsp]",
    "    mov [r8 + {rip}], r9",
    "    mov r9, [rsp + 16]",
    "    mov [r8 + {flags}], r9",
    "    mov [r8 + 16], rax",
    "    mov [r8 + {rbx}], rbx",
    "    mov [r8 + {rcx}], rcx",
    "    mov [r8 + 40], rsi",
    ".endm",
    "vmpager_tasks_label start",
    "    xor edx, edx",
    "    mov ecx, 0x80f", // the local APIC, on
    "    mov eax, 0x1ff",
    "    wrmsr",
    "    mov ecx, 0x4b564d06",
    "    mov eax, {vector}",
    "    wrmsr",
    "    mov ecx, 0x4b564d02",
    "    lea rax, [r15 + 9]",
    "    wrmsr",
    "    mov al, {started}",
    "    out {port}, al",

    "20: mov rsp, r14",
    "    lea r10, [r15 + {first_task} + 7*{task_bytes}]",
    "    mov r11d, {tasks}",
    "21: cmp qword ptr [r10 + {state}], {runnable}",
    "    je 22f",
    "    sub r10, {task_bytes}",
    "    dec r11d",
    "    jnz 21b",
    "    mov qword ptr [r15 + {current}], 0",
    "    sti",
    "    hlt",
    "    cli",
    "    jmp 20b",
    "22: mov [r15 + {current}], r10",
    "    push 0x2b",
    "    push r14", // tasks have no stack
    "    push qword ptr [r10 + {flags}]",
    "    push 0x33",
    "    push qword ptr [r10 + {rip}]",
    "    mov rax, [r10 + 16]",
    "    mov rbx, [r10 + {rbx}]",
    "    mov rcx, [r10 + {rcx}]",
    "    mov rsi, [r10 + 40]",
    "    iretq",

    "vmpager_tasks_label fault",
    "    mov r8, [r15 + {current}]",
    "    cmp dword ptr [r15], 1",
    "    jne 90f",
    "    mov dword ptr [r15], 0",
    "    mov r9, cr2",
    "    mov [r8 + {token}], r9d",
    "    mov qword ptr [r8 + {state}], {asleep}",
    "    add rsp, 8", // the error code
    "    vmpager_tasks_save",
    "    jmp 20b",

    "vmpager_tasks_label ready",
    "    mov r8, [r15 + {current}]",
    "    test r8, r8",
    "    jz 40f",
    "    vmpager_tasks_save",
    "40: mov r9d, [r15 + 4]",
    "    mov dword ptr [r15 + 4], 0",
    "    lea r10, [r15 + {first_task}]",
    "    mov r11d, {tasks}",
    "41: cmp qword ptr [r10 + {state}], {asleep}",
    "    jne 43f",
    "    cmp r9d, -1",
    "    je 42f",
    "    cmp r9d, [r10 + {token}]",
    "    jne 43f",
    "42: mov qword ptr [r10 + {state}], {runnable}",
    "43: add r10, {task_bytes}",
    "    dec r11d",
    "    jnz 41b",
    "    xor edx, edx",
    "    mov ecx, 0x4b564d07",
    "    mov eax, 1",
    "    wrmsr",
    "    mov ecx, 0x80b", // the end of the interrupt
    "    xor eax, eax",
    "    wrmsr",
    "    jmp 20b",

    "vmpager_tasks_label ended",
    "    mov r8, [r15 + {current}]",
    "    add [r15 + {wrong}], rsi",
    "    mov qword ptr [r8 + {state}], 0",
    "    xor edx, edx",
    "    mov ecx, 0x80b",
    "    xor eax, eax",
    "    wrmsr",
    "    dec qword ptr [r15 + {left}]",
    "    jnz 20b",
    "    mov al, {done}",
    "    out {port}, al",
    "90: mov al, {lost}",
    "    out {port}, al",
    "    jmp 90b",

    "vmpager_tasks_label compute",
    "50: imul rax, rax, 3",
    "    dec rcx",
    "    jnz 50b",
    "51: mov al, {task_ended}",
    "    out {port}, al",
    "52: jmp 52b",

    "vmpager_tasks_label walk",
    "55: mov eax, [rbx]",
    "    xor eax, ebx",
    "    cmp eax, {key}",
    "    je 60f",
    "    inc rsi",
    "60: add rbx, 4096",
    "    dec rcx",
    "    jnz 55b",
    "    jmp 51b",
    "vmpager_tasks_label end",
    ".purgem vmpager_tasks_label",
    ".purgem vmpager_tasks_save",
    ".popsection",
    vector = const VECTOR,
    task_ended = const EVENT_TASK_ENDED,
    port = const EVENT_PORT,
    started = const EVENT_STARTED,
    done = const EVENT_DONE,
    lost = const EVENT_LOST,
    key = const KEY,
    tasks = const TASKS,
    first_task = const FIRST_TASK,
    task_bytes = const TASK_BYTES,
    current = const CURRENT,
    left = const LEFT,
    wrong = const WRONG,
    rip = const RIP,
    flags = const FLAGS,
    rbx = const RBX,
    rcx = const RCX,
    token = const TOKEN,
    state = const STATE,
    runnable = const RUNNABLE,
    asleep = const ASLEEP,
);
