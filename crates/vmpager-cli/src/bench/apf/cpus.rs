//! Where threads run: the vCPU has a CPU of its own, if there are two.

use rustix::io;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The last of the CPUs that this process may use, for the vCPU, and the others, for
/// everything else: whoever brings pages. One and the same where there is only one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cpus {
    vcpu: CpuSet,
    others: CpuSet,
}

impl Cpus {
    /// The calling thread, and those it starts, are kept off the vCPU's from now on.
    pub(super) fn set_apart() -> io::Result<Self> {
        let all = sched_getaffinity(None)?;
        let (mut vcpu, mut others) = (all, all);
        let last = (0..CpuSet::MAX_CPU).rev().find(|cpu| all.is_set(*cpu));
        if let Some(last) = last.filter(|_| all.count() > 1) {
            vcpu.clear();
            vcpu.set(last);
            others.unset(last);
        }
        sched_setaffinity(None, &others)?;
        Ok(Self { vcpu, others })
    }

    /// Threads that are started here run on the vCPU's.
    pub(super) fn on_vcpus<T>(&self, start: impl FnOnce() -> T) -> io::Result<T> {
        sched_setaffinity(None, &self.vcpu)?;
        let started = start();
        sched_setaffinity(None, &self.others)?;
        Ok(started)
    }
}
