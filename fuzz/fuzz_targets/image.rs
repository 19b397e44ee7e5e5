//! A packed image of any content: whatever it is, nothing panics, nothing is
//! read beyond it, and memory stays bounded.
//!
//! The first byte of the input says whether the rest is a file as it is (`f`), or
//! one whose checksums are to be made right: a fuzzer does not find those by
//! itself.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::ops::{ControlFlow, Range};
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use vmpager_core::{ByteRange, PageSource};
use vmpager_store::image::Image;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, bytes)) = input.split_first() else { return };
    let mut file = bytes.to_vec();
    if kind != b'f' {
        seal(&mut file);
    }
    check(&file);
});

/// Opened or refused; and what is opened is read, or says why not.
fn check(bytes: &[u8]) {
    let memfd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(memfd.expect("a memfd"));
    file.write_all(bytes).expect("memory for it");
    // No layer below is found here.
    let image = match Image::options().open_file(file, Path::new("/nowhere/image")) {
        Ok(image) => image,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let len = image.memory_bytes();
    let mut pages = vec![0; 64 << 10];
    for start in [0, len / 2 / 4096 * 4096, len.saturating_sub(64 << 10)] {
        let range = ByteRange::new(start, (64 << 10).min(len - start));
        let to = &mut pages[..usize::try_from(range.len).expect("64 KiB at most")];
        if let Err(error) = image.read(range, to) {
            assert!(!error.to_string().is_empty());
        }
    }
    if len <= 16 << 20 {
        let mut zero = 0;
        image.visit_zero_ranges(&mut |range| zero += range.len);
        let seen = image.inspect(16);
        assert_eq!(seen.zero_pages * 4096, zero);
        assert_eq!((seen.zero_pages + seen.duplicate_pages + seen.distinct_pages) * 4096, len);
        image.verify(1, &mut |_| ControlFlow::Continue(())).expect("a report");
    }
}

fn number<const N: usize>(file: &[u8], at: usize) -> Option<usize> {
    let mut bytes = [0; 8];
    bytes[..N].copy_from_slice(file.get(at..at.checked_add(N)?)?);
    usize::try_from(u64::from_le_bytes(bytes)).ok()
}

fn put_crc(file: &mut [u8], of: Range<usize>, at: usize) -> Option<()> {
    let crc = crc32c::crc32c(file.get(of)?).to_le_bytes();
    file.get_mut(at..at.checked_add(4)?)?.copy_from_slice(&crc);
    Some(())
}

/// Makes lengths and checksums right, as far as there is something to check.
fn seal(file: &mut [u8]) -> Option<()> {
    put_crc(file, 0..12, 12)?;
    let trailer = file.len().checked_sub(40)?;
    file[trailer..trailer + 8].copy_from_slice(&(trailer as u64 + 40).to_le_bytes());
    let directory = number::<8>(file, trailer + 8)?;
    for entry in (directory..trailer).step_by(32) {
        let (start, len) = (number::<8>(file, entry + 8)?, number::<8>(file, entry + 16)?);
        let section = start..start.saturating_add(len);
        if file.get(entry..entry + 4) == Some(b"FRMS") {
            for frame in section.clone().step_by(16) {
                let Some(at) = number::<8>(file, frame) else { break };
                let Some(len) = number::<4>(file, frame + 8) else { break };
                let _ = put_crc(file, at..at.saturating_add(len), frame + 12);
            }
        }
        let _ = put_crc(file, section, entry + 24);
    }
    put_crc(file, directory..trailer, trailer + 20)?;
    put_crc(file, trailer..trailer + 28, trailer + 28)
}
