//! The handler vmpager is measured against: one thread, one page per fault,
//! `poll`, `read`, `UFFDIO_COPY` from a mapping of the memory file. It is what
//! the example handlers in the field do, and speaks the same protocol.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use vmpager::core::{Hva, SlotSet};
use vmpager::handshake::{Inbox, Said};
use vmpager_sys::file_map::FileMap;
use vmpager_sys::peer::{Peer, recv_with_fds};
use vmpager_sys::uffd::{Message, Messages, Stop, Userfaultfd};

use crate::output;

/// Options of the hidden command `vmpager naive-handler`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct NaiveArgs {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    memory: PathBuf,
}

/// Serves one VM until it exits, then prints how many faults it had.
pub(crate) fn run(args: &NaiveArgs) -> anyhow::Result<()> {
    let file = File::open(&args.memory).context("opening the memory file")?;
    let map = FileMap::new(file.as_fd(), file.metadata()?.len())?;
    let beside = args.socket.with_extension("new");
    let listener = UnixListener::bind(&beside).context("binding the socket")?;
    std::fs::rename(&beside, &args.socket)?;
    let (socket, _) = listener.accept()?;
    let peer = Peer::of(&socket)?;
    let pidfd = peer.pidfd.context("pinning the peer")?;
    let mut inbox = Inbox::default();
    let mut fds: Vec<OwnedFd> = Vec::new();
    let slots = loop {
        if let Some(Said::Handshake(handshake)) = inbox.next_message()? {
            break SlotSet::new(&handshake.slots, map.len())?;
        }
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], None)?;
        let mut bytes = [0; 4096];
        let count = recv_with_fds(&socket, &mut bytes, &mut fds)?;
        inbox.push(&bytes[..count])?;
    };
    let uffd = Userfaultfd::adopt(fds.pop().context("a descriptor")?)?;
    let faults = serve(&uffd, &slots, &map, &pidfd)?;
    std::fs::remove_file(&args.socket).context("removing the socket")?;
    output::line(&faults.to_string())
}

fn serve(
    uffd: &Userfaultfd,
    slots: &SlotSet,
    map: &FileMap,
    pidfd: &OwnedFd,
) -> anyhow::Result<u64> {
    let mut messages = Messages::new();
    let mut faults = 0;
    loop {
        let mut fds = [PollFd::new(uffd, PollFlags::IN), PollFd::new(pidfd, PollFlags::IN)];
        poll(&mut fds, None)?;
        if !fds[0].revents().contains(PollFlags::IN) {
            return Ok(faults);
        }
        uffd.read(&mut messages)?;
        for message in messages.drain() {
            let Message::Fault { address, .. } = message else { continue };
            let page = slots.page_at(Hva(address)).context("a fault outside the regions")?;
            let (hva, range) = slots.locate(vmpager::core::PageRun::new(page, 1));
            faults += 1;
            match uffd.copy(hva.0, map.addr_of(range.start), range.len).stop {
                None | Some(Stop::Present | Stop::Gone) => {}
                Some(stop) => bail!("UFFDIO_COPY at {hva}: {stop:?}"),
            }
        }
    }
}
