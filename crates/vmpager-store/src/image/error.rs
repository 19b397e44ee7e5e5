//! What can be wrong with an image, or with making one.

use std::io;
use std::path::PathBuf;

use super::ContentId;

/// Why an image cannot be opened, read or made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The system refused or failed.
    #[error("cannot {what} {}: {error}", path.display())]
    Io {
        /// What was tried, as in "read" or "write".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's own words.
        error: io::Error,
    },
    /// The file does not begin as an image does.
    #[error(
        "{} is no packed image (its first bytes are not those of one); make one with \
         `vmpager image pack`",
        path.display()
    )]
    NotAnImage {
        /// The file.
        path: PathBuf,
    },
    /// A version of the format this program does not know.
    #[error(
        "{} has version {version} of the image format, and this program reads version 1; use the \
         vmpager that made it, or a newer one",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version it has.
        version: u16,
    },
    /// Something this program must know to read the image right.
    #[error(
        "{} needs a feature this program does not know (section {kind:?}); use a newer vmpager",
        path.display()
    )]
    UnknownFeature {
        /// The file.
        path: PathBuf,
        /// The kind of the section that says so.
        kind: String,
    },
    /// The file is shorter or longer than it was made.
    #[error(
        "{} is cut short or has grown: {why}; copy it again from where it was made",
        path.display()
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// What shows it.
        why: String,
    },
    /// Some of its bytes are not those that were written.
    #[error("{} is damaged: {why}; copy it again from where it was made", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        why: String,
    },
    /// An image lacks the layer below.
    #[error(
        "{} is a layer over image {parent}, and there is no {name:?} beside it; name that image \
         with --parent",
        path.display()
    )]
    NoParent {
        /// The layer.
        path: PathBuf,
        /// Identity of the contents below.
        parent: ContentId,
        /// The name of its file when the layer was made.
        name: String,
    },
    /// An image is not the layer below that another was made over.
    #[error(
        "{} is a layer over image {wanted}, and {} is image {found}; give the image the layer was \
         made from",
        path.display(),
        parent.display()
    )]
    WrongParent {
        /// The layer.
        path: PathBuf,
        /// What is no parent of it.
        parent: PathBuf,
        /// Identity of the contents below.
        wanted: ContentId,
        /// Identity of what was found.
        found: ContentId,
    },
    /// An image is its own parent, directly or not.
    #[error("{} is below itself: the layers form a circle", path.display())]
    Circle {
        /// The file that came twice.
        path: PathBuf,
    },
    /// The output is there already.
    #[error("{} exists; give --force to replace it", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// An image at a server cannot be had.
    #[error(transparent)]
    Remote(#[from] crate::remote::RemoteError),
    /// A raw memory file cannot be opened.
    #[error(transparent)]
    Raw(#[from] crate::OpenError),
    /// Pages of an image cannot be had.
    #[error(transparent)]
    Source(#[from] vmpager_core::SourceError),
    /// A raw memory file was written to meanwhile.
    #[error("{} changed while it was read; pack a file that nobody writes to", path.display())]
    InputChanged {
        /// The file.
        path: PathBuf,
    },
    /// What shall be packed has no size an image can have.
    #[error(
        "{} has {len} bytes; an image holds 1 to 2^32 - 16 pages of 4096 bytes, whole ones",
        path.display()
    )]
    MemoryLength {
        /// The input.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// Two memories that must have one size do not.
    #[error(
        "{} has {base} bytes of memory and {} has {new}; a layer has the size of what is below",
        base_path.display(),
        new_path.display()
    )]
    Sizes {
        /// The image below.
        base_path: PathBuf,
        /// Its memory.
        base: u64,
        /// The memory to be made a layer of.
        new_path: PathBuf,
        /// Its length.
        new: u64,
    },
    /// An option with a value that makes no sense.
    #[error("{option} {value}: {remedy}")]
    Option {
        /// Which.
        option: &'static str,
        /// Its value.
        value: String,
        /// What would do.
        remedy: &'static str,
    },
    /// The caller asked to stop.
    #[error("interrupted; nothing was left behind")]
    Interrupted,
}

impl ImageError {
    /// For `map_err`: this was tried with that file.
    pub(crate) fn io(what: &'static str, path: &std::path::Path) -> impl Fn(io::Error) -> Self {
        move |error| Self::Io { what, path: path.to_owned(), error }
    }
}
