//! Doors to the memory of the VMs that this daemon serves: one for each, in a
//! directory, named by the VMM's process id. Whoever starts a VM's back-ends
//! gives each of them the one door it needs. With a keeper, doors outlive the process
//! that opened them: its successor has them and whoever has come, and finds in the
//! VMM's socket what memory it is.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{error, info, warn};

use super::connection::Connection;
use super::{Daemon, DaemonError, session_of, unlisten};
use crate::attach::{
    Custody, Entrance, Kept, LeftDoor, QueueOwner, Resumed, ShareError, SharedRegion, Stock, Wares,
};
use crate::handshake::{Handshake, InMemfd};
use crate::reads::MemoryId;
use crate::served::Served;
use crate::worker::Teller;

/// The most memories of one process that have doors.
const MAX_DOORS: u64 = 64;

/// Where a door is to be, and what there was of it.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    /// In its name.
    number: u64,
    /// Who holds it for whoever takes over, if there is somebody.
    custody: Option<Custody>,
    left: Option<LeftDoor>,
}

/// A door that is about to be opened.
#[derive(Debug)]
pub(super) struct Opening {
    place: Place,
    wares: Result<Wares, String>,
    resumed: Resumed,
}

/// Has `served` answer those who will come by a door, and those who came to another
/// process. Where there is nothing that other processes could map, the door will say
/// so.
pub(super) fn prepare(
    mut place: Place,
    served: &mut Served,
    worker: &Teller,
    handshake: &Handshake,
    memfds: Vec<OwnedFd>,
    source_len: u64,
) -> Opening {
    let resumed = Resumed::default();
    if handshake.memfds.is_empty() {
        let why = "this VM's memory is its VMM's own: a userfaultfd came without memfds, and no \
                   other process can map such memory. Have the VMM keep guest memory in memfds, \
                   and pass them in its handshake";
        return Opening { place, wares: Err(why.into()), resumed };
    }
    let (queue, resumed) = match place.take_up() {
        Ok(taken) => taken,
        Err(why) => {
            warn!("the memory is served to its VMM alone: its fault queue: {why}");
            return Opening { place, wares: Err(why.to_string()), resumed };
        }
    };
    let wares = share(served, worker, handshake, memfds, source_len, queue);
    let wares = wares.map_err(|why| {
        warn!("the memory is served to its VMM alone: {why}");
        format!("this VM's memory cannot be had by others: {why}")
    });
    Opening { place, wares, resumed }
}

fn share(
    served: &mut Served,
    worker: &Teller,
    handshake: &Handshake,
    memfds: Vec<OwnedFd>,
    source_len: u64,
    queue: QueueOwner,
) -> Result<Wares, ShareError> {
    let memfds: Vec<Arc<OwnedFd>> = memfds.into_iter().map(Arc::new).collect();
    let region = |at: &InMemfd| {
        let memfd = memfds.get(at.memfd).cloned();
        Some(SharedRegion { gpa: at.gpa, memfd: memfd?, offset: at.offset })
    };
    let regions: Option<Vec<SharedRegion>> = handshake.memfds.iter().map(region).collect();
    let regions = regions.ok_or_else(|| io::Error::other("a memfd has not come"))?;
    let stock = Stock {
        memory: served.id(),
        worker: worker.clone(),
        slots: &handshake.slots,
        source_len,
        map: served.map(),
    };
    let (wares, reader, table) = Wares::new(&stock, &regions, queue)?;
    served.open(reader, table);
    Ok(wares)
}

impl Place {
    /// The fault queue, and whatever else the door goes on with: another process's, or
    /// new.
    fn take_up(&mut self) -> io::Result<(QueueOwner, Resumed)> {
        match self.left.take().map(|left| left.take_up(&self.path)) {
            Some(Ok(left)) => return Ok(left),
            Some(Err(why)) => {
                warn!("those who took part must come again: their fault queue: {why}");
                self.custody.iter().for_each(Custody::shut);
            }
            None => {}
        }
        Ok((QueueOwner::new()?, Resumed::default()))
    }
}

