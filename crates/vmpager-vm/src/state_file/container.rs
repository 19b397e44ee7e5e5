//! What is around the body: version and checksum.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The version this program writes, and the only one it reads.
const VERSION: u64 = 3;

/// No state file is longer: 64 vCPUs of 256 KiB, and 8 bytes for the checksum of
/// each 2 MiB of the largest memory that is saved.
pub const MAX_STATE_BYTES: usize = 24 << 20;

/// No memory file is longer.
pub(crate) const MAX_MEMORY_BYTES: u64 = 1 << 40;

/// Why some bytes are no state of a VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// More than any state file has.
    #[error("it has more than {MAX_STATE_BYTES} bytes; is it a memory file?")]
    TooLong,
    /// Not the fields that every version has.
    #[error("it is cut short, or no state file: {0}")]
    Form(String),
    /// Another version.
    #[error(
        "version is {0}, this program reads version {VERSION}; take the snapshot again with this \
         program"
    )]
    Version(u64),
    /// The body is not the one that was written.
    #[error(
        "crc32c is {stated}, but that of its body is {actual}: it was changed or damaged; use a \
         good copy, or take the snapshot again"
    )]
    Checksum {
        /// In the file.
        stated: String,
        /// Of the file.
        actual: String,
    },
    /// A field of the body is missing, not known, not of its type, or does not
    /// fit others.
    #[error("{field}: {problem}")]
    Field {
        /// Its path in the body.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl StateError {
    pub(crate) fn field(field: impl Into<String>, problem: String) -> Self {
        Self::Field { field: field.into(), problem }
    }
}

/// What every version has.
#[derive(Deserialize)]
struct AnyVersion {
    version: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Container<'a> {
    version: u64,
    crc32c: String,
    #[serde(borrow)]
    body: &'a RawValue,
}

fn checksum(body: &RawValue) -> String {
    format!("{:#010x}", crc32c::crc32c(body.get().as_bytes()))
}

/// A state file with that body.
pub(super) fn seal(body: &impl Serialize) -> Vec<u8> {
    let text = serde_json::to_string_pretty(body).expect("plain fields always serialize");
    let body = RawValue::from_string(text).expect("what was just serialized is JSON");
    let container = Container { version: VERSION, crc32c: checksum(&body), body: &body };
    let mut file = serde_json::to_vec_pretty(&container).expect("plain fields always serialize");
    file.push(b'\n');
    file
}

/// The body of a state file.
pub(super) fn open<T: DeserializeOwned>(file: &[u8]) -> Result<T, StateError> {
    if file.len() > MAX_STATE_BYTES {
        return Err(StateError::TooLong);
    }
    let form = |error: serde_json::Error| StateError::Form(error.to_string());
    // First by itself: the fields of another version are none of our business.
    let AnyVersion { version } = serde_json::from_slice(file).map_err(form)?;
    if version != VERSION {
        return Err(StateError::Version(version));
    }
    let Container { crc32c: stated, body, .. } = serde_json::from_slice(file).map_err(form)?;
    let actual = checksum(body);
    if stated != actual {
        return Err(StateError::Checksum { stated, actual });
    }
    let mut body = serde_json::Deserializer::from_str(body.get());
    serde_path_to_error::deserialize(&mut body)
        .map_err(|error| StateError::field(error.path().to_string(), error.inner().to_string()))
}
