//! A guest to look at: memory, page tables that the test builds, registers.

use std::collections::{BTreeMap, BTreeSet};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events};

use crate::candidates::{
    Absent, Access, Candidate, CandidateFinder, Cause, GuestView, Missing, PAGE_BYTES, Registers,
    VectorRegisters,
};

pub(super) const CODE: u64 = 0x40_0000;
pub(super) const STACK: u64 = 0x7f_0000;
pub(super) const DATA: u64 = 0x60_0000;
pub(super) const GDT: u64 = 0x10_0000;
pub(super) const LDT: u64 = 0x10_2000;
pub(super) const IDT: u64 = 0x11_0000;
pub(super) const TSS: u64 = 0x12_0000;
pub(super) const INNER_STACK: u64 = 0x13_8000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Real,
    Protected,
    Paged32,
    Pae,
    Compat,
    Long4,
    Long5,
}

impl Mode {
    pub(super) fn is_long(self) -> bool {
        matches!(self, Self::Compat | Self::Long4 | Self::Long5)
    }
    fn is_paging(self) -> bool {
        !matches!(self, Self::Real | Self::Protected)
    }
    fn levels(self) -> u32 {
        match self {
            Self::Real | Self::Protected => 0,
            Self::Paged32 => 2,
            Self::Pae => 3,
            Self::Compat | Self::Long4 => 4,
            Self::Long5 => 5,
        }
    }
}

/// Physical memory, and what of it is missing.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    pages: BTreeMap<u64, Box<[u8; 4096]>>,
    pub(super) missing: BTreeSet<u64>,
}

impl GuestView for Memory {
    fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<(), Absent> {
        let (page, offset) = (gpa / PAGE_BYTES * PAGE_BYTES, offset_of(gpa));
        assert!(offset + bytes.len() <= 4096, "a read across pages");
        if self.missing.contains(&page) {
            return Err(Absent::Missing);
        }
        let content = self.pages.get(&page).ok_or(Absent::NoMemory)?;
        bytes.copy_from_slice(&content[offset..offset + bytes.len()]);
        Ok(())
    }

    fn is_missing(&self, gpa: u64) -> bool {
        self.missing.contains(&(gpa / PAGE_BYTES * PAGE_BYTES))
    }
}

impl Memory {
    pub(super) fn put(&mut self, gpa: u64, bytes: &[u8]) {
        for (at, byte) in (gpa..).zip(bytes) {
            let page = self.pages.entry(at & !0xfff).or_insert_with(|| Box::new([0; 4096]));
            page[offset_of(at)] = *byte;
        }
    }
    fn get(&self, gpa: u64, bytes: usize) -> u64 {
        let mut value = [0; 8];
        let page = self.pages.get(&(gpa & !0xfff));
        let offset = offset_of(gpa);
        if let Some(page) = page {
            value[..bytes].copy_from_slice(&page[offset..offset + bytes]);
        }
        u64::from_le_bytes(value)
    }
}

fn offset_of(gpa: u64) -> usize {
    usize::try_from(gpa % PAGE_BYTES).expect("less than a page")
}

/// What was touched, in linear addresses: (cause, page, access).
pub(super) type Touched = (Cause, u64, Access);

#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) mode: Mode,
    pub(super) memory: Memory,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) events: kvm_vcpu_events,
    pub(super) vectors: Option<VectorRegisters>,
    pub(super) xsave_bytes: u32,
    /// From guest-physical page to linear page.
    linear_of: BTreeMap<u64, u64>,
    pub(super) tables: BTreeSet<u64>,
    /// The tables on the way to a linear page.
    ways: BTreeMap<u64, Vec<u64>>,
    next: u64,
    /// What page addresses are scattered by.
    step: u64,
}

impl Guest {
    /// In ring 3, or ring 0 without paging, with nothing mapped.
    pub(super) fn new(mode: Mode) -> Self {
        Self::scattered(mode, 7)
    }

