//! The ways guest memory comes back from a snapshot.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use vmpager::Pager;
use vmpager::store::RawFile;
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

use vmpager::core::Hva;
use vmpager_kvm::exit::Mechanism as ExitMechanism;

use crate::PAGE_SIZE;
use crate::bringer::Oracle;
use crate::device::to_usize;
use crate::error::VmError;
use crate::memory::{GuestMemory, Served};
use crate::snapshot::Snapshot;

/// How a vCPU's fault on a missing page is learned of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Delivery {
    /// The vCPU waits in the kernel, and a userfaultfd tells the pager.
    #[default]
    Userfaultfd,
    /// The vCPU leaves the guest by this mechanism, and its own thread installs
    /// the page (see [`vmpager_kvm::exit`]).
    Exit(ExitMechanism),
}

/// Where a restored VM's memory comes from.
#[derive(Clone, Debug)]
pub enum RestoreMemory {
    /// Anonymous memory, all of it read from the file before the guest starts,
    /// and verified. With the others, that is [`Snapshot::verify_memory`]'s.
    Eager,
    /// A private mapping of the file.
    Mmap,
    /// Absent memory, handed to a pager over its unix socket exactly as
    /// Firecracker does.
    OnDemand {
        /// Where the pager listens.
        socket: PathBuf,
        /// Whether the memory is made of hugetlb pages of 2 MiB.
        huge_pages: bool,
    },
    /// Absent memory, whose pages a thread of this process brings as they are
    /// touched.
    InProcess {
        /// Whether it brings the others too, while nobody waits.
        background_fill: bool,
        /// How the faults of vCPUs get to it.
        delivery: Delivery,
    },
    /// For benchmarks: absent memory, whose pages vCPUs exit on and copy from the
    /// mapped file, with nothing else done about them. Which they are must be
    /// [foretold](crate::Vm::foretell), if the exits do not say; no other thread may
    /// touch them, for nobody listens to their userfaultfd. For the built-in guest,
    /// whose own structures are there.
    Oracle(ExitMechanism),
    /// Memory the caller has prepared (and serves, if its pages are absent).
    /// It must have [`Snapshot::memory_bytes`] bytes.
    Prepared(Arc<Mapping>),
}

impl GuestMemory {
    pub(crate) fn restore(snapshot: &Snapshot, from: RestoreMemory) -> Result<Self, VmError> {
        let bytes = snapshot.memory_bytes();
        let len = to_usize(bytes);
        let cannot_map = |error| VmError::Memory { bytes, error };
        let path = &snapshot.paths.memory;
        let slots = snapshot.state.memslots.clone();
        match from {
            RestoreMemory::Eager => {
                let file = File::open(path).map_err(VmError::file("open", path))?;
                let mapping = Mapping::anonymous(len).map_err(cannot_map)?;
                // Holes are zeroes, and so is fresh memory: they cost nothing.
                snapshot.read_verified(&file, |offset, chunk| {
                    let offset = to_usize(offset);
                    mapping.read_from_file(file.as_fd(), offset..offset + chunk.len())?;
                    mapping.read(offset, chunk);
                    Ok(())
                })?;
                Ok(Self::new(Arc::new(mapping), slots))
            }
            RestoreMemory::Mmap => {
                let file = File::open(path).map_err(VmError::file("open", path))?;
                let mapping = Mapping::file_private(file.as_fd(), len);
                Ok(Self::new(Arc::new(mapping.map_err(VmError::file("map", path))?), slots))
            }
            RestoreMemory::OnDemand { socket, huge_pages } => {
                let mapping =
                    if huge_pages { Mapping::hugetlb_2m(len) } else { Mapping::for_pager(len) };
                let mapping = Arc::new(mapping.map_err(cannot_map)?);
                let (connection, uffd) = hand_over(&mapping, &socket, huge_pages)?;
                Ok(Self::new(mapping, slots)
                    .served(Served::ByPeer { _connection: connection, _uffd: uffd }))
            }
            RestoreMemory::InProcess { background_fill, delivery } => {
                let mapping = Arc::new(Mapping::inaccessible(len).map_err(cannot_map)?);
                let pager = Pager::builder(RawFile::open(path)?)
                    .region(&GuestRange::of_mapping(&mapping), 0)
                    .background_fill(background_fill)
                    .start()?;
                Self::new(mapping, slots)
                    .served(Served::InProcess(Box::new(pager)))
                    .delivered_by(delivery)
                    .map_err(cannot_map)
            }
            RestoreMemory::Oracle(mechanism) => Self::by_oracle(snapshot, mechanism),
            RestoreMemory::Prepared(mapping) if mapping.len() == len => {
                Ok(Self::new(mapping, slots))
            }
            RestoreMemory::Prepared(mapping) => Err(VmError::Config {
                field: "prepared memory size",
                value: mapping.len() as u64,
                remedy: "map as many bytes as the snapshot's memory has",
            }),
        }
    }

    fn by_oracle(snapshot: &Snapshot, mechanism: ExitMechanism) -> Result<Self, VmError> {
        let bytes = snapshot.memory_bytes();
        let len = to_usize(bytes);
        let cannot_map = |error| VmError::Memory { bytes, error };
        let path = &snapshot.paths.memory;
        let file = File::open(path).map_err(VmError::file("open", path))?;
        let file = Mapping::file_private(file.as_fd(), len).map_err(VmError::file("map", path))?;
        let mapping = Arc::new(Mapping::inaccessible(len).map_err(cannot_map)?);
        let uffd = Userfaultfd::open(Features(0))?;
        uffd.register_missing(&GuestRange::of_mapping(&mapping)).map_err(VmError::Register)?;
        let mut oracle = Oracle::new(uffd, file, &mapping);
        for page in snapshot.fixed_pages() {
            oracle.resolve(Hva(mapping.hva() + page * PAGE_SIZE));
        }
        Self::new(mapping, snapshot.state.memslots.clone())
            .served(Served::ByOracle(oracle))
            .delivered_by(Delivery::Exit(mechanism))
            .map_err(cannot_map)
    }
}

/// One memory region in Firecracker's handshake.
#[derive(Serialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// In bytes, whatever the name says.
    page_size_kib: u64,
}

/// Registers the memory, and sends its layout and the userfaultfd in one
/// message.
fn hand_over(
    mapping: &Arc<Mapping>,
    socket: &Path,
    huge_pages: bool,
) -> Result<(UnixStream, Userfaultfd), VmError> {
    let features = if huge_pages {
        Features::EVENT_REMOVE.union(Features::MISSING_HUGETLBFS)
    } else {
        Features::EVENT_REMOVE
    };
    let uffd = Userfaultfd::open(features)?;
    uffd.register_missing(&GuestRange::of_mapping(mapping)).map_err(VmError::Register)?;

    let page_size = if huge_pages { 2 << 20 } else { 4096 };
    let regions = [Region {
        base_host_virt_addr: mapping.hva(),
        size: mapping.len() as u64,
        offset: 0,
        page_size,
        page_size_kib: page_size,
    }];
    let message = serde_json::to_vec(&regions).expect("plain fields always serialize");
    let failed = |error| VmError::Handshake { socket: socket.to_path_buf(), error };
    let stream = UnixStream::connect(socket).map_err(failed)?;
    let sent = send_with_fds(&stream, &message, &[uffd.as_fd()]).map_err(failed)?;
    if sent != message.len() {
        return Err(failed(std::io::ErrorKind::WriteZero.into()));
    }
    Ok((stream, uffd))
}
