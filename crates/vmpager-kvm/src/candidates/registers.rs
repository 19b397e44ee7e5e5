//! A stopped vCPU's registers.

use iced_x86::Register;
use kvm_bindings::{kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events};

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_VM: u64 = 1 << 17;

/// A stopped vCPU's registers, as `KVM_CAP_SYNC_REGS` gives them.
#[derive(Clone, Copy, Debug)]
pub struct Registers<'a> {
    /// General registers.
    pub regs: &'a kvm_regs,
    /// System registers.
    pub sregs: &'a kvm_sregs,
    /// Events to be delivered.
    pub events: &'a kvm_vcpu_events,
    /// Size of the area that `xsave` writes with all the guest's features
    /// enabled (CPUID leaf 0xd, ecx). 0: that of the registers up to XMM.
    pub xsave_bytes: u32,
}

impl Registers<'_> {
    /// Protected mode, whatever the code segment says.
    pub(super) fn is_protected(&self) -> bool {
        self.sregs.cr0 & CR0_PE != 0
    }

    pub(super) fn is_paging(&self) -> bool {
        self.sregs.cr0 & (CR0_PG | CR0_PE) == CR0_PG | CR0_PE
    }

    /// Long mode, which compatibility mode is a part of.
    pub(super) fn is_long(&self) -> bool {
        self.sregs.efer & EFER_LMA != 0 && self.is_paging()
    }

    pub(super) fn is_virtual_8086(&self) -> bool {
        self.is_protected() && !self.is_long() && self.regs.rflags & RFLAGS_VM != 0
    }

    /// Whether selectors are numbers of descriptors.
    pub(super) fn has_descriptors(&self) -> bool {
        self.is_protected() && !self.is_virtual_8086()
    }

    /// 64, 32 or 16: how code is decoded.
    pub(super) fn bitness(&self) -> u32 {
        match self.sregs.cs {
            kvm_segment { l, .. } if l != 0 && self.is_long() => 64,
            kvm_segment { db, .. } if db != 0 => 32,
            _ => 16,
        }
    }

    pub(super) fn privilege(&self) -> u8 {
        match self.is_protected() {
            true if self.is_virtual_8086() => 3,
            true => self.sregs.ss.dpl & 3,
            false => 0,
        }
    }

    pub(super) fn instruction_pointer(&self) -> u64 {
        self.narrow(self.regs.rip)
    }

    /// `offset` into a segment at `base`, as code and data see it.
    pub(super) fn linear(&self, base: u64, offset: u64) -> u64 {
        self.narrow(base.wrapping_add(offset))
    }

    /// Linear addresses end at 4 GiB outside 64-bit code.
    fn narrow(&self, address: u64) -> u64 {
        if self.bitness() == 64 { address } else { address & u64::from(u32::MAX) }
    }

    /// The last linear address that operands have.
    pub(super) fn last_linear(&self) -> u64 {
        self.narrow(u64::MAX)
    }

    /// `offset` into a descriptor table or a task state segment: these lie
    /// anywhere in long mode, even while 32-bit code runs.
    pub(super) fn system_linear(&self, base: u64, offset: u64) -> u64 {
        let address = base.wrapping_add(offset);
        if self.is_long() { address } else { address & u64::from(u32::MAX) }
    }

    /// Where a segment begins; 64-bit code has only fs and gs.
    pub(super) fn segment_base(&self, segment: Register) -> u64 {
        let flat = self.bitness() == 64;
        match segment {
            Register::FS => self.sregs.fs.base,
            Register::GS => self.sregs.gs.base,
            _ if flat => 0,
            Register::CS => self.sregs.cs.base,
            Register::DS => self.sregs.ds.base,
            Register::ES => self.sregs.es.base,
            Register::SS => self.sregs.ss.base,
            _ => 0,
        }
    }

    /// A general register of 16, 32 or 64 bits, zero-extended.
    pub(super) fn general(&self, register: Register) -> u64 {
        let r = self.regs;
        let all = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ];
        if !register.is_gpr() {
            return 0;
        }
        all.get(register.number()).map_or(0, |value| value & mask(register_bits(register)))
    }

    /// The stack pointer, as wide as the stack segment has it.
    pub(super) fn stack_mask(&self) -> u64 {
        match self.sregs.ss.db {
            _ if self.bitness() == 64 => u64::MAX,
            0 => mask(16),
            _ => mask(32),
        }
    }
}

