//! Delivery of exceptions and interrupts.

use kvm_bindings::kvm_vcpu_events;

use super::descriptor::{Descriptor, Stack};
use super::scan::{Report, Scan};
use super::{Access, Cause, GuestView};

const NMI_VECTOR: u8 = 2;
const TASK_GATE: u8 = 5;

/// An event that is to be, or is being, delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) vector: u8,
    pub(super) has_error_code: bool,
}

impl Event {
    /// The event that the next entry delivers first. One whose delivery met a
    /// missing page is injected again, and is among these.
    pub(super) fn of(events: &kvm_vcpu_events) -> Option<Self> {
        let exception = &events.exception;
        let plain = |vector| Some(Self { vector, has_error_code: false });
        if exception.injected | exception.pending != 0 {
            let has_error_code = exception.has_error_code != 0;
            Some(Self { vector: exception.nr, has_error_code })
        } else if events.nmi.injected != 0 {
            plain(NMI_VECTOR)
        } else if events.interrupt.injected != 0 {
            plain(events.interrupt.nr)
        } else if events.nmi.pending != 0 {
            plain(NMI_VECTOR)
        } else {
            None
        }
    }
}

/// Follows a delivery: table, descriptor, stack, handler.
pub(super) fn deliver<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    event: Event,
) -> Option<()> {
    if !scan.registers.is_protected() {
        deliver_real(scan, event)
    } else if scan.registers.is_long() {
        deliver_long(scan, event)
    } else {
        deliver_legacy(scan, event)
    }
}

fn deliver_real<V: GuestView, R: Report>(scan: &mut Scan<'_, V, R>, event: Event) -> Option<()> {
    let [a, b, c, d] = table_entry::<4, V, R>(scan, event)?;
    push_here(scan, 3 * 2);
    let segment = u64::from(u16::from_le_bytes([c, d])) << 4;
    touch_handler(scan, segment + u64::from(u16::from_le_bytes([a, b])));
    Some(())
}

fn deliver_long<V: GuestView, R: Report>(scan: &mut Scan<'_, V, R>, event: Event) -> Option<()> {
    let entry = u128::from_le_bytes(table_entry::<16, V, R>(scan, event)?);
    let bits = |shift: u32, bits: u32| u64::try_from(entry >> shift & ((1 << bits) - 1));
    let handler = bits(0, 16).ok()? | bits(48, 48).ok()? << 16;
    let selector = u16::try_from(bits(16, 16).ok()?).ok()?;
    let code = scan.descriptor(selector);
    let privilege = privilege_of(scan, code);
    let stack = match bits(32, 3).ok()? {
        0 if privilege < scan.registers.privilege() => scan.inner_stack(privilege),
        0 => Some(Stack { base: 0, pointer: scan.registers.regs.rsp, mask: u64::MAX }),
        ist => scan.long_stack(0x24 + 8 * (ist - 1)),
    };
    if let Some(stack) = stack {
        let words = 5 + u64::from(event.has_error_code);
        let aligned = Stack { pointer: stack.pointer & !15, ..stack };
        scan.push(&aligned, words * 8, Cause::EventStack);
    }
    touch_handler(scan, handler);
    Some(())
}

fn deliver_legacy<V: GuestView, R: Report>(scan: &mut Scan<'_, V, R>, event: Event) -> Option<()> {
    let entry = table_entry::<8, V, R>(scan, event)?;
    let [low0, low1, selector0, selector1, _, kind, high0, high1] = entry;
    let selector = u16::from_le_bytes([selector0, selector1]);
    let code = scan.descriptor(selector);
    if kind & 0x1f == TASK_GATE {
        scan.switch_tasks(code?);
        return Some(());
    }
    let is_32_bit = kind & 8 != 0;
    let width = if is_32_bit { 4 } else { 2 };
    let privilege = privilege_of(scan, code);
    let error_code = u64::from(event.has_error_code);
    if privilege < scan.registers.privilege() {
        // From virtual-8086 mode, the data segments too.
        let segments = if scan.registers.is_virtual_8086() { 4 } else { 0 };
        if let Some(stack) = scan.inner_stack(privilege) {
            scan.push(&stack, (5 + error_code + segments) * width, Cause::EventStack);
        }
    } else {
        push_here(scan, (3 + error_code) * width);
    }
    let high = if is_32_bit { [high0, high1] } else { [0; 2] };
    let offset = u32::from_le_bytes([low0, low1, high[0], high[1]]);
    let handler = scan.registers.system_linear(code?.base(), offset.into());
    touch_handler(scan, handler);
    Some(())
}

/// The privilege a handler runs with. Nearly always the highest: assumed where
/// the descriptor cannot be read.
fn privilege_of<V: GuestView, R: Report>(scan: &Scan<'_, V, R>, code: Option<Descriptor>) -> u8 {
    match code {
        Some(code) if code.is_conforming() => scan.registers.privilege(),
        Some(code) => code.privilege(),
        None => 0,
    }
}

fn table_entry<const N: usize, V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    event: Event,
) -> Option<[u8; N]> {
    let idt = scan.registers.sregs.idt;
    let offset = u64::from(event.vector) * N as u64;
    if offset + N as u64 > u64::from(idt.limit) + 1 {
        return None;
    }
    let linear = scan.registers.system_linear(idt.base, offset);
    scan.read(linear, Cause::InterruptTable, Access::Read)
}

/// A push onto the stack in use, outside long mode.
fn push_here<V: GuestView, R: Report>(scan: &mut Scan<'_, V, R>, bytes: u64) {
    let registers = scan.registers;
    let stack = Stack {
        base: registers.sregs.ss.base,
        pointer: registers.regs.rsp,
        mask: registers.stack_mask(),
    };
    scan.push(&stack, bytes, Cause::EventStack);
}

/// Its first byte: the rest is an instruction like any other.
fn touch_handler<V: GuestView, R: Report>(scan: &mut Scan<'_, V, R>, linear: u64) {
    scan.touch(linear, 1, Cause::Handler, Access::Execute);
}
