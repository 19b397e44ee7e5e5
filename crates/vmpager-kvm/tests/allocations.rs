//! Conversions ask the allocator for nothing: a guest may convert page after page.

use std::io;
use std::ops::Range;

use vmpager_core::convert::{Contents, Kind, PAGE_BYTES, Places, Request};
use vmpager_kvm::private::{AfterFault, Backend, Cause, Intent, PrivateMemory};

/// Does nothing, and can tell contents apart from none.
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

/// More than the log keeps.
const CONVERSIONS: u64 = 3000;

#[test]
fn conversions_of_one_range_allocate_nothing() {
    let slots = [(0, 1024 * PAGE_BYTES), (1024 * PAGE_BYTES, 1024 * PAGE_BYTES)];
    for (places, contents) in [
        (Places::Two, Contents::Zero),
        (Places::One, Contents::Zero),
        (Places::One, Contents::Preserve),
    ] {
        let backend = Box::new(Nothing(places));
        let memory = PrivateMemory::new(backend, slots, Kind::Shared, contents, Intent::Access)
            .expect("slots that make sense");
        let convert = |number: u64| {
            let to = if number.is_multiple_of(2) { Kind::Private } else { Kind::Shared };
            let (gpa, len) = (number / 2 % 500 * PAGE_BYTES, (1 + number / 2 % 513) * PAGE_BYTES);
            memory.convert(&Request { gpa, len, to }, Cause::Host).expect("nothing fails");
            // And back by an access, if it was made shared.
            let after = memory.on_fault(gpa, PAGE_BYTES, Kind::Private).expect("nothing fails");
            let found = if to == Kind::Shared { AfterFault::Enter } else { AfterFault::Matches };
            assert_eq!(after, found);
            memory.convert(&Request { gpa, len, to }, Cause::Host).expect("nothing fails");
        };
        // The first of all makes room for those that go on.
        convert(0);
        let allocated = allocation_counter::measure(|| (1..CONVERSIONS).for_each(convert));
        assert_eq!(allocated.count_total, 0, "{places:?}, {contents:?}: {allocated:?}");
        let stats = memory.stats();
        assert!(stats.host == 2 * CONVERSIONS && stats.implicit > 0, "{stats:?}");
        assert_eq!((stats.undone, stats.stands), (0, 0));
    }
}