    /// With physical pages taken in steps of so many.
    pub(super) fn scattered(mode: Mode, step: u64) -> Self {
        let mut guest = Self {
            mode,
            memory: Memory::default(),
            regs: kvm_regs { rip: CODE, rsp: STACK + 0x800, rflags: 2, ..Default::default() },
            sregs: kvm_sregs::default(),
            events: kvm_vcpu_events::default(),
            vectors: None,
            xsave_bytes: 0,
            linear_of: BTreeMap::new(),
            tables: BTreeSet::new(),
            ways: BTreeMap::new(),
            next: 0x100_0000,
            step,
        };
        guest.reset();
        guest
    }

    fn reset(&mut self) {
        let mode = self.mode;
        let dpl = if mode.is_paging() { 3 } else { 0 };
        let data = kvm_segment {
            limit: u32::MAX,
            type_: 3,
            present: 1,
            dpl,
            db: 1,
            s: 1,
            g: 1,
            selector: 0x20 | u16::from(dpl),
            ..Default::default()
        };
        let long = matches!(mode, Mode::Long4 | Mode::Long5);
        let code = kvm_segment { type_: 11, l: u8::from(long), db: u8::from(!long), ..data };
        let s = &mut self.sregs;
        (s.cs, s.ss, s.ds, s.es, s.fs, s.gs) = (code, data, data, data, data, data);
        s.tr = kvm_segment { base: TSS + 0xff0, limit: 0x200, type_: 11, ..Default::default() };
        s.ldt = kvm_segment { base: LDT, limit: 0xfff, type_: 2, ..Default::default() };
        s.gdt.base = GDT;
        s.gdt.limit = 0xffff;
        s.idt.base = IDT;
        s.idt.limit = 0xfff;
        s.cr0 = u64::from(mode != Mode::Real) | u64::from(mode.is_paging()) << 31;
        s.cr4 = match mode {
            Mode::Paged32 => 1 << 4,
            Mode::Long5 => 1 << 5 | 1 << 12,
            _ => 1 << 5,
        };
        s.efer = if mode.is_long() { 0xd00 } else { 0 };
        if mode == Mode::Real {
            for segment in [&mut s.cs, &mut s.ss, &mut s.ds, &mut s.es] {
                segment.db = 0;
            }
            s.idt.base = 0;
            s.idt.limit = 0x3ff;
        }
        if mode.is_paging() {
            // Bits beside the address: they must not count.
            let root = self.new_page();
            self.tables.insert(root);
            self.sregs.cr3 = root | if mode.is_long() { 1 << 61 | 3 } else { 0x18 };
        }
    }

    fn new_page(&mut self) -> u64 {
        let page = self.next;
        self.next += self.step * PAGE_BYTES;
        self.memory.put(page, &[0]);
        page
    }

    /// Maps a linear page, and says where.
    pub(super) fn map(&mut self, linear: u64) -> u64 {
        let linear = linear & !0xfff;
        if let Some((gpa, _)) = self.linear_of.iter().find(|(_, known)| **known == linear) {
            return *gpa;
        }
        let gpa = if self.mode.is_paging() { self.new_page() } else { linear };
        self.memory.put(gpa, &[0]);
        self.linear_of.insert(gpa, linear);
        self.enter(linear, gpa, 0);
        gpa
    }

    /// Maps all pages of a range.
    pub(super) fn map_all(&mut self, from: u64, to: u64) {
        for page in (from..to).step_by(0x1000) {
            self.map(page);
        }
    }

    /// Maps a page of the size of this level's; the physical page as given.
    pub(super) fn enter(&mut self, linear: u64, gpa: u64, level: u32) {
        let levels = self.mode.levels();
        let bits32 = self.mode == Mode::Paged32;
        let (index_bits, bytes) = if bits32 { (10, 4_usize) } else { (9, 8) };
        let mut table = self.sregs.cr3 & 0x000f_ffff_ffff_f000;
        let mut way = Vec::new();
        for at in (level..levels).rev() {
            let index_bits_here = if self.mode == Mode::Pae && at == 2 { 2 } else { index_bits };
            let index = linear >> (12 + index_bits * at) & ((1 << index_bits_here) - 1);
            let slot = table + index * bytes as u64;
            way.push(table);
            if at == level {
                let high = if bits32 || self.mode == Mode::Pae { 0 } else { 1 << 63 };
                let large = if level > 0 { 0x80 } else { 0 };
                let entry = gpa | 0x67 | large | high;
                self.memory.put(slot, &entry.to_le_bytes()[..bytes]);
            } else {
                let mut entry = self.memory.get(slot, bytes);
                if entry & 1 == 0 {
                    let page = self.new_page();
                    self.tables.insert(page);
                    entry = page | if self.mode == Mode::Pae && at == 2 { 1 } else { 0x27 };
                    self.memory.put(slot, &entry.to_le_bytes()[..bytes]);
                }
                table = entry & 0x000f_ffff_ffff_f000;
            }
        }
        self.ways.insert(linear, way);
    }

