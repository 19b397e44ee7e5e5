//! Memory of which some pages come only when the test says so.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmpager_core::{Hva, PageInstaller, Resolution, WatchedInstaller, Watcher};
use vmpager_sys::memory::{GuestRange, Mapping};
use vmpager_sys::uffd::{Features, Message, Messages, Userfaultfd};

use super::{PAGE, offset};

/// However busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// Guest memory. Its pages are known by their offset.
#[derive(Debug)]
pub(crate) struct Pages {
    pub(crate) memory: Arc<Mapping>,
    uffd: Userfaultfd,
    state: Mutex<State>,
    asked: Condvar,
    watchers: Mutex<Vec<Arc<dyn Watcher>>>,
    stop: AtomicBool,
}

#[derive(Debug)]
struct State {
    image: Vec<u8>,
    present: BTreeSet<u64>,
    /// Those that wait for the test, unless present.
    slow: BTreeSet<u64>,
    /// Those that the userfaultfd has asked for.
    asked: BTreeSet<u64>,
    /// The one that comes as soon as somebody looks whether it has.
    sudden: Option<u64>,
}

impl State {
    fn waits(&self, page: u64) -> bool {
        self.slow.contains(&page) && !self.present.contains(&page)
    }
}

/// Serves the userfaultfd for as long as it is there.
pub(crate) struct Server {
    pages: Arc<Pages>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.pages.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Pages {
    /// With all in place but those that are slow.
    pub(crate) fn new(image: Vec<u8>, slow: &[u64]) -> Result<Arc<Self>, String> {
        let uffd = Userfaultfd::open(Features::NONE).map_err(|error| error.to_string())?;
        let memory = Arc::new(Mapping::inaccessible(image.len()).expect("a few MiB"));
        uffd.register_missing(&GuestRange::of_mapping(&memory)).expect("anonymous memory");
        let mut state = State {
            image,
            present: BTreeSet::new(),
            slow: slow.iter().copied().collect(),
            asked: BTreeSet::new(),
            sudden: None,
        };
        let pages = (0..state.image.len() as u64).step_by(offset(PAGE));
        state.present = pages.filter(|page| !state.slow.contains(page)).collect();
        for page in &state.present {
            copy(&uffd, &memory, &state.image, *page);
        }
        Ok(Arc::new(Self {
            memory,
            uffd,
            state: Mutex::new(state),
            asked: Condvar::new(),
            watchers: Mutex::default(),
            stop: AtomicBool::new(false),
        }))
    }

    pub(crate) fn serve(self: &Arc<Self>) -> Server {
        let pages = self.clone();
        let thread = Some(std::thread::spawn(move || pages.run()));
        Server { pages: self.clone(), thread }
    }

    fn run(&self) {
        let mut messages = Messages::new();
        let wait = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        while !self.stop.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(&self.uffd, PollFlags::IN)];
            poll(&mut fds, Some(&wait)).expect("poll");
            self.uffd.read(&mut messages).expect("a userfaultfd that can be read");
            for message in messages.drain() {
                let Message::Fault { address, .. } = message else { panic!("{message:?}") };
                let page = self.page(Hva(address));
                let mut state = self.state();
                state.asked.insert(page);
                self.asked.notify_all();
                if !state.waits(page) {
                    self.install(&mut state, page);
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    fn page(&self, hva: Hva) -> u64 {
        (hva.0 - self.memory.hva()) / PAGE * PAGE
    }

    fn install(&self, state: &mut State, page: u64) {
        if state.present.insert(page) {
            copy(&self.uffd, &self.memory, &state.image, page);
        } else {
            self.uffd.wake(self.memory.hva() + page, PAGE).expect("registered memory");
        }
    }

    /// A slow page comes.
    pub(crate) fn release(&self, page: u64) {
        self.install(&mut self.state(), page);
        let watchers = self.watchers.lock().expect("nobody panics with it").clone();
        watchers.iter().for_each(|watcher| watcher.changed(&|hva| self.is_settled(hva)));
    }

    /// Has a slow page come when somebody looks whether it has.
    pub(crate) fn release_when_looked_at(&self, page: u64) {
        self.state().sudden = Some(page);
    }

    /// The page is gone, and slow from now on.
    pub(crate) fn take_away(&self, page: u64) {
        let mut state = self.state();
        let at = offset(page);
        let mut bytes = vec![0; offset(PAGE)];
        self.memory.read(at, &mut bytes);
        state.image[at..at + bytes.len()].copy_from_slice(&bytes);
        state.present.remove(&page);
        state.asked.remove(&page);
        state.slow.insert(page);
        self.memory.discard(at..at + offset(PAGE)).expect("anonymous memory");
    }

    /// Waits until the userfaultfd has asked for a page.
    pub(crate) fn wait_until_asked(&self, page: u64) {
        let (state, waited) = self
            .asked
            .wait_timeout_while(self.state(), PATIENCE, |state| !state.asked.contains(&page))
            .expect("nobody panics with it");
        assert!(!waited.timed_out(), "nobody asked for {page:#x}, but for {:x?}", state.asked);
    }

    fn is_settled(&self, hva: Hva) -> bool {
        let page = self.page(hva);
        let mut state = self.state();
        if state.sudden.take_if(|sudden| *sudden == page).is_some() {
            self.install(&mut state, page);
        }
        !state.waits(page)
    }
}

fn copy(uffd: &Userfaultfd, memory: &Mapping, image: &[u8], page: u64) {
    let installed = uffd.copy(memory.hva() + page, image[offset(page)..].as_ptr() as usize, PAGE);
    assert_eq!(installed.stop, None, "page {page:#x}");
}

/// The vCPU thread's way to bring pages.
#[derive(Debug)]
pub(crate) struct Own(pub(crate) Arc<Pages>);

impl PageInstaller for Own {
    fn is_present(&self, hva: Hva) -> bool {
        self.0.state().present.contains(&self.0.page(hva))
    }

    fn is_complete(&self) -> bool {
        false
    }

    fn resolve(&mut self, hva: Hva) -> Resolution {
        let page = self.0.page(hva);
        let state = self.0.state();
        match (state.present.contains(&page), state.slow.contains(&page)) {
            (true, _) => Resolution::Present,
            (false, true) => Resolution::Waiting,
            (false, false) => panic!("page {page:#x} is missing, and not slow"),
        }
    }
}

impl WatchedInstaller for Own {
    fn is_settled(&self, hva: Hva) -> bool {
        self.0.is_settled(hva)
    }

    fn watch(&self, watcher: Arc<dyn Watcher>) {
        self.0.watchers.lock().expect("nobody panics with it").push(watcher);
    }
}
