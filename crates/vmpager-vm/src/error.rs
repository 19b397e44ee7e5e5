//! What can go wrong with a reference VM.

use std::io;
use std::path::{Path, PathBuf};

use vmpager::attach::AttachError;
use vmpager_sys::uffd::OpenError;

use crate::linux::BootError;
use crate::state_file::StateError;

/// Why a VM could not be built, saved, restored or run.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A setting is out of range.
    #[error("{field} {value} cannot be used; {remedy}")]
    Config {
        /// Which setting.
        field: &'static str,
        /// What it was.
        value: u64,
        /// What to use instead.
        remedy: &'static str,
    },
    /// There is no KVM for this user.
    #[error(
        "/dev/kvm: {0}. Load the kvm module or give this user access to it; host threads can \
         stand in for vCPUs"
    )]
    NoKvm(io::Error),
    /// KVM lacks something.
    #[error("this KVM lacks {0}; use a newer kernel, or one built with it")]
    NoCapability(&'static str),
    /// KVM refused something.
    #[error("KVM refused to {what}: {error}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        error: io::Error,
    },
    /// KVM refused the value of a model-specific register.
    #[error(
        "KVM refused to load MSR {index:#x} with {value:#x}; restore on a host with the processor \
         and the kernel of the one that saved"
    )]
    Msr {
        /// Which register.
        index: u32,
        /// The value in the state file.
        value: u64,
    },
    /// What the guest is to boot cannot be used.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The pager's door did not let this VM in.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The guest stopped in a way it never does by itself.
    #[error("vCPU {vcpu} stopped unexpectedly at rip {rip:#x}: {exit}")]
    Exit {
        /// Which vCPU.
        vcpu: u64,
        /// KVM's exit reason, or the error of KVM_RUN.
        exit: String,
        /// The guest's instruction pointer.
        rip: u64,
    },
    /// A file could not be read or written.
    #[error("cannot {what} {path}: {error}")]
    File {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A state file is not one, or of another version.
    #[error("{path} is no usable VM state: {problem}")]
    State {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it, naming the field.
        problem: StateError,
    },
    /// The state file is that of another kind of guest.
    #[error("{path} is the state of a guest that runs {runs}: restore it as such")]
    OtherGuest {
        /// Which file.
        path: PathBuf,
        /// What its guest runs.
        runs: &'static str,
    },
    /// The memory file does not belong to the state file.
    #[error(
        "{path} has {actual} bytes, but its state file says memory_bytes {expected}; use the two \
         files of one snapshot"
    )]
    MemorySize {
        /// The memory file.
        path: PathBuf,
        /// Its size.
        actual: u64,
        /// The size in the state file.
        expected: u64,
    },
    /// The memory file is not as it was written.
    #[error(
        "{path}: the crc32c of bytes {start:#x} to {end:#x} is {actual:#010x}, but its state file \
         says {stated:#010x} ({damaged} of {pieces} such pieces differ): it was changed or \
         damaged, or is that of another snapshot; use a good copy, or take the snapshot again"
    )]
    MemoryChecksum {
        /// The memory file.
        path: PathBuf,
        /// Where the first piece that differs starts.
        start: u64,
        /// Where that piece ends.
        end: u64,
        /// Its checksum.
        actual: u32,
        /// Its checksum in the state file.
        stated: u32,
        /// How many pieces differ.
        damaged: u64,
        /// How many pieces there are.
        pieces: u64,
    },
    /// Guest memory could not be mapped.
    #[error("cannot map {bytes} bytes of guest memory: {error}")]
    Memory {
        /// How much.
        bytes: u64,
        /// What the system said.
        error: io::Error,
    },
    /// Guest memory could not be had in huge pages.
    #[error(
        "cannot map {bytes} bytes of guest memory in huge pages of 2 MiB: {error}; raise \
         /proc/sys/vm/nr_hugepages, or do without huge pages"
    )]
    HugePages {
        /// How much.
        bytes: u64,
        /// What the system said.
        error: io::Error,
    },
    /// The pager in this process could not start.
    #[error(transparent)]
    Pager(#[from] vmpager::PagerError),
    /// The memory file is not fit to be served.
    #[error(transparent)]
    Source(#[from] vmpager::store::OpenError),
    /// Missing pages could not be delivered as exits of a vCPU.
    #[error("delivering missing pages as vCPU exits: {0}")]
    Delivery(#[from] vmpager_kvm::exit::ExitError),
    /// The guest could not be told of a fault.
    #[error(transparent)]
    AsyncFaults(#[from] vmpager_kvm::apf::ApfError),
    /// Memory cannot be private so.
    #[error("private guest memory: {0}")]
    Private(#[from] vmpager_kvm::private::PrivateError),
    /// Memory cannot be private on this host, or not in this way.
    #[error("private guest memory: {problem}")]
    NotPrivate {
        /// Why not, and what to do instead.
        problem: &'static str,
    },
    /// A conversion between private and shared memory left a guest that cannot go
    /// on.
    #[error(transparent)]
    Conversion(#[from] vmpager_kvm::private::ConvertError),
    /// A guest was told that a conversion failed.
    #[error(
        "a conversion the guest asked for returned {answer}: {}",
        .failed.as_ref().map_or("see the log".to_owned(), |failed| format!("{failed:?}"))
    )]
    ConversionRefused {
        /// What it was told, a negative error number.
        answer: i64,
        /// The last conversion that failed, if one was begun.
        failed: Option<Box<vmpager_kvm::private::Logged>>,
    },
    /// A page the guest needs cannot be had.
    #[error(
        "the page at gpa {gpa:#x} cannot be had (see the log for why); the guest cannot go on \
         without it"
    )]
    PagePoisoned {
        /// Its guest-physical address.
        gpa: u64,
    },
    /// The source of guest memory gives no reader.
    #[error(transparent)]
    Reader(#[from] vmpager::core::SourceError),
    /// No eventfd could be had, or waited for.
    #[error("using an eventfd: {0}; raise the limit on open files (ulimit -n)")]
    Eventfd(io::Error),
    /// No thread could be had for a vCPU.
    #[error("starting a vCPU's thread: {0}; raise the limit on processes (ulimit -u)")]
    Thread(io::Error),
    /// The guest has ended.
    #[error("the guest has ended: there is nothing left to run or to save")]
    Ended,
    /// No userfaultfd for on-demand memory.
    #[error(transparent)]
    Userfaultfd(#[from] OpenError),
    /// Guest memory could not be registered with the userfaultfd.
    #[error("cannot register guest memory for on-demand paging: {0}")]
    Register(io::Error),
    /// The pager could not be reached.
    #[error("cannot hand guest memory to the pager at {socket}: {error}; is it running?")]
    Handshake {
        /// The pager's socket.
        socket: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The guest has no checksum table yet.
    #[error("the guest is not prepared: let it compute its checksums first (`Vm::prepare`)")]
    NotPrepared,
}

impl VmError {
    /// For `map_err` on a file operation.
    pub(crate) fn file<'a>(
        what: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |error| Self::File { what, path: path.to_path_buf(), error }
    }
}
