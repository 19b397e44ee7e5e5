//! Checksums as one text of eight hexadecimal digits each. Large memory has thousands,
//! and a VM is not to start later for reading them one by one.

use serde::de::Error as _;
use serde::{Deserializer, Serializer};

pub(super) fn serialize<S: Serializer>(checksums: &[u32], to: S) -> Result<S::Ok, S::Error> {
    let bytes: Vec<u8> = checksums.iter().flat_map(|sum| sum.to_be_bytes()).collect();
    hex::serde::serialize(bytes, to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u32>, D::Error> {
    let bytes: Vec<u8> = hex::serde::deserialize(from)?;
    let (checksums, rest) = bytes.as_chunks();
    if !rest.is_empty() {
        return Err(D::Error::custom(format!("{} bytes are not checksums of 4", bytes.len())));
    }
    Ok(checksums.iter().map(|&sum| u32::from_be_bytes(sum)).collect())
}
