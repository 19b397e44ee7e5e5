//! One object at a server: what is known of it, and reading it piece by piece.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::error::{Problem, RemoteError};
use super::http::{Body, Client, Known, Validator};
use super::pace::Pace;
use super::url::ObjectUrl;
use super::{Counters, RemoteOptions};

/// Between two complaints about the same server.
const COMPLAIN_EVERY: Duration = Duration::from_secs(30);

/// For as long an object is tried to be opened, at most: somebody waits for it to say
/// what is wrong.
const LONGEST_OPEN: Duration = Duration::from_secs(10);

/// Which bytes an image's index is, and what they hash to: whoever has the same has
/// the same frames, at the same places, of the same checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IndexId {
    pub(crate) bytes: Range<u64>,
    pub(crate) hash: [u8; 32],
}

/// An object, open.
#[derive(Debug)]
pub(crate) struct Object {
    url: ObjectUrl,
    client: Client,
    len: u64,
    known: Mutex<Known>,
    index: OnceLock<IndexId>,
    health: Mutex<Health>,
    patience: Duration,
    counters: Arc<Counters>,
}

/// How the server has been lately.
#[derive(Debug, Default)]
struct Health {
    pace: Pace,
    complained: Option<Instant>,
    /// What was wrong the last time.
    trouble: Option<String>,
}

