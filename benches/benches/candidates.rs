//! How long a fault's candidates take: decoding, walking, looking up.
//!
//! The target is one microsecond; installing a page takes about as long.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use vmpager_benches::{CODE, CODE_PAGES, DATA, Guest, INSTRUCTIONS, STACK};
use vmpager_kvm::candidates::{CandidateFinder, VectorRegisters, XsaveLayout};

const PAGE: u64 = 4096;

fn find(finder: &mut CandidateFinder, guest: &Guest) -> usize {
    let area = [0; 2688];
    let layout = XsaveLayout { ymm_high: 576, masks: 1088, zmm_high: 1152, zmm_16_to_31: 1664 };
    let vectors = || Some(VectorRegisters::from_xsave(&area, &layout));
    black_box(finder.missing(black_box(&guest.registers()), &guest.memory, vectors)).pages().len()
}

/// One guest, stopped at one place over and over.
fn bench_guest(c: &mut Criterion, name: &str, guest: &Guest, missing: usize) {
    let mut finder = CandidateFinder::new();
    assert_eq!(find(&mut finder, guest), missing, "{name}");
    c.bench_function(name, |b| b.iter(|| find(&mut finder, guest)));
}

/// An operand is missing; the instruction is known, as in a loop, or new.
fn operands(c: &mut Criterion) {
    for (name, code) in INSTRUCTIONS {
        let mut guest = Guest::new();
        guest.put(CODE, code);
        for page in [DATA, STACK] {
            let gpa = guest.map(page);
            guest.take_away(gpa);
        }
        let missing = if name.starts_with("call") { 2 } else { 1 };
        bench_guest(c, &format!("operand, known: {name}"), &guest, missing);
    }
    let mut guest = Guest::new();
    let places: Vec<u64> = (0..CODE_PAGES * PAGE / 16).map(|i| CODE + i * 16).collect();
    for (i, place) in places.iter().enumerate() {
        guest.put(*place, INSTRUCTIONS[i % INSTRUCTIONS.len()].1);
    }
    for page in [DATA, STACK] {
        let gpa = guest.map(page);
        guest.take_away(gpa);
    }
    let mut finder = CandidateFinder::new();
    let mut places = places.iter().cycle();
    c.bench_function("operand, new instruction each time", |b| {
        b.iter(|| {
            guest.regs.rip = places.next().copied().unwrap_or(CODE);
            find(&mut finder, &guest)
        });
    });
}

/// What else may be missing.
fn others(c: &mut Criterion) {
    let load = b"\x48\x8b\x03";
    let mut guest = Guest::new();
    guest.put(CODE, load);
    bench_guest(c, "nothing missing", &guest, 0);

    guest.take_away(guest.table_of(DATA));
    bench_guest(c, "page table", &guest, 1);

    let mut guest = Guest::new();
    let code = guest.map(CODE);
    guest.take_away(code);
    bench_guest(c, "code", &guest, 1);

    let mut guest = Guest::new();
    guest.put(CODE + 0xffe, load);
    guest.regs.rip = CODE + 0xffe;
    let data = guest.map(DATA);
    guest.take_away(data);
    bench_guest(c, "operand, instruction across pages", &guest, 1);

    let mut guest = Guest::new();
    guest.put(CODE, load);
    guest.events.exception.injected = 1;
    guest.events.exception.nr = 14;
    guest.events.exception.has_error_code = 1;
    bench_guest(c, "delivery of a page fault", &guest, 0);

    let mut guest = Guest::new();
    guest.put(CODE, b"\xc4\xe2\x6d\x92\x04\x8b");
    let data = guest.map(DATA);
    guest.take_away(data);
    bench_guest(c, "gather of 8, all masked out", &guest, 0);
}

criterion_group!(benches, operands, others);
criterion_main!(benches);
