//! The modes of a processor, each with tables that have pages of their own.

use kvm_bindings::{kvm_dtable, kvm_segment};

use super::Setup;

/// Page tables.
pub(crate) const TABLES: u64 = 0x1000;
pub(crate) const GDT: u64 = 0x8000;
pub(crate) const TSS: u64 = 0x9000;
pub(crate) const IDT: u64 = 0xa000;
/// The end of the stack that events in ring 3 change to.
pub(crate) const RING_0_STACK: u64 = 0xc000;
/// The end of the first stack of the interrupt stack table.
pub(crate) const IST_STACK: u64 = 0xf000;

/// Selectors.
pub(crate) const CODE_0: u16 = 0x08;
pub(crate) const DATA_0: u16 = 0x10;
pub(crate) const DATA_3: u16 = 0x28 | 3;
pub(crate) const CODE_3: u16 = 0x30 | 3;
pub(crate) const TASK: u16 = 0x40;
/// Another data segment, which nothing has loaded.
pub(crate) const OTHER: u16 = 0x50 | 3;
/// A call gate for ring 3.
pub(crate) const GATE: u16 = 0x60 | 3;

/// How the processor runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// 64-bit code.
    Long,
    /// 64-bit code, five levels of tables.
    Long5,
    /// 64-bit code, tables that end with pages of 2 MiB.
    LongLarge,
    /// 32-bit code in long mode.
    Compatibility,
    /// 32-bit code without page tables.
    Flat,
    /// 32-bit code, two levels of tables.
    Paged32,
    /// 32-bit code, three levels of tables.
    Pae,
    /// 16-bit code without protection.
    Real,
}

impl Mode {
    pub(crate) fn is_long(self) -> bool {
        matches!(self, Self::Long | Self::Long5 | Self::LongLarge | Self::Compatibility)
    }

    fn is_64_bit(self) -> bool {
        self.is_long() && self != Self::Compatibility
    }
}

