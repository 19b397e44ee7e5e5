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
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::device::to_usize;
use crate::error::VmError;
use crate::memory::{GuestMemory, data_ranges};
use crate::pieces::{checksums, piece, pieces};
use crate::state_file::{Guest, MAX_MEMORY_BYTES, MAX_STATE_BYTES, VmState};
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
        mut state: VmState,
        memory: &GuestMemory,
    ) -> Result<Self, VmError> {
        if state.memory_bytes > MAX_MEMORY_BYTES {
            return Err(VmError::Config {
                field: "memory size",
                value: state.memory_bytes,
                remedy: "a snapshot has at most 1 TiB of memory",
            });
        }
        match fs::remove_file(&paths.state) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(VmError::file("replace", &paths.state)(e));
            }
            _ => {}
        }
        state.memory_crc32c = write_beside(&paths.memory, |file| write_memory(file, memory))?;
        write_beside(&paths.state, |file| file.write_all_at(&state.encode(), 0))?;
        Ok(Self { paths: paths.clone(), state })
    }

    /// Reads the whole memory file, but its holes, and checks it against the
    /// checksums in the state file.
    ///
    /// [`RestoreMemory::Eager`](crate::RestoreMemory::Eager) does as much. The
    /// other ways read only what the guest touches, and notice no damage unless
    /// this came first.
    ///
    /// # Errors
    ///
    /// [`VmError::MemoryChecksum`], naming the first piece that differs; or if
    /// the file cannot be read.
    pub fn verify_memory(&self) -> Result<(), VmError> {
        let path = &self.paths.memory;
        let file = File::open(path).map_err(VmError::file("open", path))?;
        self.read_verified(&file, |offset, chunk| file.read_exact_at(chunk, offset))
    }

    /// Brings the memory file's data by `bring`, and checks the checksums of what
    /// it brought.
    pub(crate) fn read_verified(
        &self,
        file: &File,
        bring: impl Fn(u64, &mut [u8]) -> io::Result<()> + Sync,
    ) -> Result<(), VmError> {
        let (bytes, stated) = (self.memory_bytes(), &self.state.memory_crc32c);
        let actual = data_ranges(file.as_fd(), bytes)
            .and_then(|data| checksums(bytes, &data, bring))
            .map_err(VmError::file("read", &self.paths.memory))?;
        let mut damaged = (0..).zip(actual.iter().zip(stated)).filter(|(_, (a, s))| a != s);
        let Some((number, (&actual, &stated))) = damaged.next() else { return Ok(()) };
        let Range { start, end } = piece(number, bytes);
        Err(VmError::MemoryChecksum {
            path: self.paths.memory.clone(),
            start,
            end,
            actual,
            stated,
            damaged: 1 + damaged.count() as u64,
            pieces: pieces(bytes),
        })
    }

    /// Where it is.
    pub fn paths(&self) -> &SnapshotPaths {
        &self.paths
    }

    /// Size of guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.state.memory_bytes
    }

    /// What of its memory was private.
    pub(crate) fn private_ranges(&self) -> Vec<Range<u64>> {
        let ranges = self.state.private.iter().flat_map(|private| &private.ranges);
        ranges.map(|(gpa, len)| *gpa..gpa + len).collect()
    }

    /// Whether its guest is Linux, not the built-in program.
    pub fn is_linux(&self) -> bool {
        matches!(self.state.guest, Guest::Linux(_))
    }

    /// The built-in guest's own pages: all but its contents.
    pub(crate) fn fixed_pages(&self) -> Range<u64> {
        match &self.state.guest {
            Guest::Builtin(guest) => 0..guest.layout.contents().start,
            Guest::Linux(_) => 0..0,
        }
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
fn write_beside<T>(path: &Path, write: impl FnOnce(&File) -> io::Result<T>) -> Result<T, VmError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary).and_then(|file| {
        let answer = write(&file)?;
        file.sync_data()?;
        fs::rename(&temporary, path)?;
        Ok(answer)
    });
    if written.is_err() {
        // What is half-written helps nobody; the first error is the one to tell.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(VmError::file("write", path))
}

