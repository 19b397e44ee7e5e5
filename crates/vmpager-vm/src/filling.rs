//! Where the contents of the built-in guest's memory come from.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmpager_sys::memory::Mapping;

use crate::contents::{Contents, Kind};
use crate::device::to_usize;
use crate::error::VmError;
use crate::layout::Layout;
use crate::parallel::in_parallel;
use crate::{PAGE_BYTES, PAGE_SIZE};

/// What a guest's memory holds beside the guest's own structures. Memory that is
/// left is never touched, and a hole of the memory file.
#[derive(Clone, Debug)]
pub enum Filling {
    /// Pages generated from a seed.
    Generated {
        /// Decides the contents.
        seed: u64,
        /// How much: a multiple of the page size; all memory if `None`.
        bytes: Option<u64>,
    },
    /// The bytes of a file, such as the memory file of another guest.
    File(PathBuf),
}

impl Filling {
    /// How many pages of contents there are, if not as many as fit.
    pub(crate) fn pages(&self) -> Result<Option<u64>, VmError> {
        let bytes = match self {
            Self::Generated { bytes: None, .. } => return Ok(None),
            Self::Generated { bytes: Some(bytes), .. } => *bytes,
            Self::File(path) => std::fs::metadata(path).map_err(VmError::file("read", path))?.len(),
        };
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(VmError::Config {
                field: "bytes of contents",
                value: bytes,
                remedy: "use a multiple of the page size, 4096 bytes",
            });
        }
        Ok(Some(bytes / PAGE_SIZE))
    }

    /// Writes the contents into fresh memory, but not its zero pages. Returns
    /// the seed they were generated from.
    pub(crate) fn fill(&self, memory: &Mapping, layout: &Layout) -> Result<Option<u64>, VmError> {
        match self {
            Self::Generated { seed, .. } => {
                generate(*seed, memory, layout);
                Ok(Some(*seed))
            }
            Self::File(path) => {
                copy(path, memory, layout)?;
                Ok(None)
            }
        }
    }
}

fn generate(seed: u64, memory: &Mapping, layout: &Layout) {
    let contents = Contents::new(seed);
    in_parallel(layout.contents(), |part| {
        let mut bytes = [0; PAGE_BYTES];
        for page in part.filter(|page| contents.kind(*page) != Kind::Zero) {
            contents.fill(page, &mut bytes);
            memory.write(to_usize(page) * PAGE_BYTES, &bytes);
        }
    });
}

fn copy(path: &Path, memory: &Mapping, layout: &Layout) -> Result<(), VmError> {
    let file = File::open(path).map_err(VmError::file("open", path))?;
    let copied: std::io::Result<()> = in_parallel(layout.contents(), |part| {
        let mut bytes = [0; PAGE_BYTES];
        for page in part {
            file.read_exact_at(&mut bytes, (page - layout.first) * PAGE_SIZE)?;
            if bytes != [0; PAGE_BYTES] {
                memory.write(to_usize(page) * PAGE_BYTES, &bytes);
            }
        }
        Ok(())
    })
    .into_iter()
    .collect();
    copied.map_err(VmError::file("read", path))
}
