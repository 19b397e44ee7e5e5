//! Private and shared guest memory: conversions, carried out.
//!
//! [`vmpager_core::convert`] has the rules; a [`Backend`] does each step; and
//! [`PrivateMemory`] takes a VM's conversions, from any number of threads, through
//! both:
//!
//! ```text
//!   KVM_EXIT_HYPERCALL (KVM_HC_MAP_GPA_RANGE) ──> PrivateMemory::hypercall ─┐
//!   KVM_EXIT_MEMORY_FAULT                     ──> PrivateMemory::on_fault  ─┤
//!   the VMM itself                            ──> PrivateMemory::convert   ─┴─> Backend
//! ```
//!
//! | back-end | memory of the two kinds | contents |
//! |---|---|---|
//! | [`GuestMemfd`] | shared: a mapping; private: a guest_memfd, which the host cannot map | zero |
//! | [`InPlace`] | one file; private pages are in none of the host's mappings | zero, preserve |
//! | [`ByAddress`] | the same, and vCPUs reach each kind at addresses of its own | zero, preserve |
//!
//! With a guest_memfd KVM enforces the kinds, by memory attributes
//! (`KVM_SET_MEMORY_ATTRIBUTES`). In place, the VMM does, for its own sake: the
//! host's views lose private pages, but a process that has the file can map it
//! anew. What that is good for is hosts without attributes. By address, a guest says
//! which kind it means, as SEV-SNP's and TDX's do, so that its accesses ask for
//! conversions.

mod attributes;
mod backend;
mod by_address;
mod guest_memfd;
mod in_place;
mod log;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmpager_core::convert::{
    Begin, Contents, FaultAnswer, Kind, Kinds, Outcome, PAGE_BYTES, Places, Refusal, Request,
    SlotError, Slots, State, Step,
};

pub use backend::Backend;
pub use by_address::ByAddress;
pub use guest_memfd::GuestMemfd;
pub use in_place::InPlace;
use log::Log;
pub use log::{Cause, ConversionStats, Logged};

/// What the kind of access in a `KVM_EXIT_MEMORY_FAULT` comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// From the page's attribute, as KVM found it when the access began: in
    /// software-protected VMs, whose guests do not say which kind they mean. If
    /// the page is of the other kind by now, it has just been converted.
    Attribute,
    /// From the guest itself, by a bit of its page tables or of the address (with
    /// [`ByAddress`], too): if the page is of the other kind, the guest wants it
    /// converted.
    Access,
}

/// What to do after a `KVM_EXIT_MEMORY_FAULT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterFault {
    /// Enter the guest again: the page was converted, or is being converted, or
    /// just has been.
    Enter,
    /// The page is of the kind accessed: the fault has another cause (it may be
    /// missing).
    Matches,
    /// No memory that can be converted.
    Outside,
}

/// Why a conversion did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// It was not begun.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A step of it failed.
    #[error(
        "converting gpa {:#x} to {:#x} to {}: {} failed: {error}; {}",
        .request.gpa, .request.gpa + .request.len, .request.to,
        .outcome.failed.as_ref().map_or_else(String::new, failed_step),
        stands(.outcome)
    )]
    Failed {
        /// What was asked for.
        request: Request,
        /// What has come of it.
        outcome: Box<Outcome>,
        /// What the kernel said.
        error: io::Error,
    },
    /// A page that no conversion could open, so that nobody can have it.
    #[error(
        "the page at gpa {gpa:#x} is open to nobody since a conversion of it failed (see the log \
         of conversions); convert it again"
    )]
    Closed {
        /// Its address.
        gpa: u64,
    },
}

/// A step that failed, in words.
pub fn failed_step(step: &Step) -> String {
    let at = |pages: &std::ops::Range<u64>| {
        format!("gpa {:#x} to {:#x}", pages.start * PAGE_BYTES, pages.end * PAGE_BYTES)
    };
    match step {
        Step::Close { pages, .. } => format!("closing {}", at(pages)),
        Step::Discard { pages, of } => format!("discarding {of} memory of {}", at(pages)),
        Step::Open { pages, .. } | Step::Reopen { pages, .. } => {
            format!("opening {}", at(pages))
        }
    }
}

