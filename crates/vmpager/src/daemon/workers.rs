//! The threads that serve.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam_channel::Receiver;
use vmpager_core::PageSource;

use super::{DaemonConfig, DaemonError, doors};
use crate::clean::CleanSource;
use crate::worker::{Event, WorkerConfig, WorkerHandle, doorbell, spawn};

/// The threads that serve, and how they tell what happens.
pub(super) struct Workers {
    pub(super) bell: Arc<OwnedFd>,
    pub(super) events: Receiver<Event>,
    pub(super) workers: Vec<WorkerHandle>,
}

impl Workers {
    pub(super) fn start(config: &DaemonConfig) -> Result<Self, DaemonError> {
        config.attach.as_deref().map_or(Ok(()), doors::check)?;
        let (tell, events) = crossbeam_channel::unbounded();
        let bell = Arc::new(doorbell()?);
        let source: Arc<dyn PageSource> = match &config.clean {
            Some(clean) => CleanSource::new(config.source.clone(), clean.clone()),
            None => config.source.clone(),
        };
        let workers = (0..config.workers.max(1)).map(|index| {
            spawn(WorkerConfig {
                name: format!("vmpager-serve-{index}"),
                source: source.clone(),
                events: tell.clone(),
                owner: bell.clone(),
                max_polling: crate::polling::default_max(),
                turn: config.faults_per_turn,
            })
        });
        let workers = workers.collect::<Result<Vec<_>, _>>()?;
        Ok(Self { bell, events, workers })
    }
}
