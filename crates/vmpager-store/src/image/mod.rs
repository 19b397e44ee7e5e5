//! Packed images: memory contents without zero pages, each page once, compressed
//! in frames, each with a checksum that is verified before its pages are used.
//! An image may be a layer over another one. The format, byte by byte, is in
//! `docs/format.md`.
//!
//! ```text
//! page -> index: zero | as below | stored page -> frame -> read, verify, decode
//!         (in memory, all layers at once)                  (or the cache)
//! ```
//!
//! | module | what it knows |
//! |---|---|
//! | `layout` | the bytes of records |
//! | `codec` | how frames are compressed |
//! | `index` | which page is which stored page |
//! | `identity` | what contents are called |
//! | `layer`, `storage` | one file, or object at a server |
//! | `contents`, `cache` | all layers as one memory |
//! | `reader`, `decoders` | the [`PageSource`](vmpager_core::PageSource) |
//! | `pack`, `unpack`, `verify`, `inspect` | what is done with images |

mod cache;
mod codec;
mod contents;
mod decoders;
mod error;
mod identity;
mod index;
mod input;
mod inspect;
mod layer;
mod layout;
mod output;
mod pack;
mod parallel;
mod reader;
mod storage;
mod unpack;
mod verify;

use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmpager_core::{ByteRange, SourceError};

use crate::PAGE;
use crate::remote::{
    CacheDir, Fetcher, Problem, Remote, RemoteError, RemoteNumbers, RemoteOptions,
};

use self::cache::FrameCache;
use self::contents::{Contents, Placed, Tools, Wait};
use self::decoders::Decoders;
use self::index::PageIndex;
use self::layer::{Layer, ParentRef};
use self::layout::MAX_STORED;
use self::storage::{Opened, Place};

pub(crate) use self::layout::FrameRecord;

pub use self::codec::Codec;
pub use self::error::ImageError;
pub use self::identity::ContentId;
pub use self::input::MemoryInput;
pub use self::inspect::{Cell, Inspection, LayerInfo};
pub use self::pack::{PackOptions, PackReport};
pub use self::verify::{Damage, VerifyReport};

/// The size of a page, for lengths in memory.
const PAGE_BYTES: usize = 4096;

/// How far something has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of memory that are done.
    pub done_bytes: u64,
    /// Of so many.
    pub total_bytes: u64,
}

/// How to open an [`Image`].
#[derive(Clone, Debug)]
pub struct ImageOptions {
    parents: Vec<PathBuf>,
    cache_bytes: usize,
    for_many: bool,
    remote: RemoteOptions,
}

impl Default for ImageOptions {
    fn default() -> Self {
        let remote = RemoteOptions::default();
        Self { parents: Vec::new(), cache_bytes: 8 << 20, for_many: false, remote }
    }
}

impl ImageOptions {
    /// Names a file that a layer may be over. Without one, the layer below is
    /// looked for beside the layer, under the name it had when that was made.
    #[must_use]
    pub fn parent(mut self, path: impl Into<PathBuf>) -> Self {
        self.parents.push(path.into());
        self
    }

    /// Bounds the decoded frames that are kept for neighbours of the pages they
    /// were decoded for: 8 MiB by default, and never less than 16 frames.
    #[must_use]
    pub fn cache_bytes(mut self, bytes: usize) -> Self {
        self.cache_bytes = bytes;
        self
    }

    /// Keeps frames for other VMs too, also those all of whose pages were needed
    /// at once. With a cache as large as the memory, each is decoded once, however
    /// many VMs there are.
    #[must_use]
    pub fn for_many(mut self, many: bool) -> Self {
        self.for_many = many;
        self
    }

    /// How to read layers that are at servers.
    #[must_use]
    pub fn remote(mut self, remote: RemoteOptions) -> Self {
        self.remote = remote;
        self
    }

    /// Opens an image and the layers below it. What begins with `http://`, or `https://`
    /// (feature `tls`), is at a server; with `s3://`, `gs://` or `az://` (feature
    /// `object-store`), in a store.
    ///
    /// # Errors
    ///
    /// See [`ImageError`].
    pub fn open(self, path: impl AsRef<Path>) -> Result<Arc<Image>, ImageError> {
        let opened = Opened::open(path.as_ref(), &self.remote)?;
        self.open_top(opened)
    }

