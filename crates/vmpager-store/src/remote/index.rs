//! Reading the index of an image at a server: its last bytes with one request, and
//! with a second one what they do not hold.

use std::path::Path;

use crate::image::ImageError;

use super::RemoteOptions;
use super::error::{Problem, RemoteError};
use super::object::{IndexId, Object};
use super::url::ObjectUrl;

/// Bytes at the end to begin with: the index of 1 GiB and more.
const TAIL: u64 = 512 << 10;
/// Asked for at a time: what a server does not send is not allocated.
const PIECE: u64 = 16 << 20;

/// An object while its index is read.
#[derive(Debug)]
pub(crate) struct IndexReader {
    object: Object,
    head: [u8; 16],
    tail: Vec<u8>,
    tail_start: u64,
}

impl IndexReader {
    pub(crate) fn open(url: ObjectUrl, options: &RemoteOptions) -> Result<Self, RemoteError> {
        let mut head = [0; 16];
        let object = Object::open(url, options, &mut head)?;
        let tail_start = object.len().saturating_sub(TAIL);
        let mut reader = Self { tail_start: object.len(), tail: Vec::new(), head, object };
        reader.reach(tail_start)?;
        Ok(reader)
    }

    pub(crate) fn len(&self) -> u64 {
        self.object.len()
    }

    /// Reads what is missing from `start` to the end.
    fn reach(&mut self, start: u64) -> Result<(), RemoteError> {
        if start >= self.tail_start {
            return Ok(());
        }
        let mut bytes = Vec::new();
        let mut at = start;
        while at < self.tail_start {
            let end = self.tail_start.min(at + PIECE);
            let (from, len) = (bytes.len(), usize::try_from(end - at).unwrap_or(usize::MAX));
            let room = bytes.try_reserve(len + self.tail.len());
            room.map_err(|_| {
                let what = format!("its index has {} bytes", self.len() - start);
                self.object.error(Problem::Wrong { what })
            })?;
            bytes.resize(from + len, 0);
            self.object.read(at..end, &mut bytes[from..])?;
            at = end;
        }
        bytes.append(&mut self.tail);
        (self.tail, self.tail_start) = (bytes, start);
        Ok(())
    }

    /// Says where the index is, which is up to the end.
    pub(crate) fn index_begins(&mut self, start: u64) -> Result<(), ImageError> {
        self.reach(start)?;
        let tail = &self.tail[offset(start - self.tail_start)..];
        let hash = *blake3::hash(tail).as_bytes();
        self.object.set_index(IndexId { bytes: start..self.len(), hash });
        Ok(())
    }

    /// Reads from its beginning, or from the index.
    pub(crate) fn read(&self, to: &mut [u8], at: u64, path: &Path) -> Result<(), ImageError> {
        let from = |bytes: &[u8], start: u64| {
            let part = offset(at.checked_sub(start)?);
            Some(bytes.get(part..part.checked_add(to.len())?)?.to_vec())
        };
        let Some(bytes) = from(&self.head, 0).or_else(|| from(&self.tail, self.tail_start)) else {
            let why = format!("bytes {at:#x} and on are no part of its index");
            return Err(ImageError::Damaged { path: path.to_owned(), why });
        };
        to.copy_from_slice(&bytes);
        Ok(())
    }

    /// The object, its index read.
    pub(crate) fn finish(self) -> Object {
        self.object
    }
}

fn offset(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