/// Writes all of memory, leaving holes for zero pages, and tells the checksums of
/// its pieces.
fn write_memory(file: &File, memory: &GuestMemory) -> io::Result<Vec<u32>> {
    let mapping = &memory.mapping;
    let bytes = mapping.len() as u64;
    file.set_len(bytes)?;
    let pages = |range: Range<u64>| {
        let end = range.end.next_multiple_of(PAGE_SIZE);
        range.start / PAGE_SIZE * PAGE_SIZE..end
    };
    let data: Vec<Range<u64>> = memory.data()?.into_iter().map(pages).collect();
    checksums(bytes, &data, |offset, chunk| {
        mapping.read(to_usize(offset), chunk);
        write_pages(file, offset, chunk)
    })
}

/// Writes the pages that are not zero.
fn write_pages(file: &File, offset: u64, pages: &[u8]) -> io::Result<()> {
    let is_zero = |page: &[u8; PAGE_BYTES]| *page == [0; PAGE_BYTES];
    let mut at = offset;
    for run in pages.as_chunks::<PAGE_BYTES>().0.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        if !is_zero(&run[0]) {
            file.write_all_at(run.as_flattened(), at)?;
        }
        at += run.as_flattened().len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {

    use tempfile::TempDir;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::RestoreMemory;
    use crate::devices::Ports;
    use crate::memory::HOLE_START;
    use crate::state_file::LinuxState;

    /// The snapshot of a Linux guest's memory that has these bytes.
    fn saved(memory_bytes: u64, contents: &[(u64, &[u8])]) -> (TempDir, Snapshot) {
        let memory = GuestMemory::memfd(memory_bytes, false).unwrap();
        for (offset, bytes) in contents {
            memory.mapping.write(to_usize(*offset), bytes);
        }
        let interrupt = EventFd::new(0).unwrap();
        let devices = Ports::new(Box::new(io::sink()), interrupt).state();
        let state = VmState {
            memory_bytes,
            memslots: memory.slots.clone(),
            guest: Guest::Linux(LinuxState { cmdline: String::new(), devices }),
            kvm: None,
            private: None,
            memory_crc32c: Vec::new(),
        };
        let dir = TempDir::new().unwrap();
        let snapshot = Snapshot::write(&SnapshotPaths::in_dir(dir.path()), state, &memory).unwrap();
        (dir, snapshot)
    }

    /// Memory this process has, its own and mapped.
    fn resident_bytes() -> u64 {
        let statm = fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
        pages * PAGE_SIZE
    }

    #[test]
    fn sparse_memory_is_verified_by_what_it_has_not_by_its_size() {
        // The last piece is a single page.
        let bytes = (16 << 30) + 4096;
        let contents: [(u64, &[u8]); 3] =
            [(4096, b"low"), (HOLE_START + 8, b"high"), (bytes - 4, b"last")];
        let (_dir, snapshot) = saved(bytes, &contents);
        let before = resident_bytes();
        snapshot.verify_memory().unwrap();
        let memory = GuestMemory::restore(&snapshot, RestoreMemory::Eager, None).unwrap();
        // Other tests use some, at the same time.
        let made = resident_bytes().saturating_sub(before);
        assert!(made < 1 << 30, "{made} bytes of memory for a few pages");
        for (offset, bytes) in contents {
            let mut found = vec![0; bytes.len()];
            memory.mapping.read(to_usize(offset), &mut found);
            assert_eq!(found, bytes);
        }
        let file = File::options().write(true).open(&snapshot.paths.memory).unwrap();
        for (at, piece) in [
            (bytes - 4000, "bytes 0x400000000 to 0x400001000"),
            ((8 << 30) + 5, "bytes 0x200000000 to 0x200200000"),
        ] {
            file.write_all_at(&[1], at).unwrap();
            let error = snapshot.verify_memory().unwrap_err().to_string();
            assert!(error.contains(piece), "{error}");
            let error = GuestMemory::restore(&snapshot, RestoreMemory::Eager, None).unwrap_err();
            assert!(error.to_string().contains(piece), "{error}");
        }
    }

    #[test]
    fn memory_that_no_state_file_has_room_for_is_not_saved() {
        let (dir, snapshot) = saved(4096, &[]);
        let before = fs::read(&snapshot.paths.state).unwrap();
        let memory = GuestMemory::memfd(4096, false).unwrap();
        let state = VmState { memory_bytes: MAX_MEMORY_BYTES + PAGE_SIZE, ..snapshot.state };
        let paths = SnapshotPaths::in_dir(dir.path());
        let error = Snapshot::write(&paths, state, &memory).unwrap_err().to_string();
        assert!(error.contains("1099511631872") && error.contains("1 TiB"), "{error}");
        assert_eq!(fs::read(&paths.state).unwrap(), before, "what was there is still there");
    }
}
