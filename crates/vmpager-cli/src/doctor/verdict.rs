//! What the findings add up to.

use serde::Serialize;
use vmpager_kvm::probe::KvmReport;
use vmpager_sys::probe::Host;

use linux_features::{EVENT_REMOVE, MISSING_HUGETLBFS};

/// The two features a verdict hangs on, as in `linux/userfaultfd.h`.
mod linux_features {
    pub(super) const EVENT_REMOVE: u32 = 1 << 3;
    pub(super) const MISSING_HUGETLBFS: u32 = 1 << 4;
}

/// Whether something can be run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Answer {
    /// It can.
    Yes,
    /// It can in part; the findings say which.
    Limited,
    /// It cannot.
    No,
}

impl Answer {
    fn of(condition: bool) -> Self {
        if condition { Self::Yes } else { Self::No }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::Limited => "limited",
            Self::No => "no",
        }
    }
}

/// What a demonstration or a test runs as its guest here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Guest {
    /// A VM.
    Kvm,
    /// Threads that touch memory as vCPUs would.
    Threads,
}

/// What this machine can run. The names are a contract with programs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Verdict {
    /// Memory that arrives when it is touched; limited where faults the kernel
    /// takes for a VM cannot be served, or removed pages not be seen.
    pub(super) on_demand_restore: Answer,
    /// The same for the memory of KVM guests.
    pub(super) kvm_guest_restore: Answer,
    /// The same for memory in hugetlb pages.
    pub(super) hugetlb_restore: Answer,
    /// Guests that give memory back (balloon, free-page reporting).
    pub(super) removed_pages: Answer,
    /// What plays the guest.
    pub(super) guest: Guest,
    /// Linux as a guest; limited where ring 0 is emulated.
    pub(super) linux_guests: Answer,
    /// Reads in the background by io_uring.
    pub(super) io_uring: Answer,
}

impl Verdict {
    pub(super) fn new(host: &Host, kvm: Option<&KvmReport>) -> Self {
        let uffd = &host.userfaultfd;
        let kernel_mode = uffd.features.is_ok() && uffd.kernel_mode();
        let removed = uffd.has(EVENT_REMOVE);
        let has_pool = |pool: &vmpager_sys::probe::HugePool| pool.total + pool.overcommit > 0;
        let guest = if kvm.is_some() && kernel_mode { Guest::Kvm } else { Guest::Threads };
        Self {
            on_demand_restore: match uffd.features {
                Ok(_) if kernel_mode && removed => Answer::Yes,
                Ok(_) => Answer::Limited,
                Err(_) => Answer::No,
            },
            kvm_guest_restore: Answer::of(guest == Guest::Kvm),
            hugetlb_restore: if !uffd.has(MISSING_HUGETLBFS) {
                Answer::No
            } else if host.huge_pools.iter().any(has_pool) {
                Answer::Yes
            } else {
                Answer::Limited
            },
            removed_pages: Answer::of(removed),
            guest,
            linux_guests: match kvm {
                Some(kvm) if kvm.ring0_emulated() => Answer::Limited,
                Some(_) => Answer::Yes,
                None => Answer::No,
            },
            io_uring: Answer::of(host.io_uring.setup.is_ok()),
        }
    }

    /// The last line of the report.
    pub(super) fn sentence(&self) -> String {
        let guest = match self.guest {
            Guest::Kvm => "KVM",
            Guest::Threads => "threads in place of vCPUs",
        };
        let linux = match self.linux_guests {
            Answer::Limited => "slow or not at all",
            answer => answer.word(),
        };
        format!(
            "this machine can run: on-demand restore {}; of KVM guests: {}; of memory in hugetlb \
             pages: {}; with a balloon: {}; Linux guests: {linux}; io_uring: {}; demo with {guest}",
            self.on_demand_restore.word(),
            self.kvm_guest_restore.word(),
            self.hugetlb_restore.word(),
            self.removed_pages.word(),
            self.io_uring.word(),
        )
    }
}
