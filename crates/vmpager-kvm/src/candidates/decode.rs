//! Instructions, as far as they touch memory, and a cache of them.

use iced_x86::{
    Code, CodeSize, Decoder, DecoderError, DecoderOptions, InstructionInfoFactory,
    InstructionInfoOptions, MemorySize, Mnemonic, OpAccess, OpKind, Register, UsedMemory,
};

use super::registers::mask;
use super::{Access, MAX_INSTRUCTION};

/// How many instructions are remembered: more than a loop has.
const SLOTS: usize = 64;

/// What an instruction does with memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Instruction {
    operands: [Operand; Self::MOST],
    count: u8,
    pub(super) transfer: Transfer,
}

/// A range of memory that the instruction names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub(super) memory: UsedMemory,
    pub(super) bytes: u32,
    pub(super) access: Access,
    pub(super) kind: Kind,
}

/// How an operand's address is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// As it is written.
    Plain,
    /// By the stack pointer, as wide as the stack segment says.
    Stack,
    /// The operand, or one so many units before or after it, by the bit number
    /// in a register.
    Bit(Register),
    /// One address for each element of a vector, those masked out excepted.
    Gather { elements: u8, mask: Register },
    /// Rows of a tile, as far from each other as a register and a scale say.
    Tile { stride: Register, scale: u32 },
    /// The area of `xsave`.
    Xsave,
}

/// What an instruction does that needs descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    None,
    /// Raises an interrupt.
    Event(u8),
    /// Loads or examines a segment.
    Select(Selector),
    /// A far jump or call.
    Far(Selector),
    /// A far return that takes values of so many bytes off the stack, and then
    /// parameters.
    Return {
        width: u8,
        parameters: u16,
    },
    /// A return from an interrupt, with values of so many bytes.
    InterruptReturn {
        width: u8,
    },
    /// Input or output, at a port in dx or a fixed one.
    Port(Option<u8>),
}

/// Where a selector comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Selector {
    Immediate(u16),
    Register(Register),
    /// So far into the first operand.
    Operand(u8),
}

impl Instruction {
    /// Most distinct operands of an instruction, after merging: VIA's `xcrypt`
    /// has the most.
    const MOST: usize = 6;

    const NONE: Self =
        Self { operands: [Operand::NONE; Self::MOST], count: 0, transfer: Transfer::None };

    /// The operands, in the order in which the processor touches them: it reads
    /// before it writes.
    pub(super) fn operands(&self) -> &[Operand] {
        self.operands.get(..usize::from(self.count)).unwrap_or_default()
    }

    fn of(decoded: &iced_x86::Instruction, info: &mut InstructionInfoFactory) -> Self {
        let info = info.info_options(decoded, InstructionInfoOptions::NO_REGISTER_USAGE);
        let mut all = Self::NONE;
        for first in [true, false] {
            for memory in info.used_memory() {
                let access = match memory.access() {
                    OpAccess::None | OpAccess::NoMemAccess => continue,
                    OpAccess::Read | OpAccess::CondRead => Access::Read,
                    _ => Access::Write,
                };
                if first == (access == Access::Read) {
                    all.add(Operand::of(decoded, *memory, access));
                }
            }
        }
        if decoded.mnemonic() == Mnemonic::Enter
            && let Some(push) = info.used_memory().first()
        {
            all.add(Operand::end_of_frame(decoded, push));
        }
        all.transfer = Transfer::of(decoded);
        all
    }

    fn add(&mut self, operand: Operand) {
        let count = usize::from(self.count);
        let (known, free) = self.operands.split_at_mut(count.min(Self::MOST));
        if known.iter_mut().any(|known| known.join(&operand)) {
            return;
        }
        if let Some(free) = free.first_mut() {
            *free = operand;
            self.count += 1;
        }
    }
}

impl Operand {
    const NONE: Self = Self {
        memory: UsedMemory::new(
            Register::None,
            Register::None,
            Register::None,
            1,
            0,
            MemorySize::Unknown,
            OpAccess::None,
        ),
        bytes: 0,
        access: Access::Read,
        kind: Kind::Plain,
    };

    fn of(decoded: &iced_x86::Instruction, memory: UsedMemory, access: Access) -> Self {
        let kind = Kind::of(decoded, &memory);
        Self { memory, bytes: size_of_operand(decoded, &memory), access, kind }
    }

