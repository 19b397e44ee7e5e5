//! The ACPI tables: processors, I/O APIC, serial port, ways to end.
//!
//! The machine has the fixed hardware of ACPI (not the "hardware-reduced"
//! kind), because Linux then keeps the interrupt controllers and the timer that
//! KVM emulates, and calibrates its own by them. Of that hardware the guest can
//! only use what ends it: the PM1 control register (S5) and the reset register.
//!
//! There is no interrupt source override: KVM wires IRQ `n` to pin `n` of its
//! I/O APIC, the timer's included.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate, Scope};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::devices::{
    PANIC_PORT, PM1_CONTROL_PORT, PM1_EVENT_PORT, RESET_PORT, RESET_VALUE, SERIAL_IRQ, SERIAL_PORT,
    SERIAL_PORTS, SLEEP_TYPE_S5,
};

/// Where the tables start, with the root pointer: in the area that firmware
/// uses, where kernels also look by themselves.
pub(super) const RSDP_GPA: u64 = 0xe_0000;

const OEM: [u8; 6] = *b"VMPAGE";
const OEM_TABLE: [u8; 8] = *b"VMPAGER ";
const OEM_REVISION: u32 = 1;

/// The length of the header that all tables share.
const HEADER: u32 = 36;
/// The length of the MADT before its list.
const MADT_START: u32 = HEADER + 8;

const LAPIC_GPA: u32 = 0xfee0_0000;
const IOAPIC_GPA: u32 = 0xfec0_0000;
/// MADT: the machine also has the two 8259 interrupt controllers.
const PCAT_COMPAT: u32 = 1;
/// The interrupt of ACPI's fixed hardware, which this machine never raises.
const SCI_IRQ: u16 = 9;

/// FADT, IA-PC boot architecture: neither a display adapter nor a CMOS clock.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// Tables one after the other, from [`RSDP_GPA`] on.
#[derive(Default)]
struct Tables(Vec<u8>);

impl Tables {
    /// Adds a table at the next multiple of 64, which is enough for each, and
    /// says where that is.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(64), 0);
        let gpa = RSDP_GPA + self.0.len() as u64;
        table.to_aml_bytes(&mut self.0);
        gpa
    }
}

/// The tables of a machine with so many vCPUs, to be put at [`RSDP_GPA`].
pub(super) fn tables(vcpus: u8) -> Vec<u8> {
    // The root pointer comes first, and is known last.
    let mut tables = Tables(vec![0; Rsdp::len()]);
    let dsdt = tables.add(&dsdt());
    let facs = tables.add(&FACS::new());
    let fadt = tables.add(&fadt(facs, dsdt).finalize());
    let madt = tables.add(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.add(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    tables.0[..root.len()].copy_from_slice(&root);
    tables.0
}

fn fadt(facs: u64, dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_64(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Neither button is there, nor a clock to wake by.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::Headless)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = SCI_IRQ.into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg =
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, RESET_PORT.into());
    fadt.reset_value = RESET_VALUE;
    fadt
}

fn madt(vcpus: u8) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", MADT_START, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_bytes(36, &LAPIC_GPA.to_le_bytes());
    madt.write_bytes(40, &PCAT_COMPAT.to_le_bytes());
    for vcpu in 0..vcpus {
        append(&mut madt, &ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    append(&mut madt, &IoApic::new(vcpus, IOAPIC_GPA, 0));
    madt
}

fn dsdt() -> Sdt {
    let zero = 0_u8;
    let sleep_type = SLEEP_TYPE_S5;
    let s5 = Name::new("_S5_".into(), &Package::new(vec![&sleep_type, &zero, &zero, &zero]));

    let serial_id = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let unit = Name::new("_UID".into(), &zero);
    let serial_io = IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORTS);
    let serial_irq = Interrupt::new(true, true, false, false, SERIAL_IRQ);
    let serial_crs = ResourceTemplate::new(vec![&serial_io, &serial_irq]);
    let serial_crs = Name::new("_CRS".into(), &serial_crs);
    let serial = Device::new("COM1".into(), vec![&serial_id, &unit, &serial_crs]);

    let panic_id = Name::new("_HID".into(), &"QEMU0001");
    let panic_io = IO::new(PANIC_PORT, PANIC_PORT, 1, 1);
    let panic_crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&panic_io]));
    let panic = Device::new("PEVT".into(), vec![&panic_id, &panic_crs]);

    let devices = Scope::new("\\_SB_".into(), vec![&serial, &panic]);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM, OEM_TABLE, OEM_REVISION);
    append(&mut dsdt, &s5);
    append(&mut dsdt, &devices);
    dsdt
}