fn register_bits(register: Register) -> u32 {
    u32::try_from(register.size() * 8).unwrap_or(64)
}

/// The low `bits` bits.
pub(super) fn mask(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// Where the parts of vector registers lie in what `KVM_GET_XSAVE` returns:
/// CPUID leaf 0xd, which differs between processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XsaveLayout {
    /// Offset of bits 128 to 255 of registers 0 to 15 (component 2).
    pub ymm_high: u32,
    /// Offset of k0 to k7 (component 5).
    pub masks: u32,
    /// Offset of bits 256 to 511 of registers 0 to 15 (component 6).
    pub zmm_high: u32,
    /// Offset of registers 16 to 31 (component 7).
    pub zmm_16_to_31: u32,
}

impl XsaveLayout {
    /// From what `KVM_GET_SUPPORTED_CPUID` returns. What a processor lacks is at
    /// 0, and read as zeroes.
    pub fn from_cpuid(entries: &[kvm_cpuid_entry2]) -> Self {
        let offset = |component| {
            let of = |entry: &&kvm_cpuid_entry2| entry.function == 0xd && entry.index == component;
            entries.iter().find(of).map_or(0, |entry| entry.ebx)
        };
        Self { ymm_high: offset(2), masks: offset(5), zmm_high: offset(6), zmm_16_to_31: offset(7) }
    }
}

/// The registers a gather or scatter takes its addresses from.
#[derive(Clone, Debug)]
pub struct VectorRegisters {
    zmm: [[u8; 64]; 32],
    masks: [u64; 8],
}

impl VectorRegisters {
    /// From an area that `KVM_GET_XSAVE` or `KVM_GET_XSAVE2` filled.
    pub fn from_xsave(area: &[u8], layout: &XsaveLayout) -> Self {
        let mut all = Self { zmm: [[0; 64]; 32], masks: [0; 8] };
        let present = u64::from_le_bytes(bytes_at(area, 512).unwrap_or_default());
        let has = |component: u32, offset: u32| {
            (offset != 0 && present & 1 << component != 0).then_some(offset as usize)
        };
        for (i, register) in all.zmm.iter_mut().enumerate() {
            let mut put = |to: usize, at: Option<usize>, bytes: usize| {
                let from = at.and_then(|at| area.get(at..at + bytes));
                if let (Some(from), Some(to)) = (from, register.get_mut(to..to + bytes)) {
                    to.copy_from_slice(from);
                }
            };
            if i < 16 {
                put(0, has(1, 160).map(|at| at + i * 16), 16);
                put(16, has(2, layout.ymm_high).map(|at| at + i * 16), 16);
                put(32, has(6, layout.zmm_high).map(|at| at + i * 32), 32);
            } else {
                put(0, has(7, layout.zmm_16_to_31).map(|at| at + (i - 16) * 64), 64);
            }
        }
        for (i, k) in all.masks.iter_mut().enumerate() {
            let at = has(5, layout.masks).map(|at| at + i * 8);
            *k = at.and_then(|at| bytes_at(area, at)).map_or(0, u64::from_le_bytes);
        }
        all
    }

    /// Element `index` of `bytes` (4 or 8) bytes, zero-extended.
    pub(super) fn element(&self, register: Register, index: usize, bytes: usize) -> Option<u64> {
        let register = self.zmm.get(register.number())?;
        match bytes {
            4 => bytes_at(register, index * 4).map(u32::from_le_bytes).map(u64::from),
            _ => bytes_at(register, index * 8).map(u64::from_le_bytes),
        }
    }

    pub(super) fn mask(&self, register: Register) -> u64 {
        self.masks.get(register.number()).copied().unwrap_or(0)
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}
