//! A peer's bytes, in pieces of any size, into the handshake: whatever they
//! are, nothing panics, limits hold, and the pieces make no difference.
//!
//! The first byte of the input chooses the sizes of the pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmpager::core::{Slot, SlotSet};
use vmpager::handshake::{HandshakeError, Inbox, MAX_MESSAGE, MAX_REGIONS, Said};

/// What came of a connection.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    messages: Vec<Vec<Slot>>,
    /// The error's words, which name what was refused.
    refused: Option<String>,
    partial: bool,
}

fuzz_target!(|input: &[u8]| {
    let Some((&way, bytes)) = input.split_first() else { return };
    let outcome = listen(bytes, pieces_of(way));
    for slots in &outcome.messages {
        assert!(slots.len() <= MAX_REGIONS);
        check_slots(slots);
    }
    if outcome.refused.is_none() && bytes.len() <= MAX_MESSAGE {
        // Other pieces, the same messages.
        let whole = listen(bytes, usize::MAX);
        assert_eq!(outcome, whole, "pieces of {}", pieces_of(way));
    }
});

fn pieces_of(way: u8) -> usize {
    match way {
        0 => usize::MAX,
        way => usize::from(way),
    }
}

/// As the daemon does: a piece, then every message that is whole.
fn listen(bytes: &[u8], piece: usize) -> Outcome {
    let mut inbox = Inbox::default();
    let mut outcome = Outcome { messages: Vec::new(), refused: None, partial: false };
    for piece in bytes.chunks(piece) {
        if let Err(error) = take_in(&mut inbox, piece, &mut outcome.messages) {
            assert!(!error.to_string().is_empty());
            outcome.refused = Some(error.to_string());
            return outcome;
        }
    }
    outcome.partial = inbox.is_partial();
    outcome
}

fn take_in(
    inbox: &mut Inbox,
    piece: &[u8],
    messages: &mut Vec<Vec<Slot>>,
) -> Result<(), HandshakeError> {
    inbox.push(piece)?;
    while let Some(said) = inbox.next_message()? {
        let slots = match said {
            Said::Handshake(handshake) => {
                assert!(handshake.descriptors() <= 257);
                handshake.slots
            }
            Said::AsksForCleanPages => Vec::new(),
        };
        messages.push(slots);
    }
    Ok(())
}

/// Accepted or refused, but never a panic; and what is accepted is sound.
fn check_slots(slots: &[Slot]) {
    for source_len in [0, 4096, 1 << 30, u64::MAX] {
        let Ok(set) = SlotSet::new(slots, source_len) else { continue };
        assert!(set.pages() > 0);
        let mut first = 0;
        while first < set.pages() {
            let (slot, run) = set.slot_of(first);
            assert_eq!(run.first, first);
            assert_eq!(run.count, slot.pages());
            let (hva, range) = set.locate(run);
            assert_eq!((hva, range.len), (slot.hva, slot.len));
            assert!(range.end() <= source_len);
            assert_eq!(set.page_at(hva), Some(run.first));
            first = run.end();
        }
        assert_eq!(set.bytes(), slots.iter().map(|slot| slot.len).sum::<u64>());
    }
}
