//! Opening a raw memory file: what is refused, and what is found out once.

use std::fs::{File, Metadata};
use std::io;
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};

use crate::PAGE;

/// Why a file cannot serve as raw guest memory.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened for reading.
    #[error(
        "cannot open memory file {}: {error}; check that it exists and that this user may read it",
        path.display()
    )]
    Open {
        /// The path given.
        path: PathBuf,
        /// The system's own words.
        error: io::Error,
    },
    /// It is not a regular file.
    #[error("{} is {kind}; give the regular file the VMM wrote guest memory to", path.display())]
    NotRegular {
        /// The path given.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// It has no bytes.
    #[error("memory file {} is empty; was the snapshot written to its end?", path.display())]
    Empty {
        /// The path given.
        path: PathBuf,
    },
    /// Its length is not a whole number of pages.
    #[error(
        "memory file {} has {len} bytes, which is not a multiple of 4096: it was cut short, or is \
         not raw guest memory (the VMM's state file?)",
        path.display()
    )]
    Length {
        /// The path given.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
}

/// Opens a file for reading, and tells what it is. Never waits for a writer,
/// whatever the path names.
pub(crate) fn open_at_once(path: &Path) -> io::Result<(File, Metadata)> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    // NONBLOCK was for pipes and devices; some kernels' io_uring would take it
    // for "fail rather than wait".
    rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
    Ok((file, metadata))
}

/// Opens a regular file of whole pages for reading.
pub(crate) fn open(path: &Path) -> Result<File, OpenError> {
    let (file, metadata) =
        open_at_once(path).map_err(|error| OpenError::Open { path: path.to_owned(), error })?;
    if !metadata.is_file() {
        let kind = kind_of(metadata.file_type());
        return Err(OpenError::NotRegular { path: path.to_owned(), kind });
    }
    if metadata.len() == 0 {
        return Err(OpenError::Empty { path: path.to_owned() });
    }
    if !metadata.len().is_multiple_of(PAGE) {
        return Err(OpenError::Length { path: path.to_owned(), len: metadata.len() });
    }
    Ok(file)
}

fn kind_of(file_type: std::fs::FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_block_device() {
        "a block device"
    } else if file_type.is_char_device() {
        "a character device"
    } else if file_type.is_fifo() {
        "a pipe"
    } else {
        "not a file"
    }
}

/// What reading without waiting takes on the file's file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Memory (tmpfs, ramfs): every read is at hand.
    Memory,
    /// preadv2(2) with RWF_NOWAIT reads what is at hand.
    Nowait,
    /// Every read may wait.
    Waits,
}

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

impl Storage {
    /// The storage of a file, and whether it can be mapped in base pages.
    pub(crate) fn of(file: &File) -> (Self, bool) {
        let magic = rustix::fs::fstatfs(file)
            .ok()
            .and_then(|statfs| u64::try_from(statfs.f_type).ok())
            .unwrap_or(0);
        match magic {
            TMPFS_MAGIC | RAMFS_MAGIC => (Self::Memory, true),
            HUGETLBFS_MAGIC => (Self::Memory, false),
            _ if takes_nowait(file) => (Self::Nowait, true),
            _ => (Self::Waits, true),
        }
    }
}

fn takes_nowait(file: &File) -> bool {
    let mut byte = [0];
    let mut bufs = [IoSliceMut::new(&mut byte)];
    let result = rustix::io::preadv2(file, &mut bufs, 0, ReadWriteFlags::NOWAIT);
    matches!(result, Ok(_) | Err(Errno::AGAIN))
}

/// Whether mincore(2) tells this process the truth about a file: only its
/// owner and those who may write it hear it. Asked once, at opening.
pub(crate) fn residency_is_known(file: &File) -> bool {
    let owner = file.metadata().is_ok_and(|m| m.uid() == rustix::process::geteuid().as_raw());
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    owner || rustix::fs::accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
}
