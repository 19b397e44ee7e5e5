//! A pager whose memory other processes may have, and those who come.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use vmpager::{Attached, Door, GuestRange, NeighbourPolicy, Pager, SharedRegion};
use vmpager_store::FaultySource;
use vmpager_sys::memory::Mapping;

use super::{PAGE, faulty};

/// A pager with memory in a memfd, and a door to it.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) memory: Arc<Mapping>,
    pub(crate) pager: Pager,
    pub(crate) door: Door,
    pub(crate) source: Arc<FaultySource>,
    pub(crate) path: PathBuf,
    _dir: tempfile::TempDir,
}

pub(crate) fn memfd(pages: usize) -> Arc<OwnedFd> {
    Arc::new(vmpager_sys::memfd::sealed("guest", (pages * PAGE) as u64).unwrap())
}

pub(crate) fn home(pages: usize) -> Home {
    home_with(pages, NeighbourPolicy::Off)
}

pub(crate) fn home_with(pages: usize, neighbours: NeighbourPolicy) -> Home {
    let memfd = memfd(pages);
    let source = faulty(pages);
    let memory = Arc::new(Mapping::file_shared(memfd.as_fd(), pages * PAGE).unwrap());
    let pager = Pager::builder(source.clone())
        .region(&GuestRange::of_mapping(&memory), 0)
        .neighbours(neighbours)
        .start()
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("door");
    let region = SharedRegion { gpa: 0, memfd, offset: 0 };
    let door = pager.share(&path, &[region]).unwrap();
    Home { memory, pager, door, source, path, _dir: dir }
}

pub(crate) fn view(home: &Home) -> (Attached, Arc<Mapping>) {
    let attached = Attached::connect(&home.path).unwrap();
    let memory = attached.regions()[0].memory.clone();
    (attached, memory)
}
