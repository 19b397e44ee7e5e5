//! Segment descriptors, gates and task state segments.

use super::scan::{Report, Scan};
use super::{Access, Cause, GuestView};

const USE_LDT: u16 = 4;
/// Bits of a selector that are its number.
const INDEX: u16 = 0xfff8;
/// What a switch of tasks writes or reads of a 32-bit task state segment.
const TASK_STATE_BYTES: u64 = 104;

/// A descriptor's 8 bytes. A long system descriptor's others are seldom of use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor(u64);

impl Descriptor {
    /// Where the segment begins.
    pub(super) fn base(self) -> u64 {
        self.0 >> 16 & 0x00ff_ffff | self.0 >> 32 & 0xff00_0000
    }

    pub(super) fn privilege(self) -> u8 {
        self.byte(5) >> 5 & 3
    }

    /// Whether its code runs with the caller's privilege.
    pub(super) fn is_conforming(self) -> bool {
        self.byte(5) & 0x1c == 0x1c
    }

    /// The type of a gate or of a task state segment.
    pub(super) fn system_type(self) -> Option<u8> {
        (self.byte(5) & 0x10 == 0).then_some(self.byte(5) & 0xf)
    }

    /// Whether a stack segment's pointer has 32 bits.
    pub(super) fn is_32_bit(self) -> bool {
        self.byte(6) & 0x40 != 0
    }

    /// The code segment a gate leads to.
    pub(super) fn target(self) -> u16 {
        u16::from_le_bytes([self.byte(2), self.byte(3)])
    }

    /// How many parameters a call gate copies.
    pub(super) fn parameters(self) -> u8 {
        self.byte(4) & 0x1f
    }

    fn byte(self, at: usize) -> u8 {
        self.0.to_le_bytes().get(at).copied().unwrap_or(0)
    }
}

/// Where a stack pointer points, and the mask it wraps by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    pub(super) base: u64,
    pub(super) pointer: u64,
    pub(super) mask: u64,
}

impl<V: GuestView, R: Report> Scan<'_, V, R> {
    /// Reads the descriptor that a selector names. Null names none.
    pub(super) fn descriptor(&mut self, selector: u16) -> Option<Descriptor> {
        let sregs = self.registers.sregs;
        let (base, limit) = match selector & USE_LDT {
            0 => (sregs.gdt.base, u32::from(sregs.gdt.limit)),
            _ if sregs.ldt.unusable != 0 => return None,
            _ => (sregs.ldt.base, sregs.ldt.limit),
        };
        let offset = selector & INDEX;
        if offset | selector & USE_LDT == 0 || u32::from(offset) + 7 > limit {
            return None;
        }
        // Written, too, if the accessed bit is not set yet.
        let linear = self.registers.system_linear(base, offset.into());
        let low = self.read(linear, Cause::Descriptor, Access::Read)?;
        let descriptor = Descriptor(u64::from_le_bytes(low));
        if self.registers.is_long() && descriptor.system_type().is_some() {
            let high = self.registers.system_linear(linear, 8);
            self.touch(high, 8, Cause::Descriptor, Access::Read);
        }
        Some(descriptor)
    }

    /// The stack that code of a more privileged level begins with.
    pub(super) fn inner_stack(&mut self, privilege: u8) -> Option<Stack> {
        let level = u64::from(privilege);
        if self.registers.is_long() {
            return self.long_stack(4 + 8 * level);
        }
        let is_32_bit = self.registers.sregs.tr.type_ & 8 != 0;
        let (pointer, selector) = if is_32_bit {
            let bytes = self.read_task_state::<6>(4 + 8 * level)?;
            let [a, b, c, d, e, f] = bytes;
            (u64::from(u32::from_le_bytes([a, b, c, d])), u16::from_le_bytes([e, f]))
        } else {
            let [a, b, c, d] = self.read_task_state::<4>(2 + 4 * level)?;
            (u64::from(u16::from_le_bytes([a, b])), u16::from_le_bytes([c, d]))
        };
        let segment = self.descriptor(selector)?;
        let mask = if segment.is_32_bit() { u64::from(u32::MAX) } else { u64::from(u16::MAX) };
        Some(Stack { base: segment.base(), pointer, mask })
    }

    /// A stack pointer of a long mode's task state segment.
    pub(super) fn long_stack(&mut self, offset: u64) -> Option<Stack> {
        let pointer = u64::from_le_bytes(self.read_task_state(offset)?);
        Some(Stack { base: 0, pointer, mask: u64::MAX })
    }

    pub(super) fn read_task_state<const N: usize>(&mut self, offset: u64) -> Option<[u8; N]> {
        let tr = &self.registers.sregs.tr;
        if offset + N as u64 > u64::from(tr.limit) + 1 {
            return None;
        }
        let linear = self.registers.system_linear(tr.base, offset);
        self.read(linear, Cause::TaskState, Access::Read)
    }

    /// `bytes` are pushed onto a stack.
    pub(super) fn push(&mut self, stack: &Stack, bytes: u64, cause: Cause) {
        let offset = stack.pointer.wrapping_sub(bytes) & stack.mask;
        let linear = self.registers.system_linear(stack.base, offset);
        self.touch(linear, bytes, cause, Access::Write);
    }

    /// The task state segment of this descriptor takes over from the present one.
    pub(super) fn switch_tasks(&mut self, descriptor: Descriptor) {
        let old = self.registers.sregs.tr.base;
        let new = self.registers.system_linear(descriptor.base(), 0);
        self.touch(new, TASK_STATE_BYTES, Cause::TaskState, Access::Write);
        self.touch(old, TASK_STATE_BYTES, Cause::TaskState, Access::Write);
    }
}