impl Opening {
    /// Opens it. What fails is logged: the VM is served in any case.
    pub(super) fn open(self) -> Option<Entrance> {
        let Self { place: Place { path, number, custody, .. }, wares, resumed } = self;
        let is_shared = wares.is_ok();
        let kept = custody.map(|custody| Kept { custody, number, resumed });
        match Entrance::open(&path, wares, kept) {
            Ok(door) => {
                if is_shared {
                    info!(door = %path.display(), "other processes may take part");
                }
                Some(door)
            }
            Err(why) => {
                error!("no other process can take part: {why}");
                None
            }
        }
    }
}

/// That doors can be opened in a directory.
pub(super) fn check(directory: &Path) -> Result<(), DaemonError> {
    let problem = match std::fs::metadata(directory) {
        Ok(metadata) if metadata.is_dir() => return Ok(()),
        Ok(_) => "it is no directory; doors need one of their own".into(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            "the directory does not exist; create it first".into()
        }
        Err(error) => error.to_string(),
    };
    Err(DaemonError::Socket { path: directory.into(), problem })
}

impl Daemon {
    /// Where the door to a peer's next memory is to be, if there shall be one.
    pub(super) fn next_door(&self, id: u64) -> Option<Place> {
        let directory = self.config.attach.as_deref()?;
        let connection = self.connections.get(&id)?;
        let doors = || self.connections.values().flat_map(Connection::doors);
        let mut names = (1..=MAX_DOORS).map(|n| (n, path_of(directory, connection.pid(), n)));
        let (number, path) = names.find(|(_, path)| !doors().any(|door| door.path() == path))?;
        let custody = self.front.custody(session_of(id), connection.next_memory(id));
        Some(Place { path, number, custody, left: None })
    }

    /// Has a memory that was taken over answer those who come to its door, and those
    /// who have come.
    pub(super) fn reopen(
        &mut self,
        id: u64,
        served: &mut Served,
        worker: usize,
    ) -> Option<Opening> {
        let memory = served.id();
        let place = self.same_door(id, memory);
        let connection = self.connections.get_mut(&id)?;
        let Some(place) = place else {
            connection.shut_left_door(self.front.custody(session_of(id), memory), memory);
            return None;
        };
        let Some((handshake, memfds)) = connection.handed_over(id, memory) else {
            error!("what a VM handed over is not to be found: no other process can take part");
            return None;
        };
        let to = self.workers[worker].teller();
        Some(prepare(place, served, to, &handshake, memfds, self.config.source.len()))
    }

    /// The place of a memory's door that another process had opened, or the next.
    fn same_door(&mut self, id: u64, memory: MemoryId) -> Option<Place> {
        let directory = self.config.attach.clone()?;
        let connection = self.connections.get_mut(&id)?;
        let Some(left) = connection.take_left_door(memory) else {
            let place = self.next_door(id)?;
            return Some(Place { custody: self.front.custody(session_of(id), memory), ..place });
        };
        let number = left.number;
        let path = path_of(&directory, connection.pid(), number);
        if let Some(old) = left.directory().filter(|old| *old != directory) {
            unlisten(&path_of(&old, connection.pid(), number));
        }
        let custody = self.front.custody(session_of(id), memory);
        Some(Place { path, number, custody, left: Some(left) })
    }
}

impl Connection {
    /// A door that another process had opened is not wanted any more.
    fn shut_left_door(&mut self, custody: Option<Custody>, memory: MemoryId) {
        let Some(left) = self.take_left_door(memory) else { return };
        info!("other processes may take part no longer: there is no --attach");
        if let Some(old) = left.directory() {
            unlisten(&path_of(&old, self.pid(), left.number));
        }
        custody.iter().for_each(Custody::shut);
    }
}

/// Where the door of that number to a process's memories is.
fn path_of(directory: &Path, pid: i32, number: u64) -> PathBuf {
    match number {
        1 => directory.join(format!("{pid}.sock")),
        n => directory.join(format!("{pid}-{n}.sock")),
    }
}
