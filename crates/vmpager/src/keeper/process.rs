//! The worker process, as its keeper sees it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::message::{Kind, pair, send};
use super::shown::Shown;
use super::table::{Entry, Table};

/// ETOOMANYREFS.
const TOO_MANY: i32 = rustix::io::Errno::TOOMANYREFS.raw_os_error();

/// The process that serves.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) child: Child,
    pub(super) pidfd: OwnedFd,
    pub(super) channel: OwnedFd,
    pub(super) since: Instant,
    pub(super) ready: bool,
    /// What it has to be told, once it is ready.
    pub(super) tell: VecDeque<Tell>,
}

/// Something that a worker is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tell {
    Metrics,
    Entry(Entry),
    Known,
    Stop,
}

impl Worker {
    /// Starts one that opens `sources`.
    pub(super) fn start(command: &mut Command, sources: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let (channel, theirs) = pair()?;
        send(&channel, Kind::Sources, [0; 3], sources)?;
        rustix::io::ioctl_fionbio(&channel, true)?;
        let child = command.stdin(Stdio::from(theirs)).spawn()?;
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        let (tell, since) = (VecDeque::new(), Instant::now());
        Ok(Self { child, pidfd, channel, since, ready: false, tell })
    }

    /// It is ready, and learns of all there is first.
    pub(super) fn is_ready(&mut self, table: &Table) {
        let entries = table.entries().map(Tell::Entry);
        self.tell = std::iter::once(Tell::Metrics).chain(entries).chain([Tell::Known]).collect();
        self.ready = true;
    }

    /// Tells it what there is room for.
    pub(super) fn tell(&mut self, table: &Table, shown: &Shown) {
        while let Some(tell) = self.tell.front().filter(|_| self.ready) {
            let told = match tell {
                Tell::Metrics => shown.tell(&self.channel),
                Tell::Entry(entry) => table.tell(*entry, &self.channel),
                Tell::Known => send(&self.channel, Kind::Known, [0; 3], &[]),
                Tell::Stop => send(&self.channel, Kind::Stop, [0; 3], &[]),
            };
            match told {
                Ok(()) => drop(self.tell.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Too many descriptors on their way (ETOOMANYREFS): it takes them
                // out as fast as it can.
                Err(error) if error.raw_os_error() == Some(TOO_MANY) => {
                    std::thread::sleep(Duration::from_millis(1));
                    return;
                }
                // It has ended, which is seen next.
                Err(_) => return,
            }
        }
    }
}