    /// Opens an image that is open already. `path` is what it is called, and where
    /// the layer below is looked for.
    ///
    /// # Errors
    ///
    /// See [`ImageError`].
    pub fn open_file(self, file: File, path: &Path) -> Result<Arc<Image>, ImageError> {
        let opened = Opened::file(file, path)?;
        self.open_top(opened)
    }

    fn open_top(self, top: Opened) -> Result<Arc<Image>, ImageError> {
        let mut seen = HashSet::from([top.place]);
        let path = top.path;
        let mut chain = vec![Layer::open(&path, top.source)?];
        while let Some((layer, _)) = chain.last()
            && let Some(parent) = &layer.parent
        {
            let below = self.below(layer, parent, &mut seen)?;
            chain.push(below);
        }
        chain.reverse();
        Ok(Arc::new(Image::join(&path, chain, &self)?))
    }

    /// What is beside a layer under the name that the layer below had.
    fn beside(&self, layer: &Layer, name: &str) -> Result<Option<Opened>, ImageError> {
        if name.is_empty() {
            return Ok(None);
        }
        if let Some(object) = layer.storage.object() {
            let Some(url) = object.url().beside(name) else { return Ok(None) };
            return match Opened::remote(url, &self.remote) {
                Err(ImageError::Remote(RemoteError {
                    problem: Problem::Missing { .. }, ..
                })) => Ok(None),
                opened => opened.map(Some),
            };
        }
        let path = layer.path.with_file_name(name);
        path.exists().then(|| Opened::open(&path, &self.remote)).transpose()
    }

    /// Opens the layer below one.
    fn below(
        &self,
        layer: &Layer,
        wanted: &ParentRef,
        seen: &mut HashSet<Place>,
    ) -> Result<(Layer, PageIndex), ImageError> {
        let path = || layer.path.clone();
        let given = self.parents.iter().map(|path| Opened::open(path, &self.remote).map(Some));
        let candidates = given.chain(std::iter::once_with(|| self.beside(layer, &wanted.name)));
        let mut why_not = None;
        for candidate in candidates.filter_map(Result::transpose) {
            let Opened { path: candidate, place, source } = candidate?;
            let (below, index) = Layer::open(&candidate, source)?;
            let found = ContentId(below.record.content);
            if found != wanted.content || below.record.memory_bytes != layer.record.memory_bytes {
                why_not.get_or_insert(ImageError::WrongParent {
                    path: path(),
                    parent: candidate,
                    wanted: wanted.content,
                    found,
                });
            } else if seen.insert(place) {
                return Ok((below, index));
            } else {
                why_not = Some(ImageError::Circle { path: candidate });
            }
        }
        Err(why_not.unwrap_or_else(|| ImageError::NoParent {
            path: path(),
            parent: wanted.content,
            name: wanted.name.clone(),
        }))
    }
}

/// A packed image and the layers below it, open: one memory.
///
/// Immutable, and shared by all who read it. In memory are 8 bytes for each run
/// of pages that are stored in order or are alike, 16 for each frame, and
/// [`ImageOptions::cache_bytes`] of decoded frames, whatever its size.
#[derive(Debug)]
pub struct Image {
    contents: Arc<Contents>,
    decoders: Mutex<Option<Arc<Decoders>>>,
}

