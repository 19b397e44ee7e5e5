//! A peer as Firecracker is one: memory registered with a userfaultfd, handed
//! over on a socket; in this process, or in one that can be killed.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

use super::child::{self, TestChild};
use super::{HUGE, Holds, PAGE};

/// What a Firecracker release sends, and what it does afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Up to 1.6: no page size.
    V1_6,
    /// 1.7 to 1.9: `page_size_kib`, which holds bytes.
    V1_7,
    /// Both fields.
    V1_10,
    /// Hangs up after the handshake, as all before it.
    V1_11,
    /// Keeps the socket open.
    V1_12,
    /// A development branch: fields nobody knows.
    Dev,
}

impl Dialect {
    pub(crate) const ALL: [Self; 6] =
        [Self::V1_6, Self::V1_7, Self::V1_10, Self::V1_11, Self::V1_12, Self::Dev];

    fn name(self) -> String {
        format!("{self:?}")
    }

    fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|dialect| dialect.name() == name).unwrap()
    }

    pub(crate) fn hangs_up(self) -> bool {
        !matches!(self, Self::V1_12 | Self::Dev)
    }

    fn region(self, hva: u64, len: usize, offset: usize, page_size: usize) -> Value {
        let mut region = json!({"base_host_virt_addr": hva, "size": len, "offset": offset});
        if self != Self::V1_6 {
            region["page_size_kib"] = page_size.into();
        }
        if !matches!(self, Self::V1_6 | Self::V1_7) {
            region["page_size"] = page_size.into();
        }
        if self == Self::Dev {
            region["gpa_start"] = offset.into();
            region["is_guest_memfd"] = false.into();
            region["another"] = json!({"thing": [1, 2]});
        }
        region
    }
}

/// Guest memory and its userfaultfd.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Mappings and where each begins in the source.
    pub(crate) regions: Vec<(Arc<Mapping>, usize)>,
    pub(crate) page_size: usize,
    pub(crate) uffd: OwnedFd,
}

impl Memory {
    /// Regions of so many pages each, one after another in the source.
    pub(crate) fn new(pages: &[usize], page_size: usize) -> Self {
        Self::at(0, pages, page_size)
    }

    pub(crate) fn at(mut offset: usize, pages: &[usize], page_size: usize) -> Self {
        let uffd = Userfaultfd::open(Features::EVENT_REMOVE).unwrap();
        let mut regions = Vec::new();
        for count in pages {
            let len = count * page_size;
            let mapping = match page_size {
                HUGE => Mapping::hugetlb_2m(len).unwrap(),
                _ => Mapping::for_pager(len).unwrap(),
            };
            let mapping = Arc::new(mapping);
            uffd.register_missing(&GuestRange::of_mapping(&mapping)).unwrap();
            regions.push((mapping, offset));
            offset += len;
        }
        Self { regions, page_size, uffd: uffd.duplicate().unwrap() }
    }

    /// The handshake about it, as JSON to be spoilt.
    pub(crate) fn json(&self, dialect: Dialect) -> Value {
        let regions = self.regions.iter().map(|(mapping, offset)| {
            dialect.region(mapping.hva(), mapping.len(), *offset, self.page_size)
        });
        Value::Array(regions.collect())
    }

    pub(crate) fn hand_over(&self, socket: &UnixStream, dialect: Dialect) {
        let message = self.json(dialect).to_string();
        send_with_fds(socket, message.as_bytes(), &[self.uffd.as_fd()]).unwrap();
    }

    /// What a 4 KiB page of a region holds.
    pub(crate) fn page(&self, region: usize, page: usize) -> Holds {
        super::page(&self.regions[region].0, page * PAGE)
    }

    /// What it should hold if nothing happened to it.
    pub(crate) fn expected(&self, region: usize, page: usize) -> Holds {
        Holds::Source(self.regions[region].1 + page * PAGE)
    }

    /// Touches all of a region but one page.
    pub(crate) fn assert_is_source_but(&self, region: usize, but: usize) {
        for at in (0..self.regions[region].0.len() / PAGE).filter(|&at| at != but) {
            assert_eq!(self.page(region, at), self.expected(region, at), "page {at}");
        }
    }

    /// Touches all of it.
    pub(crate) fn assert_is_source(&self) {
        for (mapping, offset) in &self.regions {
            super::assert_is_source(mapping, *offset);
        }
    }
}

