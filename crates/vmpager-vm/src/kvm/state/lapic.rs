//! The local APIC of a vCPU, as KVM has it: its page of registers, 16 bytes
//! apart.

use kvm_bindings::kvm_lapic_state;
use serde::{Deserialize, Serialize};

/// In a state file, the registers are one string of hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(proptest_derive::Arbitrary))]
#[serde(transparent)]
pub(crate) struct Lapic(#[serde(with = "hex")] pub(crate) [u8; 1024]);

impl From<kvm_lapic_state> for Lapic {
    fn from(kvm: kvm_lapic_state) -> Self {
        Self(kvm.regs.map(i8::cast_unsigned))
    }
}

impl From<&Lapic> for kvm_lapic_state {
    fn from(saved: &Lapic) -> Self {
        Self { regs: saved.0.map(u8::cast_signed) }
    }
}