    /// The pages on the way to a mapped linear page, itself the last.
    pub(super) fn way(&mut self, linear: u64) -> Vec<u64> {
        let gpa = self.map(linear);
        let mut way = self.ways.get(&(linear & !0xfff)).cloned().unwrap_or_default();
        way.push(gpa);
        way
    }

    /// Maps what is needed, and puts bytes at a linear address.
    pub(super) fn put(&mut self, linear: u64, bytes: &[u8]) {
        for (at, byte) in (linear..).zip(bytes) {
            let gpa = self.map(at);
            self.memory.put(gpa + at % PAGE_BYTES, &[*byte]);
        }
    }

    /// Puts an instruction at rip.
    pub(super) fn code(&mut self, bytes: &[u8]) {
        let base = if self.sregs.cs.l != 0 { 0 } else { self.sregs.cs.base };
        self.put(base + self.regs.rip, bytes);
        // What follows is never executed, but must not be missing either.
        self.put(base + self.regs.rip + bytes.len() as u64, &[0x90]);
    }

    pub(super) fn registers(&self) -> Registers<'_> {
        Registers {
            regs: &self.regs,
            sregs: &self.sregs,
            events: &self.events,
            xsave_bytes: self.xsave_bytes,
        }
    }

    pub(super) fn all(&self) -> Vec<Candidate> {
        let mut all = Vec::new();
        let vectors = || self.vectors.clone();
        CandidateFinder::new().all(&self.registers(), &self.memory, vectors, |c| all.push(c));
        all
    }

    pub(super) fn missing(&self) -> Missing {
        CandidateFinder::new().missing(&self.registers(), &self.memory, || self.vectors.clone())
    }

    /// All that is touched but the page tables, in order, each once.
    pub(super) fn touched(&self) -> Vec<Touched> {
        let mut touched = Vec::new();
        for candidate in self.all() {
            let page = match self.linear_of.get(&candidate.page) {
                Some(linear) => *linear,
                None if self.mode.is_paging() => {
                    let tables = &self.tables;
                    assert!(tables.contains(&candidate.page), "{candidate:x?} of {tables:x?}");
                    assert_eq!(candidate.cause, Cause::PageTable);
                    continue;
                }
                None => candidate.page,
            };
            let one = (candidate.cause, page, candidate.access);
            if !touched.contains(&one) {
                touched.push(one);
            }
        }
        touched
    }

    /// The touched pages without the code.
    pub(super) fn touched_data(&self) -> Vec<Touched> {
        let mut all = self.touched();
        all.retain(|(cause, ..)| *cause != Cause::Code);
        all
    }

    /// Maps pages and makes them missing.
    pub(super) fn take_away(&mut self, linear: &[u64]) {
        for page in linear {
            let gpa = self.map(*page);
            self.memory.missing.insert(gpa);
        }
    }

    /// Does what a pager would: installs what is missing and looks again, until
    /// nothing is. Returns the pages in order, as linear ones or page tables.
    pub(super) fn resolve(&mut self) -> Vec<u64> {
        let mut installed = Vec::new();
        let mut finder = CandidateFinder::new();
        loop {
            let registers = Registers {
                regs: &self.regs,
                sregs: &self.sregs,
                events: &self.events,
                xsave_bytes: self.xsave_bytes,
            };
            let missing = finder.missing(&registers, &self.memory, || self.vectors.clone());
            let Some(first) = missing.pages().first() else {
                assert!(!missing.ends_early());
                return installed;
            };
            assert!(self.memory.missing.remove(&first.page));
            installed.push(self.linear_of.get(&first.page).copied().unwrap_or(first.page));
        }
    }
}