/// Puts a setup into a mode and a ring (0 or 3).
pub(crate) fn enter(setup: &mut Setup, mode: Mode, ring: u8) {
    if mode == Mode::Real {
        return real(setup);
    }
    tables(setup, mode);
    descriptors(setup, mode);
    let data = kvm_segment {
        limit: u32::MAX,
        selector: if ring == 3 { DATA_3 } else { DATA_0 },
        type_: 3,
        present: 1,
        dpl: ring,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let (l, db) = if mode.is_64_bit() { (1, 0) } else { (0, 1) };
    let sregs = &mut setup.sregs;
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    let selector = if ring == 3 { CODE_3 } else { CODE_0 };
    sregs.cs = kvm_segment { selector, type_: 11, db, l, ..data };
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        selector: TASK,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment { type_: 2, unusable: 1, ..Default::default() };
    sregs.gdt = kvm_dtable { base: GDT, limit: 0x7f, ..Default::default() };
    sregs.idt = kvm_dtable { base: IDT, limit: 0xfff, ..Default::default() };
    // NE ET MP PE, then PG AM WP; OSFXSR OSXMMEXCPT PAE, OSXSAVE where there is
    // something to enable.
    sregs.cr0 = if mode == Mode::Flat { 0x33 } else { 0x8005_0033 };
    sregs.cr3 = TABLES;
    let pae = if matches!(mode, Mode::Flat | Mode::Paged32) { 0 } else { 0x20 };
    let la57 = if mode == Mode::Long5 { 1 << 12 } else { 0 };
    sregs.cr4 = 0x600 | pae | la57 | if setup.has_avx { 1 << 18 } else { 0 };
    sregs.efer = if mode.is_long() { 0xd00 } else { 0 };
}

/// Segments 64 KiB apart, the vectors at 0.
fn real(setup: &mut Setup) {
    let segment = |base: u64| kvm_segment {
        base,
        limit: 0xffff,
        selector: u16::try_from(base >> 4).expect("in the first MiB"),
        type_: 3,
        present: 1,
        s: 1,
        ..Default::default()
    };
    let sregs = &mut setup.sregs;
    sregs.cs = kvm_segment { type_: 11, ..segment(0x1_0000) };
    sregs.ds = segment(0x2_0000);
    sregs.es = segment(0x3_0000);
    sregs.ss = segment(0x4_0000);
    sregs.fs = segment(0x5_0000);
    sregs.gs = segment(0x6_0000);
    sregs.idt = kvm_dtable { base: 0, limit: 0x3ff, ..Default::default() };
    sregs.cr0 = 0x32;
    (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0x600, 0);
}

/// All memory to itself. Accessed and dirty, so that tables stay as they are.
fn tables(setup: &mut Setup, mode: Mode) {
    const ENTRY: u64 = 0x67;
    const LARGE: u64 = 0xe7;
    let table = |n: u64| TABLES + n * 0x1000;
    let pages = 0..super::MEMORY / super::PAGE;
    match mode {
        Mode::Long | Mode::Long5 | Mode::LongLarge | Mode::Compatibility => {
            let upper = if mode == Mode::Long5 { 3 } else { 2 };
            for level in 0..upper {
                setup.word(table(level), table(level + 1) | ENTRY);
            }
            for half in 0..2 {
                let entry = if mode == Mode::LongLarge {
                    (half << 21) | LARGE
                } else {
                    table(upper + 1 + half) | ENTRY
                };
                setup.word(table(upper) + 8 * half, entry);
            }
            if mode != Mode::LongLarge {
                pages.for_each(|page| {
                    setup.word(table(upper + 1) + page * 8, (page << 12) | ENTRY);
                });
            }
        }
        Mode::Paged32 => {
            setup.put(table(0), &word(table(1) | ENTRY));
            pages.for_each(|page| {
                setup.put(table(1) + page * 4, &word((page << 12) | ENTRY));
            });
        }
        Mode::Pae => {
            setup.word(table(0), table(1) | 1);
            for half in 0..2 {
                setup.word(table(1) + 8 * half, table(2 + half) | ENTRY);
            }
            pages.for_each(|page| setup.word(table(2) + page * 8, (page << 12) | ENTRY));
        }
        Mode::Flat | Mode::Real => {}
    }
}

fn descriptors(setup: &mut Setup, mode: Mode) {
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
    const CODE_64: u64 = 0x00af_9b00_0000_ffff;
    const RING_3: u64 = 3 << 45;
    // Handlers of events are 64-bit code in all of long mode.
    let kernel = if mode.is_long() { CODE_64 } else { CODE_32 };
    let user = if mode.is_64_bit() { CODE_64 } else { CODE_32 };
    let mut descriptor =
        |selector: u16, value: u64| setup.word(GDT + u64::from(selector & !7), value);
    descriptor(CODE_0, kernel);
    descriptor(DATA_0, DATA);
    descriptor(DATA_3, DATA | RING_3);
    descriptor(CODE_3, user | RING_3);
    descriptor(OTHER, DATA | RING_3);
    descriptor(TASK, 0x0000_8b00_0000_0067 | (TSS << 16));
    if mode.is_long() {
        setup.word(TSS + 4, RING_0_STACK);
        setup.word(TSS + 0x24, IST_STACK);
    } else {
        setup.put(TSS + 4, &word(RING_0_STACK));
        setup.put(TSS + 8, &u32::from(DATA_0).to_le_bytes());
    }
}

fn word(value: u64) -> [u8; 4] {
    u32::try_from(value).expect("below 4 GiB").to_le_bytes()
}

/// A gate: type 0xc a call gate, 0xe an interrupt gate.
fn gate(handler: u64, kind: u64, stack: u64) -> u64 {
    let target = u64::from(CODE_0) << 16 | handler & 0xffff | (handler & 0xffff_0000) << 32;
    target | stack << 32 | (0x80 | 0x60 | kind) << 40
}

/// Has an event go to a handler, by the stack of that number in the interrupt
/// stack table if it is not 0.
pub(crate) fn on_event(setup: &mut Setup, mode: Mode, vector: u64, handler: u64, stack: u64) {
    match mode {
        Mode::Real => {
            let far = (handler >> 4 << 16) | handler & 0xf;
            setup.put(vector * 4, &word(far));
        }
        _ if mode.is_long() => setup.word(IDT + vector * 16, gate(handler, 0xe, stack)),
        _ => setup.word(IDT + vector * 8, gate(handler, 0xe, 0)),
    }
}

/// Makes [`GATE`] lead to a handler.
pub(crate) fn call_gate(setup: &mut Setup, handler: u64) {
    setup.word(GDT + u64::from(GATE & !7), gate(handler, 0xc, 0));
}
