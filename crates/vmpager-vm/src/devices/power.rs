//! ACPI's PM1 registers (ACPI 6.5, 4.8.3), of which only the sleep type and
//! sleep enable bits do anything. No event ever happens, so that status reads
//! as zero and the enabled events do not matter.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// PM1 status, then PM1 enable: two bytes each.
pub(crate) const PM1_EVENT_PORT: u16 = 0x600;
/// PM1 control: two bytes.
pub(crate) const PM1_CONTROL_PORT: u16 = PM1_EVENT_PORT + 4;
/// The sleep type that means "off", as the DSDT's `_S5_` tells the guest.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;

const PORTS: Range<u16> = PM1_EVENT_PORT..PM1_CONTROL_PORT + 2;
const ENABLE: Range<usize> = 2..4;
const CONTROL: Range<usize> = 4..6;

/// The machine is in ACPI mode, and always was.
const SCI_ENABLE: u16 = 1;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE_MASK: u16 = 7;
const SLEEP_ENABLE: u16 = 1 << 13;

/// Which byte of the registers a port is, if it is one of theirs.
pub(super) fn offset(port: u16) -> Option<usize> {
    PORTS.contains(&port).then(|| usize::from(port - PM1_EVENT_PORT))
}

/// The registers that keep what is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Power {
    enable: u16,
    control: u16,
}

impl Power {
    fn bytes(&self) -> [u8; 6] {
        let mut bytes = [0; 6];
        bytes[ENABLE].copy_from_slice(&self.enable.to_le_bytes());
        bytes[CONTROL].copy_from_slice(&(self.control | SCI_ENABLE).to_le_bytes());
        bytes
    }

    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.bytes();
        data.fill(0xff);
        data.iter_mut().zip(&bytes[offset..]).for_each(|(to, from)| *to = *from);
    }

    /// Whether the guest switched itself off.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let mut bytes = self.bytes();
        bytes[offset..].iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let [_, _, enable_low, enable_high, control_low, control_high] = bytes;
        self.enable = u16::from_le_bytes([enable_low, enable_high]);
        let control = u16::from_le_bytes([control_low, control_high]);
        // A command, not a state: it reads as zero.
        self.control = control & !SLEEP_ENABLE;
        let sleep_type = control >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
        control & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5)
    }
}
