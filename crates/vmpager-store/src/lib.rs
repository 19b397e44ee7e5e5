//! Where page contents come from: implementations of
//! [`vmpager_core::PageSource`].
//!
//! | type | what it reads |
//! |---|---|
//! | [`RawFile`] | a raw memory file, as VMMs write it |
//! | [`Image`](image::Image) | a packed image: no zeroes, each page once, compressed, in layers |
//! | [`MemorySource`] | bytes in this process, always at hand: tests, benchmarks |
//! | [`FaultySource`] | another source, made slow, failing or silent by a script: tests |
//!
//! [`profile`] says which of their pages to bring first.
#![forbid(unsafe_code)]

mod background;
mod buffers;
mod bytes;
mod doorbell;
mod executor;
pub mod faulty;
pub mod image;
mod memory_source;
pub mod profile;
mod queue;
pub mod raw_file;
mod readahead;
pub mod remote;
mod threads;

pub use faulty::FaultySource;
pub use memory_source::MemorySource;
pub use raw_file::{Backend, OpenError, RawFile, RawFileOptions};

/// Guest memory, sources and page caches are addressed in pages of this size.
const PAGE: u64 = 4096;

/// A number that tells bytes from others.
fn fingerprint(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    let (words, _) = hash.as_bytes().as_chunks::<8>();
    words.first().map_or(0, |word| u64::from_le_bytes(*word))
}
