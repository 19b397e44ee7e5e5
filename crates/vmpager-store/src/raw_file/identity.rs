//! Whether a file is still the one that was opened.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vmpager_core::{ByteRange, SourceError};

/// What changes when somebody writes to a file or cuts it short. (Its inode
/// cannot: the descriptor holds it.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) len: u64,
    mtime: (i64, i64),
}

impl Identity {
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let mtime = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Self { len: metadata.len(), mtime })
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
