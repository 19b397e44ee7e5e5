//! Images that are not what was written: refused, or found, and never a wrong
//! byte.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "common/mod.rs"]
mod common;
#[path = "common/image_file.rs"]
mod image_file;
#[path = "common/memory.rs"]
mod memory;

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use common::{PAGE, fetch, pages, span, temp_file};
use image_file::{add, directory, frame, replace, seal, seal_frame, section};
use memory::{Page, write_sparse};
use vmpager_core::{PageSource, SourceError};
use vmpager_store::image::{Codec, Image, ImageError, MemoryInput, PackOptions, Progress};

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Four frames of four pages, that are touched by 20 pages of memory.
fn contents() -> Vec<u8> {
    let text = (0..14).map(Page::Text);
    let all = text.chain([Page::Zero, Page::Text(3), Page::Zero, Page::Text(20), Page::Text(21)]);
    memory::memory(&all.chain([Page::Zero]).collect::<Vec<_>>())
}

fn image_of(bytes: &[u8], codec: Codec) -> Vec<u8> {
    let (raw, to) = (temp_file(), temp_file());
    write_sparse(raw.as_file(), bytes);
    let options = PackOptions::default().codec(codec).frame_bytes(16384).replace(true);
    options.pack(&MemoryInput::raw(raw.path()).unwrap(), to.path(), &mut go_on).unwrap();
    std::fs::read(to.path()).unwrap()
}

fn open(file: &[u8]) -> Result<Arc<Image>, ImageError> {
    let at = temp_file();
    std::fs::write(at.path(), file).unwrap();
    Image::options().open_file(File::open(at.path()).unwrap(), at.path())
}

fn refusal(file: &[u8]) -> String {
    open(file).map(|_| ()).unwrap_err().to_string()
}

/// All that is readable is right. Returns the pages that are not.
fn unreadable(image: &Arc<Image>, contents: &[u8]) -> Vec<u64> {
    let mut reader = Arc::clone(image).open_reader().unwrap();
    let count = contents.len() as u64 / PAGE;
    let is_lost = |page: &u64| match fetch(&mut *reader, pages(*page, 1)) {
        Ok(bytes) => {
            assert!(bytes == contents[span(pages(*page, 1))], "wrong bytes of page {page}");
            false
        }
        Err(SourceError::Damaged { what, .. }) => {
            assert!(what.contains("frame"), "{what}");
            true
        }
        Err(other) => panic!("{other}"),
    };
    (0..count).filter(is_lost).collect()
}

#[test]
fn every_flipped_bit_is_found_and_no_wrong_byte_comes_of_it() {
    let contents = contents();
    for codec in Codec::ALL {
        let file = image_of(&contents, codec);
        let frames: Vec<Range<usize>> = (0..4).map(|n| frame(&file, n)).collect();
        // One bit of each byte of what is small, of some bytes of frames.
        let body = frames[0].start..frames[3].end;
        let some = (0..file.len()).filter(|at| !body.contains(at) || at % 97 == 0);
        for at in some {
            let mut flipped = file.clone();
            flipped[at] ^= 1 << (at % 8);
            let hit = frames.iter().position(|frame| frame.contains(&at));
            let image = match (open(&flipped), hit) {
                (Err(error), None) => {
                    assert!(!matches!(error, ImageError::Io { .. }), "byte {at}: {error}");
                    continue;
                }
                (Ok(image), Some(_)) => image,
                (other, _) => panic!("{codec}, byte {at}: {other:?}"),
            };
            let hit = hit.unwrap();
            let report = image.verify(2, &mut go_on).unwrap();
            assert_eq!(report.damage.len(), 1, "{codec}, byte {at}");
            let damage = &report.damage[0];
            assert!(damage.bytes.contains(&(at as u64)), "byte {at}: {damage:?}");
            assert!(damage.what.contains(&format!("frame {hit} ")), "byte {at}: {damage:?}");
            let lost: Vec<u64> =
                damage.memory.iter().flat_map(|r| r.start / PAGE..r.end / PAGE).collect();
            assert_eq!(unreadable(&image, &contents), lost, "byte {at}");
            if hit == 0 {
                assert_eq!(lost, [0, 1, 2, 3, 15], "the duplicate too");
            }
        }
    }
}

