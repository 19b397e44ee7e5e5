//! Event delivery, and instructions that look into descriptor tables.

use super::guest::{CODE, DATA, GDT, Guest, IDT, INNER_STACK, LDT, Mode, STACK, TSS};
use crate::candidates::{Access, Cause};

use Access::{Execute, Read, Write};
use Cause::{Descriptor, EventStack, Handler, InterruptTable, Operand, TaskState};

const HANDLER: u64 = 0x20_0000;

/// A descriptor of 8 bytes.
fn segment(base: u64, kind: u8, flags: u8) -> [u8; 8] {
    let [b0, b1, b2, b3, ..] = base.to_le_bytes();
    [0xff, 0xff, b0, b1, b2, kind, 0xf | flags << 4, b3]
}

/// A gate's 16 bytes, of which legacy modes have 8.
fn gate(target: u64, selector: u16, ist: u8, kind: u8) -> [u8; 16] {
    let t = target.to_le_bytes();
    let [s0, s1] = selector.to_le_bytes();
    [t[0], t[1], s0, s1, ist, kind, t[2], t[3], t[4], t[5], t[6], t[7], 0, 0, 0, 0]
}

/// A guest whose kernel code segment is the GDT's 0x1000 and whose stack's is its
/// 0x18; vector 14 and 0x80 lead to the handler.
fn with_tables(mode: Mode) -> Guest {
    let mut guest = Guest::new(mode);
    let flags = if mode.is_long() { 0xa } else { 0xc };
    guest.put(GDT + 0x1000, &segment(0, 0x9b, flags));
    guest.put(GDT + 0x18, &segment(0, 0x93, 0xc));
    let size = if mode.is_long() { 16 } else { 8 };
    for vector in [14, 0x80] {
        let gate = gate(HANDLER, 0x1000, 0, 0xee);
        guest.put(IDT + vector * size as u64, &gate[..size]);
    }
    let tss = TSS + 0xff0;
    if mode.is_long() {
        guest.put(tss + 4, &INNER_STACK.to_le_bytes());
        guest.put(tss + 0x24 + 8 * 2, &(INNER_STACK - 0x4000).to_le_bytes());
        // What crosses into the next page: the stack pointers of ring 2 and on.
    } else {
        guest.put(tss + 4, &INNER_STACK.to_le_bytes()[..4]);
        guest.put(tss + 8, &0x18_u16.to_le_bytes());
    }
    guest.map(HANDLER);
    guest.map(INNER_STACK - 0x1000);
    guest.map(INNER_STACK - 0x5000);
    guest.code(&[0x90]);
    guest
}

fn page_fault(guest: &mut Guest) {
    guest.events.exception.injected = 1;
    guest.events.exception.nr = 14;
    guest.events.exception.has_error_code = 1;
}

#[test]
fn an_exception_in_long_mode() {
    for mode in [Mode::Long4, Mode::Long5, Mode::Compat] {
        let mut guest = with_tables(mode);
        page_fault(&mut guest);
        let expected = [
            (InterruptTable, IDT, Read),
            (Descriptor, GDT + 0x1000, Read),
            (TaskState, TSS, Read),
            (EventStack, INNER_STACK - 0x1000, Write),
            (Handler, HANDLER, Execute),
        ];
        assert_eq!(guest.touched_data(), expected, "{mode:?}");
        // The code that was interrupted comes last.
        assert_eq!(guest.touched().last(), Some(&(Cause::Code, CODE, Execute)));
        let order = [IDT, GDT + 0x1000, TSS, INNER_STACK - 0x1000, HANDLER, CODE];
        guest.take_away(&order);
        assert_eq!(guest.resolve(), order, "{mode:?}");
    }
}

#[test]
fn an_exception_in_protected_mode() {
    for mode in [Mode::Paged32, Mode::Pae] {
        let mut guest = with_tables(mode);
        page_fault(&mut guest);
        let expected = [
            (InterruptTable, IDT, Read),
            (Descriptor, GDT + 0x1000, Read),
            (TaskState, TSS, Read),
            (Descriptor, GDT, Read),
            (EventStack, INNER_STACK - 0x1000, Write),
            (Handler, HANDLER, Execute),
        ];
        assert_eq!(guest.touched_data(), expected, "{mode:?}");
    }
}

/// Without a change of privilege the frame goes to the stack in use, and no task
/// state is read.
#[test]
fn an_exception_in_the_kernel() {
    let mut guest = with_tables(Mode::Long4);
    guest.sregs.ss.dpl = 0;
    guest.sregs.cs.dpl = 0;
    page_fault(&mut guest);
    // Aligned down to 16 first.
    for (rsp, pages) in [
        (STACK + 8, &[STACK - 0x1000][..]),
        (STACK + 0x2f, &[STACK - 0x1000, STACK]),
        (STACK + 0x3f, &[STACK]),
    ] {
        guest.regs.rsp = rsp;
        guest.map_all(STACK - 0x1000, STACK + 0x1000);
        let mut expected = vec![(InterruptTable, IDT, Read), (Descriptor, GDT + 0x1000, Read)];
        expected.extend(pages.iter().map(|page| (EventStack, *page, Write)));
        expected.push((Handler, HANDLER, Execute));
        assert_eq!(guest.touched_data(), expected, "rsp {rsp:#x}");
    }
}

