//! Which of the pages that a profile names are in place.

use vmpager_core::{ByteRange, Hva, SlotSet};

/// The parts of these ranges of the source whose pages are present: where they lie, and
/// how many bytes they have. In the order of the ranges; what adjoins is one part.
pub(crate) fn in_place(
    slots: &SlotSet,
    order: &[ByteRange],
    is_present: impl Fn(u64) -> bool,
) -> Vec<(Hva, u64)> {
    let mut parts: Vec<(Hva, u64)> = Vec::new();
    for run in order.iter().flat_map(|range| slots.runs_meeting_source(*range)) {
        let (slot, all) = slots.slot_of(run.first);
        let size = slot.page_size.bytes();
        for page in (run.first..run.end()).filter(|page| is_present(*page)) {
            let hva = slot.hva.0 + (page - all.first) * size;
            match parts.last_mut() {
                Some((last, len)) if last.0 + *len == hva => *len += size,
                _ => parts.push((Hva(hva), size)),
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use vmpager_core::{PageSize, Slot};

    use super::*;

    const P: u64 = 4096;

    #[test]
    fn parts_are_those_present_in_the_order_given() {
        let slot = |hva, pages, at| Slot {
            hva: Hva(hva),
            len: pages * P,
            source_offset: at * P,
            page_size: PageSize::Size4K,
        };
        // The second slot has the first bytes of the source, and lies elsewhere.
        let slots = [slot(0x10_0000, 8, 4), slot(0x80_0000, 4, 0)];
        let slots = SlotSet::new(&slots, 12 * P).unwrap();
        let order = [(9, 3), (2, 4), (0, 1)].map(|(at, len)| ByteRange::new(at * P, len * P));
        let at = |hva: u64, page: u64, pages: u64| (Hva(hva + page * P), pages * P);
        let all =
            [at(0x10_0000, 5, 3), at(0x10_0000, 0, 2), at(0x80_0000, 2, 2), at(0x80_0000, 0, 1)];
        assert_eq!(in_place(&slots, &order, |_| true), all);
        assert_eq!(in_place(&slots, &order, |_| false), []);
        // Pages 0 to 7 are of the first slot.
        let some = [at(0x10_0000, 5, 1), at(0x10_0000, 7, 1), at(0x10_0000, 1, 1)];
        assert_eq!(in_place(&slots, &order, |page| [1, 3, 5, 7].contains(&page)), some);
    }
}
