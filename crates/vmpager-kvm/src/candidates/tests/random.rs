//! Random instructions, page tables and missing pages, against a model that
//! knows each instruction's accesses because it made the instruction for them.

use proptest::prelude::*;

use super::guest::{Guest, Mode};
use crate::candidates::CandidateFinder;

/// An instruction with a memory operand.
#[derive(Clone, Copy, Debug)]
struct Template {
    prefix: &'static [u8],
    /// Bit 3 of a REX prefix: 64-bit operands.
    wide: bool,
    opcode: &'static [u8],
    /// The reg field, if it is part of the opcode.
    extension: Option<u8>,
    immediate: usize,
    bytes: u64,
    stack: Stack,
    /// Whether a register is a bit number.
    bit: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stack {
    None,
    Push,
    Pop,
}

const PLAIN: Template = Template {
    prefix: &[],
    wide: false,
    opcode: &[],
    extension: None,
    immediate: 0,
    bytes: 4,
    stack: Stack::None,
    bit: false,
};

/// Those of 64-bit mode only are at the end.
const TEMPLATES: [Template; 16] = [
    Template { opcode: &[0x8b], ..PLAIN },           // mov r32, m
    Template { opcode: &[0x88], bytes: 1, ..PLAIN }, // mov m, r8
    Template { opcode: &[0x83], extension: Some(0), immediate: 1, ..PLAIN }, // add m, imm8
    Template { opcode: &[0x69], immediate: 4, ..PLAIN }, // imul r32, m, imm32
    Template { opcode: &[0x0f, 0x10], bytes: 16, ..PLAIN }, // movups xmm, m
    Template { prefix: &[0x66], opcode: &[0x0f, 0xe7], bytes: 16, ..PLAIN }, // movntdq m, xmm
    Template { opcode: &[0xd9], extension: Some(6), bytes: 28, ..PLAIN }, // fnstenv m
    Template { opcode: &[0x0f, 0xae], extension: Some(0), bytes: 512, ..PLAIN }, // fxsave m
    Template { opcode: &[0x0f, 0xae], extension: Some(4), bytes: 2696, ..PLAIN }, // xsave m
    Template { opcode: &[0xff], extension: Some(6), stack: Stack::Push, ..PLAIN }, // push m
    Template { opcode: &[0xff], extension: Some(2), stack: Stack::Push, ..PLAIN }, // call m
    Template { opcode: &[0x8f], extension: Some(0), stack: Stack::Pop, ..PLAIN }, // pop m
    Template { opcode: &[0x0f, 0xab], bit: true, ..PLAIN }, // bts m, r32
    Template { opcode: &[0x0f, 0xa3], bit: true, wide: true, bytes: 8, ..PLAIN }, // bt m, r64
    Template { opcode: &[0x8b], wide: true, bytes: 8, ..PLAIN }, // mov r64, m
    Template { opcode: &[0x0f, 0xc7], extension: Some(1), wide: true, bytes: 16, ..PLAIN },
];

/// Of the templates, those that 32-bit code has.
const LEGACY: usize = 13;

#[derive(Clone, Debug)]
struct Case {
    mode: Mode,
    template: Template,
    /// Register numbers, distinct; none is the stack pointer.
    base: u8,
    index: Option<u8>,
    reg: u8,
    scale: u8,
    displacement: i32,
    short: bool,
    relative: bool,
    index_value: u64,
    bit: i32,
    code: u64,
    operand: u64,
    stack: u64,
    step: u64,
    missing: u64,
}

/// An address that is often near the end of a page, often near another one.
fn address() -> impl Strategy<Value = u64> {
    let page = prop_oneof![0_u64..8, 0_u64..0x8000, Just(0x1ff), Just(0x3ff)];
    let region = prop_oneof![Just(0_usize), 0_usize..3];
    let offset = prop_oneof![0_u64..4096, 4064_u64..4096];
    (page, region, offset).prop_map(|(page, region, offset): (u64, usize, u64)| {
        // Regions that share all page tables but the last, two, or one.
        let region = [0x10_0000_0000_u64, 0x7f00_0000_0000, 0xffff_9000_0000_0000][region];
        region + 0x1000_0000 + (page << 12) + offset
    })
}

fn case() -> impl Strategy<Value = Case> {
    let mode = prop::sample::select(vec![
        Mode::Paged32,
        Mode::Pae,
        Mode::Compat,
        Mode::Long4,
        Mode::Long4,
        Mode::Long5,
    ]);
    let numbers = Just((0..16_u8).filter(|n| *n != 4).collect::<Vec<_>>()).prop_shuffle();
    let form = (any::<i32>(), any::<bool>(), any::<bool>(), 0..4_u8, any::<Option<u64>>());
    let places = (address(), address(), address());
    (mode, 0..TEMPLATES.len(), numbers, form, places, any::<i32>(), 1..20_u64, any::<u64>())
        .prop_map(|(mode, template, mut numbers, form, places, bit, step, missing)| {
            let is_64 = matches!(mode, Mode::Long4 | Mode::Long5);
            if !is_64 {
                numbers.retain(|n| *n < 8);
            }
            let narrow = |at: u64| if is_64 { at } else { at & 0x7fff_ffff };
            let (displacement, short, relative, scale, index) = form;
            let template = TEMPLATES[if is_64 { template } else { template % LEGACY }];
            Case {
                mode,
                template,
                base: numbers[0],
                index: index.map(|_| numbers[1]),
                reg: numbers[2],
                scale,
                displacement: if short { displacement >> 24 } else { displacement },
                short,
                relative: relative && is_64,
                index_value: index.unwrap_or(0),
                // Not so far that it leaves the mapped pages.
                bit: bit >> 8,
                code: narrow(places.0),
                operand: narrow(places.1),
                stack: narrow(places.2),
                step,
                missing,
            }
        })
}

impl Case {
    fn is_64(&self) -> bool {
        matches!(self.mode, Mode::Long4 | Mode::Long5)
    }