/// What a peer in a process of its own is made of.
#[derive(Clone, Debug)]
pub(crate) struct PeerPlan<'a> {
    pub(crate) socket: &'a Path,
    pub(crate) dialect: Dialect,
    /// Pages of each region.
    pub(crate) pages: &'a [usize],
    pub(crate) page_size: usize,
    /// Whether it keeps a copy of its userfaultfd, as Firecracker does.
    pub(crate) keeps_userfaultfd: bool,
}

impl<'a> PeerPlan<'a> {
    pub(crate) fn new(socket: &'a Path, pages: &'a [usize]) -> Self {
        let dialect = Dialect::V1_12;
        Self { socket, dialect, pages, page_size: PAGE, keeps_userfaultfd: true }
    }

    /// Starts it; it has sent its handshake when this returns. The test that
    /// calls this has to call [`run_if_peer`] first.
    pub(crate) fn spawn(&self, test: &str) -> RemotePeer {
        let task = json!({
            "peer": self.socket,
            "dialect": self.dialect.name(),
            "pages": self.pages,
            "page_size": self.page_size,
            "keeps": self.keeps_userfaultfd,
        });
        let child = child::spawn(test, &task.to_string());
        assert_eq!(child.hear(), "handed over");
        RemotePeer { child }
    }
}

/// A peer in a process of its own.
#[derive(Debug)]
pub(crate) struct RemotePeer {
    pub(crate) child: TestChild,
}

impl RemotePeer {
    /// Touches a page there and returns what it holds.
    pub(crate) fn read(&mut self, region: usize, page: usize) -> String {
        self.child.ask(&format!("read {region} {page}"))
    }

    /// Touches a page and expects the source's bytes.
    pub(crate) fn expect_source(&mut self, region: usize, page: usize) {
        assert_eq!(self.read(region, page), "expected", "region {region} page {page}");
    }

    /// Touches a page and does not wait for the answer.
    pub(crate) fn start_reading(&mut self, region: usize, page: usize) {
        self.child.tell(&format!("read {region} {page}"));
    }

    /// Whether the last thing asked for remains unanswered for that long.
    pub(crate) fn is_stuck_for(&self, time: Duration) -> bool {
        self.child.hear_within(time).is_none()
    }
}

/// Runs the peer this process was started as, if it was; then returns true.
pub(crate) fn run_if_peer() -> bool {
    let Some(task) = child::task() else { return false };
    let Ok(task) = serde_json::from_str::<Value>(&task) else { return false };
    let Some(path) = task["peer"].as_str() else { return false };
    let dialect = Dialect::named(task["dialect"].as_str().unwrap());
    let page_size = usize::try_from(task["page_size"].as_u64().unwrap()).unwrap();
    let pages = task["pages"].as_array().unwrap();
    let pages: Vec<usize> =
        pages.iter().map(|n| usize::try_from(n.as_u64().unwrap()).unwrap()).collect();

    let mut socket = Some(UnixStream::connect(path).unwrap());
    let Memory { mut regions, uffd, .. } = {
        let memory = Memory::new(&pages, page_size);
        memory.hand_over(socket.as_ref().unwrap(), dialect);
        memory
    };
    let mut kept = vec![uffd];
    if !task["keeps"].as_bool().unwrap() {
        kept.clear();
    }
    if dialect.hangs_up() {
        socket = None;
    }
    child::say("handed over");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<usize>().unwrap();
        let answer = match words[0] {
            "read" => {
                let (mapping, offset) = &regions[number(1)];
                let at = number(2) * PAGE;
                match super::page(mapping, at) {
                    Holds::Source(from) if from == offset + at => "expected".into(),
                    other => format!("{other:?}"),
                }
            }
            "discard" => {
                let (mapping, _) = &regions[number(1)];
                mapping.discard(number(2) * PAGE..number(3) * PAGE).unwrap();
                "done".into()
            }
            "more" => {
                let offset = regions.iter().map(|(mapping, _)| mapping.len()).sum();
                let memory = Memory::at(offset, &[number(1)], PAGE);
                memory.hand_over(socket.as_ref().unwrap(), dialect);
                regions.extend(memory.regions);
                kept.push(memory.uffd);
                "done".into()
            }
            "hang-up" => {
                socket = None;
                "done".into()
            }
            other => panic!("unknown command {other:?}"),
        };
        child::say(&answer);
    }
    true
}
