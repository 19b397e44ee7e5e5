//! A VM: a process whose memory comes from the daemon.

use std::io::{Read, stdin};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use vmpager::clean;
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

use crate::output;

const PAGE: usize = 4096;
/// What it says when it has touched all of its memory.
const DONE: &str = "done";
pub(super) const DONE_LINE: &str = "done\n";

/// What it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) socket: PathBuf,
    pub(super) bytes: usize,
    pub(super) written_percent: u8,
    /// Whether it maps the daemon's clean pages.
    pub(super) shares: bool,
}

/// Touches all memory, writes to some, and waits until standard input ends.
pub(super) fn run(plan: &str) -> anyhow::Result<()> {
    let plan: Plan = serde_json::from_str(plan).context("what to be")?;
    let socket = UnixStream::connect(&plan.socket).context("connecting to the pager")?;
    let features = Features::EVENT_REMOVE;
    let (memory, uffd) = if plan.shares {
        let offered = clean::ask(&socket)?;
        let memory = Arc::new(Mapping::file_private(offered.memfd.as_fd(), plan.bytes)?);
        let uffd = Userfaultfd::open(features.union(Features::MINOR_SHMEM))?;
        uffd.register_minor(&GuestRange::of_mapping(&memory))?;
        (memory, uffd)
    } else {
        let memory = Arc::new(Mapping::anonymous(plan.bytes).context("memory for a VM")?);
        let uffd = Userfaultfd::open(features)?;
        uffd.register_missing(&GuestRange::of_mapping(&memory))?;
        (memory, uffd)
    };
    let message = serde_json::to_vec(&serde_json::json!([{
        "base_host_virt_addr": memory.hva(), "size": plan.bytes, "offset": 0, "page_size": PAGE,
        "clean_pages": plan.shares,
    }]))?;
    if send_with_fds(&socket, &message, &[uffd.as_fd()]).context("the handshake")? != message.len()
    {
        bail!("the handshake was not taken whole");
    }
    touch(&memory, plan.written_percent)?;
    output::line(DONE)?;
    stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn touch(memory: &Mapping, written_percent: u8) -> anyhow::Result<()> {
    for page in 0..memory.len() / PAGE {
        let offset = page * PAGE + page * 8 % PAGE;
        let found = memory.read_u64(offset);
        if found != offset as u64 + 1 {
            bail!("wrong bytes at {offset:#x}: {found:#x}");
        }
        // Evenly, so that any number of pages has its share.
        if (page * 37) % 100 < usize::from(written_percent) {
            memory.write_u64(offset, found);
        }
    }
    Ok(())
}