#[test]
fn an_nmi_on_a_stack_of_its_own() {
    let mut guest = with_tables(Mode::Long4);
    guest.put(IDT + 2 * 16, &gate(HANDLER, 0x1000, 3, 0x8e));
    guest.sregs.ss.dpl = 0;
    guest.events.nmi.pending = 1;
    let touched = guest.touched_data();
    assert!(touched.contains(&(TaskState, TSS + 0x1000, Read)), "{touched:x?}");
    assert!(touched.contains(&(EventStack, INNER_STACK - 0x5000, Write)), "{touched:x?}");
}

#[test]
fn an_interrupt_in_real_mode() {
    let mut guest = Guest::new(Mode::Real);
    (guest.sregs.cs.base, guest.regs.rip) = (CODE, 0);
    (guest.sregs.ss.base, guest.regs.rsp) = (STACK, 0xabcd_0002);
    guest.code(&[0x90]);
    guest.put(0x21 * 4, &[0x34, 0x12, 0x00, 0x30]);
    guest.events.interrupt.injected = 1;
    guest.events.interrupt.nr = 0x21;
    let expected = [
        (InterruptTable, 0, Read),
        (EventStack, STACK + 0xf000, Write),
        (EventStack, STACK + 0x10000, Write),
        (Handler, 0x31000, Execute),
    ];
    assert_eq!(guest.touched_data(), expected);
}

#[test]
fn from_virtual_8086_mode() {
    let mut guest = with_tables(Mode::Paged32);
    guest.regs.rflags |= 1 << 17;
    guest.sregs.cs.db = 0;
    // 10 values of 4 bytes: the data segments too.
    guest.put(TSS + 0xff4, &(INNER_STACK + 36_u64).to_le_bytes()[..4]);
    guest.map(INNER_STACK);
    page_fault(&mut guest);
    let touched = guest.touched_data();
    assert!(touched.contains(&(EventStack, INNER_STACK - 0x1000, Write)), "{touched:x?}");
    assert!(touched.contains(&(EventStack, INNER_STACK, Write)), "{touched:x?}");
}

#[test]
fn int_n_is_an_event() {
    for mode in [Mode::Long4, Mode::Compat, Mode::Pae] {
        let mut guest = with_tables(mode);
        guest.code(&[0xcd, 0x80]);
        let touched = guest.touched_data();
        assert_eq!(touched.first(), Some(&(InterruptTable, IDT, Read)));
        assert!(touched.contains(&(EventStack, INNER_STACK - 0x1000, Write)), "{touched:x?}");
        assert_eq!(touched.last(), Some(&(Handler, HANDLER, Execute)));
    }
}

#[test]
fn a_task_gate() {
    let mut guest = with_tables(Mode::Paged32);
    let task = 0x14_0000;
    guest.put(GDT + 0x2008, &segment(task, 0x89, 0));
    guest.put(IDT + 8 * 8, &gate(0, 0x2008, 0, 0xe5)[..8]);
    guest.map(task);
    guest.events.exception.pending = 1;
    guest.events.exception.nr = 8;
    let touched = guest.touched_data();
    assert!(touched.contains(&(Descriptor, GDT + 0x2000, Read)), "{touched:x?}");
    assert!(touched.contains(&(TaskState, task, Write)), "{touched:x?}");
    assert!(touched.contains(&(TaskState, TSS, Write)), "{touched:x?}");
}

