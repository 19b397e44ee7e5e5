//! The write-only view: memory that KVM cannot pin for reading.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmpager_sys::memory::{Access, Mapping};

/// A mapping that is write-only while pages are missing.
#[derive(Debug)]
pub(super) struct View {
    mapping: Arc<Mapping>,
    protection: Mutex<Protection>,
}

#[derive(Debug)]
struct Protection {
    /// vCPUs that run an instruction with the view readable.
    readers: u32,
    /// No page is missing any more: readable for good.
    complete: bool,
}

impl View {
    pub(super) fn new(mapping: Arc<Mapping>) -> io::Result<Self> {
        mapping.allow(Access::Write)?;
        Ok(Self { mapping, protection: Mutex::new(Protection { readers: 0, complete: false }) })
    }

    /// No page is missing any more: faults need no exit.
    pub(super) fn stop_exits(&self) -> io::Result<()> {
        let mut protection = self.protection.lock().unwrap_or_else(PoisonError::into_inner);
        if !protection.complete {
            self.mapping.allow(Access::ReadWrite)?;
            protection.complete = true;
        }
        Ok(())
    }

    /// Makes the view readable until the answer is dropped.
    pub(super) fn readable(&self) -> io::Result<Readable<'_>> {
        let mut protection = self.protection.lock().unwrap_or_else(PoisonError::into_inner);
        if protection.readers == 0 && !protection.complete {
            self.mapping.allow(Access::ReadWrite)?;
        }
        protection.readers += 1;
        Ok(Readable(self))
    }
}

/// The view is readable while this lives.
#[derive(Debug)]
pub(super) struct Readable<'a>(&'a View);

impl Drop for Readable<'_> {
    fn drop(&mut self) {
        let mut protection = self.0.protection.lock().unwrap_or_else(PoisonError::into_inner);
        protection.readers -= 1;
        if protection.readers == 0 && !protection.complete {
            // Left readable, faults only take the way over the userfaultfd.
            let _ = self.0.mapping.allow(Access::Write);
        }
    }
}
