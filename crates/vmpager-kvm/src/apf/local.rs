//! What the device has to know of a vCPU that neither its registers nor its exits
//! tell: whether its local APIC is on, and whether an INIT has come since.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmpager_core::apf::Register;

use super::{ApfError, refused};

/// An MSR, and the bits in it that turn the local APIC on, and make its registers
/// MSRs.
const APIC_BASE: u32 = 0x1b;
const APIC_BASE_ENABLED: u64 = 1 << 11;
const APIC_BASE_X2APIC: u64 = 1 << 10;
const X2APIC_ID: u32 = 0x802;
const X2APIC_SPURIOUS: u32 = 0x80f;
/// Where the same registers are in the local APIC's page, and the bit that turns it on by
/// software.
const APIC_ID: usize = 0x20;
const APIC_SPURIOUS: usize = 0xf0;
const APIC_SPURIOUS_ENABLED: u64 = 1 << 8;

/// KVM's copy of the vector, to see that it was forgotten: any that is not 0.
const CANARY: u64 = 0xff;

/// Puts KVM's copy of the vector there. The device stays off for KVM: that is
/// another register's.
pub(super) fn set_canary(vcpu: &VcpuFd) -> Result<(), ApfError> {
    let index = Register::Interrupt.index();
    let what = "keep a vector for its own device";
    let msrs = entries([index], CANARY)?;
    let set = vcpu.set_msrs(&msrs).map_err(refused(what))?;
    if set == 1 { Ok(()) } else { Err(ApfError::Msr { index, value: CANARY }) }
}

/// `None` from the first one on that the vCPU does not have.
fn read_msrs<const N: usize>(
    vcpu: &VcpuFd,
    indices: [u32; N],
) -> Result<[Option<u64>; N], ApfError> {
    let mut msrs = entries(indices, 0)?;
    let read = vcpu.get_msrs(&mut msrs).map_err(refused("read MSRs"))?;
    let mut values = [None; N];
    for (value, msr) in values.iter_mut().zip(msrs.as_slice().iter().take(read)) {
        *value = Some(msr.data);
    }
    Ok(values)
}

fn entries<const N: usize>(indices: [u32; N], data: u64) -> Result<Msrs, ApfError> {
    let entries = indices.map(|index| kvm_msr_entry { index, data, ..Default::default() });
    Msrs::from_entries(&entries).map_err(|_| ApfError::Unavailable { lacks: "room for MSRs" })
}

/// A vCPU's local APIC.
pub(super) struct Apic {
    /// As far as the address of an MSI has room for it.
    pub(super) id: u8,
    /// By both of its switches.
    pub(super) on: bool,
}

/// The vCPU's local APIC, and whether KVM's copy of the vector is gone. One call, if the
/// local APIC's registers are MSRs.
pub(super) fn look(vcpu: &VcpuFd) -> Result<(Apic, bool), ApfError> {
    let indices = [APIC_BASE, Register::Interrupt.index(), X2APIC_SPURIOUS, X2APIC_ID];
    let [base, canary, spurious, id] = read_msrs(vcpu, indices)?;
    let base = base.unwrap_or(0);
    let apic = match (spurious, id) {
        (Some(spurious), Some(id)) if base & APIC_BASE_X2APIC != 0 => Apic::new(base, spurious, id),
        _ => Apic::of_page(vcpu, base)?,
    };
    Ok((apic, canary.unwrap_or(0) == 0))
}

impl Apic {
    fn new(base: u64, spurious: u64, id: u64) -> Self {
        let on = base & APIC_BASE_ENABLED != 0 && spurious & APIC_SPURIOUS_ENABLED != 0;
        let [id, ..] = id.to_le_bytes();
        Self { id, on }
    }

    fn of_page(vcpu: &VcpuFd, base: u64) -> Result<Self, ApfError> {
        let lapic = vcpu.get_lapic().map_err(refused("read the local APIC"))?;
        let register = |at: usize| {
            let bytes = lapic.regs.get(at..at + 4).unwrap_or_default();
            bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(byte.cast_unsigned()))
        };
        Ok(Self::new(base, register(APIC_SPURIOUS), register(APIC_ID) >> 24))
    }
}