/// Loads of a segment register look into the GDT or the LDT.
#[test]
fn segment_loads() {
    let mut guest = with_tables(Mode::Long4);
    guest.map(GDT + 0x2000);
    guest.map(LDT);
    guest.regs.rax = 0x2003;
    guest.code(&[0x8e, 0xd8]); // mov ds, eax
    assert_eq!(guest.touched_data(), [(Descriptor, GDT + 0x2000, Read)]);
    guest.regs.rax = 0x17;
    assert_eq!(guest.touched_data(), [(Descriptor, LDT, Read)]);
    guest.regs.rax = 3;
    assert_eq!(guest.touched_data(), [], "a null selector");
    guest.put(DATA, &0x2000_u16.to_le_bytes());
    guest.regs.rbx = DATA;
    guest.code(&[0x8e, 0x23]); // mov fs, [rbx]
    assert_eq!(guest.touched_data(), [(Operand, DATA, Read), (Descriptor, GDT + 0x2000, Read)]);
    guest.put(STACK, &0x2000_u64.to_le_bytes());
    guest.regs.rsp = STACK;
    guest.code(&[0x0f, 0xa9]); // pop gs
    assert_eq!(guest.touched_data(), [(Operand, STACK, Read), (Descriptor, GDT + 0x2000, Read)]);
    guest.put(DATA, &[0, 0, 0, 0, 0x00, 0x20]);
    guest.code(&[0x0f, 0xb4, 0x03]); // lfs eax, [rbx]
    assert_eq!(guest.touched_data(), [(Operand, DATA, Read), (Descriptor, GDT + 0x2000, Read)]);
    // ltr ax: a system descriptor of 16 bytes, here across pages.
    guest.put(GDT + 0x2ff8, &segment(TSS, 0x89, 0));
    guest.map(GDT + 0x3000);
    guest.regs.rax = 0x2ff8;
    guest.code(&[0x0f, 0x00, 0xd8]);
    let expected = [(Descriptor, GDT + 0x2000, Read), (Descriptor, GDT + 0x3000, Read)];
    assert_eq!(guest.touched_data(), expected);
}

#[test]
fn a_far_call_through_a_gate() {
    let mut guest = with_tables(Mode::Long4);
    guest.put(GDT + 0x2000, &gate(HANDLER, 0x1000, 0, 0xec)[..8]);
    guest.put(DATA, &[0, 0, 0, 0, 0x00, 0x20]);
    guest.regs.rbx = DATA;
    guest.map(STACK);
    guest.code(&[0xff, 0x1b]); // call far dword [rbx]
    let touched = guest.touched_data();
    for expected in [
        (Operand, DATA, Read),
        (Descriptor, GDT + 0x2000, Read),
        (Descriptor, GDT + 0x1000, Read),
        (TaskState, TSS, Read),
        (Operand, INNER_STACK - 0x1000, Write),
    ] {
        assert!(touched.contains(&expected), "{expected:x?} in {touched:x?}");
    }
    let mut guest = with_tables(Mode::Pae);
    guest.map(GDT + 0x2000);
    guest.code(&[0xea, 0, 0, 0, 0, 0x08, 0x20]); // jmp 0x2008:0
    assert_eq!(guest.touched_data(), [(Descriptor, GDT + 0x2000, Read)]);
}

/// To a less privileged level, the outer stack's segment is looked up too.
#[test]
fn returns() {
    let values = |width: usize, values: &[u64]| -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()[..width].to_vec()).collect()
    };
    let mut guest = with_tables(Mode::Long4);
    guest.sregs.ss.dpl = 0;
    guest.regs.rsp = STACK + 0xff0;
    guest.put(STACK + 0xff0, &values(8, &[CODE, 0x2003, 2, STACK, 0x3003]));
    guest.map(GDT + 0x2000);
    guest.map(GDT + 0x3000);
    guest.code(&[0x48, 0xcf]); // iretq
    let expected = [
        (Operand, STACK, Read),
        (Operand, STACK + 0x1000, Read),
        (Descriptor, GDT + 0x2000, Read),
        (Descriptor, GDT + 0x3000, Read),
    ];
    assert_eq!(guest.touched_data(), expected);

    let mut guest = with_tables(Mode::Pae);
    guest.sregs.ss.dpl = 0;
    guest.regs.rsp = STACK + 0xff8;
    guest.put(STACK + 0xff8, &values(4, &[CODE, 0x2003]));
    guest.put(STACK + 0x1000 + 0x10, &values(4, &[STACK, 0x3003]));
    guest.map(GDT + 0x2000);
    guest.map(GDT + 0x3000);
    guest.code(&[0xca, 0x10, 0x00]); // retf 16
    assert_eq!(guest.touched_data(), [expected[0], expected[2], expected[1], expected[3]]);
    // iretd to virtual-8086 mode takes nine values.
    guest.put(STACK + 0xff8, &values(4, &[CODE, 0x2003, 1 << 17]));
    guest.regs.rsp = STACK + 0xff0;
    guest.put(STACK + 0xff0, &values(4, &[CODE, 0x2003, 1 << 17]));
    guest.code(&[0xcf]);
    assert_eq!(guest.touched_data(), &expected[..2]);
}

/// Ring 3 may use a port if its bit in the task state segment says so.
#[test]
fn ports() {
    let mut guest = with_tables(Mode::Long4);
    guest.put(TSS + 0xff0 + 0x66, &0x68_u16.to_le_bytes());
    guest.regs.rdx = 0x400;
    guest.code(&[0xec]); // in al, dx
    let read = [(TaskState, TSS + 0x1000, Read)];
    assert_eq!(guest.touched_data(), read);
    guest.regs.rflags |= 3 << 12;
    assert_eq!(guest.touched_data(), []);
}
