//! The reader of a faulty source: submitted reads are parked until they are
//! due, then fail, or are answered by the reader behind: at once, or go on to it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use vmpager_core::{ByteRange, PageData, PageReader, Priority, ReadId, ReadRequest, SourceError};

use crate::doorbell::Doorbell;

use super::{Due, FaultySource, lock};

#[derive(Debug)]
pub(super) struct FaultyReader {
    /// Readable if one of the three below is: the bell, the timer, the reader
    /// behind.
    any: OwnedFd,
    bell: Arc<Doorbell>,
    timer: OwnedFd,
    inner: Box<dyn PageReader>,
    source: Arc<FaultySource>,
    parked: Vec<(Due, ReadRequest)>,
}

impl FaultyReader {
    pub(super) fn new(source: Arc<FaultySource>, inner: Box<dyn PageReader>) -> io::Result<Self> {
        let bell = Arc::new(Doorbell::new()?);
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let any = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = || epoll::EventData::new_u64(0);
        epoll::add(&any, &*bell, data(), epoll::EventFlags::IN)?;
        epoll::add(&any, &timer, data(), epoll::EventFlags::IN)?;
        if let Some(fd) = inner.ready_fd() {
            epoll::add(&any, fd, data(), epoll::EventFlags::IN)?;
        }
        lock(&source.bells).push(Arc::downgrade(&bell));
        Ok(Self { any, bell, timer, inner, source, parked: Vec::new() })
    }

    /// Wakes the owner when the next delay ends. Also takes back an expiry.
    fn set_timer(&self, now: Instant) {
        let next = self.parked.iter().filter_map(|(due, _)| match due {
            Due::At(at) => Some(at.saturating_duration_since(now).max(Duration::from_nanos(1))),
            Due::Now | Due::Release(_) => None,
        });
        let value = next.min().and_then(|left| Timespec::try_from(left).ok());
        let it_value = value.unwrap_or_default();
        let spec = Itimerspec { it_interval: Timespec::default(), it_value };
        // The descriptor and the value are this function's own.
        let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
    }
}

impl PageReader for FaultyReader {
    fn try_read(&mut self, range: ByteRange) -> Result<Option<PageData<'_>>, SourceError> {
        if !self.source.may_be_at_hand(range) {
            return Ok(None);
        }
        if let Some(error) = self.source.failure(range) {
            return Err(error);
        }
        let data = self.inner.try_read(range)?;
        if data.is_some() {
            self.source.count(range);
        }
        Ok(data)
    }

    fn at_hand_bytes(&self) -> u64 {
        self.inner.at_hand_bytes()
    }

    fn will_need(&mut self, ranges: &[ByteRange]) {
        self.inner.will_need(ranges);
    }

    fn submit(&mut self, request: ReadRequest) {
        self.source.count(request.range);
        let due = self.source.due(request.range);
        self.parked.push((due, request));
        match due {
            Due::Now => self.bell.ring(),
            Due::At(_) => self.set_timer(Instant::now()),
            // The release rings.
            Due::Release(_) => {}
        }
    }

    fn promote(&mut self, id: ReadId, priority: Priority) {
        match self.parked.iter_mut().find(|(_, request)| request.id == id) {
            Some((_, request)) => request.priority = request.priority.max(priority),
            None => self.inner.promote(id, priority),
        }
    }

    fn complete(&mut self, done: &mut dyn FnMut(ReadId, Result<PageData<'_>, SourceError>)) {
        self.bell.clear();
        let now = Instant::now();
        let (source, inner) = (&self.source, &mut self.inner);
        self.parked.retain(|&(due, request)| {
            if !source.is_due(due, now) {
                return true;
            }
            source.end_hold(due);
            match source.failure(request.range) {
                Some(error) => done(request.id, Err(error)),
                None => match inner.try_read(request.range) {
                    Ok(Some(data)) if data.len() as u64 == request.range.len => {
                        done(request.id, Ok(data));
                    }
                    _ => inner.submit(request),
                },
            }
            false
        });
        self.set_timer(now);
        self.inner.complete(done);
    }

    fn ready_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.any.as_fd())
    }
}

impl Drop for FaultyReader {
    fn drop(&mut self) {
        for &(due, _) in &self.parked {
            self.source.end_hold(due);
        }
    }
}
