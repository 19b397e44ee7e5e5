//! Memory to be packed: a raw file, or an image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmpager_core::ByteRange;

use crate::PAGE;
use crate::profile::MemoryIdentity;
use crate::raw_file::{Holes, Identity, open_raw};
use crate::remote::RemoteNumbers;

use super::contents::{Tools, Wait};
use super::error::ImageError;
use super::index::Kind;
use super::layout::MAX_STORED;
use super::{ContentId, Image, page_range};

/// Memory that can be packed, or be made a layer of.
#[derive(Debug)]
pub struct MemoryInput(Input);

#[derive(Debug)]
enum Input {
    Raw { path: PathBuf, file: File, identity: Identity },
    Image(Arc<Image>),
}

impl MemoryInput {
    /// A raw memory file: byte `n` of it is byte `n` of memory.
    ///
    /// # Errors
    ///
    /// See [`OpenError`](crate::OpenError), and [`ImageError::MemoryLength`].
    pub fn raw(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let path = path.as_ref();
        let file = open_raw(path)?;
        let identity = Identity::of(&file).map_err(ImageError::io("read", path))?;
        if identity.len / PAGE > MAX_STORED.into() {
            let path = path.to_owned();
            return Err(ImageError::MemoryLength { path, len: identity.len });
        }
        Ok(Self(Input::Raw { path: path.to_owned(), file, identity }))
    }

    /// The contents of an image and of the layers below it.
    pub fn image(image: Arc<Image>) -> Self {
        Self(Input::Image(image))
    }

    /// Where it comes from.
    pub fn path(&self) -> &Path {
        match &self.0 {
            Input::Raw { path, .. } => path,
            Input::Image(image) => image.path(),
        }
    }

    /// What was asked of servers so far, if it is an image at one.
    pub fn remote_numbers(&self) -> Option<RemoteNumbers> {
        match &self.0 {
            Input::Raw { .. } => None,
            Input::Image(image) => image.remote_numbers(),
        }
    }

    /// Bytes of memory.
    pub fn memory_bytes(&self) -> u64 {
        match &self.0 {
            Input::Raw { identity, .. } => identity.len,
            Input::Image(image) => image.memory_bytes(),
        }
    }

    /// What an image calls its contents; nothing of a raw file.
    pub(crate) fn content(&self) -> Option<ContentId> {
        match &self.0 {
            Input::Raw { .. } => None,
            Input::Image(image) => Some(image.content()),
        }
    }

    /// What it is told apart by. Reads 64 pages.
    ///
    /// # Errors
    ///
    /// If they cannot be read.
    pub fn identity(&self) -> Result<MemoryIdentity, ImageError> {
        if let Input::Raw { file, .. } = &self.0 {
            // Read ahead of each page would read much of a cold file. It is only
            // advice.
            let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Random);
        }
        let content = self.content();
        let mut tools = Tools::new();
        let identity = MemoryIdentity::sample(self.memory_bytes(), content, |page, to| {
            self.read(page..page + 1, &mut tools, to)
        });
        if let Input::Raw { file, .. } = &self.0 {
            let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Normal);
        }
        identity
    }

    /// The pages that are not known to be zeroes, in ascending order.
    pub(crate) fn data(&self) -> Vec<Range<u32>> {
        let mut data: Vec<Range<u32>> = Vec::new();
        match &self.0 {
            Input::Raw { file, identity, .. } => {
                let all = page_range(ByteRange::new(0, identity.len));
                let mut at = all.start;
                for hole in Holes::find(file, identity.len).iter().map(page_range) {
                    data.push(at..hole.start);
                    at = hole.end;
                }
                data.push(at..all.end);
                data.retain(|range| !range.is_empty());
            }
            Input::Image(image) => {
                let spans = image.contents.index.spans();
                for span in spans.filter(|span| span.kind != Kind::Zero) {
                    match data.last_mut() {
                        Some(last) if last.end == span.first => last.end = span.pages().end,
                        _ => data.push(span.pages()),
                    }
                }
            }
        }
        data
    }

    /// Reads pages into `to`, which has room for just them.
    pub(crate) fn read(
        &self,
        pages: Range<u32>,
        tools: &mut Tools,
        to: &mut [u8],
    ) -> Result<(), ImageError> {
        match &self.0 {
            Input::Raw { path, file, .. } => {
                let at = u64::from(pages.start) * PAGE;
                match file.read_exact_at(to, at) {
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        Err(ImageError::InputChanged { path: path.clone() })
                    }
                    result => result.map_err(ImageError::io("read", path)),
                }
            }
            Input::Image(image) => {
                image.contents.read(pages, Wait::May, tools, to)?;
                Ok(())
            }
        }
    }

    /// Whether it is still what it was when it was opened.
    pub(crate) fn check_unchanged(&self) -> Result<(), ImageError> {
        let Input::Raw { path, file, identity } = &self.0 else { return Ok(()) };
        let now = Identity::of(file).map_err(ImageError::io("read", path))?;
        if now == *identity { Ok(()) } else { Err(ImageError::InputChanged { path: path.clone() }) }
    }
}
