//! A saved VM: a state file (JSON) and a memory file beside it, sparse, byte
//! `n` of the file being gpa `n`.
//!
//! Both are written under another name, synced, and renamed when complete. The
//! old state goes first and the new one comes last, so that whoever finds a
//! state file finds its memory. A running VM keeps the memory file it was
//! restored from: it is replaced, never written to.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmpager_sys::memory::Mapping;

use crate::device::to_usize;
use crate::error::VmError;
use crate::kvm::KvmState;
use crate::layout::Layout;
use crate::parallel::in_parallel;
use crate::vm::CpuKind;
use crate::{PAGE_BYTES, PAGE_SIZE};

/// The version this program writes, and the only one it reads.
const VERSION: u64 = 2;

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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    pub(crate) version: u64,
    pub(crate) memory_bytes: u64,
    /// Of the contents.
    pub(crate) seed: u64,
    /// What prepared it.
    pub(crate) cpu: CpuKind,
    pub(crate) layout: Layout,
    /// Absent if host threads prepared it: the guest then starts afresh.
    pub(crate) kvm: Option<KvmState>,
}

impl State {
    pub(crate) fn new(layout: &Layout, seed: u64, cpu: CpuKind, kvm: Option<KvmState>) -> Self {
        let memory_bytes = layout.memory_bytes();
        Self { version: VERSION, memory_bytes, seed, cpu, layout: layout.clone(), kvm }
    }
}

/// A snapshot whose state was read and found consistent with its memory file.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub(crate) paths: SnapshotPaths,
    pub(crate) state: State,
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
        let text = fs::read(&paths.state).map_err(VmError::file("read", &paths.state))?;
        let state = parse(&text)
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
        state: State,
        memory: &Mapping,
    ) -> Result<Self, VmError> {
        match fs::remove_file(&paths.state) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(VmError::file("replace", &paths.state)(e));
            }
            _ => {}
        }
        write_beside(&paths.memory, |file| write_memory(file, memory))?;
        let text = serde_json::to_vec_pretty(&state).expect("plain fields always serialize");
        write_beside(&paths.state, |file| file.write_all_at(&text, 0))?;
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

    /// The seed of its contents.
    pub fn seed(&self) -> u64 {
        self.state.seed
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u64 {
        self.state.layout.vcpus
    }
}

fn parse(text: &[u8]) -> Result<State, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u64,
    }
    // First by itself: the fields of another version are none of our business.
    let Version { version } = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    if version != VERSION {
        return Err(format!(
            "version is {version}, this program reads version {VERSION}; take the snapshot again \
             with this program"
        ));
    }
    let state: State = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    let expected =
        Layout::new(state.memory_bytes, state.layout.vcpus).map_err(|e| e.to_string())?;
    if state.layout != expected {
        return Err(format!(
            "layout is {:?}, but memory_bytes {} is laid out as {expected:?}",
            state.layout, state.memory_bytes
        ));
    }
    if let Some(kvm) = &state.kvm
        && kvm.vcpus.len() as u64 != state.layout.vcpus
    {
        return Err(format!(
            "kvm.vcpus has {} entries, but layout.vcpus is {}",
            kvm.vcpus.len(),
            state.layout.vcpus
        ));
    }
    Ok(state)
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
fn write_memory(file: &File, memory: &Mapping) -> io::Result<()> {
    file.set_len(memory.len() as u64)?;
    let pages = memory.len() as u64 / PAGE_SIZE;
    in_parallel(0..pages, |part| write_pages(file, memory, part.start, part.end))
        .into_iter()
        .collect()
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
