//! The built-in guest of tasks: a VM of its own for each run.

use std::sync::Arc;

use anyhow::ensure;
use vmpager::core::ByteRange;
use vmpager_store::MemorySource;
use vmpager_store::faulty::FaultySource;
use vmpager_vm::{Delivery, TaskGuest, TaskRun, TaskWork};

use super::guest::{Run, Walk, Way};
use crate::vm::AsyncPf;

/// Over which the speed of computing is measured.
const MEASURED_STEPS: u64 = 100_000_000;

/// The guest, and what it can compute.
#[derive(Debug)]
pub(super) struct Tasks {
    guest: TaskGuest,
    image: Vec<u8>,
    steps_per_ms: u64,
}

impl Tasks {
    pub(super) fn new(pages: u64) -> anyhow::Result<Self> {
        let guest = TaskGuest::new(pages)?;
        let mut tasks = Self { image: guest.image(), guest, steps_per_ms: 1 };
        let alone = TaskWork { steps: MEASURED_STEPS, walkers: 0, pages: 0 };
        let way = Way { delivery: Delivery::Userfaultfd, async_faults: None };
        let run = tasks.work(FaultySource::wrap(tasks.source()), alone, way)?;
        let millis = u64::try_from(run.took.as_millis())?.max(1);
        tasks.steps_per_ms = (MEASURED_STEPS / millis).max(1);
        Ok(tasks)
    }

    fn source(&self) -> Arc<MemorySource> {
        Arc::new(MemorySource::new(self.image.clone()))
    }

    pub(super) fn run(&self, walk: &Walk, way: Way) -> anyhow::Result<Run> {
        let source = FaultySource::wrap(self.source());
        if !walk.latency.is_zero() {
            let walked = self.guest.walked();
            source.delay(ByteRange::new(walked.start, walked.end - walked.start), walk.latency);
        }
        let steps = walk.compute_ms * self.steps_per_ms;
        let work = TaskWork { steps, walkers: walk.walkers, pages: walk.pages };
        let run = self.work(source, work, way)?;
        let told = run.told.zip(run.exits).map(|(stats, exits)| AsyncPf::new(stats, exits));
        Ok(Run { seconds: run.took.as_secs_f64(), told })
    }

    fn work(&self, source: Arc<FaultySource>, work: TaskWork, way: Way) -> anyhow::Result<TaskRun> {
        let run = self.guest.run(source, way.delivery, way.async_faults, work)?;
        ensure!(run.wrong == 0, "the guest found {} wrong pages by {way:?}", run.wrong);
        Ok(run)
    }
}
