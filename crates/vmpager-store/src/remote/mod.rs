//! Images at an HTTP server, read by ranges.
//!
//! ```text
//! page -> frame -> at hand?  staged in memory, or in the cache on disk
//!                  else      queue (demand first) -> threads -> one request for
//!                            neighbours -> each frame verified as it comes -> whoever
//!                            waits for it, then the cache
//! ```
//!
//! | module | what it knows |
//! |---|---|
//! | `url`, `error` | where objects are, and what can be wrong with them |
//! | `http` | one request, and what is believed of its answer |
//! | `tls` | which servers are believed to be who they say they are |
//! | `provider`, `store` | object stores: what they say; signed requests for what they have |
//! | `object` | one object: that it is still the same, how its server is |
//! | `pace` | when to ask again |
//! | `index` | reading the index in few requests |
//! | `queue` | which frames are wanted by whom, and which go into one request |
//! | `fetch` | the threads that ask |
//! | `cache`, `room` | frames on disk, which a restart finds again |

mod cache;
mod error;
mod fetch;
mod http;
mod index;
mod object;
mod pace;
#[cfg(feature = "object-store")]
mod provider;
mod queue;
mod room;
#[cfg(feature = "object-store")]
mod store;
#[cfg(feature = "tls")]
mod tls;
mod url;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use self::error::{Problem, RemoteError};

pub(crate) use self::cache::CacheDir;
pub(crate) use self::fetch::{FetchFailed, Fetcher, Remote};
pub(crate) use self::index::IndexReader;
pub(crate) use self::object::Object;
pub(crate) use self::queue::Frames;
pub(crate) use self::url::{ObjectUrl, is_url};

/// How to read images that are at a server.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    pub(crate) cache: Option<(PathBuf, u64)>,
    pub(crate) patience: Duration,
    pub(crate) timeout: Duration,
    #[cfg(feature = "tls")]
    pub(crate) authorities: Option<PathBuf>,
    pub(crate) counters: Arc<Counters>,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            cache: None,
            patience: Duration::from_secs(60),
            timeout: Duration::from_secs(15),
            #[cfg(feature = "tls")]
            authorities: None,
            counters: Arc::default(),
        }
    }
}

impl RemoteOptions {
    /// Keeps what was fetched in files in this directory, up to so many bytes. It is
    /// made if it is not there; any number of processes may share it.
    #[must_use]
    pub fn cache(mut self, directory: impl Into<PathBuf>, bytes: u64) -> Self {
        self.cache = Some((directory.into(), bytes));
        self
    }

    /// How long a page is tried to be had before it is said that it cannot be: a
    /// minute by default.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// How long a server may be silent before it is asked anew: 15 s by default.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Believes servers of `https://` URLs that the authorities in this file (of PEM
    /// certificates) vouch for, instead of those that the machine trusts: the system's
    /// store, or what `SSL_CERT_FILE` and `SSL_CERT_DIR` name.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn authorities(mut self, file: impl Into<PathBuf>) -> Self {
        self.authorities = Some(file.into());
        self
    }
}

/// What was asked of servers and of the cache, so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemoteNumbers {
    /// Requests, those that failed among them.
    pub requests: u64,
    /// Requests that failed, and were made again.
    pub failures: u64,
    /// Bytes of the images that came.
    pub bytes: u64,
    /// Frames that came.
    pub frames_fetched: u64,
    /// Frames that were read from the cache.
    pub frames_cached: u64,
    /// Frames that were written to the cache.
    pub frames_stored: u64,
    /// Frames for which there was no room in it, or no time.
    pub frames_not_stored: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    requests: AtomicU64,
    failures: AtomicU64,
    bytes: AtomicU64,
    fetched: AtomicU64,
    cached: AtomicU64,
    stored: AtomicU64,
    not_stored: AtomicU64,
}

impl Counters {
    pub(crate) fn numbers(&self) -> RemoteNumbers {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RemoteNumbers {
            requests: get(&self.requests),
            failures: get(&self.failures),
            bytes: get(&self.bytes),
            frames_fetched: get(&self.fetched),
            frames_cached: get(&self.cached),
            frames_stored: get(&self.stored),
            frames_not_stored: get(&self.not_stored),
        }
    }
}
