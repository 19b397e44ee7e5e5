//! What a conversion costs beyond the calls it takes: by a back-end that does nothing.

use std::io;
use std::ops::Range;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use vmpager_core::convert::{Contents, Kind, PAGE_BYTES, Places};
use vmpager_kvm::private::{AfterFault, Backend, Intent, PrivateMemory};

#[derive(Debug)]
struct Nothing(Places);

impl Backend for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
    }

    fn places(&self) -> Places {
        self.0
    }

    fn close(&self, _: Range<u64>, _: Kind) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: Range<u64>, _: Kind) -> io::Result<()> {
        Ok(())
    }

    fn open(&self, _: Range<u64>, _: Kind) -> io::Result<()> {
        Ok(())
    }

    fn reopen(&self, _: Range<u64>, _: Kind) -> io::Result<()> {
        Ok(())
    }
}

/// Two memslots of 2048 pages each.
fn memory(places: Places) -> PrivateMemory {
    let half = 2048 * PAGE_BYTES;
    let slots = [(0, half), (half, half)];
    let backend = Box::new(Nothing(places));
    PrivateMemory::new(backend, slots, Kind::Shared, Contents::Zero, Intent::Access)
        .expect("slots that make sense")
}

/// To private and back, by hypercalls.
fn ranges(c: &mut Criterion) {
    let mut group = c.benchmark_group("both ways");
    for places in [Places::Two, Places::One] {
        for pages in [1, 16, 128, 512, 513] {
            let memory = memory(places);
            group.bench_function(BenchmarkId::new(format!("{places:?}"), pages), |b| {
                b.iter(|| [16, 0].map(|flags| memory.hypercall(&[0, pages, flags, 0, 0, 0])));
            });
        }
    }
    let memory = memory(Places::Two);
    group.bench_function("Two, 16 pages in two memslots", |b| {
        b.iter(|| [16, 0].map(|flags| memory.hypercall(&[2040 << 12, 16, flags, 0, 0, 0])));
    });
    group.finish();
}

/// A page, asked for by accesses.
fn accesses(c: &mut Criterion) {
    let memory = memory(Places::One);
    c.bench_function("both ways, a page by accesses", |b| {
        b.iter(|| {
            for kind in [Kind::Private, Kind::Shared] {
                let after = memory.on_fault(5 * PAGE_BYTES, PAGE_BYTES, kind);
                assert_eq!(after.ok(), Some(AfterFault::Enter));
            }
        });
    });
}

criterion_group!(benches, ranges, accesses);
criterion_main!(benches);
