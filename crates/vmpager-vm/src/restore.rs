//! The ways guest memory comes back from a snapshot.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use vmpager::clean::{self, Offered};
use vmpager::core::{Hva, PageSource};
use vmpager::store::RawFile;
use vmpager::store::profile::Profile;
use vmpager::{NeighbourPolicy, Pager};
use vmpager_sys::memfd;
use vmpager_sys::memory::{Access, GuestRange, Mapping};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

use vmpager_kvm::apf::{self, Policy};
use vmpager_kvm::exit::Mechanism as ExitMechanism;

use crate::PAGE_SIZE;
use crate::bringer::Oracle;
use crate::device::to_usize;
use crate::error::VmError;
use crate::memory::{GuestMemory, Memslot, Served};
use crate::peer::{Connection, OnRefusal};
use crate::private::{PrivateBackend, PrivateConfig};
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

/// Which faults a guest is told of, to run something else meanwhile (see
/// [`vmpager_kvm::apf`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsyncFaults {
    /// All whose page is not at hand.
    Always,
    /// None: vCPUs wait.
    Never,
    /// Those that are expected to wait so long.
    LongerThan(Duration),
}

impl AsyncFaults {
    pub(crate) fn policy(self) -> Arc<dyn Policy> {
        match self {
            Self::Always => Arc::new(apf::Always),
            Self::Never => Arc::new(apf::Never),
            Self::LongerThan(wait) => Arc::new(apf::LongerThan(wait)),
        }
    }
}

