//! Those who wait for a page, but not on the memory's own userfaultfd: other
//! processes that map the same memory, by userfaultfds of theirs or through the
//! fault queue.
//!
//! Shared memory lies in a file of pages (shmem), which every process maps. A
//! missing page is put into the file by `UFFDIO_COPY` into this process's own
//! mapping: whole, or not at all. From then on others find it there by
//! themselves, without a message. But the kernel wakes only those who wait on
//! the userfaultfd that was asked; so whoever came by way of another one is
//! remembered here until the page is in place, and then woken by that one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use tracing::{error, warn};
use vmpager_core::queue::Taken;
use vmpager_core::{Content, Hva, MapSlot, PageRun, PageSize, SlotSet};
use vmpager_sys::uffd::{Features, Message, Messages, Stop, Userfaultfd};

use super::install::{Put, PutEnd};
use super::{Lost, Pending, Served};
use crate::attach::FaultReader;
use crate::kill;

/// Names a view of one memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ViewId(pub(crate) u64);

/// Another process's mapping of the memory.
#[derive(Debug)]
pub(crate) struct View {
    id: ViewId,
    uffd: Userfaultfd,
    /// The slots served, at that process's addresses.
    slots: SlotSet,
    /// It was seen to be of the memory's own file: pages may be installed
    /// through it.
    is_seen: bool,
    /// It cannot be read any more.
    broken: bool,
}

impl View {
    /// A view whose faults come by `uffd`.
    ///
    /// # Errors
    ///
    /// If the userfaultfd does not tell of removals.
    pub(crate) fn new(
        id: ViewId,
        uffd: Userfaultfd,
        slots: SlotSet,
        is_seen: bool,
    ) -> Result<Self, String> {
        match uffd.features().contains(Features::EVENT_REMOVE) {
            true => Ok(Self { id, uffd, slots, is_seen, broken: false }),
            false => Err("the userfaultfd was made without UFFD_FEATURE_EVENT_REMOVE".into()),
        }
    }

    fn address(&self, run: PageRun) -> (u64, u64) {
        let (hva, range) = self.slots.locate(run);
        (hva.0, range.len)
    }
}

/// Who waits for a page.
#[derive(Debug)]
enum Waits {
    View(ViewId),
    Queue(Taken),
}

/// Everybody outside.
#[derive(Debug, Default)]
pub(super) struct Outside {
    views: Vec<View>,
    queue: Option<(FaultReader, Vec<MapSlot>)>,
    waiting: Vec<(Waits, u64)>,
    /// The view whose fault is being served.
    pub(super) serving: Option<ViewId>,
    /// vCPUs exit on pages that are not in the VMM's own page tables.
    pub(super) exits: bool,
    /// Nobody may write.
    pub(super) frozen: bool,
}

impl Outside {
    /// Whether the memory is shared, and others may come at any time.
    pub(super) fn is_open(&self) -> bool {
        self.queue.is_some()
    }
}

/// ESRCH.
const GONE: i32 = rustix::io::Errno::SRCH.raw_os_error();

/// The most faults taken from the queue at a time.
const BATCH: usize = 64;

/// How long a freeze goes on trying while the memory's layout keeps changing.
const FREEZE_LIMIT: Duration = Duration::from_secs(2);

impl Served {
    /// Shares the memory: faults come by the queue, too, from now on.
    pub(crate) fn open(&mut self, queue: FaultReader, slots: Vec<MapSlot>) {
        self.outside.queue = Some((queue, slots));
    }

    /// Serves a view, too.
    ///
    /// # Errors
    ///
    /// If it cannot be kept from writing while the memory is frozen, or its
    /// addresses are none.
    pub(crate) fn add_view(&mut self, view: View) -> io::Result<()> {
        if self.outside.frozen {
            set_protection(&view.uffd, &view.slots, true)?;
        }
        // Faults that another pager has read, which served this view before, do
        // not come again by themselves.
        for slot in view.slots.iter() {
            view.uffd.wake(slot.hva.0, slot.len)?;
        }
        self.outside.views.push(view);
        Ok(())
    }

