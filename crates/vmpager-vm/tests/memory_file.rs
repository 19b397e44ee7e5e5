//! A memory file that is not as it was written is refused: by an eager restore,
//! and before any other if its caller asks.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::{MEMORY, config, snapshot};
use vmpager_vm::{Contents, Cpu, Kind, RestoreMemory, Snapshot, Vm, VmError};

const PIECE: u64 = 2 << 20;

/// What both say to it.
fn verdicts(snapshot: &Snapshot) -> [Result<(), VmError>; 2] {
    let eager = Vm::restore(snapshot, RestoreMemory::Eager, Cpu::Threads);
    [eager.map(drop), snapshot.verify_memory()]
}

#[track_caller]
fn assert_refused_at(snapshot: &Snapshot, piece: u64, differing: u64) {
    for verdict in verdicts(snapshot) {
        let error = verdict.unwrap_err();
        let VmError::MemoryChecksum { start, end, damaged, pieces, .. } = error else {
            panic!("{error}")
        };
        assert_eq!((start, end), (piece * PIECE, (piece + 1) * PIECE));
        assert_eq!((damaged, pieces), (differing, MEMORY / PIECE));
        let text = error.to_string();
        assert!(text.contains("memory.raw") && text.contains("use a good copy"), "{text}");
        assert!(text.contains(&format!("bytes {start:#x} to {end:#x}")), "{text}");
    }
}

fn made() -> (tempfile::TempDir, Snapshot, File) {
    let (dir, snapshot) = snapshot(&config(Cpu::Auto));
    let file = File::options().read(true).write(true).open(&snapshot.paths().memory).unwrap();
    (dir, snapshot, file)
}

fn flip(file: &File, at: u64, bit: u8) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
}

#[test]
fn one_flipped_bit_is_found_and_its_piece_named() {
    let (_dir, snapshot, file) = made();
    let contents = Contents::new(common::SEED);
    let of_kind = |kind| (1000..MEMORY / 4096).find(|page| contents.kind(*page) == kind).unwrap();
    let (data, hole) = (of_kind(Kind::Text) * 4096, of_kind(Kind::Zero) * 4096);
    assert!(verdicts(&snapshot).iter().all(Result::is_ok));
    for (at, bit) in [(data, 0), (data + 4095, 7), (hole + 17, 3), (MEMORY - 1, 5)] {
        flip(&file, at, bit);
        assert_refused_at(&snapshot, at / PIECE, 1);
        // What a program opens anew knows as much.
        let again = Snapshot::open(snapshot.paths()).unwrap();
        assert_refused_at(&again, at / PIECE, 1);
        flip(&file, at, bit);
    }
    // A hole that became zeroes, or zeroes a hole, is no damage.
    file.write_all_at(&[0; 4096], hole).unwrap();
    assert!(verdicts(&snapshot).iter().all(Result::is_ok));
}

#[test]
fn of_several_damaged_pieces_the_first_is_named() {
    let (_dir, snapshot, file) = made();
    for piece in [6, 2, 3] {
        flip(&file, piece * PIECE + 5, 1);
    }
    assert_refused_at(&snapshot, 2, 3);
}

#[test]
fn a_page_that_became_zeroes_is_found() {
    let (_dir, snapshot, file) = made();
    let contents = Contents::new(common::SEED);
    let page = (1000..MEMORY / 4096).find(|page| contents.kind(*page) == Kind::Random).unwrap();
    file.write_all_at(&[0; 4096], page * 4096).unwrap();
    assert_refused_at(&snapshot, page * 4096 / PIECE, 1);
}

#[test]
fn a_file_cut_short_after_it_was_opened_is_refused_too() {
    let (_dir, snapshot, file) = made();
    file.set_len(MEMORY - 4096).unwrap();
    for verdict in verdicts(&snapshot) {
        let error = verdict.unwrap_err().to_string();
        assert!(error.contains("memory.raw"), "{error}");
    }
}