fn stands(outcome: &Outcome) -> String {
    match outcome.state() {
        State::Done | State::Undone => "all is as it was".to_owned(),
        State::Stands => format!(
            "{} pages are {} now, {} are not, {} are open to nobody",
            outcome.converted.pages(),
            outcome.to,
            outcome.unconverted.pages(),
            outcome.closed.pages()
        ),
    }
}

/// Why private memory cannot be had so.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// The back-end loses contents.
    #[error(
        "{backend} cannot preserve contents when pages are converted: it moves no data; convert \
         to zeroes, or use a back-end in place"
    )]
    CannotPreserve {
        /// Which one.
        backend: &'static str,
    },
    /// Its private pages cannot be filled.
    #[error(
        "private pages of a snapshot cannot be restored by {backend}: the host cannot write it, \
         since up to Linux 7.2 KVM refuses GUEST_MEMFD_FLAG_INIT_SHARED to VMs with private \
         memory; keep them in place"
    )]
    CannotRestore {
        /// The back-end.
        backend: &'static str,
    },
    /// What was private cannot be made so again.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// Its memslots make no sense.
    #[error(transparent)]
    Slots(#[from] SlotError),
}

/// The memory of a VM whose pages are private or shared.
#[derive(Debug)]
pub struct PrivateMemory {
    backend: Box<dyn Backend>,
    contents: Contents,
    intent: Intent,
    /// Whether guests are answered by bare calls.
    bare: AtomicBool,
    /// Never held while a step is carried out.
    state: Mutex<Kept>,
    /// A conversion is over.
    over: Condvar,
}

#[derive(Debug)]
struct Kept {
    kinds: Kinds,
    log: Log,
    /// Threads that wait for a conversion's end: to wake none takes no system call.
    waiting: usize,
    /// How many want no conversion to begin.
    held: usize,
}

/// Keeps conversions from beginning, as long as it is there.
#[derive(Debug)]
pub struct Held<'a>(&'a PrivateMemory);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.held -= 1;
        let is_awaited = state.waiting > 0;
        drop(state);
        if is_awaited {
            self.0.over.notify_all();
        }
    }
}

impl PrivateMemory {
    /// Memory of these slots (guest-physical address and bytes), all of which is of
    /// that kind by now.
    ///
    /// # Errors
    ///
    /// [`PrivateError`]: contents are to be preserved by a back-end that cannot, or
    /// the slots make no sense.
    pub fn new(
        backend: Box<dyn Backend>,
        slots: impl IntoIterator<Item = (u64, u64)>,
        kind: Kind,
        contents: Contents,
        intent: Intent,
    ) -> Result<Self, PrivateError> {
        let kinds = Kinds::new(Slots::new(slots)?, backend.places(), kind);
        if !kinds.can(contents) {
            return Err(PrivateError::CannotPreserve { backend: backend.name() });
        }
        let state = Mutex::new(Kept { kinds, log: Log::new(), waiting: 0, held: 0 });
        let bare = AtomicBool::new(false);
        Ok(Self { backend, contents, intent, bare, state, over: Condvar::new() })
    }