    /// Serves a view no longer. Returns it, to be unwatched.
    pub(crate) fn remove_view(&mut self, id: ViewId) -> Option<View> {
        self.outside.waiting.retain(|(waits, _)| !matches!(waits, Waits::View(of) if *of == id));
        let at = self.outside.views.iter().position(|view| view.id == id)?;
        let view = self.outside.views.swap_remove(at);
        // A process that lives on may be served otherwise from now on: those of
        // it that wait fault again.
        for slot in view.slots.iter() {
            let _ = view.uffd.wake(slot.hva.0, slot.len);
        }
        Some(view)
    }

    /// Serves views no longer whose process made their userfaultfd blocking: it
    /// would seem to have something to say for ever. Returns them, to be
    /// unwatched.
    pub(crate) fn remove_blocking_views(&mut self) -> Vec<View> {
        let blocking = |view: &View| {
            let flags = rustix::fs::fcntl_getfl(&view.uffd);
            flags.is_ok_and(|flags| !flags.contains(rustix::fs::OFlags::NONBLOCK))
        };
        let ids: Vec<ViewId> =
            self.outside.views.iter().filter(|view| blocking(view)).map(|view| view.id).collect();
        ids.into_iter().filter_map(|id| self.remove_view(id)).collect()
    }

    /// The descriptors that are readable while somebody outside waits.
    pub(crate) fn outside_events(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let queue = self.outside.queue.iter().map(|(queue, _)| queue.as_fd());
        self.outside.views.iter().map(AsFd::as_fd).chain(queue)
    }

    /// Reads what those outside want, as [`read_events`](Self::read_events)
    /// does what this process's threads want.
    pub(super) fn read_outside(&mut self) -> Result<(), Lost> {
        for at in 0..self.outside.views.len() {
            self.read_view(at)?;
        }
        for taken_so_far in 1..=BATCH {
            let Some((queue, slots)) = &self.outside.queue else { break };
            let Some(taken) = queue.take() else { break };
            if taken_so_far == BATCH {
                self.arrival.left_some();
            }
            let wanted = page_of(slots, taken.gfn);
            match wanted.filter(|page| !self.engine.map().is_present(*page)) {
                Some(page) => {
                    self.counters.faults_queued += 1;
                    self.outside.waiting.push((Waits::Queue(taken), page));
                    self.demand(page, None);
                }
                // There meanwhile, or no page of ours.
                None => queue.commit(&taken),
            }
        }
        Ok(())
    }

    fn read_view(&mut self, at: usize) -> Result<(), Lost> {
        let view = &mut self.outside.views[at];
        if view.broken {
            return Ok(());
        }
        self.record.reads_of(Some(&view.slots));
        if let Err(error) = view.uffd.read(&mut self.messages) {
            warn!("reading the userfaultfd of another process: {error}; it is served no longer");
            view.broken = true;
        }
        if self.messages.len() == Messages::BATCH {
            self.arrival.left_some();
        }
        kill::point("view read");
        let messages: Vec<Message> = self.messages.drain().collect();
        for message in messages {
            let view = &self.outside.views[at];
            match message {
                Message::Fault { address, flags, .. } => {
                    let Some(page) = view.slots.page_at(Hva(address)) else {
                        warn!(
                            address,
                            "a fault outside every region of a view; its thread is held"
                        );
                        continue;
                    };
                    if flags & Message::PROTECTED != 0 {
                        let (hva, len) = view.address(PageRun::new(page, 1));
                        if !self.outside.frozen {
                            let_write(&view.uffd, hva, len);
                        }
                        continue;
                    }
                    self.counters.faults_attached += 1;
                    let id = view.id;
                    self.outside.waiting.push((Waits::View(id), page));
                    self.demand(page, Some(id));
                }
                Message::Remove { start, end, .. } => {
                    let slots = view.slots.clone();
                    self.removed_in_view(&slots, Hva(start), Hva(end));
                }
                Message::Remap { .. } => moved_view(),
                // Closing it would let the child read zeroes (trap 7).
                Message::Fork { child } => self.children.push(child),
                Message::Unknown(event) => warn!(event, "unknown userfaultfd event"),
            }
        }
        kill::point("view applied");
        self.messages.clear();
        self.record.reads_of(None);
        Ok(())
    }