/// Appends in one piece: the checksum is computed anew each time.
fn append(table: &mut Sdt, item: &dyn Aml) {
    let mut bytes = Vec::new();
    item.to_aml_bytes(&mut bytes);
    table.append_slice(&bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at a gpa, as a guest finds it: by its length and checksum.
    fn table(all: &[u8], gpa: u64) -> &[u8] {
        let at = usize::try_from(gpa - RSDP_GPA).unwrap();
        let length = usize::try_from(u32_at(all, at + 4)).unwrap();
        let table = &all[at..at + length];
        assert_eq!(sum(table), 0, "checksum of {:?}", String::from_utf8_lossy(&table[..4]));
        table
    }

    /// Follows the root pointer to every table: FADT, then MADT.
    fn fadt_and_madt(all: &[u8]) -> (&[u8], &[u8]) {
        assert_eq!(&all[..8], b"RSD PTR ");
        assert_eq!((sum(&all[..20]), sum(&all[..36])), (0, 0), "both checksums");
        let xsdt = table(all, u64_at(all, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        (table(all, u64_at(xsdt, 36)), table(all, u64_at(xsdt, 44)))
    }

    #[test]
    fn every_processor_is_listed_once_and_the_io_apic() {
        for vcpus in 1..=super::super::MAX_VCPUS {
            let all = tables(vcpus);
            let (_, madt) = fadt_and_madt(&all);
            assert_eq!(&madt[..4], b"APIC");
            assert_eq!(u32_at(madt, 36), 0xfee0_0000);
            assert_eq!(u32_at(madt, 40), 1, "PCs have 8259s");
            let mut rest = &madt[44..];
            for id in 0..vcpus {
                // Type, length, processor, APIC, enabled.
                assert_eq!(rest[..8], [0, 8, id, id, 1, 0, 0, 0]);
                rest = &rest[8..];
            }
            assert_eq!(rest.len(), 12);
            assert_eq!((rest[0], rest[1], rest[2]), (1, 12, vcpus), "an ID of its own");
            assert_eq!((u32_at(rest, 4), u32_at(rest, 8)), (0xfec0_0000, 0));
        }
    }

    #[test]
    fn the_ways_to_end_are_where_the_devices_are() {
        let all = tables(1);
        let (fadt, _) = fadt_and_madt(&all);
        assert_eq!(&fadt[..4], b"FACP");
        assert_eq!(u32_at(fadt, 56), 0x600, "PM1a events");
        assert_eq!(u32_at(fadt, 64), 0x604, "PM1a control");
        assert_eq!((fadt[88], fadt[89]), (4, 2), "their lengths");
        assert_eq!(u32_at(fadt, 48), 0, "no SMI command: always in ACPI mode");
        let flags = u32_at(fadt, 112);
        assert_eq!((flags >> 10 & 1, flags >> 20 & 1), (1, 0), "reset, not hardware-reduced");
        // I/O space, 8 bits, at 0, by bytes; the port; the value.
        assert_eq!(fadt[116..120], [1, 8, 0, 1]);
        assert_eq!((u64_at(fadt, 120), fadt[128]), (0x64, 0xfe));
        let facs_at = usize::try_from(u64_at(fadt, 132) - RSDP_GPA).unwrap();
        assert_eq!((&all[facs_at..facs_at + 4], facs_at % 64), (&b"FACS"[..], 0));
        let dsdt = table(&all, u64_at(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        // Name (_S5_, Package (4) { 5, 0, 0, 0 })
        let s5 = b"\x08_S5_\x12\x07\x04\x0a\x05";
        assert!(dsdt.windows(s5.len()).any(|bytes| bytes == s5), "{dsdt:x?}");
        for name in [&b"COM1"[..], b"PEVT", b"QEMU0001"] {
            assert!(dsdt.windows(name.len()).any(|bytes| bytes == name));
        }
        assert!(all.len() < 0x1_0000, "below what the BIOS area has");
    }
}
