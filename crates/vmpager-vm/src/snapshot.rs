//! A saved VM: a state file and a memory file beside it, sparse, byte
//! `n` of the file being gpa `n`.
//!
//! Both are written under another name, synced, and renamed when complete. The
//! old state goes first and the new one comes last, so that whoever finds a
//! state file finds its memory. A running VM keeps the memory file it was
//! restored from: it is replaced, never written to.

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmpager_sys::memory::Mapping;

use crate::device::to_usize;
use crate::error::VmError;
use crate::memory::GuestMemory;
use crate::parallel::in_parallel;
use crate::state_file::{Guest, MAX_STATE_BYTES, VmState};
use crate::{PAGE_BYTES, PAGE_SIZE};

/// The two files of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotPaths {
    /// Registers and layout.
    pub state: PathBuf,
    /// The bytes of guest memory.
    pub memory: PathBuf,
}

impl SnapshotPaths {
    /// `state.json` and `memory.raw` in a directory.
    pub fn in_dir(dir: impl AsRef<Path>) -> Self {
        let dir = dir.as_ref();
        Self { state: dir.join("state.json"), memory: dir.join("memory.raw") }
    }
}

/// A snapshot whose state was read and found consistent with its memory file.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub(crate) paths: SnapshotPaths,
    pub(crate) state: VmState,
}

impl Snapshot {
    /// Reads the state file and checks the memory file against it.
    ///
    /// # Errors
    ///
    /// [`VmError::State`], naming the field, if the state file is truncated, of
    /// another version or contradicts itself; [`VmError::MemorySize`] if the
    /// memory file is not its.
    pub fn open(paths: &SnapshotPaths) -> Result<Self, VmError> {
        let bytes = read_state(&paths.state).map_err(VmError::file("read", &paths.state))?;
        let state = VmState::parse(&bytes)
            .map_err(|problem| VmError::State { path: paths.state.clone(), problem })?;
        let metadata = fs::metadata(&paths.memory).map_err(VmError::file("read", &paths.memory))?;
        if metadata.len() != state.memory_bytes {
            return Err(VmError::MemorySize {
                path: paths.memory.clone(),
                actual: metadata.len(),
                expected: state.memory_bytes,
            });
        }
        Ok(Self { paths: paths.clone(), state })
    }

    pub(crate) fn write(
        paths: &SnapshotPaths,
        state: VmState,
        memory: &GuestMemory,
    ) -> Result<Self, VmError> {
        match fs::remove_file(&paths.state) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(VmError::file("replace", &paths.state)(e));
            }
            _ => {}
        }
        write_beside(&paths.memory, |file| write_memory(file, memory))?;
        write_beside(&paths.state, |file| file.write_all_at(&state.encode(), 0))?;
        Ok(Self { paths: paths.clone(), state })
    }

    /// Where it is.
    pub fn paths(&self) -> &SnapshotPaths {
        &self.paths
    }

    /// Size of guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.state.memory_bytes
    }

    /// Whether its guest is Linux, not the built-in program.
    pub fn is_linux(&self) -> bool {
        matches!(self.state.guest, Guest::Linux(_))
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u64 {
        self.state.vcpus()
    }
}

/// Reads as much of a file as a state file can have.
fn read_state(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_STATE_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a file under a temporary name, syncs it, gives it its name.
fn write_beside(path: &Path, write: impl FnOnce(&File) -> io::Result<()>) -> Result<(), VmError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary).and_then(|file| {
        write(&file)?;
        file.sync_data()?;
        fs::rename(&temporary, path)
    });
    if written.is_err() {
        // What is half-written helps nobody; the first error is the one to tell.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(VmError::file("write", path))
}

/// Writes all of memory, leaving holes for zero pages.
fn write_memory(file: &File, memory: &GuestMemory) -> io::Result<()> {
    let mapping = &memory.mapping;
    file.set_len(mapping.len() as u64)?;
    let data: Vec<Range<u64>> = memory
        .data()?
        .into_iter()
        .map(|range| range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE))
        .collect();
    let pages = mapping.len() as u64 / PAGE_SIZE;
    let parts = in_parallel(0..pages, |part| {
        data.iter().try_for_each(|range| {
            let (first, end) = (range.start.max(part.start), range.end.min(part.end));
            write_pages(file, mapping, first, end)
        })
    });
    parts.into_iter().collect()
}

fn write_pages(file: &File, memory: &Mapping, first: u64, end: u64) -> io::Result<()> {
    const CHUNK_PAGES: u64 = 256;
    let mut buffer = vec![0; to_usize(CHUNK_PAGES) * PAGE_BYTES];
    let mut at = first;
    while at < end {
        let count = CHUNK_PAGES.min(end - at);
        let chunk = &mut buffer[..to_usize(count) * PAGE_BYTES];
        memory.read(to_usize(at) * PAGE_BYTES, chunk);
        let offset = at * PAGE_SIZE;
        let is_zero = |page: &[u8; PAGE_BYTES]| *page == [0; PAGE_BYTES];
        let mut from = 0;
        for run in chunk.as_chunks::<PAGE_BYTES>().0.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            if !is_zero(&run[0]) {
                file.write_all_at(run.as_flattened(), offset + from)?;
            }
            from += run.as_flattened().len() as u64;
        }
        at += count;
    }
    Ok(())
}