    /// What `enter` makes sure of after its pushes: that the new frame's last
    /// byte can be written.
    fn end_of_frame(decoded: &iced_x86::Instruction, push: &UsedMemory) -> Self {
        let down = i64::from(decoded.stack_pointer_increment()).cast_unsigned();
        let memory = UsedMemory::new2(
            push.segment(),
            push.base(),
            Register::None,
            1,
            down & mask(address_bits(push.address_size())),
            MemorySize::UInt8,
            OpAccess::Write,
            push.address_size(),
            0,
        );
        Self { memory, bytes: 1, access: Access::Write, kind: Kind::Stack }
    }

    /// Takes in an operand that lies directly before or after: the pushes of
    /// `pusha` are one range.
    fn join(&mut self, other: &Self) -> bool {
        let (a, b) = (&self.memory, &other.memory);
        let same = a.base() == b.base()
            && a.index() == b.index()
            && a.segment() == b.segment()
            && a.address_size() == b.address_size()
            && (self.kind, self.access) == (other.kind, other.access)
            && matches!(self.kind, Kind::Plain | Kind::Stack);
        let distance = b.displacement().wrapping_sub(a.displacement());
        if same && distance == u64::from(self.bytes) {
            self.bytes += other.bytes;
        } else if same && distance.wrapping_neg() == u64::from(other.bytes) {
            self.bytes += other.bytes;
            self.memory = other.memory;
        } else {
            return false;
        }
        true
    }
}

fn size_of_operand(decoded: &iced_x86::Instruction, memory: &UsedMemory) -> u32 {
    let sizes = [memory.memory_size(), decoded.memory_size()];
    let size = sizes.map(MemorySize::size).into_iter().find(|size| *size != 0);
    // Of a repeated string instruction the next element. What is left are the
    // blocks of VIA's ciphers.
    size.and_then(|size| u32::try_from(size).ok()).unwrap_or(16)
}

impl Kind {
    fn of(decoded: &iced_x86::Instruction, memory: &UsedMemory) -> Self {
        use Mnemonic::{Bt, Btc, Btr, Bts};
        if memory.vsib_size() != 0 {
            return Self::gather(decoded, memory);
        }
        match memory.memory_size() {
            MemorySize::Xsave | MemorySize::Xsave64 => return Self::Xsave,
            MemorySize::Tile => {
                let scale = decoded.memory_index_scale();
                return Self::Tile { stride: decoded.memory_index(), scale };
            }
            _ => {}
        }
        let is_bit = matches!(decoded.mnemonic(), Bt | Bts | Btr | Btc);
        if is_bit && decoded.op1_kind() == OpKind::Register {
            return Self::Bit(decoded.op1_register());
        }
        let by_stack = matches!(memory.base().full_register(), Register::RSP | Register::RBP);
        if by_stack && decoded.is_stack_instruction() { Self::Stack } else { Self::Plain }
    }

    fn gather(decoded: &iced_x86::Instruction, memory: &UsedMemory) -> Self {
        let lanes = |register: Register, bytes: usize| {
            if register.is_vector_register() { register.size() / bytes.max(1) } else { usize::MAX }
        };
        let data = memory.memory_size().element_size();
        let mut registers = (0..decoded.op_count())
            .filter(|i| decoded.op_kind(*i) == OpKind::Register)
            .map(|i| decoded.op_register(i));
        let target = registers.next().unwrap_or(Register::None);
        let in_index = lanes(memory.index(), memory.vsib_size() as usize);
        let elements = in_index.min(lanes(target, data)).min(16);
        // A vector register whose elements' highest bits are the mask, or k1 to k7.
        let mask = registers.next().unwrap_or(decoded.op_mask());
        Self::Gather { elements: u8::try_from(elements).unwrap_or(16), mask }
    }
}

impl Transfer {
    fn of(decoded: &iced_x86::Instruction) -> Self {
        use Mnemonic as M;
        match decoded.mnemonic() {
            M::Mov | M::Pop if decoded.op0_register().is_segment_register() => {
                Self::Select(Selector::in_operand(decoded, 1))
            }
            M::Lldt | M::Ltr | M::Verr | M::Verw => Self::Select(Selector::in_operand(decoded, 0)),
            M::Lar | M::Lsl => Self::Select(Selector::in_operand(decoded, 1)),
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
                Self::Select(Selector::after_offset(decoded))
            }
            M::Jmp | M::Call => match decoded.op0_kind() {
                OpKind::FarBranch16 | OpKind::FarBranch32 => {
                    Self::Far(Selector::Immediate(decoded.far_branch_selector()))
                }
                OpKind::Memory if is_far_pointer(decoded.memory_size()) => {
                    Self::Far(Selector::after_offset(decoded))
                }
                _ => Self::None,
            },
            M::Retf => Self::far_return(decoded),
            M::Iret => Self::InterruptReturn { width: 2 },
            M::Iretd => Self::InterruptReturn { width: 4 },
            M::Iretq => Self::InterruptReturn { width: 8 },
            M::Int => Self::Event(decoded.immediate8()),
            M::Int1 => Self::Event(1),
            M::Int3 => Self::Event(3),
            M::Into => Self::Event(4),
            M::In if decoded.op1_kind() == OpKind::Immediate8 => {
                Self::Port(Some(decoded.immediate8()))
            }
            M::Out if decoded.op0_kind() == OpKind::Immediate8 => {
                Self::Port(Some(decoded.immediate8()))
            }
            M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => {
                Self::Port(None)
            }
            _ => Self::None,
        }
    }

    fn far_return(decoded: &iced_x86::Instruction) -> Self {
        let (width, parameters) = match decoded.code() {
            Code::Retfw => (2, 0),
            Code::Retfd => (4, 0),
            Code::Retfw_imm16 => (2, decoded.immediate16()),
            Code::Retfd_imm16 => (4, decoded.immediate16()),
            Code::Retfq_imm16 => (8, decoded.immediate16()),
            _ => (8, 0),
        };
        Self::Return { width, parameters }
    }
}