/// How a thread of this process brings memory.
#[derive(Clone, Debug, Default)]
pub struct InProcess {
    /// Whether it brings what is not touched too, while nobody waits.
    pub background_fill: bool,
    /// Whether memory comes to lie in huge pages.
    pub collapse: bool,
    /// How the faults of vCPUs get to it.
    pub delivery: Delivery,
    /// Whether vmpager plays the guest's device for asynchronous page faults, and
    /// for which faults; with delivery by exits only. Else the device is KVM's.
    pub async_faults: Option<AsyncFaults>,
    /// What comes along with a page that is touched.
    pub neighbours: NeighbourPolicy,
    /// Where the bytes come from instead of the memory file: as many.
    pub source: Option<Arc<dyn PageSource>>,
    /// Which pages come before others, from now on.
    pub profile: Option<Arc<Profile>>,
    /// How long KVM may be kept, before the guest runs, with mapping those that are in
    /// place by then (see [`vmpager_kvm::ahead`]); zero to leave it. Not with delivery by
    /// attributes, nor where pages can be private: KVM refuses what is not shared.
    pub map_ahead: Duration,
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
        /// If the pager does not serve it.
        refused: OnRefusal,
    },
    /// Absent memory in a memfd, which is handed to a pager over its unix socket
    /// together with its userfaultfd, so that other processes can have it too.
    Shared {
        /// Where the pager listens.
        socket: PathBuf,
        /// The directory of its doors (`vmpager serve --attach`), if missing
        /// pages shall be exits of vCPUs, which ask for them there.
        exits: Option<PathBuf>,
        /// If the pager does not serve it.
        refused: OnRefusal,
    },
    /// A private mapping of memory that a pager shares with other VMs of the same image,
    /// handed to it as absent memory is: pages that the guest has not written to are
    /// there once for all of them (`vmpager serve --share-clean`).
    CleanShared {
        /// Where the pager listens.
        socket: PathBuf,
        /// If the pager does not serve it.
        refused: OnRefusal,
    },
    /// Absent memory, whose pages a thread of this process brings as they are
    /// touched.
    InProcess(InProcess),
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
    /// Memory of which pages can be private, if `private` says so.
    pub(crate) fn restore(
        snapshot: &Snapshot,
        from: RestoreMemory,
        private: Option<PrivateConfig>,
    ) -> Result<Self, VmError> {
        if let Some(private) = private {
            can_be_private(&from, private.backend)?;
        }
        let bytes = snapshot.memory_bytes();
        let len = to_usize(bytes);
        let cannot_map = |error| VmError::Memory { bytes, error };
        let path = &snapshot.paths.memory;
        let slots = snapshot.state.memslots.clone();
        let blank = |slots, ordinary: fn(usize) -> io::Result<Mapping>| match private {
            Some(config) => Self::private(bytes, slots, config, snapshot.private_ranges()),
            None => Ok(Self::new(Arc::new(ordinary(len).map_err(cannot_map)?), slots)),
        };
        match from {
            RestoreMemory::Eager => {
                let file = File::open(path).map_err(VmError::file("open", path))?;
                let memory = blank(slots, Mapping::anonymous)?;
                let mapping = &memory.mapping;
                // Holes are zeroes, and so is fresh memory: they cost nothing.
                snapshot.read_verified(&file, |offset, chunk| {
                    let offset = to_usize(offset);
                    mapping.read_from_file(file.as_fd(), offset..offset + chunk.len())?;
                    mapping.read(offset, chunk);
                    Ok(())
                })?;
                Ok(memory)
            }
            RestoreMemory::Mmap => {
                let file = File::open(path).map_err(VmError::file("open", path))?;
                let mapping = Mapping::file_private(file.as_fd(), len);
                Ok(Self::new(Arc::new(mapping.map_err(VmError::file("map", path))?), slots))
            }
            RestoreMemory::OnDemand { socket, huge_pages, refused } => {
                let memory = if huge_pages {
                    Self::new(Arc::new(Mapping::hugetlb_2m(len).map_err(cannot_map)?), slots)
                } else {
                    blank(slots, Mapping::for_pager)?
                };
                let page_size = if huge_pages { 2 << 20 } else { PAGE_SIZE };
                let all = Memslot::flat(bytes);
                let regions: Vec<Region> =
                    all.iter().map(|all| Region::new(&memory.mapping, all, page_size)).collect();
                let stream = connect(&socket)?;
                let uffd = register(&memory.mapping, &regions)?;
                let peer = hand_over((stream, &refused), uffd, &regions, None);
                Ok(memory.served(peer.map_err(failed(&socket))?))
            }
            RestoreMemory::CleanShared { socket, refused } => {
                Self::clean_shared(snapshot, (&socket, &refused))
            }
            RestoreMemory::Shared { socket, exits, refused } => {
                Self::shared(snapshot, (&socket, &refused), exits)
            }
            RestoreMemory::InProcess(how) => {
                let memory = blank(slots, Mapping::for_pager)?;
                memory.mapping.allow(Access::None).map_err(cannot_map)?;
                let source = match how.source {
                    Some(source) => source,
                    None => RawFile::open(path)?,
                };
                let mut pager = Pager::builder(source)
                    .region(&GuestRange::of_mapping(&memory.mapping), 0)
                    .background_fill(how.background_fill)
                    .huge_pages(how.collapse)
                    .neighbours(how.neighbours);
                if let Some(profile) = &how.profile {
                    pager = pager.profile(profile);
                }
                memory
                    .served(Served::InProcess(Box::new(pager.start()?)))
                    .mapped_ahead(how.map_ahead)
                    .with_async_faults(how.async_faults)
                    .delivered_by(how.delivery)
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

    fn shared(
        snapshot: &Snapshot,
        pager: (&Path, &OnRefusal),
        exits: Option<PathBuf>,
    ) -> Result<Self, VmError> {
        let bytes = snapshot.memory_bytes();
        let cannot_map = |error| VmError::Memory { bytes, error };
        let memfd = memfd::sealed("guest-memory", bytes).map_err(cannot_map)?;
        let mapping = Mapping::file_shared(memfd.as_fd(), to_usize(bytes)).map_err(cannot_map)?;
        mapping.allow(Access::None).map_err(cannot_map)?;
        let mapping = Arc::new(mapping);
        let slots = snapshot.state.memslots.clone();
        let region = |slot| Region::new(&mapping, slot, PAGE_SIZE).in_memfd(slot);
        let regions: Vec<Region> = slots.iter().map(region).collect();
        let (socket, refused) = pager;
        let stream = connect(socket)?;
        let uffd = register(&mapping, &regions)?;
        let peer = hand_over((stream, refused), uffd, &regions, Some(memfd.as_fd()));
        let peer = peer.map_err(failed(socket))?;
        let delivery = match &exits {
            None => Delivery::Userfaultfd,
            Some(_) => Delivery::Exit(ExitMechanism::View),
        };
        let door = exits.map(|doors| doors.join(format!("{}.sock", std::process::id())));
        Self::new(mapping, slots)
            .served(peer.asked_at(door))
            .delivered_by(delivery)
            .map_err(cannot_map)
    }

    fn clean_shared(
        snapshot: &Snapshot,
        (socket, refused): (&Path, &OnRefusal),
    ) -> Result<Self, VmError> {
        let bytes = snapshot.memory_bytes();
        let stream = connect(socket)?;
        let Offered { memfd, len } = clean::ask(&stream).map_err(failed(socket))?;
        if len != bytes {
            return Err(VmError::Config {
                field: "length of the pager's clean pages",
                value: len,
                remedy: "have the pager serve the image of this snapshot's memory",
            });
        }
        let mapping = Mapping::file_private(memfd.as_fd(), to_usize(len))
            .map_err(|error| VmError::Memory { bytes, error })?;
        let mapping = Arc::new(mapping);
        let features = Features::EVENT_REMOVE.union(Features::THREAD_ID);
        let uffd = Userfaultfd::open(features.union(Features::MINOR_SHMEM))?;
        uffd.register_minor(&GuestRange::of_mapping(&mapping)).map_err(VmError::Register)?;
        let slots = snapshot.state.memslots.clone();
        let all = Memslot::flat(bytes);
        let regions: Vec<Region> =
            all.iter().map(|all| Region::new(&mapping, all, PAGE_SIZE).clean()).collect();
        let peer = hand_over((stream, refused), uffd, &regions, None).map_err(failed(socket))?;
        Ok(Self::new(mapping, slots).served(peer))
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

/// Private pages need memory that the host can have a second view of, and whose
/// pages can be given back.
fn can_be_private(from: &RestoreMemory, backend: PrivateBackend) -> Result<(), VmError> {
    let problem = match from {
        RestoreMemory::OnDemand { .. } | RestoreMemory::InProcess(_)
            if backend == PrivateBackend::MappedGuestMemfd =>
        {
            "vCPUs take missing pages of a guest_memfd as zeroes, and no userfaultfd is told: \
             restore it eagerly, or keep private pages in place"
        }
        RestoreMemory::Eager
        | RestoreMemory::OnDemand { huge_pages: false, .. }
        | RestoreMemory::InProcess(InProcess { delivery: Delivery::Userfaultfd, .. }) => {
            return Ok(());
        }
        RestoreMemory::Mmap => {
            "pages of a mapped snapshot cannot be given back: restore it eagerly or on demand"
        }
        RestoreMemory::OnDemand { huge_pages: true, .. } => {
            "single pages of huge pages cannot be converted: restore it without huge pages"
        }
        RestoreMemory::InProcess(InProcess { delivery: Delivery::Exit(_), .. }) => {
            "missing pages of memory that can be private are no exits: deliver them by userfaultfd"
        }
        RestoreMemory::Shared { .. }
        | RestoreMemory::CleanShared { .. }
        | RestoreMemory::Oracle(_) => {
            "memory that others map or foretell stays shared: restore it eagerly or on demand"
        }
        RestoreMemory::Prepared(_) => {
            "memory the caller has prepared has no second view: restore it eagerly or on demand"
        }
    };
    Err(VmError::NotPrivate { problem })
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
    /// Where others find it.
    #[serde(flatten)]
    shared: Option<InMemfd>,
    /// It is a mapping of the pager's clean pages.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    clean_pages: bool,
}

/// Where a region lies in the memfd that comes with the handshake.
#[derive(Serialize)]
struct InMemfd {
    gpa_start: u64,
    memfd: u64,
    memfd_offset: u64,
}

impl Region {
    fn new(mapping: &Mapping, slot: &Memslot, page_size: u64) -> Self {
        Self {
            base_host_virt_addr: mapping.hva() + slot.offset,
            size: slot.len,
            offset: slot.offset,
            page_size,
            page_size_kib: page_size,
            shared: None,
            clean_pages: false,
        }
    }

    /// The same, when the mapping is of the pager's clean pages.
    fn clean(self) -> Self {
        Self { clean_pages: true, ..self }
    }

    /// The same, when the mapping is of a memfd.
    fn in_memfd(self, slot: &Memslot) -> Self {
        let (gpa_start, memfd_offset) = (slot.gpa, slot.offset);
        Self { shared: Some(InMemfd { gpa_start, memfd: 0, memfd_offset }), ..self }
    }
}

fn connect(socket: &Path) -> Result<UnixStream, VmError> {
    UnixStream::connect(socket).map_err(failed(socket))
}

fn failed(socket: &Path) -> impl Fn(io::Error) -> VmError {
    |error| VmError::Handshake { socket: socket.to_path_buf(), error }
}

/// Registers absent memory.
fn register(mapping: &Arc<Mapping>, regions: &[Region]) -> Result<Userfaultfd, VmError> {
    let features = Features::EVENT_REMOVE.union(Features::THREAD_ID);
    let is_huge = regions.iter().any(|region| region.page_size > PAGE_SIZE);
    let features = if is_huge { features.union(Features::MISSING_HUGETLBFS) } else { features };
    let uffd = Userfaultfd::open(features)?;
    uffd.register_missing(&GuestRange::of_mapping(mapping)).map_err(VmError::Register)?;
    Ok(uffd)
}

/// Sends the memory's layout, its userfaultfd and the memfd, if there is one, in one
/// message.
fn hand_over(
    (stream, refused): (UnixStream, &OnRefusal),
    uffd: Userfaultfd,
    regions: &[Region],
    memfd: Option<BorrowedFd<'_>>,
) -> io::Result<Served> {
    let message = serde_json::to_vec(regions)?;
    let fds: Vec<BorrowedFd<'_>> = std::iter::once(uffd.as_fd()).chain(memfd).collect();
    if send_with_fds(&stream, &message, &fds)? != message.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let connection = Connection::new(stream, refused)?;
    Ok(Served::ByPeer { door: None, _connection: connection, _uffd: uffd })
}
