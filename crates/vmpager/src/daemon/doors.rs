//! Doors to the memory of the VMs that this daemon serves: one for each, in a
//! directory, named by the VMM's process id. Whoever starts a VM's back-ends
//! gives each of them the one door it needs.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{error, info, warn};

use super::connection::Connection;
use super::{Daemon, DaemonError};
use crate::attach::{Entrance, ShareError, SharedRegion, Stock, Wares};
use crate::handshake::{Handshake, InMemfd};
use crate::served::Served;
use crate::worker::Teller;

/// The most memories of one process that have doors.
const MAX_DOORS: u32 = 64;

/// A door that is about to be opened.
#[derive(Debug)]
pub(super) struct Opening {
    path: PathBuf,
    wares: Result<Wares, String>,
}

/// Has `served` answer those who will come by a door. Where there is nothing
/// that other processes could map, the door will say so.
pub(super) fn prepare(
    path: PathBuf,
    served: &mut Served,
    worker: &Teller,
    handshake: &Handshake,
    memfds: Vec<OwnedFd>,
    source_len: u64,
) -> Opening {
    if handshake.memfds.is_empty() {
        let why = "this VM's memory is its VMM's own: a userfaultfd came without memfds, and no \
                   other process can map such memory. Have the VMM keep guest memory in memfds, \
                   and pass them in its handshake";
        return Opening { path, wares: Err(why.into()) };
    }
    let wares = share(served, worker, handshake, memfds, source_len);
    let wares = wares.map_err(|why| {
        warn!("the memory is served to its VMM alone: {why}");
        format!("this VM's memory cannot be had by others: {why}")
    });
    Opening { path, wares }
}

fn share(
    served: &mut Served,
    worker: &Teller,
    handshake: &Handshake,
    memfds: Vec<OwnedFd>,
    source_len: u64,
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
    let (wares, reader, table) = Wares::new(&stock, &regions)?;
    served.open(reader, table);
    Ok(wares)
}

impl Opening {
    /// Opens it. What fails is logged: the VM is served in any case.
    pub(super) fn open(self) -> Option<Entrance> {
        let is_shared = self.wares.is_ok();
        match Entrance::open(&self.path, self.wares) {
            Ok(door) => {
                if is_shared {
                    info!(door = %self.path.display(), "other processes may take part");
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
    pub(super) fn next_door(&self, id: u64) -> Option<PathBuf> {
        let directory = self.config.attach.as_deref()?;
        let pid = self.connections.get(&id)?.pid();
        let names = (1..=MAX_DOORS).map(|n| match n {
            1 => format!("{pid}.sock"),
            n => format!("{pid}-{n}.sock"),
        });
        let mut paths = names.map(|name| directory.join(name));
        let doors = || self.connections.values().flat_map(Connection::doors);
        paths.find(|path| !doors().any(|door| door.path() == path))
    }
}