/// What is where the object was.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// The object, with all that the server said of it.
    Untouched(Known),
    /// Its bytes, put there anew.
    Same(Known),
    Other {
        len: u64,
        hash: Option<[u8; 32]>,
    },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves its data whole, whoever panics elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Object {
    /// Opens an object: asks for its first bytes, which go to `head`.
    pub(crate) fn open(
        url: ObjectUrl,
        options: &RemoteOptions,
        head: &mut [u8],
    ) -> Result<Self, RemoteError> {
        let client = Client::new(&url, options)
            .map_err(|problem| RemoteError { url: url.shown().to_owned(), problem })?;
        let mut object = Self {
            url,
            client,
            len: 0,
            known: Mutex::default(),
            index: OnceLock::new(),
            health: Mutex::default(),
            patience: options.patience.min(LONGEST_OPEN),
            counters: Arc::clone(&options.counters),
        };
        let part = 0..head.len() as u64;
        let known = object.patiently(|| {
            let (known, mut body) = object.ask(&part, None)?;
            body.read_exact(head)?;
            body.finish();
            Ok(known)
        })?;
        object.len = known.len;
        object.known = Mutex::new(known);
        Ok(object)
    }

    /// How many bytes it has.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn url(&self) -> &ObjectUrl {
        &self.url
    }

    /// Says which of its bytes tell it from all others.
    pub(crate) fn set_index(&self, index: IndexId) {
        // Whoever opens it says it once.
        let _ = self.index.set(index);
    }

    pub(crate) fn index(&self) -> Option<&IndexId> {
        self.index.get()
    }

    /// Reads a part, trying again for a while if the server fails.
    pub(crate) fn read(&self, part: Range<u64>, to: &mut [u8]) -> Result<(), RemoteError> {
        self.patiently(|| {
            let mut body = self.get(&part)?;
            body.read_exact(to)?;
            body.finish();
            self.counters.bytes.fetch_add(to.len() as u64, Ordering::Relaxed);
            Ok(())
        })
    }

    /// Asks for a part, once; of the object that was opened, or one that is the same.
    pub(crate) fn get(&self, part: &Range<u64>) -> Result<Body, Problem> {
        let known = lock(&self.known).clone();
        match self.ask(part, Some(&known)) {
            Ok((_, body)) => Ok(body),
            Err(Problem::Changed { what }) => {
                let known = self.same_again(what)?;
                let (_, body) = self.ask(part, Some(&known)).map_err(|problem| match problem {
                    // It was not, a moment ago.
                    Problem::Changed { what } => Problem::Wrong { what },
                    problem => problem,
                })?;
                Ok(body)
            }
            Err(problem) => Err(problem),
        }
    }

    fn ask(&self, part: &Range<u64>, known: Option<&Known>) -> Result<(Known, Body), Problem> {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        self.client.get(part, known)
    }

    /// Something says that the object is another one. If its index is what it was, so
    /// is every frame: it was copied, or put there again. That it is another one is
    /// believed if the same other one is seen twice.
    pub(crate) fn same_again(&self, what: String) -> Result<Known, Problem> {
        let Some(index) = self.index.get() else { return Err(Problem::Changed { what }) };
        let first = match self.look_again(index)? {
            Seen::Same(known) => {
                info!("{}: put there anew, and the same ({what})", self.url.shown());
                lock(&self.known).clone_from(&known);
                return Ok(known);
            }
            Seen::Untouched(known) => return Ok(known),
            other @ Seen::Other { .. } => other,
        };
        if self.look_again(index)? == first {
            return Err(Problem::Changed { what });
        }
        Err(Problem::Wrong { what: "the index is another one each time it is read".into() })
    }

    fn look_again(&self, index: &IndexId) -> Result<Seen, Problem> {
        let (known, mut body) = match self.ask(&index.bytes, None) {
            Ok(answer) => answer,
            Err(Problem::Short { len }) => return Ok(Seen::Other { len, hash: None }),
            Err(problem) => return Err(problem),
        };
        if known == *lock(&self.known) && known.validator != Validator::None {
            return Ok(Seen::Untouched(known));
        }
        let mut hasher = blake3::Hasher::new();
        let mut piece = vec![0; 64 << 10];
        let mut left = index.bytes.end - index.bytes.start;
        while left > 0 {
            let part = &mut piece[..usize::try_from(left).unwrap_or(usize::MAX).min(64 << 10)];
            body.read_exact(part)?;
            hasher.update(part);
            left -= part.len() as u64;
        }
        body.finish();
        let hash = *hasher.finalize().as_bytes();
        if known.len == self.len && hash == index.hash {
            return Ok(Seen::Same(known));
        }
        Ok(Seen::Other { len: known.len, hash: Some(hash) })
    }

    fn patiently<T>(&self, mut ask: impl FnMut() -> Result<T, Problem>) -> Result<T, RemoteError> {
        let started = Instant::now();
        loop {
            let problem = match ask() {
                Ok(value) => {
                    self.answered();
                    return Ok(value);
                }
                Err(problem) => problem,
            };
            self.failed(&problem);
            let now = Instant::now();
            let again = self.again(now).unwrap_or(now);
            if !problem.is_passing() || again.duration_since(started) > self.patience {
                return Err(self.error(problem));
            }
            std::thread::sleep(again.saturating_duration_since(now));
        }
    }

    pub(crate) fn error(&self, problem: Problem) -> RemoteError {
        RemoteError { url: self.url.shown().to_owned(), problem }
    }

    /// When the server may be asked again, if not at once.
    pub(crate) fn again(&self, now: Instant) -> Option<Instant> {
        lock(&self.health).pace.again(now)
    }

    /// What was wrong with the latest request, in words.
    pub(crate) fn trouble(&self) -> String {
        let trouble = lock(&self.health).trouble.clone();
        trouble.unwrap_or_else(|| Problem::Unreachable { what: "no answer".into() }.to_string())
    }

    /// The server has answered as it should.
    pub(crate) fn answered(&self) {
        let mut health = lock(&self.health);
        let failures = health.pace.succeeded();
        health.trouble = None;
        if health.complained.take().is_some() {
            info!("{}: answers again, after {failures} failures", self.url.shown());
        }
    }

    /// The server has failed.
    pub(crate) fn failed(&self, problem: &Problem) {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        let (now, mut health) = (Instant::now(), lock(&self.health));
        health.trouble = Some(problem.to_string());
        health.pace.failed(now, problem.retry_after(), fastrand::f64());
        if health.complained.is_none_or(|before| now - before > COMPLAIN_EVERY) {
            health.complained = Some(now);
            warn!("{}: {problem}; trying again", self.url.shown());
        }
    }
}