    /// Pages were given back by a process that has these slots.
    pub(super) fn removed_in_view(&mut self, slots: &SlotSet, start: Hva, end: Hva) {
        for run in slots.runs_within(start, end) {
            let (hva, len) = self.address(run);
            self.counters.pages_removed += self.engine.removed(hva, Hva(hva.0 + len));
        }
    }

    /// Somebody here found a page write-protected: unless the memory is frozen,
    /// that has been lifted meanwhile.
    pub(super) fn let_write(&self, hva: Hva) {
        let page = self.engine.slots().page_at(hva);
        if let Some(page) = page.filter(|_| !self.outside.frozen) {
            let (hva, len) = self.address(PageRun::new(page, 1));
            let_write(&self.uffd, hva.0, len);
        }
    }

    /// Has a page brought as if this process had missed it.
    fn demand(&mut self, page: u64, view: Option<ViewId>) {
        self.counters.faults += 1;
        let (hva, _) = self.address(PageRun::new(page, 1));
        self.faults.push_back(Pending { hva, view, since: self.arrival.since() });
    }

    /// From now on vCPUs exit on missing pages.
    pub(crate) fn expect_exits(&mut self) {
        self.outside.exits = true;
    }

    /// Installs a run that has just been claimed for a fault of a view through
    /// that view: one call installs, maps and wakes there, where else the page
    /// would be installed here, the view be woken by a second call, and fault
    /// once more to map it. Nobody can have joined so fresh a claim, so that no
    /// other waiter relies on this wake. None if that is not the way.
    pub(super) fn put_through_view(
        &mut self,
        run: PageRun,
        src: usize,
    ) -> Result<Option<PutEnd>, Lost> {
        let Outside { views, serving, frozen: false, exits: false, .. } = &self.outside else {
            return Ok(None);
        };
        let view = views.iter().find(|view| Some(view.id) == *serving && view.is_seen);
        let Some(view) = view else { return Ok(None) };
        let ((hva, len), id) = (view.address(run), view.id);
        let bytes = view.uffd.copy(hva, src, len).bytes;
        // Why it went no further is found out in the ordinary way.
        let done = PageRun::new(run.first, bytes >> PageSize::Size4K.shift());
        if done.count == 0 {
            return Ok(None);
        }
        self.outside.waiting.retain(|(waits, page)| {
            let is_of_view = matches!(waits, Waits::View(of) if *of == id);
            !(is_of_view && done.pages().contains(page))
        });
        self.installed(done);
        let rest = PageRun::new(done.end(), run.count - done.count);
        let src = src + usize::try_from(bytes).unwrap_or(usize::MAX);
        let end = match rest.count {
            0 => PutEnd { pages: 0, rest: None },
            _ => self.put(rest, Put::Bytes(src))?,
        };
        Ok(Some(PutEnd { pages: done.count + end.pages, rest: end.rest }))
    }

    /// An installer beside us brings a page: it shall tell, for those outside.
    pub(super) fn await_installers(&mut self) {
        if let Some(shared) = &self.shared
            && self.is_awaited_outside()
        {
            shared.set_awaited(true);
            // It may have been faster.
            self.look_outside();
        }
    }

    /// Another installer may have brought what those outside wait for.
    pub(crate) fn look_outside(&mut self) {
        let map = self.engine.map();
        let there = |page: u64| map.is_present(page).then_some(PageRun::new(page, 1));
        let runs: Vec<_> =
            self.outside.waiting.iter().filter_map(|(_, page)| there(*page)).collect();
        runs.into_iter().for_each(|run| self.let_go(run));
        if let Some(shared) = &self.shared {
            shared.set_awaited(self.is_awaited_outside());
        }
    }

    /// Whether somebody outside waits for a page.
    pub(super) fn is_awaited_outside(&self) -> bool {
        !self.outside.waiting.is_empty()
    }

    /// Lets those outside look again who wait for a page of a run.
    pub(super) fn let_go(&mut self, run: PageRun) {
        let mut at = 0;
        while let Some((_, page)) = self.outside.waiting.get(at) {
            if !run.pages().contains(page) {
                at += 1;
                continue;
            }
            let (waits, page) = self.outside.waiting.swap_remove(at);
            match waits {
                Waits::View(id) => self.let_look(id, PageRun::new(page, 1)),
                Waits::Queue(taken) => {
                    if let Some((queue, _)) = &self.outside.queue {
                        queue.commit(&taken);
                    }
                }
            }
        }
    }

