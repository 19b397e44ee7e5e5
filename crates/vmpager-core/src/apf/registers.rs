//! The device's model-specific registers, with KVM's rules for what may be
//! written to them.

use std::ops::RangeInclusive;

/// A register of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// `MSR_KVM_ASYNC_PF_EN`: the area shared with the guest, and what is enabled.
    Enable,
    /// `MSR_KVM_ASYNC_PF_INT`: the vector that says "ready".
    Interrupt,
    /// `MSR_KVM_ASYNC_PF_ACK`: the guest has taken a token.
    Acknowledge,
}

impl Register {
    /// Indices among which all of them are, to be kept from KVM.
    pub const INDICES: RangeInclusive<u32> = 0x4b56_4d02..=0x4b56_4d07;

    /// The register with that index.
    pub fn of(index: u32) -> Option<Self> {
        [Self::Enable, Self::Interrupt, Self::Acknowledge]
            .into_iter()
            .find(|register| register.index() == index)
    }

    /// Its index.
    pub const fn index(self) -> u32 {
        match self {
            Self::Enable => 0x4b56_4d02,
            Self::Interrupt => 0x4b56_4d06,
            Self::Acknowledge => 0x4b56_4d07,
        }
    }
}

/// What the vCPU's CPUID (leaf 0x4000_0001, EAX) offers of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `KVM_FEATURE_ASYNC_PF`: the device.
    pub async_pf: bool,
    /// `KVM_FEATURE_ASYNC_PF_INT`: "ready" by interrupt.
    pub interrupt: bool,
    /// `KVM_FEATURE_ASYNC_PF_VMEXIT`: "not present" as an exit of a guest's guest.
    pub vmexit: bool,
}

impl Features {
    const ASYNC_PF: u32 = 1 << 4;
    const VMEXIT: u32 = 1 << 10;
    const INTERRUPT: u32 = 1 << 14;

    /// From that leaf's EAX.
    pub fn of(eax: u32) -> Self {
        let has = |bit| eax & bit != 0;
        Self {
            async_pf: has(Self::ASYNC_PF),
            interrupt: has(Self::INTERRUPT),
            vmexit: has(Self::VMEXIT),
        }
    }

    /// That leaf's EAX as a guest with this device has it: the device, and no word
    /// of guests of its own.
    pub fn offered(eax: u32) -> u32 {
        (eax | Self::ASYNC_PF | Self::INTERRUPT) & !Self::VMEXIT
    }
}

/// The access raises #GP in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

/// What a write meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The device is on, from now on or anew.
    Enabled,
    /// It is off.
    Disabled,
    /// The guest has taken a token.
    Acknowledged,
    /// Nothing beyond the value.
    Nothing,
}

/// The registers' values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    features: Features,
    enable: u64,
    interrupt: u64,
}

const ENABLED: u64 = 1;
const SEND_ALWAYS: u64 = 1 << 1;
const AS_VMEXIT: u64 = 1 << 2;
const AS_INTERRUPT: u64 = 1 << 3;
const RESERVED: u64 = 0x30;
const FLAGS: u64 = 0x3f;

impl Registers {
    /// As after reset.
    pub fn new(features: Features) -> Self {
        Self { features, ..Self::default() }
    }

    pub(super) fn set_features(&mut self, features: Features) {
        self.features = features;
    }

    /// The same processor's, as after reset.
    pub(super) fn after_reset(&self) -> Self {
        Self::new(self.features)
    }

    /// Whether both halves of the device are on: KVM serves none without the
    /// other.
    pub fn is_enabled(&self) -> bool {
        is_enabled(self.enable)
    }

    /// Whether the guest wants faults of its kernel told as well.
    pub fn sends_always(&self) -> bool {
        self.enable & SEND_ALWAYS != 0
    }

    /// Where the area shared with the guest is: a word of flags, then the token.
    pub fn area(&self) -> Option<u64> {
        self.is_enabled().then_some(self.enable & !FLAGS)
    }

    /// The vector that says "ready".
    pub fn vector(&self) -> u8 {
        self.interrupt.to_le_bytes()[0]
    }

    /// A read by the guest.
    ///
    /// # Errors
    ///
    /// [`GeneralProtection`] if its processor has no such register.
    pub fn read(&self, register: Register) -> Result<u64, GeneralProtection> {
        self.exists(register)?;
        Ok(match register {
            Register::Enable => self.enable,
            Register::Interrupt => self.interrupt,
            Register::Acknowledge => 0,
        })
    }

