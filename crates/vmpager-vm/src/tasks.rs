//! A VM whose guest has a task that computes, and others that walk pages of their own:
//! for asynchronous page faults, where Linux does not boot.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;
use vmpager::core::PageSource;
use vmpager::{NeighbourPolicy, Pager};
use vmpager_kvm::apf::ApfStats;
use vmpager_kvm::exit::ExitStats;
use vmpager_sys::memory::{Access, GuestRange, Mapping};

use crate::device::to_usize;
use crate::error::VmError;
use crate::kvm::{
    Answer, EVENT_DONE, EVENT_PORT, EVENT_STARTED, EVENT_TASK_ENDED, KEY, Parts, Stopped, Task,
    ending, task_machine, task_pages, wrong_pages,
};
use crate::layout::Layout;
use crate::memory::{GuestMemory, Memslot, Served};
use crate::restore::{AsyncFaults, Delivery};
use crate::{PAGE_BYTES, PAGE_SIZE};

/// How long the guest may take for its work.
const PATIENCE: Duration = Duration::from_secs(120);

/// A guest with a task that computes and up to [`WALKERS`](Self::WALKERS) that walk
/// pages.
#[derive(Debug)]
pub struct TaskGuest {
    layout: Layout,
    /// Of each walker.
    pages: u64,
}

/// What its tasks do.
#[derive(Clone, Copy, Debug)]
pub struct TaskWork {
    /// Steps of the task that computes.
    pub steps: u64,
    /// Tasks that walk.
    pub walkers: u64,
    /// Pages of each that are walked.
    pub pages: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct TaskRun {
    /// From its kernel's start to the end of the last task.
    pub took: Duration,
    /// Pages that did not have what they should.
    pub wrong: u64,
    /// What its exits on missing pages came to, if they were delivered so.
    pub exits: Option<ExitStats>,
    /// What the device for asynchronous page faults has done, if vmpager played it.
    pub told: Option<ApfStats>,
}

impl TaskGuest {
    /// Tasks that walk, at most.
    pub const WALKERS: u64 = 7;

    /// A guest each of whose walkers has so many pages.
    ///
    /// # Errors
    ///
    /// If that are more than fit into 32 GiB.
    pub fn new(pages: u64) -> Result<Self, VmError> {
        const MIB_2: u64 = 2 << 20;
        // Its own structures take 2 MiB at most, and some bytes for each page.
        let bytes = pages.saturating_mul(Self::WALKERS * (PAGE_SIZE + 16));
        let memory = bytes.saturating_add(MIB_2 + 1).checked_next_multiple_of(MIB_2);
        let layout = Layout::new(memory.unwrap_or(u64::MAX).max(2 * MIB_2), 1)?;
        Ok(Self { layout, pages })
    }

    /// Its memory, as a source of it has to have it.
    pub fn image(&self) -> Vec<u8> {
        let mut image: Vec<u8> = task_pages(&self.layout).into_iter().flatten().collect();
        image.resize(to_usize(self.layout.memory_bytes()), 0);
        for gpa in self.walked().step_by(PAGE_BYTES) {
            let low = u32::try_from(gpa & u64::from(u32::MAX)).unwrap_or_default();
            let word = (low ^ KEY).to_le_bytes();
            image[to_usize(gpa)..][..word.len()].copy_from_slice(&word);
        }
        image
    }

    /// The bytes of its memory that are walked.
    pub fn walked(&self) -> Range<u64> {
        let start = self.layout.contents().start * PAGE_SIZE;
        start..start + Self::WALKERS * self.pages * PAGE_SIZE
    }

    /// Has a new VM do this, its memory brought from `source`.
    ///
    /// # Errors
    ///
    /// If KVM or the kernel lacks something, or the guest does not end.
    pub fn run(
        &self,
        source: Arc<dyn PageSource>,
        delivery: Delivery,
        async_faults: Option<AsyncFaults>,
        work: TaskWork,
    ) -> Result<TaskRun, VmError> {
        let memory = self.memory(source, delivery, async_faults)?;
        let parts = Parts { memory: &memory, device: None, vcpus: 1, irqchip: true };
        let walk = |walker: u64| {
            let start = self.walked().start + walker * self.pages * PAGE_SIZE;
            Task::Walk(start, work.pages.min(self.pages))
        };
        let walkers = (0..work.walkers.min(Self::WALKERS)).map(walk);
        let tasks: Vec<Task> =
            std::iter::once(Task::Compute(work.steps.max(1))).chain(walkers).collect();
        let mut machine = task_machine(&parts, &self.layout, &tasks)?;
        let end_task = ending(&machine);
        let mut started = None;
        let mut took = Duration::ZERO;
        for vcpu in &mut machine.vcpus {
            let kick = vcpu.kick().clone();
            let (running, ended) = channel::<()>();
            let stopped = thread::scope(|scope| {
                scope.spawn(move || {
                    if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                        kick.stop();
                    }
                });
                let stopped = vcpu.run(|exit| match (exit, started) {
                    (VcpuExit::IoOut(EVENT_PORT, [EVENT_STARTED]), None) => {
                        started = Some(Instant::now());
                        Answer::GoOn
                    }
                    (VcpuExit::IoOut(EVENT_PORT, [EVENT_TASK_ENDED]), _) => match end_task() {
                        Ok(()) => Answer::GoOn,
                        Err(error) => Answer::Unexpected(error.to_string()),
                    },
                    (VcpuExit::IoOut(EVENT_PORT, [EVENT_DONE]), Some(started)) => {
                        Answer::Stop(started.elapsed())
                    }
                    (exit, _) => Answer::Unexpected(format!("{exit:?}")),
                });
                drop(running);
                stopped
            })?;
            took = match stopped {
                Stopped::Answered(took) => took,
                Stopped::Kicked => {
                    return Err(vcpu.unexpected(format!("no end in {PATIENCE:?}")));
                }
            };
        }
        let (exits, told) = (machine.exit_stats(), machine.async_fault_stats());
        Ok(TaskRun { took, wrong: wrong_pages(&parts, &self.layout), exits, told })
    }

    fn memory(
        &self,
        source: Arc<dyn PageSource>,
        delivery: Delivery,
        async_faults: Option<AsyncFaults>,
    ) -> Result<GuestMemory, VmError> {
        let bytes = self.layout.memory_bytes();
        let cannot_map = |error| VmError::Memory { bytes, error };
        let mapping = Arc::new(Mapping::for_pager(to_usize(bytes)).map_err(cannot_map)?);
        mapping.allow(Access::None).map_err(cannot_map)?;
        let pager = Pager::builder(source)
            .region(&GuestRange::of_mapping(&mapping), 0)
            .neighbours(NeighbourPolicy::Off)
            .start()?;
        GuestMemory::new(mapping, Memslot::flat(bytes))
            .served(Served::InProcess(Box::new(pager)))
            .with_async_faults(async_faults)
            .delivered_by(delivery)
            .map_err(cannot_map)
    }
}
