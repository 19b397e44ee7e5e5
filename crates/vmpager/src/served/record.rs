//! What a memory's successor must know beside its page map, in memory that
//! outlives the process: a memfd that somebody else holds, too
//! ([`keeper`](crate::keeper)).
//!
//! In 64-bit words:
//!
//! | words | what |
//! |---|---|
//! | 0 | magic, `b"VMPGSES\0"` little-endian |
//! | 1 | version of this layout: 2 |
//! | 2 | number of slots |
//! | 3 | flags: [`Flag`] |
//! | 4 | fingerprint of the source ([`PageSource::fingerprint`]) |
//! | 5 | how many processes took the memory over |
//! | 6 | slots of the view whose messages are read; 0: the memory's own |
//! | 7 | which clean pages its memory is a mapping of; 0: none |
//! | 512..768 | messages read from a userfaultfd and not yet applied |
//! | 768..1024 | that view's host address of each slot |
//! | 1024.. | four words a slot: host address, bytes, offset in the source, page size |
//!
//! # Why no removal is lost
//!
//! The kernel forgets a removal once it was read, and the thread that gave the
//! memory back goes on. A reader killed between that and taking note of it in the
//! page map would leave a successor that installs bytes of the source where the
//! guest must read zeroes. So messages are read *into the record*:
//!
//! 1. the buffer is clear, the kernel copies messages into it (a process that is
//!    being killed dies when it leaves the kernel, so that what was taken from the
//!    queue is in the buffer; its page is locked, so that the copy never waits);
//! 2. every removal among them is applied to the page map;
//! 3. the buffer is cleared;
//! 4. only then anything is planned or installed.
//!
//! Killed before 2 has ended, it leaves messages behind, and the successor applies
//! them before it does anything else. Applying one twice does no harm: the pages
//! are `Zero` already, which they remain for ever, and nothing was installed in
//! between. Another process's view of the memory has messages with addresses of its
//! own; where its slots are is noted before they are read, while the buffer is clear.
//! Killed after 2, the page map says it all. Faults in the buffer need no
//! care: the successor wakes whoever waits, and they fault again.
//!
//! The rest follows from the page map. A page is claimed before it is installed and
//! published after: one that was installed and not published is claimed and absent,
//! the successor takes it for missing, and the kernel refuses to install it again
//! (EEXIST), which says that it is there. One that the map calls present and that
//! was given back unseen is offered zeroes (`FaultPlan::Confirm`), whoever looks.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::warn;
use vmpager_core::page_map::words_for;
use vmpager_core::{Hva, PageSize, PageSource, Slot, SlotSet};
use vmpager_sys::shared::{Part, SharedWords};
use vmpager_sys::uffd::Messages;

const MAGIC: u64 = u64::from_le_bytes(*b"VMPGSES\0");
/// The layout that this version reads and writes.
pub(crate) const VERSION: u64 = 2;
const COUNT: usize = 2;
const FLAGS: usize = 3;
const SOURCE: usize = 4;
const TAKEOVERS: usize = 5;
const VIEW: usize = 6;
const CLEAN: usize = 7;
const VIEW_AT: std::ops::Range<usize> = 768..1024;
const JOURNAL: usize = 512;
const SLOTS: usize = 1024;
const SLOT_WORDS: usize = 4;

/// What is remembered of a memory for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Flag {
    /// Letting go of the memory would let somebody read zeroes.
    MustHold = 1,
    /// It can be served no longer.
    Failed = 2,
}

/// Why a record is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    #[error("mapping it: {0}")]
    Io(#[from] io::Error),
    #[error("it begins with {0:#018x}, not with \"VMPGSES\"")]
    Magic(u64),
    #[error("it has version {0}; this program reads version {VERSION}")]
    Version(u64),
    #[error("its {field} is {value:#x}, which makes no sense")]
    Field { field: &'static str, value: u64 },
    #[error(
        "it was served from another source than {0}, or from that before it was changed: give \
         the pager the one its VMs were started with"
    )]
    Source(Arc<str>),
}

/// The record of one memory.
#[derive(Debug)]
pub(crate) struct Record {
    words: Arc<SharedWords>,
}

/// What a memory's successor needs: its page map, and its record.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) map: SharedWords,
    pub(crate) record: Record,
}

impl State {
    /// Of a memory that nobody has served yet.
    ///
    /// # Errors
    ///
    /// If there is no memory for it.
    pub(crate) fn new(slots: &SlotSet, source: &dyn PageSource) -> io::Result<Self> {
        let map = SharedWords::new("vmpager-page-map", words_for(slots.pages()))?;
        Ok(Self { map, record: Record::new(slots, source.fingerprint())? })
    }

    /// Of a memory that another process has served.
    ///
    /// # Errors
    ///
    /// If this version cannot read it, or the source is another one.
    pub(crate) fn open(
        map: OwnedFd,
        record: OwnedFd,
        source: &dyn PageSource,
    ) -> Result<Self, RecordError> {
        let record = Record::open(record)?;
        match record.word(SOURCE) == source.fingerprint() {
            true => Ok(Self { map: SharedWords::open(map)?, record }),
            false => Err(RecordError::Source(source.name())),
        }
    }
}