    fn let_look(&self, id: ViewId, page: PageRun) {
        let Some(view) = self.outside.views.iter().find(|view| view.id == id) else { return };
        let (hva, len) = view.address(page);
        let map = self.engine.map();
        if map.content(page.first) == Content::Poisoned && !map.is_present(page.first) {
            // Poison is of one mapping: each view needs its own.
            match view.uffd.poison(hva, len).stop {
                None | Some(Stop::Gone) => return,
                // It is there already, of another thread: that is to be woken.
                Some(Stop::Present) => {}
                Some(stop) => {
                    error!("a page of another process cannot be poisoned ({stop:?}): held");
                    return;
                }
            }
        }
        // Fails only where nobody can wait either: the view is gone.
        let _ = view.uffd.wake(hva, len);
    }

    /// Poisons pages in every view, where they are absent.
    pub(super) fn poison_views(&self, run: PageRun) {
        for view in &self.outside.views {
            for page in run.pages() {
                let (hva, len) = view.address(PageRun::new(page, 1));
                if view.uffd.poison(hva, len).stop == Some(Stop::Gone) {
                    break;
                }
            }
        }
    }

    /// Keeps everybody from writing, in every process, or lets them again. When
    /// this returns `Ok`, whoever wrote has written, and whoever writes waits.
    ///
    /// # Errors
    ///
    /// If the kernel does not protect this memory; then all may write.
    pub(crate) fn freeze(&mut self, frozen: bool) -> Result<(), String> {
        let until = Instant::now() + FREEZE_LIMIT;
        // Installers beside us look at this, within the gate.
        let shared = self.shared.clone();
        if let Some(shared) = &shared {
            let _gate = shared.applying();
            shared.set_frozen(frozen);
        }
        self.outside.frozen = frozen;
        while let Err(error) = self.protect_everywhere(frozen) {
            let changing = error.kind() == io::ErrorKind::WouldBlock;
            let read = self.read_events().is_ok();
            if changing && read && Instant::now() < until {
                std::thread::yield_now();
            } else if frozen {
                // A half-frozen memory would be worse than none.
                let thawed = self.freeze(false);
                let rest = thawed.err().map_or_else(String::new, |why| format!("; and then {why}"));
                return Err(format!("protecting the memory against writing: {error}{rest}"));
            } else {
                return Err(format!("letting the memory be written again: {error}"));
            }
        }
        Ok(())
    }

    fn protect_everywhere(&self, frozen: bool) -> io::Result<()> {
        set_protection(&self.uffd, self.engine.slots(), frozen)?;
        for view in &self.outside.views {
            match set_protection(&view.uffd, &view.slots, frozen) {
                // A process that has ended writes no more.
                Err(error) if error.raw_os_error() == Some(GONE) => {}
                other => other?,
            }
        }
        Ok(())
    }
}

pub(super) fn moved_view() {
    warn!("another process moved its view of guest memory; what moved is not served");
}

impl AsFd for View {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

fn set_protection(uffd: &Userfaultfd, slots: &SlotSet, on: bool) -> io::Result<()> {
    for slot in slots.iter() {
        if on {
            uffd.register_protection(slot.hva.0, slot.len)?;
            uffd.protect(slot.hva.0, slot.len)?;
        } else {
            uffd.unprotect(slot.hva.0, slot.len)?;
        }
    }
    Ok(())
}

/// Lets somebody write who found a page protected that is so no longer.
fn let_write(uffd: &Userfaultfd, hva: u64, len: u64) {
    if let Err(error) = uffd.unprotect(hva, len) {
        warn!("lifting the write protection of a page at {hva:#x}: {error}");
    }
}

/// The page of a guest frame number, in base pages.
fn page_of(slots: &[MapSlot], gfn: u64) -> Option<u64> {
    let gpa = gfn << 12;
    slots.iter().find_map(|slot| {
        let offset = gpa.checked_sub(slot.gpa)? / slot.page_size;
        (offset < slot.pages).then(|| slot.first_page + offset)
    })
}
