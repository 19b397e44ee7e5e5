//! A process that plays VMs: each has memory, a userfaultfd and a connection of its
//! own, and one thread that touches its memory when told to.

use std::io::{BufRead, stdin};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

use crate::output;
use crate::vm_process::monotonic_ns;

const PAGE: usize = 4096;
/// Pages that share a page of the page tables.
const PIECE: usize = 512;

/// What a process is to play.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) socket: PathBuf,
    pub(super) sessions: usize,
    /// The number of its first one.
    pub(super) first: usize,
    /// Memory of each.
    pub(super) bytes: usize,
}

/// What it is told, a line each.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Touch {
    /// When to begin, by [`monotonic_ns`].
    pub(super) start_ns: u64,
    /// For how long.
    pub(super) ms: u64,
    /// The pause after each page.
    pub(super) pause_us: u64,
}

/// What came of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Touched {
    /// Pages, by session.
    pub(super) pages: Vec<u64>,
    /// How long each took.
    pub(super) waits_ns: Vec<u32>,
    /// When the last one ended.
    pub(super) end_ns: u64,
}

/// One VM.
struct Vm {
    memory: Arc<Mapping>,
    _uffd: Userfaultfd,
    _socket: UnixStream,
    /// Which of its pieces comes first.
    first: usize,
    done: usize,
}

impl Vm {
    /// Hands over memory, to be served from the start of the file.
    fn new(plan: &Plan, number: usize) -> anyhow::Result<Self> {
        let memory = Arc::new(Mapping::anonymous(plan.bytes).context("memory for a VM")?);
        let uffd = Userfaultfd::open(Features::EVENT_REMOVE)?;
        uffd.register_missing(&GuestRange::of_mapping(&memory))?;
        let socket = UnixStream::connect(&plan.socket).context("connecting to the pager")?;
        let message = serde_json::to_vec(&serde_json::json!([{
            "base_host_virt_addr": memory.hva(), "size": plan.bytes, "offset": 0, "page_size": PAGE,
        }]))?;
        let sent = send_with_fds(&socket, &message, &[uffd.as_fd()]).context("the handshake")?;
        if sent != message.len() {
            bail!("the handshake of {} bytes: {sent} were taken", message.len());
        }
        let pieces = (plan.bytes / PAGE / PIECE).max(1);
        Ok(Self { memory, _uffd: uffd, _socket: socket, first: number * 37 % pieces, done: 0 })
    }

    /// Touches its next page, far from the one before, but within 2 MiB: page tables
    /// then cost each VM the same, however much it touches. Returns how long it took;
    /// None if there is no page left.
    fn touch(&mut self) -> anyhow::Result<Option<Duration>> {
        let pages = self.memory.len() / PAGE;
        if self.done == pages {
            return Ok(None);
        }
        let (piece, within) = (self.done / PIECE, self.done * 421 % PIECE);
        let page = ((self.first + piece) * PIECE + within) % pages;
        let offset = page * PAGE + self.done * 8 % PAGE;
        let before = Instant::now();
        let found = self.memory.read_u64(offset);
        let took = before.elapsed();
        if found != offset as u64 + 1 {
            bail!("wrong bytes at {offset:#x}: {found:#x}");
        }
        self.done += 1;
        Ok(Some(took))
    }

    fn touch_for(&mut self, what: Touch) -> anyhow::Result<(Vec<u32>, u64)> {
        let left = what.start_ns.saturating_sub(monotonic_ns());
        let start = Instant::now() + Duration::from_nanos(left);
        let end = start + Duration::from_millis(what.ms);
        std::thread::sleep(Duration::from_nanos(left));
        let mut waits = Vec::new();
        while Instant::now() < end {
            let Some(took) = self.touch()? else { break };
            waits.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
            if what.pause_us > 0 {
                std::thread::sleep(Duration::from_micros(what.pause_us));
            }
        }
        Ok((waits, monotonic_ns()))
    }
}

/// Plays VMs until standard input ends.
pub(super) fn run(plan: &str) -> anyhow::Result<()> {
    let plan: Plan = serde_json::from_str(plan).context("what to play")?;
    let numbers = plan.first..plan.first + plan.sessions;
    let vms: anyhow::Result<Vec<Vm>> = numbers.map(|number| Vm::new(&plan, number)).collect();
    let mut vms = vms?;
    // A VM whose page has come is served.
    vms.iter_mut().try_for_each(|vm| vm.touch().map(drop))?;
    output::line("ready")?;
    for line in stdin().lock().lines() {
        let what: Touch = serde_json::from_str(&line?).context("what to touch")?;
        let all = std::thread::scope(|scope| {
            let start = |vm| {
                let thread = std::thread::Builder::new().stack_size(64 << 10);
                thread.spawn_scoped(scope, move || Vm::touch_for(vm, what))
            };
            let threads: Result<Vec<_>, _> = vms.iter_mut().map(start).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| match thread.join() {
                Ok(touched) => touched,
                Err(_) => bail!("a thread panicked"),
            };
            threads.context("a thread for each VM")?.into_iter().map(join).collect()
        });
        let all: anyhow::Result<Vec<(Vec<u32>, u64)>> = all;
        let mut touched = Touched::default();
        for (waits, end) in all? {
            touched.pages.push(waits.len() as u64);
            touched.waits_ns.extend(waits);
            touched.end_ns = touched.end_ns.max(end);
        }
        output::line(&serde_json::to_string(&touched)?)?;
    }
    Ok(())
}
