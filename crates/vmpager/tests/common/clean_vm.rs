//! A VM whose memory is a mapping of a daemon's clean pages, and what each of its pages
//! must hold.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use vmpager::clean::{Offered, ask};
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::peer::send_with_fds;
use vmpager_sys::uffd::{Features, Userfaultfd};

const PAGE: usize = 4096;

/// Whether this kernel has what it takes; says so if not.
pub(crate) fn have_minor_faults() -> bool {
    match Userfaultfd::open(Features::EVENT_REMOVE.union(Features::MINOR_SHMEM)) {
        Ok(_) => true,
        Err(error) => {
            vmpager_testing::skipped(&error.to_string());
            false
        }
    }
}

/// What a page of a numbered source holds.
pub(crate) fn numbered(page: usize) -> [u8; PAGE] {
    let words = (page * PAGE..(page + 1) * PAGE).step_by(8);
    let bytes: Vec<u8> = words.flat_map(|offset| (offset as u64 + 1).to_le_bytes()).collect();
    bytes.try_into().unwrap()
}

/// What a page must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Must {
    /// What the source has.
    Source,
    /// This word, then what the source has.
    Own(u64),
    /// This word, then zeroes; or zeroes.
    Zero(u64),
}

/// The VM.
#[derive(Debug)]
pub(crate) struct CleanVm {
    pub(crate) memory: Arc<Mapping>,
    pub(crate) must: Vec<Must>,
    memfd: OwnedFd,
    uffd: Option<Userfaultfd>,
    _socket: UnixStream,
    seed: u64,
}

impl CleanVm {
    pub(crate) fn connect(socket: &Path, seed: u64) -> Self {
        let socket = UnixStream::connect(socket).unwrap();
        let Offered { memfd, len } = ask(&socket).unwrap();
        let len = usize::try_from(len).unwrap();
        let memory = Arc::new(Mapping::file_private(memfd.as_fd(), len).unwrap());
        let features = Features::EVENT_REMOVE.union(Features::MINOR_SHMEM);
        let uffd = Userfaultfd::open(features).unwrap();
        uffd.register_minor(&GuestRange::of_mapping(&memory)).unwrap();
        let handshake = json!([{
            "base_host_virt_addr": memory.hva(), "size": len, "offset": 0, "page_size": PAGE,
            "clean_pages": true,
        }]);
        send_with_fds(&socket, handshake.to_string().as_bytes(), &[uffd.as_fd()]).unwrap();
        let must = vec![Must::Source; len / PAGE];
        Self { memory, must, memfd, uffd: Some(uffd), _socket: socket, seed }
    }

    /// Keeps no copy of its userfaultfd from now on.
    pub(crate) fn let_go_of_userfaultfd(&mut self) {
        self.uffd = None;
    }

    /// The descriptor it was given.
    pub(crate) fn memfd(&self) -> &OwnedFd {
        &self.memfd
    }

    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        usize::try_from(self.seed >> 8).unwrap() % end
    }

    /// Looks at a page, writes to it, or gives some back, as chance has it; whatever it
    /// looks at must be right. One in `writes_of` writes, and one in 64 gives back.
    pub(crate) fn step(&mut self, writes_of: usize, source: impl Fn(usize) -> [u8; PAGE]) {
        let page = self.below(self.must.len());
        if self.below(64) == 0 {
            let end = (page + 1 + self.below(8)).min(self.must.len());
            self.memory.discard(page * PAGE..end * PAGE).unwrap();
            self.must[page..end].fill(Must::Zero(0));
        }
        if self.below(writes_of) == 0 {
            let word = self.seed | 1;
            self.memory.write_u64(page * PAGE, word);
            self.must[page] = match self.must[page] {
                Must::Zero(_) => Must::Zero(word),
                Must::Source | Must::Own(_) => Must::Own(word),
            };
        }
        self.check(page, source(page));
    }

    /// Compares every byte of a page.
    pub(crate) fn check(&self, page: usize, source: [u8; PAGE]) {
        let mut bytes = [0; PAGE];
        self.memory.read(page * PAGE, &mut bytes);
        let must = self.must[page];
        let mut expected = match must {
            Must::Zero(_) => [0; PAGE],
            Must::Source | Must::Own(_) => source,
        };
        if let Must::Own(word) | Must::Zero(word) = must {
            expected[..8].copy_from_slice(&word.to_le_bytes());
        }
        assert!(bytes == expected, "page {page}, which must hold {must:x?}");
    }

    /// Compares every byte.
    pub(crate) fn check_all(&self, source: impl Fn(usize) -> [u8; PAGE]) {
        (0..self.must.len()).for_each(|page| self.check(page, source(page)));
    }
}