impl Record {
    fn new(slots: &SlotSet, source: u64) -> io::Result<Self> {
        let mut all = Vec::new();
        let mut page = 0;
        while page < slots.pages() {
            let (slot, run) = slots.slot_of(page);
            all.push(*slot);
            page = run.end();
        }
        let words = SharedWords::new("vmpager-session", SLOTS + SLOT_WORDS * all.len())?;
        for (index, value) in [(0, MAGIC), (1, VERSION), (COUNT, all.len() as u64)] {
            words[index].store(value, Ordering::Relaxed);
        }
        words[SOURCE].store(source, Ordering::Relaxed);
        for (index, slot) in all.into_iter().enumerate() {
            let fields = [slot.hva.0, slot.len, slot.source_offset, slot.page_size.bytes()];
            for (field, value) in fields.into_iter().enumerate() {
                words[SLOTS + index * SLOT_WORDS + field].store(value, Ordering::Relaxed);
            }
        }
        Ok(Self { words: Arc::new(words) })
    }

    fn open(fd: OwnedFd) -> Result<Self, RecordError> {
        let record = Self { words: Arc::new(SharedWords::open(fd)?) };
        let words = record.words.len();
        if words < SLOTS {
            return Err(RecordError::Field { field: "number of words", value: words as u64 });
        }
        if record.word(0) != MAGIC {
            return Err(RecordError::Magic(record.word(0)));
        }
        if record.word(1) != VERSION {
            return Err(RecordError::Version(record.word(1)));
        }
        let count = record.word(COUNT);
        if count > ((words - SLOTS) / SLOT_WORDS) as u64 {
            return Err(RecordError::Field { field: "number of slots", value: count });
        }
        record.words[TAKEOVERS].fetch_add(1, Ordering::Relaxed);
        Ok(record)
    }

    fn word(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Acquire)
    }

    /// The slots, in the order of their pages.
    ///
    /// # Errors
    ///
    /// If one has no page size that there is.
    pub(crate) fn slots(&self) -> Result<Vec<Slot>, RecordError> {
        let count = usize::try_from(self.word(COUNT)).unwrap_or(0);
        let slots = (0..count).map(|index| SLOTS + index * SLOT_WORDS).map(|at| {
            let bytes = self.word(at + 3);
            let page_size = PageSize::from_bytes(bytes)
                .ok_or(RecordError::Field { field: "page size", value: bytes })?;
            let hva = Hva(self.word(at));
            Ok(Slot { hva, len: self.word(at + 1), source_offset: self.word(at + 2), page_size })
        });
        slots.collect()
    }

    /// The messages to be read next are those of a view with these slots, or the
    /// memory's own. There are none in the buffer.
    pub(crate) fn reads_of(&self, view: Option<&SlotSet>) {
        if view.is_none() && self.word(VIEW) == 0 {
            return;
        }
        let (mut count, mut page) = (0, 0);
        while let Some(slots) = view.filter(|slots| page < slots.pages())
            && count < VIEW_AT.len()
        {
            let (slot, run) = slots.slot_of(page);
            self.words[VIEW_AT.start + count].store(slot.hva.0, Ordering::Relaxed);
            (count, page) = (count + 1, run.end());
        }
        self.words[VIEW].store(count as u64, Ordering::Release);
    }

    /// The slots of the view whose messages were read last, unless those were the
    /// memory's own.
    ///
    /// # Errors
    ///
    /// If there are no such slots.
    pub(crate) fn view(&self) -> Result<Option<Vec<Slot>>, RecordError> {
        let mut slots = self.slots()?;
        match self.word(VIEW) {
            0 => return Ok(None),
            count if count == slots.len() as u64 && slots.len() <= VIEW_AT.len() => {}
            value => return Err(RecordError::Field { field: "number of a view's slots", value }),
        }
        for (slot, at) in slots.iter_mut().zip(VIEW_AT) {
            slot.hva = Hva(self.word(at));
        }
        Ok(Some(slots))
    }

    /// Where messages are to be read into.
    pub(crate) fn messages(&self) -> Messages {
        let range = JOURNAL..JOURNAL + Messages::WORDS;
        if let Err(error) = self.words.lock(range.clone()) {
            warn!(
                "locking a page of memory: {error}; raise RLIMIT_MEMLOCK, lest under memory \
                 pressure a removal be lost if this process is killed"
            );
        }
        match Part::of(self.words.clone(), range) {
            Some(part) => Messages::within(part),
            // Records are longer: `new` and `open` see to that.
            None => Messages::new(),
        }
    }

    pub(crate) fn set(&self, flag: Flag) {
        self.words[FLAGS].fetch_or(flag as u64, Ordering::AcqRel);
    }

    pub(crate) fn has(&self, flag: Flag) -> bool {
        self.word(FLAGS) & flag as u64 != 0
    }

    /// How many processes took the memory over.
    pub(crate) fn takeovers(&self) -> u64 {
        self.word(TAKEOVERS)
    }

    /// Says which clean pages the memory is a mapping of.
    pub(crate) fn set_clean_pages(&self, id: u64) {
        self.words[CLEAN].store(id, Ordering::Release);
    }

    /// Which clean pages it is a mapping of; 0 if of none.
    pub(crate) fn clean_pages(&self) -> u64 {
        self.word(CLEAN)
    }

    pub(crate) fn memfd(&self) -> BorrowedFd<'_> {
        self.words.memfd()
    }
}
