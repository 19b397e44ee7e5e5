//! Images at servers: options and numbers.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmpager_store::remote::{RemoteNumbers, RemoteOptions};

use crate::size;

/// How images at servers are read.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct RemoteArgs {
    /// Keep what was fetched of images at servers in this directory: after a restart
    /// nothing that is there is fetched again. Any number of daemons may share it.
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// Let it take so much of the disk [default: 16G].
    #[arg(long, value_name = "SIZE", requires = "cache", value_parser = size::parse)]
    pub(crate) cache_size: Option<u64>,
    /// Seconds to wait for a page that a server does not send, before it is given up
    /// [default: 300].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) patience: Option<u64>,
}

impl RemoteArgs {
    pub(crate) fn options(&self) -> RemoteOptions {
        let patience = Duration::from_secs(self.patience.unwrap_or(300));
        let options = RemoteOptions::default().patience(patience);
        match &self.cache {
            Some(dir) => options.cache(dir, self.cache_size.unwrap_or(16 << 30)),
            None => options,
        }
    }
}

/// What was asked of servers and the cache so far.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct RemoteReport {
    /// Requests, those that failed among them.
    requests: u64,
    /// Requests that failed, and were made again.
    failures: u64,
    /// Bytes that came.
    bytes: u64,
    /// Parts of the image (frames) that came.
    frames_fetched: u64,
    /// Those that were read from the cache instead.
    frames_cached: u64,
    /// Those that were written to the cache.
    frames_stored: u64,
    /// Those for which the cache had no room, or the disk no time.
    frames_not_stored: u64,
}

impl From<RemoteNumbers> for RemoteReport {
    fn from(numbers: RemoteNumbers) -> Self {
        Self {
            requests: numbers.requests,
            failures: numbers.failures,
            bytes: numbers.bytes,
            frames_fetched: numbers.frames_fetched,
            frames_cached: numbers.frames_cached,
            frames_stored: numbers.frames_stored,
            frames_not_stored: numbers.frames_not_stored,
        }
    }
}
