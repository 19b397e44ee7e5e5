//! Writes the contents of an image to a raw memory file.

use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::PAGE_BYTES;
use crate::PAGE;

use super::contents::{Tools, Wait};
use super::error::ImageError;
use super::index::{Kind, Span};
use super::output::Output;
use super::pack::blocks_of;
use super::parallel;
use super::{Image, Progress};

impl Image {
    /// Writes its contents to a raw memory file with holes where it is zero, by
    /// some threads. `replace` lets that take the place of a file of its name.
    ///
    /// # Errors
    ///
    /// See [`ImageError`]. Whatever it is, no part of a file is left behind.
    pub fn unpack(
        &self,
        to: &Path,
        replace: bool,
        threads: usize,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        let output = Output::create(to, replace)?;
        let file = output.file();
        file.set_len(self.memory_bytes()).map_err(|error| output.failed(error))?;
        let data = || self.contents.index.spans().filter(|span| span.kind != Kind::Zero);
        let total_bytes = data().map(|span| u64::from(span.count) * PAGE).sum();
        let mut done_bytes = 0;
        parallel::for_each(
            threads.max(1),
            data().flat_map(|span: Span| blocks_of(span.pages())),
            || (Tools::new(), Vec::new()),
            |(tools, bytes), pages| {
                bytes.resize(pages.len() * PAGE_BYTES, 0);
                let at = u64::from(pages.start) * PAGE;
                self.contents.read(pages, Wait::May, tools, bytes)?;
                file.write_all_at(bytes, at).map_err(|error| output.failed(error))?;
                Ok(bytes.len() as u64)
            },
            |bytes| {
                done_bytes += bytes;
                match progress(Progress { done_bytes, total_bytes }) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(ImageError::Interrupted),
                }
            },
        )?;
        output.finish()
    }
}
