//! Where the bytes of an image are: in a file, or at a server.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::{Errno, ReadWriteFlags};

use crate::raw_file::open_at_once;
use crate::remote::{IndexReader, Object, ObjectUrl, RemoteOptions, is_url};

use super::error::ImageError;

/// An image whose index is being read.
#[derive(Debug)]
pub(crate) enum Source {
    File(File),
    Remote(Box<IndexReader>),
}

/// An image whose frames are read.
#[derive(Debug)]
pub(crate) enum Storage {
    File(File),
    Remote(Arc<Object>),
}

/// Tells one file or object from the others, by whatever name it was opened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    File { dev: u64, ino: u64 },
    Url(String),
}

/// What is opened: its name for people, its place, and itself.
pub(crate) struct Opened {
    pub(crate) path: PathBuf,
    pub(crate) place: Place,
    pub(crate) source: Source,
}

impl Opened {
    /// Opens a file, or what is at a URL.
    pub(crate) fn open(path: &Path, remote: &RemoteOptions) -> Result<Self, ImageError> {
        if is_url(path) {
            return Self::remote(ObjectUrl::parse(path)?, remote);
        }
        let (file, metadata) = open_at_once(path).map_err(ImageError::io("open", path))?;
        if !metadata.is_file() {
            return Err(ImageError::NotAnImage { path: path.to_owned() });
        }
        Self::file(file, path)
    }

    /// A file that is open already.
    pub(crate) fn file(file: File, path: &Path) -> Result<Self, ImageError> {
        let metadata = file.metadata().map_err(ImageError::io("read", path))?;
        let place = Place::File { dev: metadata.dev(), ino: metadata.ino() };
        Ok(Self { path: path.to_owned(), place, source: Source::File(file) })
    }

    /// What is at a URL.
    pub(crate) fn remote(url: ObjectUrl, options: &RemoteOptions) -> Result<Self, ImageError> {
        let (path, place) = (url.shown().into(), Place::Url(url.identity()));
        let source = Source::Remote(Box::new(IndexReader::open(url, options)?));
        Ok(Self { path, place, source })
    }
}

impl Source {
    /// How many bytes it has.
    pub(crate) fn len(&self, path: &Path) -> Result<u64, ImageError> {
        match self {
            Self::File(file) => Ok(file.metadata().map_err(ImageError::io("read", path))?.len()),
            Self::Remote(reader) => Ok(reader.len()),
        }
    }

    /// Says where the index is, which is up to the end.
    pub(crate) fn index_begins(&mut self, start: u64) -> Result<(), ImageError> {
        match self {
            Self::File(_) => Ok(()),
            Self::Remote(reader) => Ok(reader.index_begins(start)?),
        }
    }

    /// Reads from the header, or from the index.
    pub(crate) fn read(&self, to: &mut [u8], at: u64, path: &Path) -> Result<(), ImageError> {
        match self {
            Self::File(file) => file.read_exact_at(to, at).map_err(ImageError::io("read", path)),
            Self::Remote(reader) => reader.read(to, at, path),
        }
    }

    pub(crate) fn into_storage(self) -> Storage {
        match self {
            Self::File(file) => Storage::File(file),
            Self::Remote(reader) => Storage::Remote(Arc::new(reader.finish())),
        }
    }
}

impl Storage {
    /// Reads, and waits for it.
    pub(crate) fn read_exact_at(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(to, at),
            Self::Remote(object) => {
                let read = object.read(at..at + to.len() as u64, to);
                read.map_err(|error| io::Error::other(error.problem))
            }
        }
    }

    /// Reads if that is no more than a copy. Whether it was.
    pub(crate) fn try_read_at(&self, to: &mut [u8], at: u64) -> io::Result<bool> {
        let Self::File(file) = self else { return Ok(false) };
        let len = to.len();
        match rustix::io::preadv2(file, &mut [IoSliceMut::new(to)], at, ReadWriteFlags::NOWAIT) {
            // What is missing may not be at hand, or not there at all.
            Ok(count) => Ok(count == len),
            Err(Errno::AGAIN | Errno::INTR | Errno::OPNOTSUPP) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// How many bytes it has now.
    pub(crate) fn len(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => Ok(file.metadata()?.len()),
            Self::Remote(object) => Ok(object.len()),
        }
    }

    /// How many bytes to read at a time, by who reads all of it.
    pub(crate) fn piece_bytes(&self) -> usize {
        match self {
            Self::File(_) => 64 << 10,
            Self::Remote(_) => 2 << 20,
        }
    }

    /// The file, if it is one.
    pub(crate) fn file(&self) -> Option<&File> {
        match self {
            Self::File(file) => Some(file),
            Self::Remote(_) => None,
        }
    }

    /// The object, if it is at a server.
    pub(crate) fn object(&self) -> Option<&Arc<Object>> {
        match self {
            Self::File(_) => None,
            Self::Remote(object) => Some(object),
        }
    }
}