    /// The back-end's name.
    pub fn backend(&self) -> &'static str {
        self.backend.name()
    }

    /// Whether contents stay when pages are converted.
    pub fn preserves(&self) -> bool {
        self.contents == Contents::Preserve
    }

    /// Whether private pages are in the same memory as shared ones.
    pub fn is_in_place(&self) -> bool {
        self.backend.places() == Places::One
    }

    /// Makes a range private that was so when the VM was saved, what it holds (or is
    /// to hold, once it is brought) included.
    ///
    /// # Errors
    ///
    /// [`PrivateError::CannotRestore`] if the host has no way to fill private pages;
    /// or what converting it comes to.
    pub fn restore(&self, range: std::ops::Range<u64>) -> Result<(), PrivateError> {
        if !self.is_in_place() {
            return Err(PrivateError::CannotRestore { backend: self.backend() });
        }
        let len = range.end.saturating_sub(range.start);
        let request = Request { gpa: range.start, len, to: Kind::Private };
        Ok(self.carry_out(&request, Contents::Preserve, Cause::Host)?)
    }

    /// Converts a range. If another conversion of some of its pages goes on, waits
    /// for the end of that. When this returns no vCPU sees what the pages were.
    ///
    /// # Errors
    ///
    /// [`ConvertError`], which tells what stands.
    pub fn convert(&self, request: &Request, cause: Cause) -> Result<(), ConvertError> {
        self.carry_out(request, self.contents, cause)
    }

    /// Waits until no conversion goes on, and lets none begin until the answer is
    /// dropped: those that are asked for wait. So kinds and contents can be saved as
    /// they are at one moment. The caller must ask for no conversion meanwhile.
    pub fn hold(&self) -> Held<'_> {
        let mut state = self.lock();
        state.held += 1;
        while state.kinds.is_converting() {
            state = self.wait(state);
        }
        Held(self)
    }

    fn carry_out(
        &self,
        request: &Request,
        contents: Contents,
        cause: Cause,
    ) -> Result<(), ConvertError> {
        let began = Instant::now();
        let mut state = self.lock();
        let mut conversion = loop {
            if state.held > 0 {
                state.log.waited();
                state = self.wait(state);
                continue;
            }
            match state.kinds.begin(request, contents) {
                Err(refusal) => {
                    state.log.refused();
                    return Err(refusal.into());
                }
                Ok(Begin::Nothing) => {
                    state.log.nothing(cause);
                    return Ok(());
                }
                Ok(Begin::Busy) => {
                    state.log.waited();
                    state = self.wait(state);
                }
                Ok(Begin::Start(conversion)) => break conversion,
            }
        };
        drop(state);
        let mut error = None;
        while let Some(step) = conversion.next_step() {
            let done = self.perform(&step);
            conversion.answer(done.is_ok());
            if let Err(e) = done {
                error.get_or_insert(e);
            }
        }
        let mut state = self.lock();
        let outcome = state.kinds.finish(conversion);
        let failed = error.map(|error| ConvertError::Failed {
            request: *request,
            outcome: Box::new(outcome.clone()),
            error,
        });
        state.log.add(cause, *request, outcome, began.elapsed());
        let is_awaited = state.waiting > 0;
        drop(state);
        if is_awaited {
            self.over.notify_all();
        }
        failed.map_or(Ok(()), Err)
    }

    fn perform(&self, step: &Step) -> io::Result<()> {
        let bytes = |pages: &std::ops::Range<u64>| pages.start * PAGE_BYTES..pages.end * PAGE_BYTES;
        match step {
            Step::Close { pages, to } => self.backend.close(bytes(pages), *to),
            Step::Discard { pages, of } => self.backend.discard(bytes(pages), *of),
            Step::Open { pages, to } => self.backend.open(bytes(pages), *to),
            Step::Reopen { pages, to } => self.backend.reopen(bytes(pages), *to),
        }
    }

    /// Does what a guest asks for by `KVM_HC_MAP_GPA_RANGE`, given the hypercall's
    /// arguments. What the hypercall is to return: 0, or a negative error (EINVAL
    /// for what makes no sense, which changes nothing).
    pub fn hypercall(&self, args: &[u64; 6]) -> u64 {
        let [gpa, pages, attributes, ..] = *args;
        let request = Request::of_hypercall(gpa, pages, attributes);
        if self.bare.load(Ordering::Relaxed) {
            return request.map_or(1, |request| self.bare_calls(&request));
        }
        let converted = match request {
            Ok(request) => self.convert(&request, Cause::Hypercall),
            Err(refusal) => {
                self.lock().log.refused();
                Err(refusal.into())
            }
        };
        let errno = match converted {
            Ok(()) => return 0,
            Err(ConvertError::Refused(_)) => EINVAL,
            Err(ConvertError::Closed { .. }) => EFAULT,
            Err(ConvertError::Failed { error, .. }) => error.raw_os_error().unwrap_or(EFAULT),
        };
        i64::from(-errno).cast_unsigned()
    }

    /// For benchmarks, the floor of all conversions: while this is set, hypercalls, and
    /// accesses that ask for conversions, are answered by the back-end's bare calls, with no
    /// rules, no log, and nothing known of kinds. When it ends, all pages must be of the
    /// kinds they had before.
    pub fn answer_by_bare_calls(&self, bare: bool) {
        self.bare.store(bare, Ordering::Relaxed);
    }

    fn bare_calls(&self, request: &Request) -> u64 {
        let Request { gpa, len, to } = *request;
        let range = || gpa..gpa + len;
        let done = self
            .backend
            .close(range(), to)
            .and_then(|()| self.backend.discard(range(), to.other()))
            .and_then(|()| self.backend.open(range(), to));
        done.is_err().into()
    }

    /// Deals with a `KVM_EXIT_MEMORY_FAULT`: an access to these bytes, as to memory
    /// of the kind that KVM says.
    ///
    /// # Errors
    ///
    /// [`ConvertError`]: the guest cannot go on.
    pub fn on_fault(&self, gpa: u64, len: u64, told: Kind) -> Result<AfterFault, ConvertError> {
        let (gpa, as_) = self.backend.meant(gpa, told);
        if self.bare.load(Ordering::Relaxed) && self.intent == Intent::Access {
            let request = Request { gpa: gpa / PAGE_BYTES * PAGE_BYTES, len: PAGE_BYTES, to: as_ };
            let failed = self.bare_calls(&request) != 0;
            return if failed { Err(ConvertError::Closed { gpa }) } else { Ok(AfterFault::Enter) };
        }
        let answer = self.lock().kinds.on_fault(gpa / PAGE_BYTES, as_);
        match answer {
            FaultAnswer::Outside => return Ok(AfterFault::Outside),
            FaultAnswer::Closed => return Err(ConvertError::Closed { gpa }),
            FaultAnswer::Matches => return Ok(AfterFault::Matches),
            FaultAnswer::Busy => self.wait_while_busy(gpa / PAGE_BYTES, as_),
            FaultAnswer::Mismatch if self.intent == Intent::Access => {
                let gpa = gpa / PAGE_BYTES * PAGE_BYTES;
                let len = len.next_multiple_of(PAGE_BYTES).max(PAGE_BYTES);
                self.convert(&Request { gpa, len, to: as_ }, Cause::Fault)?;
            }
            FaultAnswer::Mismatch => self.lock().log.retried(),
        }
        Ok(AfterFault::Enter)
    }

    /// Sleeps while the page is being converted, so that its vCPU does not spin.
    fn wait_while_busy(&self, page: u64, as_: Kind) {
        let mut state = self.lock();
        state.log.retried();
        while state.kinds.on_fault(page, as_) == FaultAnswer::Busy {
            state = self.wait(state);
        }
    }

    /// Sleeps until some conversion is over.
    fn wait<'a>(&'a self, mut state: MutexGuard<'a, Kept>) -> MutexGuard<'a, Kept> {
        state.waiting += 1;
        let mut state = self.over.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }

    /// The kind of the page at a gpa; `None` if it cannot be converted.
    pub fn kind(&self, gpa: u64) -> Option<Kind> {
        self.lock().kinds.kind(gpa / PAGE_BYTES)
    }

    /// The private ranges, in bytes of guest-physical memory.
    pub fn private_ranges(&self) -> Vec<std::ops::Range<u64>> {
        let runs = self.lock().kinds.private_runs();
        runs.into_iter().map(|run| run.start * PAGE_BYTES..run.end * PAGE_BYTES).collect()
    }

    /// What was done so far.
    pub fn stats(&self) -> ConversionStats {
        self.lock().log.stats()
    }

    /// The latest conversions, the last one last.
    pub fn log(&self) -> Vec<Logged> {
        self.lock().log.latest()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        // No step is carried out under it, and the rules do not panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const EINVAL: i32 = 22;
const EFAULT: i32 = 14;