    fn word(&self) -> u64 {
        if self.is_64() { 8 } else { 4 }
    }

    fn bytes(&self) -> u64 {
        if self.template.stack == Stack::None { self.template.bytes } else { self.word() }
    }

    /// The machine code: ModRM and SIB with what `set_registers` puts there.
    fn encode(&self) -> Vec<u8> {
        let template = &self.template;
        let mut code = template.prefix.to_vec();
        let reg = template.extension.unwrap_or(self.reg);
        let index = self.index.unwrap_or(4);
        let (base, index) = if self.relative { (5, 4) } else { (self.base, index) };
        let high = |number: u8, bit: u8| (number >> 3) << bit;
        let rex = u8::from(template.wide) << 3 | high(reg, 2) | high(index, 1) | high(base, 0);
        if self.is_64() {
            code.push(0x40 | rex);
        }
        code.extend(template.opcode);
        let mode = match self.short {
            _ if self.relative => 0x00,
            true => 0x40,
            false => 0x80,
        };
        if self.relative {
            code.push((reg & 7) << 3 | 5);
        } else if self.index.is_some() || base & 7 == 4 {
            code.push(mode | (reg & 7) << 3 | 4);
            code.push(self.scale << 6 | (index & 7) << 3 | base & 7);
        } else {
            code.push(mode | (reg & 7) << 3 | base & 7);
        }
        let displacement = self.displacement.to_le_bytes();
        let bytes = if self.short && !self.relative { 1 } else { 4 };
        code.extend(&displacement[..bytes]);
        code.extend(std::iter::repeat_n(0x11, template.immediate));
        code
    }

    /// Where the operand is that the encoded address leads to.
    fn operand(&self, len: usize) -> u64 {
        match self.relative {
            true => (self.code + len as u64).wrapping_add_signed(self.displacement.into()),
            false => self.operand,
        }
    }

