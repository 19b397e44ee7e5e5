//! Whether a file is still the one that was opened.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vmpager_core::{ByteRange, SourceError};

use crate::fingerprint;

/// What changes when somebody writes to a file or cuts it short, and which file
/// it is (which cannot change: the descriptor holds it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) len: u64,
    mtime: (i64, i64),
    inode: (u64, u64),
}

impl Identity {
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let mtime = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Self { len: metadata.len(), mtime, inode: (metadata.dev(), metadata.ino()) })
    }

    /// A number that tells it from others.
    pub(crate) fn fingerprint(self) -> u64 {
        let [seconds, nanos] = [self.mtime.0, self.mtime.1].map(i64::cast_unsigned);
        let words = [self.len, seconds, nanos, self.inode.0, self.inode.1];
        fingerprint(words.map(u64::to_le_bytes).as_flattened())
    }

    /// What is wrong with a range of the file that was `self` and is `now`.
    pub(crate) fn judge(
        self,
        now: Self,
        name: &Arc<str>,
        range: ByteRange,
    ) -> Result<(), SourceError> {
        if range.end() > now.len {
            Err(SourceError::Truncated { name: Arc::clone(name), range, len: now.len })
        } else if now != self {
            Err(SourceError::Changed { name: Arc::clone(name) })
        } else {
            Ok(())
        }
    }
}
