//! Missing pages as exits of the vCPU, on stock kernels, by one of two
//! [mechanisms](Mechanism).
//!
//! **The write-only view.** Guest memory is mapped `PROT_WRITE` without
//! `PROT_READ` and registered with a userfaultfd. On x86 such memory can be read
//! by any thread all the same; only `get_user_pages` refuses to pin it for
//! reading, and that is what KVM does when a vCPU faults on a missing page. So
//! `KVM_RUN` returns at once with `EFAULT`, nothing done, while KVM's own
//! accesses (its emulator, its clock pages) wait on the userfaultfd as those of
//! any thread.
//!
//! **Attributes.** In a software-protected VM, missing pages carry the attribute
//! that makes them private to the guest. Private pages come from a guest_memfd;
//! these have none, so accesses to them exit, with their address. KVM's own
//! accesses do not look at the attribute: they too wait on a userfaultfd.
//!
//! ```text
//!   KVM_RUN: EFAULT ──> ExitDelivery::after_fault
//!        the page (attributes), or registers ──> candidates (view)
//!          ├─ installed by this very thread, or somebody else just has
//!          │      attributes: cleared, with its neighbours    Resumed
//!          ├─ being fetched                                   Waiting(gpa)
//!          ├─ nothing is missing
//!          │      ├─ a few times: enter again                 Resumed
//!          │      └─ view, still at the same instruction      FallBack
//!          └─ no memory of these slots                        NotOurs
//! ```
//!
//! That nothing is missing happens when another thread has just installed the
//! page. Or, on a view, KVM could not pin a page that is there without looking at
//! the mapping's protection, as while the kernel changes a page table nearby.
//!
//! **The fallback** makes the view readable for one entry, so that the
//! userfaultfd delivers the page whatever it is; the vCPU is interrupted soon
//! after. It always advances, but zaps all of the VM's stage-2 mappings twice,
//! and is counted. (Not by single steps: some KVMs hand their traps to the
//! guest.)

mod attributes;
mod delivery;
mod memory;
mod view;

use kvm_ioctls::VcpuExit;

pub use delivery::ExitDelivery;
pub(crate) use delivery::State;
pub use memory::{ExitMemory, GpaRange, Mechanism};

/// A `KVM_RUN` that ended with `EFAULT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// On an address that KVM does not tell.
    Somewhere,
    /// On an access to this guest-physical address
    /// (`KVM_EXIT_MEMORY_FAULT`).
    At {
        /// The address.
        gpa: u64,
    },
}

impl Fault {
    /// What a `KVM_RUN` ended with; `None` if that is another matter.
    pub fn of(run: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Option<Self> {
        match run {
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Some(Self::At { gpa: *gpa }),
            Err(error) if error.errno() == EFAULT => Some(Self::Somewhere),
            _ => None,
        }
    }
}

const EFAULT: i32 = 14;

/// What to do after a [`Fault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// Enter the guest again.
    Resumed,
    /// The page at this gpa is being fetched: wait for it, or do something
    /// else; then [ask again](ExitDelivery::ask_again), or enter the guest again.
    Waiting(u64),
    /// The page at this gpa cannot be had: the guest cannot go on.
    Poisoned(u64),
    /// Nothing that is known to be touched is missing:
    /// [`ExitDelivery::fall_back`].
    FallBack,
    /// No page of this memory that its pager could bring: the fault has another
    /// cause.
    NotOurs,
}

/// Why a fault could not be delivered.
#[derive(Debug, thiserror::Error)]
pub enum ExitError {
    /// KVM refused something.
    #[error("KVM refused to {what}: {error}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        error: std::io::Error,
    },
    /// The view's protection could not be changed.
    #[error("changing the protection of guest memory: {0}")]
    Protect(std::io::Error),
    /// This KVM has not what the mechanism needs.
    #[error(
        "this KVM has no {lacks}, which exits by memory attributes need; use a host kernel built \
         with CONFIG_KVM_SW_PROTECTED_VM, on a processor with nested paging, or exits by a \
         write-only view"
    )]
    Unavailable {
        /// What is missing.
        lacks: &'static str,
    },
    /// The pager ended with pages missing.
    #[error("the pager ended before guest memory was complete")]
    PagerEnded,
    /// The same access faults for ever.
    #[error(
        "the instruction at rip {rip:#x} faults again and again, although all pages are in place \
         that it is known to touch; please report it, with the instruction"
    )]
    Stuck {
        /// The guest's instruction pointer.
        rip: u64,
    },
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> ExitError {
    move |error| ExitError::Kvm { what, error: error.into() }
}

/// What exit delivery has done on one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitStats {
    /// Exits on missing pages.
    pub exits: u64,
    /// Pages installed by the vCPU's own thread.
    pub installed: u64,
    /// Exits whose page was being fetched.
    pub waited: u64,
    /// Pages asked for again, after a wait.
    pub asked_again: u64,
    /// Exits with nothing missing, answered by entering again. With attributes,
    /// those on whose page another vCPU had ended the exits.
    pub reentered: u64,
    /// Changes of memory attributes, of up to 2 MiB each.
    pub cleared: u64,
    /// Pages installed whose attribute another vCPU, at a neighbour, changed before
    /// the installer could.
    pub overtaken: u64,
    /// Pages mapped for the vCPU before it entered the guest, where KVM can do that.
    pub mapped: u64,
    /// Entries with the view readable.
    pub fallbacks: u64,
}

impl std::ops::Add for ExitStats {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            exits: self.exits + other.exits,
            installed: self.installed + other.installed,
            waited: self.waited + other.waited,
            asked_again: self.asked_again + other.asked_again,
            reentered: self.reentered + other.reentered,
            cleared: self.cleared + other.cleared,
            overtaken: self.overtaken + other.overtaken,
            mapped: self.mapped + other.mapped,
            fallbacks: self.fallbacks + other.fallbacks,
        }
    }
}
