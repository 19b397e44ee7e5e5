//! Who brings the pages that a vCPU exits on.

use std::sync::Arc;
use std::time::Instant;

use vmpager::Installer;
use vmpager::attach::RemoteInstaller;
use vmpager::core::{Hva, PageInstaller, Resolution, WatchedInstaller, Watcher};
use vmpager_sys::memory::Mapping;
use vmpager_sys::uffd::Userfaultfd;

use crate::PAGE_SIZE;

/// What one vCPU's thread brings pages by.
#[derive(Debug)]
pub(crate) enum Bringer {
    /// The pager of this process.
    Pager(Installer),
    /// A pager in another process.
    Remote(RemoteInstaller),
    /// Something that does no more than it must.
    Oracle(Oracle),
}

impl Bringer {
    /// Waits for a page that is being fetched, until `until` at the latest. False if
    /// it is still being fetched then.
    pub(crate) fn wait(&self, hva: Hva, until: Instant) -> bool {
        match self {
            Self::Pager(installer) => installer.wait(hva, until),
            Self::Remote(installer) => installer.wait(hva, until),
            Self::Oracle(_) => true,
        }
    }
}

impl PageInstaller for Bringer {
    fn is_present(&self, hva: Hva) -> bool {
        match self {
            Self::Pager(installer) => installer.is_present(hva),
            Self::Remote(installer) => installer.is_present(hva),
            Self::Oracle(oracle) => oracle.is_present(hva),
        }
    }

    fn is_complete(&self) -> bool {
        match self {
            Self::Pager(installer) => installer.is_complete(),
            Self::Remote(installer) => installer.is_complete(),
            Self::Oracle(_) => false,
        }
    }

    fn resolve(&mut self, hva: Hva) -> Resolution {
        match self {
            Self::Pager(installer) => installer.resolve(hva),
            Self::Remote(installer) => installer.resolve(hva),
            Self::Oracle(oracle) => oracle.resolve(hva),
        }
    }
}

/// Guests are told of faults only where the pager of this process brings pages: the
/// others are not watched.
impl WatchedInstaller for Bringer {
    fn is_settled(&self, hva: Hva) -> bool {
        match self {
            Self::Pager(installer) => installer.is_settled(hva),
            Self::Remote(_) | Self::Oracle(_) => true,
        }
    }

    fn watch(&self, watcher: Arc<dyn Watcher>) {
        match self {
            Self::Pager(installer) => installer.watch(watcher),
            Self::Remote(_) | Self::Oracle(_) => {}
        }
    }
}

/// For benchmarks: copies a page from a mapped file, and that is all. Keeps no map of
/// pages, so that no other thread may bring them, and each is asked for once.
#[derive(Clone, Debug)]
pub(crate) struct Oracle {
    uffd: Arc<Userfaultfd>,
    file: Arc<Mapping>,
    memory: u64,
    last: Option<Hva>,
}

impl Oracle {
    /// For memory that is registered with `uffd`, from a file that is mapped.
    pub(crate) fn new(uffd: Userfaultfd, file: Mapping, memory: &Mapping) -> Self {
        let (uffd, file) = (Arc::new(uffd), Arc::new(file));
        Self { uffd, file, memory: memory.hva(), last: None }
    }

    fn is_present(&self, hva: Hva) -> bool {
        self.last == Some(hva)
    }

    /// A page that is there already is told by the kernel.
    pub(crate) fn resolve(&mut self, hva: Hva) -> Resolution {
        let from = self.file.hva() + (hva.0 - self.memory);
        let copied = self.uffd.copy(hva.0, usize::try_from(from).unwrap_or(0), PAGE_SIZE);
        self.last = Some(hva);
        match copied.stop {
            None => Resolution::Installed,
            Some(_) => Resolution::Present,
        }
    }
}
