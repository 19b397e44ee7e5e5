//! What a worker shares with the threads that install pages beside it
//! ([`Installer`](crate::installer::Installer)): the pages, the userfaultfd,
//! a gate for removals, and a way to wait.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use std::time::Instant;

use vmpager_core::{Content, Hva, Pages, Watcher};
use vmpager_sys::shared::SharedWords;
use vmpager_sys::uffd::Userfaultfd;

/// Whether a memory is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Serving {
    Yes,
    /// No longer: all of it is in place, and registered no more.
    Filled,
    /// No longer, and some of it may be missing for ever.
    Ended,
}

/// One memory, as its worker and its installers see it.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) pages: Arc<Pages<SharedWords>>,
    pub(crate) uffd: Arc<Userfaultfd>,
    /// See [`vmpager_core::pages`].
    gate: RwLock<()>,
    /// A [`Serving`].
    serving: AtomicU8,
    /// Nobody may write; changed within the gate, held alone.
    frozen: AtomicBool,
    /// Other processes wait for pages, or may.
    awaited: AtomicBool,
    /// What installers have brought: pages from the source, their bytes, zero
    /// pages.
    brought: [AtomicU64; 3],
    waiters: AtomicU32,
    sleep: Mutex<()>,
    changed: Condvar,
    /// Who waits without sleeping, and whether there is anybody.
    watchers: RwLock<Vec<Arc<dyn Watcher>>>,
    watched: AtomicBool,
}

impl Shared {
    pub(crate) fn new(pages: Arc<Pages<SharedWords>>, uffd: Arc<Userfaultfd>) -> Self {
        Self {
            pages,
            uffd,
            gate: RwLock::new(()),
            serving: AtomicU8::new(Serving::Yes as u8),
            frozen: AtomicBool::new(false),
            awaited: AtomicBool::new(false),
            brought: Default::default(),
            waiters: AtomicU32::new(0),
            sleep: Mutex::new(()),
            changed: Condvar::new(),
            watchers: RwLock::default(),
            watched: AtomicBool::new(false),
        }
    }

    /// Held from the look at a claim to the end of the install.
    pub(crate) fn installing(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held from before events are read until they are applied.
    pub(crate) fn applying(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_frozen(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::Release);
    }

    /// Whether pages must be installed write-protected, which is left to the
    /// worker. To be asked within the gate.
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Acquire)
    }

    /// Says whether others than this process's threads wait for pages.
    pub(crate) fn set_awaited(&self, awaited: bool) {
        self.awaited.store(awaited, Ordering::SeqCst);
    }

    /// Whether the worker must hear of pages installed. To be asked after they
    /// were published.
    pub(crate) fn is_awaited(&self) -> bool {
        fence(Ordering::SeqCst);
        self.awaited.load(Ordering::SeqCst)
    }

    /// An installer has brought a page of so many bytes; None for a zero page.
    pub(crate) fn count_brought(&self, bytes: Option<u64>) {
        let [pages, of_source, zeroes] = &self.brought;
        match bytes {
            Some(bytes) => {
                pages.fetch_add(1, Ordering::Relaxed);
                of_source.fetch_add(bytes, Ordering::Relaxed);
            }
            None => {
                zeroes.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// What installers have brought so far: pages from the source, their bytes,
    /// zero pages.
    pub(crate) fn brought(&self) -> [u64; 3] {
        self.brought.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    pub(crate) fn serving(&self) -> Serving {
        match self.serving.load(Ordering::Acquire) {
            0 => Serving::Yes,
            1 => Serving::Filled,
            _ => Serving::Ended,
        }
    }

    pub(crate) fn end(&self, serving: Serving) {
        self.serving.store(serving as u8, Ordering::Release);
        self.changed();
    }

    /// Pages changed their state: whoever waits shall look again.
    pub(crate) fn changed(&self) {
        // Pairs with the fence in `wait`: either this sees the waiter, or the
        // waiter sees the change.
        fence(Ordering::SeqCst);
        if self.waiters.load(Ordering::Relaxed) > 0 {
            drop(self.locked());
            self.changed.notify_all();
        }
        if self.watched.load(Ordering::Relaxed) {
            let watchers = self.watchers.read().unwrap_or_else(PoisonError::into_inner);
            watchers.iter().for_each(|watcher| watcher.changed(&|hva| self.is_settled_at(hva)));
        }
    }

    /// Tells somebody of all changes from now on.
    pub(crate) fn watch(&self, watcher: Arc<dyn Watcher>) {
        self.watchers.write().unwrap_or_else(PoisonError::into_inner).push(watcher);
        self.watched.store(true, Ordering::SeqCst);
    }

    /// Whether asking for the page at this address again may have another answer.
    pub(crate) fn is_settled_at(&self, hva: Hva) -> bool {
        self.pages.slots().page_at(hva).is_none_or(|page| self.is_settled(page))
    }

    /// Waits until a page is no longer being fetched, or `until`. False if it
    /// still is.
    pub(crate) fn wait(&self, page: u64, until: Instant) -> bool {
        self.waiters.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let mut guard = self.locked();
        let settled = loop {
            if self.is_settled(page) {
                break true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break false;
            }
            let woken = self.changed.wait_timeout(guard, left);
            guard = woken.unwrap_or_else(PoisonError::into_inner).0;
        };
        self.waiters.fetch_sub(1, Ordering::Relaxed);
        settled
    }

    fn locked(&self) -> MutexGuard<'_, ()> {
        self.sleep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether asking for the page again may have another answer.
    pub(crate) fn is_settled(&self, page: u64) -> bool {
        let map = self.pages.map();
        map.is_present(page)
            || map.content(page) != Content::Claimed
            || self.serving() != Serving::Yes
    }
}
