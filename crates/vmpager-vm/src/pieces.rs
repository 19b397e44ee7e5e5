//! The memory file's checksums: one for each 2 MiB of it, its last piece being as
//! long as is left.
//!
//! A checksum is the CRC-32C of all bytes of its piece, so that it is the same
//! wherever the file system keeps holes. What is a hole is known to be zeroes:
//! it is summed up without being read.

use std::io;
use std::ops::Range;
use std::sync::LazyLock;

use crc32c::{crc32c_append, crc32c_combine};

use crate::device::to_usize;
use crate::parallel::in_parallel;

/// Bytes that share a checksum.
pub(crate) const PIECE_BYTES: u64 = 2 << 20;

/// Bytes brought at a time: they are summed up while the processor's cache has
/// them.
const CHUNK_BYTES: u64 = 256 << 10;

/// How many checksums memory of that size has.
pub(crate) fn pieces(memory_bytes: u64) -> u64 {
    memory_bytes.div_ceil(PIECE_BYTES)
}

/// Where a piece of such memory lies.
pub(crate) fn piece(number: u64, memory_bytes: u64) -> Range<u64> {
    let start = number * PIECE_BYTES;
    start..memory_bytes.min(start + PIECE_BYTES)
}

/// The checksums of memory whose bytes outside `data` (ascending) are zero.
/// `bring` gets the others, in chunks of whole pages where `data` has whole
/// pages: it fills the buffer with what is at that offset. It runs on several
/// threads, with the chunks of one piece in order.
///
/// # Errors
///
/// The first of `bring`.
pub(crate) fn checksums(
    memory_bytes: u64,
    data: &[Range<u64>],
    bring: impl Fn(u64, &mut [u8]) -> io::Result<()> + Sync,
) -> io::Result<Vec<u32>> {
    let parts = in_parallel(0..pieces(memory_bytes), |part| {
        let mut buffer = vec![0; to_usize(CHUNK_BYTES)];
        let checksum = |number| {
            let piece = piece(number, memory_bytes);
            let (mut crc, mut at) = (0, piece.start);
            for chunk in chunks(data, &piece) {
                let bytes = &mut buffer[..to_usize(chunk.end - chunk.start)];
                bring(chunk.start, bytes)?;
                crc = crc32c_append(append_zeroes(crc, chunk.start - at), bytes);
                at = chunk.end;
            }
            Ok(append_zeroes(crc, piece.end - at))
        };
        part.map(checksum).collect::<io::Result<Vec<u32>>>()
    });
    Ok(parts.into_iter().collect::<io::Result<Vec<_>>>()?.concat())
}

/// The data within a piece, cut into chunks.
fn chunks<'a>(data: &'a [Range<u64>], piece: &Range<u64>) -> impl Iterator<Item = Range<u64>> + 'a {
    let Range { start, end } = *piece;
    let first = data.partition_point(|range| range.end <= start);
    let within = data[first..].iter().take_while(move |range| range.start < end);
    within.flat_map(move |range| {
        let (first, end) = (range.start.max(start), range.end.min(end));
        let step = to_usize(CHUNK_BYTES);
        (first..end).step_by(step).map(move |at| at..end.min(at + CHUNK_BYTES))
    })
}

/// The checksum of what has the checksum `crc`, and that many zeroes after it.
fn append_zeroes(crc: u32, count: u64) -> u32 {
    static FEW: [u8; 64 << 10] = [0; 64 << 10];
    static PIECE: LazyLock<u32> = LazyLock::new(|| combine_zeroes(0, PIECE_BYTES));
    if (crc, count) == (0, PIECE_BYTES) {
        return *PIECE;
    }
    // Combining takes as long as it takes to sum up about so many.
    match FEW.get(..to_usize(count)) {
        Some(zeroes) => crc32c_append(crc, zeroes),
        None => combine_zeroes(crc, count),
    }
}

/// CRC-32C inverts its register before and after; in between, zeroes after a
/// register's bits are all that combining with an empty one adds.
fn combine_zeroes(crc: u32, count: u64) -> u32 {
    !crc32c_combine(!crc, 0, to_usize(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is left out as a hole, in order and out of alignment.
    #[test]
    fn a_checksum_is_that_of_all_bytes_of_its_piece_holes_included() {
        let len = to_usize(2 * PIECE_BYTES + 12_345);
        let mib = 1 << 20;
        let data = [0..1, 4096..8192, mib..3 * mib - 7, 3 * mib + 5..4 * mib + 1];
        let mut memory = vec![0; len];
        for range in data.clone() {
            for at in range {
                memory[at] = u8::try_from(at % 251).unwrap();
            }
        }
        let expected: Vec<u32> = memory.chunks(to_usize(PIECE_BYTES)).map(crc32c::crc32c).collect();
        let bring = |offset, chunk: &mut [u8]| {
            let offset = to_usize(offset);
            chunk.copy_from_slice(&memory[offset..offset + chunk.len()]);
            Ok(())
        };
        let ranges = data.map(|range| range.start as u64..range.end as u64);
        let all = 0..len as u64;
        for data in [&ranges[..], std::slice::from_ref(&all)] {
            assert_eq!(checksums(len as u64, data, bring).unwrap(), expected);
        }
        let nothing = checksums(len as u64, &[], |_, _| unreachable!("all is a hole")).unwrap();
        let zeroes = vec![0; len];
        let zeroes: Vec<u32> = zeroes.chunks(to_usize(PIECE_BYTES)).map(crc32c::crc32c).collect();
        assert_eq!(nothing, zeroes);
    }

    #[test]
    fn an_error_in_any_piece_is_told() {
        let bring = |offset, _: &mut [u8]| match offset {
            PIECE_BYTES => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        };
        let end = 4 * PIECE_BYTES;
        let error = checksums(end, std::slice::from_ref(&(0..end)), bring).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
