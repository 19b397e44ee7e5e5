//! Memory operands: from the instruction and the registers to addresses.

use iced_x86::Register;

use super::decode::{Instruction, Kind, Operand, address_bits};
use super::registers::{Registers, VectorRegisters, mask};
use super::scan::{Report, Scan};
use super::{Cause, GuestView};

/// What `xsave` writes: the legacy area and the header at least, and no more
/// than the tiles of AMX make it.
const XSAVE_BYTES: std::ops::RangeInclusive<u32> = 576..=16 << 10;

const TILE_ROWS: u64 = 16;
const TILE_ROW_BYTES: u32 = 64;

/// An address before segmentation.
#[derive(Clone, Copy, Debug)]
struct Place {
    base: u64,
    offset: u64,
    /// Where offsets wrap.
    mask: u64,
}

/// All that the instruction's operands touch.
pub(super) fn touch<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    instruction: &Instruction,
    vectors: &mut impl FnMut() -> Option<VectorRegisters>,
) {
    for operand in instruction.operands() {
        match operand.kind {
            Kind::Gather { elements, mask } => {
                if let Some(vectors) = vectors() {
                    gather(scan, operand, elements, mask, &vectors);
                }
            }
            _ => touch_operand(scan, operand),
        }
    }
}

/// The linear address of an operand that is where it is written.
pub(super) fn linear(registers: &Registers<'_>, operand: &Operand) -> u64 {
    let place = place(registers, operand);
    registers.linear(place.base, place.offset)
}

fn touch_operand<V: GuestView, R: Report>(scan: &mut Scan<'_, V, R>, operand: &Operand) {
    let registers = scan.registers;
    let place = place(registers, operand);
    match operand.kind {
        Kind::Tile { stride, scale } => {
            let stride = registers.general(stride) << shift_of(scale);
            for row in 0..TILE_ROWS {
                let offset = place.offset.wrapping_add(row.wrapping_mul(stride));
                touch_place(scan, Place { offset, ..place }, TILE_ROW_BYTES, operand);
            }
        }
        Kind::Xsave => {
            let bytes = registers.xsave_bytes.clamp(*XSAVE_BYTES.start(), *XSAVE_BYTES.end());
            touch_place(scan, place, bytes, operand);
        }
        Kind::Stack => {
            touch_place(scan, place, operand.bytes, operand);
            // `push [esp+4]`: an operand that is not on the stack the push goes to.
            let written = written(registers, operand);
            if (written.mask, written.offset) != (place.mask, place.offset) {
                touch_place(scan, written, operand.bytes, operand);
            }
        }
        Kind::Plain | Kind::Bit(_) | Kind::Gather { .. } => {
            touch_place(scan, place, operand.bytes, operand);
        }
    }
}

fn touch_place<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    place: Place,
    bytes: u32,
    operand: &Operand,
) {
    let registers = scan.registers;
    let (mut done, bytes) = (0, u64::from(bytes));
    while done < bytes {
        // Up to where the offset, or the address, wraps.
        let offset = place.offset.wrapping_add(done) & place.mask;
        let linear = registers.linear(place.base, offset);
        let wraps = (place.mask - offset).min(registers.last_linear() - linear);
        let piece = (bytes - done).min(wraps.saturating_add(1));
        scan.touch(linear, piece, Cause::Operand, operand.access);
        done += piece;
    }
}

fn gather<V: GuestView, R: Report>(
    scan: &mut Scan<'_, V, R>,
    operand: &Operand,
    elements: u8,
    mask: Register,
    vectors: &VectorRegisters,
) {
    let memory = &operand.memory;
    let place = written(scan.registers, operand);
    let (data, index_bytes) = (operand.bytes as usize, memory.vsib_size() as usize);
    for i in 0..usize::from(elements) {
        let is_wanted = if mask.is_vector_register() {
            let top = vectors.element(mask, i, data).unwrap_or(0) >> (data * 8 - 1).min(63);
            top & 1 != 0
        } else {
            mask == Register::None || vectors.mask(mask) >> i & 1 != 0
        };
        let Some(index) = vectors.element(memory.index(), i, index_bytes) else { continue };
        if is_wanted {
            let index = if index_bytes == 4 { sign_extend(index, 32) } else { index };
            let offset = place.offset.wrapping_add(index << shift_of(memory.scale()));
            let offset = offset & place.mask;
            touch_place(scan, Place { offset, ..place }, operand.bytes, operand);
        }
    }
}

fn place(registers: &Registers<'_>, operand: &Operand) -> Place {
    let written = written(registers, operand);
    match operand.kind {
        Kind::Stack => {
            let memory = &operand.memory;
            let displacement =
                sign_extend(memory.displacement(), address_bits(memory.address_size()));
            let pointer = registers.general(memory.base().full_register());
            let mask = registers.stack_mask();
            Place { offset: pointer.wrapping_add(displacement) & mask, mask, ..written }
        }
        Kind::Bit(register) => {
            let unit = operand.bytes.max(1);
            let bit = sign_extend(registers.general(register), unit * 8).cast_signed();
            let units = bit.div_euclid(i64::from(unit) * 8).cast_unsigned();
            let offset = written.offset.wrapping_add(units.wrapping_mul(u64::from(unit)));
            Place { offset: offset & written.mask, ..written }
        }
        _ => written,
    }
}

/// By base, index and displacement alone. Vectors of indices count as 0.
fn written(registers: &Registers<'_>, operand: &Operand) -> Place {
    let memory = &operand.memory;
    let index = registers.general(memory.index()) << shift_of(memory.scale());
    let offset =
        memory.displacement().wrapping_add(registers.general(memory.base())).wrapping_add(index);
    let mask = mask(address_bits(memory.address_size()));
    Place { base: registers.segment_base(memory.segment()), offset: offset & mask, mask }
}

/// log2 of a scale, which is 1, 2, 4 or 8.
fn shift_of(scale: u32) -> u32 {
    scale.max(1).ilog2()
}

fn sign_extend(value: u64, bits: u32) -> u64 {
    let unused = 64_u32.saturating_sub(bits).min(63);
    ((value << unused).cast_signed() >> unused).cast_unsigned()
}
