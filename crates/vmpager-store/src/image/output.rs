//! A file that is there whole, or not at all.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::error::ImageError;

/// A file under another name beside its own. Removed if dropped before it is
/// finished.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
    file: NamedTempFile,
    replace: bool,
}

impl Output {
    /// Makes it. Refuses a name that is taken, unless it may `replace`.
    pub(crate) fn create(path: &Path, replace: bool) -> Result<Self, ImageError> {
        if !replace && path.symlink_metadata().is_ok() {
            return Err(ImageError::Exists { path: path.to_owned() });
        }
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let file = tempfile::Builder::new()
            .prefix(".vmpager-")
            // As any other file: what the user's mask leaves.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(dir.unwrap_or(Path::new(".")))
            .map_err(ImageError::io("make a file beside", path))?;
        Ok(Self { path: path.to_owned(), file, replace })
    }

    pub(crate) fn file(&self) -> &File {
        self.file.as_file()
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.file.as_file_mut().write_all(bytes).map_err(|error| self.failed(error))
    }

    pub(crate) fn failed(&self, error: io::Error) -> ImageError {
        ImageError::Io { what: "write", path: self.path.clone(), error }
    }

    /// Gives the file its name, once its bytes are on storage.
    pub(crate) fn finish(self) -> Result<(), ImageError> {
        let Self { path, file, replace } = self;
        let failed = |error| ImageError::Io { what: "write", path: path.clone(), error };
        file.as_file().sync_all().map_err(failed)?;
        let done = if replace { file.persist(&path) } else { file.persist_noclobber(&path) };
        match done {
            Ok(_) => Ok(()),
            Err(refused) if refused.error.kind() == io::ErrorKind::AlreadyExists => {
                Err(ImageError::Exists { path })
            }
            Err(refused) => Err(failed(refused.error)),
        }
    }
}