#[test]
fn a_file_of_another_length_is_refused() {
    let file = image_of(&contents(), Codec::Lz4);
    for len in (0..file.len()).filter(|len| len % 61 == 0 || *len < 70) {
        let error = open(&file[..len]).unwrap_err();
        let expected = matches!(error, ImageError::Length { .. } | ImageError::NotAnImage { .. });
        assert!(expected, "{len} bytes: {error}");
    }
    let grown = [file, vec![0; 10]].concat();
    assert!(matches!(open(&grown), Err(ImageError::Length { .. })));
}

/// The file is as long as it was when it was opened, and shorter when read.
#[test]
fn a_file_cut_short_while_it_is_read_is_an_error() {
    let contents = contents();
    let at = temp_file();
    std::fs::write(at.path(), image_of(&contents, Codec::Lz4)).unwrap();
    let image = Image::open(at.path()).unwrap();
    let file = std::fs::read(at.path()).unwrap();
    let second = frame(&file, 1);
    at.as_file().set_len(second.start as u64 + 10).unwrap();
    let mut reader = Arc::clone(&image).open_reader().unwrap();
    assert!(fetch(&mut *reader, pages(0, 1)).unwrap() == contents[..4096]);
    let error = fetch(&mut *reader, pages(5, 1)).unwrap_err();
    assert!(
        matches!(&error, SourceError::Damaged { what, .. } if what.contains("its end")),
        "{error}"
    );
    assert!(!error.is_transient());
}

#[test]
fn other_files_and_versions_are_refused_by_name() {
    assert!(matches!(open(&[0; 4096]), Err(ImageError::NotAnImage { .. })));
    assert!(matches!(open(b"short"), Err(ImageError::NotAnImage { .. })));
    let mut file = image_of(&contents(), Codec::None);
    file[8] = 2;
    seal(&mut file);
    assert!(matches!(open(&file), Err(ImageError::Version { version: 2, .. })));
}

#[test]
fn sections_of_the_future_are_ignored_unless_they_are_required() {
    let contents = contents();
    let file = image_of(&contents, Codec::Zstd);
    let image = open(&add(&file, b"NEWS", 0, b"something new")).unwrap();
    assert_eq!(unreadable(&image, &contents), [0; 0]);
    assert!(image.verify(1, &mut go_on).unwrap().damage.is_empty());
    // Nobody reads it, and yet a bit of it is found.
    let mut flipped = add(&file, b"NEWS", 0, b"something new");
    let at = section(&flipped, b"NEWS").start;
    flipped[at] ^= 1;
    let damage = open(&flipped).unwrap().verify(1, &mut go_on).unwrap().damage;
    assert!(damage.len() == 1 && damage[0].what.contains("NEWS"), "{damage:?}");

    let error = open(&add(&file, b"NEWS", 1, &[])).unwrap_err();
    assert!(matches!(&error, ImageError::UnknownFeature { kind, .. } if kind == "NEWS"), "{error}");
    // A record with fields that came later.
    let longer = [&file[section(&file, b"IMAG")], &[7; 24]].concat();
    let image = open(&replace(&file, b"IMAG", &longer)).unwrap();
    assert_eq!(unreadable(&image, &contents), [0; 0]);
}

#[test]
fn bytes_that_belong_to_nothing_are_found() {
    let file = image_of(&contents(), Codec::None);
    let table = file[section(&file, b"FRMS")].to_vec();
    // The old table stays where it was.
    let image = open(&replace(&file, b"FRMS", &table)).unwrap();
    let damage = image.verify(1, &mut go_on).unwrap().damage;
    assert!(damage.iter().any(|d| d.what.contains("no part of the image")), "{damage:?}");
}