impl Image {
    /// Opens an image with default options.
    ///
    /// # Errors
    ///
    /// See [`ImageError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>, ImageError> {
        ImageOptions::default().open(path)
    }

    /// Options to open an image with.
    pub fn options() -> ImageOptions {
        ImageOptions::default()
    }

    /// Puts layers together, the bottom one first.
    fn join(
        path: &Path,
        chain: Vec<(Layer, PageIndex)>,
        options: &ImageOptions,
    ) -> Result<Self, ImageError> {
        let mut index: Option<PageIndex> = None;
        let mut layers = Vec::new();
        let (mut stored, mut frames, mut largest) = (0_u32, 0_u32, 0);
        for (layer, own) in chain {
            index = Some(match index {
                Some(below) => own.over(&below, stored),
                None => own,
            });
            let (first_stored, first_frame) = (stored, frames);
            let sum = stored.checked_add(layer.record.stored_pages);
            stored = sum.filter(|sum| *sum <= MAX_STORED).ok_or_else(|| ImageError::Damaged {
                path: path.to_owned(),
                why: "its layers store more pages than 32 bits can count".into(),
            })?;
            frames += u32::try_from(layer.frames.len()).unwrap_or(u32::MAX);
            largest = largest.max(layer.record.frame_pages);
            layers.push(Placed { layer, first_stored, first_frame });
        }
        let least = 16 * largest as usize * PAGE_BYTES;
        let fetcher = fetcher(path, &layers, &options.remote)?;
        Ok(Self {
            contents: Arc::new(Contents {
                name: path.display().to_string().into(),
                layers,
                // A chain has a layer at least.
                index: index.unwrap_or_default(),
                cache: FrameCache::new(options.cache_bytes.max(least)),
                for_many: options.for_many,
                decoded: AtomicU64::new(0),
                fetcher,
            }),
            decoders: Mutex::new(None),
        })
    }

    /// Bytes of memory it has.
    pub fn memory_bytes(&self) -> u64 {
        self.contents.bytes()
    }

    /// What its contents are called.
    pub fn content(&self) -> ContentId {
        ContentId(self.contents.top().record.content)
    }

    /// Bytes of memory that were decoded so far, by all readers.
    pub fn decoded_bytes(&self) -> u64 {
        self.contents.decoded.load(Ordering::Relaxed)
    }

    /// What was asked of servers and the cache so far, if a layer is at one.
    pub fn remote_numbers(&self) -> Option<RemoteNumbers> {
        self.contents.fetcher.as_ref().map(Fetcher::numbers)
    }

    /// Its file, or URL.
    pub fn path(&self) -> &Path {
        &self.contents.top().path
    }

    /// Reads all pages of a range of bytes that begins and ends with a page,
    /// waiting for storage.
    ///
    /// # Errors
    ///
    /// If a page cannot be had, or is not what it was.
    ///
    /// # Panics
    ///
    /// If `to` is not as long as the range, or that is not within the memory.
    pub fn read(&self, range: ByteRange, to: &mut [u8]) -> Result<(), SourceError> {
        assert!(range.end() <= self.memory_bytes() && to.len() as u64 == range.len);
        let pages = page_range(range);
        self.contents.read(pages, Wait::May, &mut Tools::new(), to).map(|_| ())
    }
}

/// The pages of a range of bytes within an image, whose pages 32 bits count.
fn page_range(range: ByteRange) -> Range<u32> {
    let page = |bytes: u64| u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
    page(range.start)..page(range.end().next_multiple_of(PAGE))
}

/// What gets the frames of the layers that are at servers, if there are any.
fn fetcher(
    path: &Path,
    layers: &[Placed],
    options: &RemoteOptions,
) -> Result<Option<Fetcher>, ImageError> {
    let is_remote = |placed: &&Placed| placed.layer.storage.object().is_some();
    if !layers.iter().any(|placed| is_remote(&placed)) {
        return Ok(None);
    }
    let cache = match &options.cache {
        None => None,
        Some((dir, bytes)) => {
            let opened = CacheDir::open(dir, *bytes, &options.counters);
            Some((dir, opened.map_err(ImageError::io("keep a cache in", dir))?))
        }
    };
    let mut remotes = Vec::new();
    for placed in layers {
        let Some(object) = placed.layer.storage.object() else { continue };
        let mut file = None;
        if let (Some((dir, cache)), Some(index)) = (&cache, object.index()) {
            let opened = cache.image(&index.hash, object.len());
            file = Some(Arc::new(opened.map_err(ImageError::io("keep a cache in", dir))?));
        }
        remotes.push(Remote {
            object: Arc::clone(object),
            frames: Arc::clone(&placed.layer.frames),
            first_frame: placed.first_frame,
            cache: file,
        });
    }
    let fetcher = Fetcher::spawn(remotes, options);
    Ok(Some(fetcher.map_err(ImageError::io("start the threads that fetch", path))?))
}
