//! The guest's page tables.

use super::registers::Registers;
use super::{Absent, GuestView};

const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Bits 12 to 51 of an entry, or of cr3. What is above is protection.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What an address leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Walk {
    /// Memory, missing or not, or a device.
    Gpa(u64),
    /// A page table that is missing.
    Stopped,
    /// Nothing: the access faults in the guest, or a page table is not memory.
    Nowhere,
}

/// The kind of page tables in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Paging {
    Off,
    /// Two levels of 4-byte entries; with pages of 4 MiB if so enabled.
    Bits32 {
        large: bool,
    },
    /// Three levels of 8-byte entries, four of them at the top.
    Pae,
    /// Long mode with so many levels.
    Long {
        levels: u32,
    },
}

impl Paging {
    pub(super) fn of(registers: &Registers<'_>) -> Self {
        let cr4 = registers.sregs.cr4;
        if !registers.is_paging() {
            Self::Off
        } else if registers.is_long() {
            Self::Long { levels: if cr4 & CR4_LA57 != 0 { 5 } else { 4 } }
        } else if cr4 & CR4_PAE != 0 {
            Self::Pae
        } else {
            Self::Bits32 { large: cr4 & CR4_PSE != 0 }
        }
    }

    /// Finds the guest-physical address of a linear one. Whether the access is
    /// allowed does not matter here: one that is not faults in the guest, and
    /// whatever is found then is at worst fetched too early. For the same reason
    /// the bits above the highest table's count for nothing, which does justice
    /// to pointers with tags in them.
    ///
    /// `on_table` is told of each entry that is looked at.
    pub(super) fn walk<V: GuestView>(
        self,
        cr3: u64,
        linear: u64,
        view: &V,
        mut on_table: impl FnMut(u64, Result<(), Absent>),
    ) -> Walk {
        let mut read = |gpa: u64, bytes: usize| {
            let mut entry = [0; 8];
            let result = view.read(gpa, entry.get_mut(..bytes).unwrap_or_default());
            on_table(gpa, result);
            match result {
                Ok(()) => Ok(u64::from_le_bytes(entry)),
                Err(Absent::Missing) => Err(Walk::Stopped),
                Err(Absent::NoMemory) => Err(Walk::Nowhere),
            }
        };
        let found = match self {
            Self::Off => Ok(Walk::Gpa(linear & u64::from(u32::MAX))),
            Self::Bits32 { large } => walk_32(cr3, linear, large, &mut read),
            Self::Pae => {
                let top = (cr3 & 0xffff_ffe0) + (linear >> 30 & 3) * 8;
                read(top, 8).and_then(|entry| match entry & PRESENT {
                    0 => Ok(Walk::Nowhere),
                    _ => walk_64(entry, linear, 2, &mut read),
                })
            }
            Self::Long { levels } => walk_64(cr3, linear, levels, &mut read),
        };
        found.unwrap_or_else(|stopped| stopped)
    }
}

/// From the table at `entry` down, `levels` of them.
fn walk_64(
    mut entry: u64,
    linear: u64,
    levels: u32,
    read: &mut impl FnMut(u64, usize) -> Result<u64, Walk>,
) -> Result<Walk, Walk> {
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        entry = read((entry & ADDRESS) + (linear >> shift & 0x1ff) * 8, 8)?;
        if entry & PRESENT == 0 {
            return Ok(Walk::Nowhere);
        }
        // Pages of 2 MiB and 1 GiB; above, the bit is reserved.
        if level == 0 || entry & LARGE != 0 && level <= 2 {
            let inside = (1 << shift) - 1;
            return Ok(Walk::Gpa(entry & ADDRESS & !inside | linear & inside));
        }
    }
    Ok(Walk::Nowhere)
}

fn walk_32(
    cr3: u64,
    linear: u64,
    large: bool,
    read: &mut impl FnMut(u64, usize) -> Result<u64, Walk>,
) -> Result<Walk, Walk> {
    let directory = read((cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4, 4)?;
    if directory & PRESENT == 0 {
        return Ok(Walk::Nowhere);
    }
    if large && directory & LARGE != 0 {
        // Bits 13 to 20 are bits 32 to 39 of the address.
        let page = directory & 0xffc0_0000 | (directory & 0x001f_e000) << 19;
        return Ok(Walk::Gpa(page | linear & 0x003f_ffff));
    }
    let entry = read((directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4, 4)?;
    Ok(match entry & PRESENT {
        0 => Walk::Nowhere,
        _ => Walk::Gpa(entry & 0xffff_f000 | linear & 0xfff),
    })
}