    fn set_registers(&self, guest: &mut Guest) {
        let index = self.index.map_or(0, |_| self.index_value << self.scale);
        let displacement = i64::from(self.displacement).cast_unsigned();
        let base = self.operand.wrapping_sub(index).wrapping_sub(displacement);
        set(guest, self.base, base);
        if let Some(number) = self.index {
            set(guest, number, self.index_value);
        }
        if self.template.bit {
            set(guest, self.reg, i64::from(self.bit).cast_unsigned());
        }
        guest.regs.rip = self.code;
        let pushes = self.template.stack == Stack::Push;
        guest.regs.rsp = self.stack + if pushes { self.word() } else { 0 };
    }

    /// What the processor touches, in order: from, length.
    fn accesses(&self, len: usize) -> Vec<(u64, u64)> {
        let mut operand = self.operand(len);
        if self.template.bit {
            let bits = 8 * self.bytes();
            let unit = i64::from(self.bit).div_euclid(bits.cast_signed());
            operand = operand.wrapping_add_signed(unit * self.bytes().cast_signed());
        }
        let (code, operand) = ((self.code, len as u64), (operand, self.bytes()));
        let stack = (self.stack, self.word());
        match self.template.stack {
            Stack::None => vec![code, operand],
            Stack::Push => vec![code, operand, stack],
            Stack::Pop => vec![code, stack, operand],
        }
    }
}

fn set(guest: &mut Guest, number: u8, value: u64) {
    let r = &mut guest.regs;
    let all = [
        &mut r.rax, &mut r.rcx, &mut r.rdx, &mut r.rbx, &mut r.rsp, &mut r.rbp, &mut r.rsi,
        &mut r.rdi, &mut r.r8, &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13,
        &mut r.r14, &mut r.r15,
    ];
    if let Some(register) = all.into_iter().nth(number.into()) {
        *register = value;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() })]

    /// The first candidate is the page that stops the processor, each time; and
    /// in the end nothing is missing that it touches, nor was anything installed
    /// that it does not.
    #[test]
    fn the_first_candidate_is_the_page_that_faults(case in case()) {
        let mut guest = Guest::scattered(case.mode, case.step);
        guest.xsave_bytes = 2696;
        let code = case.encode();
        case.set_registers(&mut guest);
        let narrow = |at: u64| if case.is_64() { at } else { at & 0xffff_ffff };
        let mut way = Vec::new();
        for (from, bytes) in case.accesses(code.len()) {
            let mut done = 0;
            while done < bytes {
                let at = narrow(from.wrapping_add(done));
                way.extend(guest.way(at));
                done += 4096 - at % 4096;
            }
        }
        for (at, byte) in (case.code..).zip(&code) {
            guest.put(narrow(at), &[*byte]);
        }
        // Its neighbours are missing too, and must stay so.
        for neighbour in [case.operand, case.stack, case.code] {
            for page in [neighbour.wrapping_sub(0x2000), neighbour.wrapping_add(0x4000)] {
                let gpa = guest.map(narrow(page));
                if !way.contains(&gpa) {
                    guest.memory.missing.insert(gpa);
                }
            }
        }
        let neighbours = guest.memory.missing.len();
        let is_missing = |i: usize| case.missing >> (i % 64) & 1 != 0;
        let taken = way.iter().enumerate().filter(|(i, _)| is_missing(*i)).map(|(_, page)| *page);
        guest.memory.missing.extend(taken);
        let mut finder = CandidateFinder::new();
        loop {
            let fault = way.iter().find(|page| guest.memory.missing.contains(page)).copied();
            let missing = finder.missing(&guest.registers(), &guest.memory, || None);
            for candidate in missing.pages() {
                prop_assert!(way.contains(&candidate.page), "{candidate:x?} of {way:x?}");
                prop_assert!(guest.memory.missing.contains(&candidate.page));
            }
            let first = missing.pages().first().map(|candidate| candidate.page);
            prop_assert_eq!(first, fault, "{:x?} {:x?}", code, way);
            let Some(page) = fault else { break };
            guest.memory.missing.remove(&page);
        }
        prop_assert_eq!(guest.memory.missing.len(), neighbours);
        // The same is seen when nothing is missing any more.
        let all: Vec<u64> = guest.all().iter().map(|candidate| candidate.page).collect();
        prop_assert!(way.iter().all(|page| all.contains(page)), "{:x?} in {:x?}", way, all);
    }
}
