//! What a worker does for other processes that map a memory of its.

use std::os::fd::{AsFd, BorrowedFd};

use crossbeam_channel::Sender;
use rustix::event::epoll;
use tracing::{debug, error};
use vmpager_core::MapSlot;

use super::{Worker, watch};
use crate::attach::FaultReader;
use crate::reads::MemoryId;
use crate::served::{Served, View, ViewId};

/// What a worker is told about other processes. Where it cannot be done, since
/// the memory is served no longer, the sender is dropped.
#[derive(Debug)]
pub(crate) enum Sharing {
    /// Let other processes have this memory, and bring what they queue.
    Open(Box<(FaultReader, Vec<MapSlot>)>, Sender<Result<(), String>>),
    /// Serve another process's view of this memory.
    AddView(Box<View>, Sender<Result<(), String>>),
    /// A view is no more.
    RemoveView(ViewId),
    /// Keep everybody from writing, or let them again.
    Freeze(bool, Sender<Result<(), String>>),
    /// vCPUs exit on missing pages from now on.
    Exits,
    /// Pages were installed that other processes may wait for.
    Look,
}

impl Worker {
    pub(super) fn share(&mut self, id: MemoryId, what: Sharing) {
        let Self { memories, epoll, .. } = self;
        let Some(memory) = memories.get_mut(&id) else { return };
        let watched =
            |fd: BorrowedFd<'_>| watch(epoll, fd, id.0).map_err(|error| error.to_string());
        match what {
            Sharing::Open(it, to) => {
                let (queue, slots) = *it;
                let done = watched(queue.as_fd());
                if done.is_ok() {
                    memory.open(queue, slots);
                }
                let _ = to.send(done);
            }
            Sharing::AddView(view, to) => {
                let done = watched(view.as_fd()).and_then(|()| {
                    let added = memory.add_view(*view);
                    added.map_err(|error| format!("taking the view in: {error}"))
                });
                let _ = to.send(done);
            }
            Sharing::RemoveView(view) => {
                if let Some(view) = memory.remove_view(view) {
                    self.unwatch(view.as_fd());
                }
            }
            Sharing::Freeze(frozen, to) => drop(to.send(memory.freeze(frozen))),
            Sharing::Exits => memory.expect_exits(),
            Sharing::Look => memory.look_outside(),
        }
        self.note_retry(id);
    }

    /// Looks no longer at views whose process made their userfaultfd blocking.
    pub(super) fn unwatch_blocking_views(&mut self, id: MemoryId) {
        let memory = self.memories.get_mut(&id);
        for view in memory.map(Served::remove_blocking_views).unwrap_or_default() {
            error!("a process made the userfaultfd of its view blocking; it is served no longer");
            self.unwatch(view.as_fd());
        }
    }

    /// Looks at a descriptor no longer. The other end may hold it, too: closing
    /// it does not suffice.
    pub(super) fn unwatch(&self, fd: BorrowedFd<'_>) {
        if let Err(error) = epoll::delete(&self.epoll, fd) {
            debug!("unwatching a descriptor: {error}");
        }
    }
}