    /// A write by the guest. `is_memory` tells whether 8 bytes at a guest-physical
    /// address are memory.
    ///
    /// # Errors
    ///
    /// [`GeneralProtection`], and nothing has changed.
    pub fn write(
        &mut self,
        register: Register,
        value: u64,
        is_memory: impl FnOnce(u64) -> bool,
    ) -> Result<Written, GeneralProtection> {
        self.exists(register)?;
        let ok = |ok: bool| if ok { Ok(()) } else { Err(GeneralProtection) };
        match register {
            Register::Enable => {
                ok(value & RESERVED == 0)?;
                ok(self.features.vmexit || value & AS_VMEXIT == 0)?;
                ok(self.features.interrupt || value & AS_INTERRUPT == 0)?;
                ok(!is_enabled(value) || is_memory(value & !FLAGS))?;
                self.enable = value;
                Ok(if is_enabled(value) { Written::Enabled } else { Written::Disabled })
            }
            Register::Interrupt => {
                ok(value <= u8::MAX.into())?;
                self.interrupt = value;
                Ok(Written::Nothing)
            }
            Register::Acknowledge if value & 1 != 0 => Ok(Written::Acknowledged),
            Register::Acknowledge => Ok(Written::Nothing),
        }
    }

    fn exists(&self, register: Register) -> Result<(), GeneralProtection> {
        let exists = match register {
            Register::Enable => self.features.async_pf,
            Register::Interrupt | Register::Acknowledge => self.features.interrupt,
        };
        if exists { Ok(()) } else { Err(GeneralProtection) }
    }
}

fn is_enabled(value: u64) -> bool {
    value & (ENABLED | AS_INTERRUPT) == ENABLED | AS_INTERRUPT
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const LINUX: u64 = 0x7f00_0040 | ENABLED | AS_INTERRUPT;

    fn all() -> Registers {
        Registers::new(Features { async_pf: true, interrupt: true, vmexit: true })
    }

    #[test]
    fn what_kvm_refuses_is_refused() {
        let none = Registers::new(Features::default());
        let plain = Registers::new(Features { vmexit: false, ..all().features });
        let old = Registers::new(Features { interrupt: false, ..all().features });
        for (registers, register, value) in [
            (none, Register::Enable, 0),
            (none, Register::Interrupt, 0),
            (none, Register::Acknowledge, 0),
            (old, Register::Interrupt, 0xf3),
            (old, Register::Acknowledge, 1),
            (old, Register::Enable, LINUX),
            (plain, Register::Enable, LINUX | AS_VMEXIT),
            (all(), Register::Enable, LINUX | 0x10),
            (all(), Register::Enable, LINUX | 0x20),
            (all(), Register::Interrupt, 0x100),
            (all(), Register::Interrupt, 1 << 63),
        ] {
            let mut after = registers;
            assert_eq!(
                after.write(register, value, |_| true),
                Err(GeneralProtection),
                "{value:#x}"
            );
            assert_eq!(after, registers);
        }
        let mut outside = all();
        assert_eq!(outside.write(Register::Enable, LINUX, |_| false), Err(GeneralProtection));
        assert_eq!(
            outside.write(Register::Enable, LINUX & !ENABLED, |_| false),
            Ok(Written::Disabled)
        );
        assert_eq!(none.read(Register::Enable), Err(GeneralProtection));
    }

    #[test]
    fn what_was_written_is_read_and_means_what_it_says() {
        let mut registers = all();
        assert_eq!(registers.write(Register::Interrupt, 0xf3, |_| true), Ok(Written::Nothing));
        let is_memory = |gpa| gpa == 0x7f00_0040;
        let value = LINUX | AS_VMEXIT;
        assert_eq!(registers.write(Register::Enable, value, is_memory), Ok(Written::Enabled));
        assert_eq!(registers.area(), Some(0x7f00_0040));
        assert_eq!((registers.vector(), registers.sends_always()), (0xf3, false));
        assert_eq!(registers.read(Register::Enable), Ok(value));
        assert_eq!(registers.read(Register::Interrupt), Ok(0xf3));
        assert_eq!(registers.read(Register::Acknowledge), Ok(0));
        assert_eq!(registers.write(Register::Acknowledge, 0, |_| true), Ok(Written::Nothing));
        assert_eq!(registers.write(Register::Acknowledge, 1, |_| true), Ok(Written::Acknowledged));
        // Without "ready" by interrupt it is not on, as in KVM.
        assert_eq!(registers.write(Register::Enable, ENABLED, is_memory), Ok(Written::Disabled));
        assert_eq!(registers.area(), None);
    }

    #[test]
    fn a_guest_is_offered_the_device_and_nothing_for_guests_of_its_own() {
        let offered = Features::of(Features::offered(u32::MAX));
        assert_eq!(offered, Features { async_pf: true, interrupt: true, vmexit: false });
        assert_eq!(Features::of(Features::offered(0)), offered);
        assert_eq!(Features::offered(u32::MAX) | Features::VMEXIT, u32::MAX);
    }

    #[test]
    fn registers_are_found_by_their_index() {
        for register in [Register::Enable, Register::Interrupt, Register::Acknowledge] {
            assert_eq!(Register::of(register.index()), Some(register));
            assert!(Register::INDICES.contains(&register.index()));
        }
        assert_eq!(Register::of(0x4b56_4d03), None);
    }
}
