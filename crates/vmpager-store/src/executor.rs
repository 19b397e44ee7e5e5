//! Who carries out background reads: the kernel by io_uring, or threads.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmpager_core::Priority;
use vmpager_sys::ring::{ReadRing, RingRead};

use crate::doorbell::Doorbell;
use crate::threads::{ReadThreads, ThreadClient};

/// From this length on a kernel thread does the read: copying that much out of
/// the page cache would keep the caller from its faults.
const OFFLOAD_FROM: usize = 128 * 1024;

/// One positioned read into part of a buffer.
#[derive(Debug)]
pub(crate) struct Read {
    /// Names it within its executor.
    pub(crate) key: u64,
    pub(crate) offset: u64,
    pub(crate) buf: Vec<u8>,
    /// Where in the buffer the bytes go; they end where the buffer ends.
    pub(crate) from: usize,
}

/// A read that has ended, with the number of bytes read.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) key: u64,
    pub(crate) result: io::Result<usize>,
    pub(crate) buf: Vec<u8>,
}

/// Rings the doorbell it was made with whenever a read ends.
#[derive(Debug)]
pub(crate) enum Executor {
    Ring(Box<ReadRing>),
    Threads(ThreadClient),
    /// Reads at most so many bytes of its own at a time.
    #[cfg(test)]
    Short {
        bytes: Vec<u8>,
        at_most: usize,
        finished: Vec<Finished>,
    },
}

impl Executor {
    pub(crate) fn ring(file: File, depth: u32, bell: &Doorbell) -> io::Result<Self> {
        let ring = ReadRing::new(file.into(), depth, Some(bell))?;
        Ok(Self::Ring(Box::new(ring)))
    }

    pub(crate) fn threads(threads: &Arc<ReadThreads>, bell: &Arc<Doorbell>) -> Self {
        Self::Threads(threads.client(Arc::clone(bell)))
    }

    /// Starts a read. The caller keeps the number in flight below the depth.
    pub(crate) fn start(&mut self, priority: Priority, read: Read) -> Result<(), Finished> {
        match self {
            Self::Ring(ring) => {
                let Read { key, offset, buf, from } = read;
                let offload = buf.len() - from >= OFFLOAD_FROM;
                ring.submit(RingRead { user_data: key, offset, buf, from, offload }).map_err(
                    |refused| Finished { key, result: Err(refused.error), buf: refused.buf },
                )
            }
            Self::Threads(threads) => {
                threads.start(priority, read);
                Ok(())
            }
            #[cfg(test)]
            Self::Short { bytes, at_most, finished } => {
                let Read { key, offset, mut buf, from } = read;
                let rest = &bytes[bytes.len().min(usize::try_from(offset).unwrap())..];
                let n = rest.len().min(*at_most).min(buf.len() - from);
                buf[from..from + n].copy_from_slice(&rest[..n]);
                finished.push(Finished { key, result: Ok(n), buf });
                Ok(())
            }
        }
    }

    /// Raises the priority of a read that has been started here but may still
    /// wait for a thread.
    pub(crate) fn promote(&mut self, key: u64, priority: Priority) {
        if let Self::Threads(threads) = self {
            threads.promote(key, priority);
        }
    }

    /// Appends what has ended since the last call.
    pub(crate) fn drain(&mut self, finished: &mut Vec<Finished>) {
        match self {
            Self::Ring(ring) => ring.completions(|key, result, buf| {
                finished.push(Finished { key, result, buf });
            }),
            Self::Threads(threads) => threads.drain(finished),
            #[cfg(test)]
            Self::Short { finished: ended, .. } => finished.append(ended),
        }
    }

    /// Whether [`drain`](Self::drain) must be called again for started reads
    /// to make progress.
    pub(crate) fn is_stalled(&self) -> bool {
        matches!(self, Self::Ring(ring) if ring.is_stalled())
    }
}