#[test]
fn what_points_outside_or_contradicts_itself_is_refused() {
    let file = image_of(&contents(), Codec::Lz4);
    let patched = |kind: &[u8; 4], at: usize, bytes: &[u8]| {
        let mut patched = file[section(&file, kind)].to_vec();
        patched[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(&replace(&file, kind, &patched))
    };
    let end = directory(&file).end as u64;
    for (kind, at, bytes, expected) in [
        (b"IMAG", 0, &4097_u64.to_le_bytes()[..], "memory has 4097 bytes"),
        (b"IMAG", 0, &0_u64.to_le_bytes()[..], "memory has 0 bytes"),
        (b"IMAG", 0, &u64::MAX.to_le_bytes()[..], "memory has"),
        (b"IMAG", 0, &(15 * PAGE).to_le_bytes()[..], "page map"),
        (b"IMAG", 8, &u32::MAX.to_le_bytes()[..], "stores"),
        (b"IMAG", 8, &15_u32.to_le_bytes()[..], "outside"),
        (b"IMAG", 8, &17_u32.to_le_bytes()[..], "table of 5 frames"),
        (b"IMAG", 12, &3_u32.to_le_bytes()[..], "frames have 3 pages"),
        (b"IMAG", 12, &1024_u32.to_le_bytes()[..], "frames have 1024 pages"),
        (b"IMAG", 12, &8_u32.to_le_bytes()[..], "FRMS has 64 bytes"),
        (b"IMAG", 16, &9_u32.to_le_bytes()[..], "codec is 9"),
        (b"FRMS", 0, &end.to_le_bytes()[..], "frame 0 points outside"),
        (b"FRMS", 0, &0_u64.to_le_bytes()[..], "frame 0 points outside"),
        (b"FRMS", 16, &16_u64.to_le_bytes()[..], "frame 1 points outside"),
        (b"FRMS", 8, &0_u32.to_le_bytes()[..], "frame 0 points outside"),
        (b"FRMS", 8, &16385_u32.to_le_bytes()[..], "frame 0 points outside"),
        (b"FRMS", 48, &u64::MAX.to_le_bytes()[..], "frame 3 points outside"),
        (b"PMAP", 0, &1_u32.to_le_bytes()[..], "begin with page 0"),
        (b"PMAP", 8, &0_u32.to_le_bytes()[..], "out of order"),
        (b"PMAP", 8, &21_u32.to_le_bytes()[..], "out of order"),
        (b"PMAP", 4, &3_u32.to_le_bytes()[..], "outside"),
        (b"PMAP", 4, &(u32::MAX - 1).to_le_bytes()[..], "outside"),
        (b"PMAP", 4, &(u32::MAX - 3).to_le_bytes()[..], "outside"),
    ] {
        let error = patched(kind, at, bytes);
        assert!(error.contains(expected), "{kind:?} at {at}: {error}");
    }
    for kind in [b"IMAG", b"FRMS", b"PMAP"] {
        let cut = &file[section(&file, kind)][1..];
        let error = refusal(&replace(&file, kind, cut));
        assert!(error.contains("is damaged"), "{error}");
        let twice = add(&file, kind, 1, &file[section(&file, kind)]);
        assert!(refusal(&twice).contains("two sections"));
    }
    let named = |name: &[u8]| add(&file, b"PRNT", 1, &[&[7; 32], name].concat());
    for name in [&b"../up"[..], b"/etc/passwd", b"..", b"\xff", b"a\0b"] {
        assert!(refusal(&named(name)).contains("no file name"), "{name:?}");
    }
    assert!(refusal(&add(&file, b"PRNT", 1, b"short")).contains("PRNT"));
    assert!(refusal(&add(&file, b"PRNT", 1, &[b'a'; 32 + 256])).contains("PRNT"));
}

/// A frame that is what its checksum says, and yet is not its pages.
#[test]
fn a_frame_that_expands_beyond_its_pages_is_an_error() {
    let contents = contents();
    for codec in [Codec::Lz4, Codec::Zstd] {
        let mut file = image_of(&contents, codec);
        // Each frame has four pages; the fourth frame has the bytes of a bomb.
        let place = frame(&file, 0);
        let bomb = match codec {
            Codec::Zstd => zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap(),
            _ => lz4_flex::block::compress(&vec![0; 1 << 20]),
        };
        let bomb = &bomb[..bomb.len().min(place.len())];
        file[place.start..place.start + bomb.len()].copy_from_slice(bomb);
        let len = u32::try_from(bomb.len()).unwrap();
        let table = section(&file, b"FRMS").start;
        file[table + 8..table + 12].copy_from_slice(&len.to_le_bytes());
        seal_frame(&mut file, 0);
        seal(&mut file);
        let image = open(&file).unwrap();
        assert_eq!(unreadable(&image, &contents), [0, 1, 2, 3, 15], "{codec}");
        assert!(!image.verify(1, &mut go_on).unwrap().damage.is_empty());
    }
}

/// Checksums that hold, of contents that are others: found by what they are
/// called.
#[test]
fn contents_that_were_exchanged_are_found() {
    let file = image_of(&contents(), Codec::None);
    // The first pages are now the second stored one and those that follow.
    let mut exchanged = file.clone();
    let map = section(&file, b"PMAP").start;
    exchanged[map + 4] = 1;
    seal(&mut exchanged);
    let damage = open(&exchanged).unwrap().verify(2, &mut go_on).unwrap().damage;
    assert_eq!(damage.len(), 1);
    assert!(damage[0].what.contains("called by"), "{damage:?}");
}
