//! The image format once more, from `docs/format.md`: to make files that are
//! wrong in one place, and right in all others.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::ops::Range;

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

/// Where the directory is.
pub(crate) fn directory(file: &[u8]) -> Range<usize> {
    let trailer = file.len() - 40;
    index(u64_at(file, trailer + 8))..trailer
}

/// Where the entry of a section is in the file.
pub(crate) fn entry(file: &[u8], kind: &[u8; 4]) -> Option<usize> {
    directory(file).step_by(32).find(|at| file[*at..*at + 4] == *kind)
}

/// Where a section is.
pub(crate) fn section(file: &[u8], kind: &[u8; 4]) -> Range<usize> {
    let at = entry(file, kind).unwrap();
    let start = index(u64_at(file, at + 8));
    start..start + index(u64_at(file, at + 16))
}

/// Where a frame is.
pub(crate) fn frame(file: &[u8], number: usize) -> Range<usize> {
    let at = section(file, b"FRMS").start + 16 * number;
    let start = index(u64_at(file, at));
    start..start + u32_at(file, at + 8) as usize
}

fn put_crc(file: &mut [u8], of: Range<usize>, at: usize) {
    let crc = crc32c::crc32c(&file[of]);
    file[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Gives every part the checksum its bytes have now, but for frames.
pub(crate) fn seal(file: &mut [u8]) {
    put_crc(file, 0..12, 12);
    for at in directory(file).step_by(32) {
        let start = index(u64_at(file, at + 8));
        let end = start.saturating_add(index(u64_at(file, at + 16)));
        if end <= file.len() {
            put_crc(file, start..end, at + 24);
        }
    }
    let (directory, trailer) = (directory(file), file.len() - 40);
    put_crc(file, directory, trailer + 20);
    put_crc(file, trailer..trailer + 28, trailer + 28);
}

/// Gives a frame the checksum its bytes have now.
pub(crate) fn seal_frame(file: &mut [u8], number: usize) {
    let at = section(file, b"FRMS").start + 16 * number;
    put_crc(file, frame(file, number), at + 12);
}

/// Replaces the bytes of a section, whatever their number, moving nothing: they
/// go behind all others.
pub(crate) fn replace(file: &[u8], kind: &[u8; 4], bytes: &[u8]) -> Vec<u8> {
    let old = directory(file);
    let mut new = file[..old.start].to_vec();
    let start = new.len() as u64;
    new.extend(bytes);
    let directory = new.len() as u64;
    new.extend(&file[old.clone()]);
    let at = index(directory) + entry(file, kind).unwrap() - old.start;
    new[at + 8..at + 16].copy_from_slice(&start.to_le_bytes());
    new[at + 16..at + 24].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    end(file, new, directory)
}

/// Adds a section.
pub(crate) fn add(file: &[u8], kind: &[u8; 4], flags: u32, bytes: &[u8]) -> Vec<u8> {
    let old = directory(file);
    let mut new = file[..old.start].to_vec();
    let start = new.len() as u64;
    new.extend(bytes);
    let directory = new.len() as u64;
    new.extend(&file[old]);
    new.extend(kind);
    new.extend(flags.to_le_bytes());
    new.extend(start.to_le_bytes());
    new.extend((bytes.len() as u64).to_le_bytes());
    new.extend([0; 8]);
    end(file, new, directory)
}

/// The trailer of a file whose directory has moved.
fn end(old: &[u8], mut new: Vec<u8>, directory: u64) -> Vec<u8> {
    let at = new.len();
    new.extend(&old[old.len() - 40..]);
    let len = new.len() as u64;
    new[at..at + 8].copy_from_slice(&len.to_le_bytes());
    new[at + 8..at + 16].copy_from_slice(&directory.to_le_bytes());
    let sections = u32::try_from((len - 40 - directory) / 32).unwrap();
    new[at + 16..at + 20].copy_from_slice(&sections.to_le_bytes());
    seal(&mut new);
    new
}
