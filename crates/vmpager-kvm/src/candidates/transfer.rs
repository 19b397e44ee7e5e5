//! Instructions that look into descriptor tables and task state segments.

use super::decode::{Instruction, Selector, Transfer};
use super::event::{self, Event};
use super::operand;
use super::scan::{Report, Scan};
use super::{Access, Cause, GuestView};

const RFLAGS_VM: u32 = 1 << 17;
const RFLAGS_IOPL_SHIFT: u32 = 12;
/// Where a task state segment says where its bits for ports begin.
const PORT_BITS: u64 = 0x66;

/// What an instruction touches beyond its operands.
pub(super) fn touch<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    instruction: &Instruction,
) -> Option<()> {
    if let Transfer::Event(vector) = instruction.transfer {
        return event::deliver(scan, Event { vector, has_error_code: false });
    }
    if !scan.registers.has_descriptors() {
        return match instruction.transfer {
            Transfer::Port(port) => touch_port(scan, port),
            _ => None,
        };
    }
    match instruction.transfer {
        Transfer::None | Transfer::Event(_) => {}
        Transfer::Select(selector) => {
            let selector = value_of(scan, instruction, selector)?;
            scan.descriptor(selector);
        }
        Transfer::Far(selector) => {
            let selector = value_of(scan, instruction, selector)?;
            let is_call = instruction.operands().iter().any(|o| o.access == Access::Write);
            go_far(scan, selector, is_call)?;
        }
        Transfer::Return { width, parameters } => {
            let width = u64::from(width);
            let outer = 2 * width + u64::from(parameters);
            go_out(scan, instruction, width, outer)?;
        }
        Transfer::InterruptReturn { width } => interrupt_return(scan, instruction, width)?,
        Transfer::Port(port) => touch_port(scan, port)?,
    }
    Some(())
}

/// A selector that an instruction has, or reads.
fn value_of<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    instruction: &Instruction,
    selector: Selector,
) -> Option<u16> {
    match selector {
        Selector::Immediate(value) => Some(value),
        Selector::Register(register) => {
            Some(u16::try_from(scan.registers.general(register) & 0xffff).unwrap_or(0))
        }
        Selector::Operand(offset) => read_operand(scan, instruction, offset.into()),
    }
}

/// Reads a selector that lies so far into the first operand.
fn read_operand<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    instruction: &Instruction,
    offset: u64,
) -> Option<u16> {
    let start = operand::linear(scan.registers, instruction.operands().first()?);
    let at = scan.registers.linear(start, offset);
    scan.read(at, Cause::Operand, Access::Read).map(u16::from_le_bytes)
}

/// To a code segment, through a call gate, or to a task.
fn go_far<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    selector: u16,
    is_call: bool,
) -> Option<()> {
    let descriptor = scan.descriptor(selector)?;
    match descriptor.system_type() {
        // A task, a gate to a task, a call gate of 16 bits, one of 32 or 64.
        Some(1 | 9) => scan.switch_tasks(descriptor),
        Some(5) => {
            let task = scan.descriptor(descriptor.target())?;
            scan.switch_tasks(task);
        }
        Some(gate @ (4 | 12)) => {
            let code = scan.descriptor(descriptor.target())?;
            let goes_in = code.privilege() < scan.registers.privilege() && !code.is_conforming();
            if is_call && goes_in {
                let stack = scan.inner_stack(code.privilege())?;
                let (width, words) = match gate {
                    _ if scan.registers.is_long() => (8, 4),
                    4 => (2, 4 + descriptor.parameters()),
                    _ => (4, 4 + descriptor.parameters()),
                };
                scan.push(&stack, width * u64::from(words), Cause::Operand);
            }
        }
        _ => {}
    }
    Some(())
}

fn interrupt_return<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    instruction: &Instruction,
    width: u8,
) -> Option<()> {
    let width = u64::from(width);
    if !scan.registers.is_long() && width == 4 {
        // The upper half of the flags says whether it goes to virtual-8086 mode.
        let flags = read_operand(scan, instruction, 2 * width + 2)?;
        if u32::from(flags) << 16 & RFLAGS_VM != 0 {
            let start = operand::linear(scan.registers, instruction.operands().first()?);
            scan.touch(start, 9 * width, Cause::Operand, Access::Read);
            return Some(());
        }
    }
    go_out(scan, instruction, width, 3 * width)
}

/// Back to code whose selector is the second value on the stack; if that is less
/// privileged, to the stack described `outer` bytes up.
fn go_out<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    instruction: &Instruction,
    width: u64,
    outer: u64,
) -> Option<()> {
    let code = read_operand(scan, instruction, width)?;
    scan.descriptor(code);
    if code & 3 > u16::from(scan.registers.privilege()) {
        let start = operand::linear(scan.registers, instruction.operands().first()?);
        let at = scan.registers.linear(start, outer);
        scan.touch(at, 2 * width, Cause::Operand, Access::Read);
        let stack = read_operand(scan, instruction, outer + width)?;
        scan.descriptor(stack);
    }
    Some(())
}

/// Code without the privilege to use ports may use some of them.
fn touch_port<V: GuestView, R: Report>(scan: &mut Scan<'_, V, R>, port: Option<u8>) -> Option<()> {
    let registers = scan.registers;
    let privileged = registers.regs.rflags >> RFLAGS_IOPL_SHIFT & 3;
    let may = u64::from(registers.privilege()) <= privileged && !registers.is_virtual_8086();
    if !registers.is_protected() || may {
        return None;
    }
    let port = port.map_or(registers.regs.rdx & 0xffff, u64::from);
    let bits = u64::from(u16::from_le_bytes(scan.read_task_state(PORT_BITS)?));
    scan.read_task_state::<2>(bits + port / 8).map(drop)
}