impl Selector {
    fn in_operand(decoded: &iced_x86::Instruction, operand: u32) -> Self {
        let is_register =
            operand < decoded.op_count() && decoded.op_kind(operand) == OpKind::Register;
        if is_register { Self::Register(decoded.op_register(operand)) } else { Self::Operand(0) }
    }

    fn after_offset(decoded: &iced_x86::Instruction) -> Self {
        let bytes = decoded.memory_size().size().saturating_sub(2);
        Self::Operand(u8::try_from(bytes).unwrap_or(0))
    }
}

fn is_far_pointer(size: MemorySize) -> bool {
    matches!(size, MemorySize::SegPtr16 | MemorySize::SegPtr32 | MemorySize::SegPtr64)
}

/// The bits of an address of this instruction or operand.
pub(super) fn address_bits(size: CodeSize) -> u32 {
    match size {
        CodeSize::Code16 => 16,
        CodeSize::Code32 => 32,
        CodeSize::Code64 | CodeSize::Unknown => 64,
    }
}

/// Instructions decoded before, by address. Each is taken only for the bytes it
/// was decoded from.
#[derive(Debug)]
pub(super) struct DecodeCache {
    slots: Box<[Slot]>,
    info: InstructionInfoFactory,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    ip: u64,
    /// 0 in a slot that is free.
    bitness: u32,
    bytes: [u8; MAX_INSTRUCTION],
    len: usize,
    instruction: Instruction,
}

/// What there is at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lookup {
    /// An instruction, to be had from this slot.
    Found(usize),
    /// An instruction that goes on after the bytes given.
    TooShort,
    /// No instruction.
    Invalid,
}

impl DecodeCache {
    pub(super) fn new() -> Self {
        let free = Slot {
            ip: 0,
            bitness: 0,
            bytes: [0; MAX_INSTRUCTION],
            len: 0,
            instruction: Instruction::NONE,
        };
        Self { slots: vec![free; SLOTS].into_boxed_slice(), info: InstructionInfoFactory::new() }
    }

    pub(super) fn get(&self, slot: usize) -> Option<&Instruction> {
        self.slots.get(slot).map(|slot| &slot.instruction)
    }

    /// The instruction that these bytes begin with.
    pub(super) fn look_up(&mut self, bitness: u32, ip: u64, bytes: &[u8]) -> Lookup {
        // Neighbours in a loop go to different slots.
        let index = usize::try_from((ip ^ ip >> 6 ^ ip >> 12) % SLOTS as u64).unwrap_or(0);
        let Some(slot) = self.slots.get_mut(index) else { return Lookup::Invalid };
        let is_known = slot.bitness == bitness
            && slot.ip == ip
            && slot.bytes.get(..slot.len).is_some_and(|known| bytes.starts_with(known));
        if is_known {
            return Lookup::Found(index);
        }
        let Ok(mut decoder) = Decoder::try_with_ip(bitness, bytes, ip, DecoderOptions::NONE) else {
            return Lookup::Invalid;
        };
        let decoded = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => {}
            DecoderError::NoMoreBytes => return Lookup::TooShort,
            _ => return Lookup::Invalid,
        }
        let len = decoded.len();
        let (Some(from), Some(to)) = (bytes.get(..len), slot.bytes.get_mut(..len)) else {
            return Lookup::Invalid;
        };
        to.copy_from_slice(from);
        (slot.ip, slot.bitness, slot.len) = (ip, bitness, len);
        slot.instruction = Instruction::of(&decoded, &mut self.info);
        Lookup::Found(index)
    }
}
