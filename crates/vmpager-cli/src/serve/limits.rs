//! How many VMs, and what each of them may take.

use anyhow::bail;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;
use vmpager::{DaemonConfig, SessionLimits};

use crate::size;

/// Limits of `vmpager serve`.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct Limits {
    /// The most VMs at a time. Others are refused: their connection is closed, and the
    /// log says why [default: as many as descriptors allow].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_sessions: Option<u32>,
    /// The most memory of a VM; one with more is refused.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    max_memory: Option<u64>,
    /// The most reads of storage that a VM waits for at a time [default: 64].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_reads: Option<u32>,
    /// The most that is brought to a VM, in bytes a second (64M/s). Pages it waits for
    /// go first, and are delayed only if they exceed it by themselves.
    #[arg(long, value_name = "SIZE/s", value_parser = rate)]
    bandwidth: Option<u64>,
}

impl Limits {
    /// Of each VM.
    pub(super) fn of_session(self) -> SessionLimits {
        let mut limits = SessionLimits { bandwidth: self.bandwidth, ..SessionLimits::default() };
        if let Some(reads) = self.max_reads {
            limits.reads = reads.try_into().unwrap_or(usize::MAX);
        }
        limits
    }

    /// Of the daemon.
    pub(super) fn apply(self, config: &mut DaemonConfig) -> anyhow::Result<()> {
        let room = sessions_by_descriptors(getrlimit(Resource::Nofile).current);
        config.max_sessions = match self.max_sessions.map(u64::from) {
            Some(most) if most > room => bail!(
                "--max-sessions {most} needs {} descriptors, and this process may have enough \
                 for {room}; raise its limit (ulimit -n, LimitNOFILE=)",
                descriptors_for(most)
            ),
            Some(most) => most,
            None => room,
        }
        .try_into()
        .unwrap_or(usize::MAX);
        config.max_memory = self.max_memory.unwrap_or(u64::MAX);
        if room < FEW && self.max_sessions.is_none() {
            warn!(
                "this process may have descriptors for {room} VMs; for more, raise its limit \
                 (ulimit -n, LimitNOFILE=)"
            );
        }
        Ok(())
    }
}

/// Fewer VMs than anybody expects to be the limit.
const FEW: u64 = 100;

/// Descriptors of each VM in either process: socket, pidfd, userfaultfd, page map,
/// record; one more for huge pages, or for its door.
const EACH: u64 = 7;
/// Descriptors of the process itself.
const OWN: u64 = 64;

fn descriptors_for(sessions: u64) -> u64 {
    sessions * EACH + OWN
}

fn sessions_by_descriptors(limit: Option<u64>) -> u64 {
    limit.map_or(u64::MAX, |limit| (limit.saturating_sub(OWN) / EACH).max(1))
}

/// Has descriptors for as many VMs as the system allows.
pub(super) fn allow_descriptors() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        warn!("raising the limit of descriptors to {maximum:?}: {error}");
    }
}

/// A size, with or without "/s".
fn rate(text: &str) -> Result<u64, String> {
    match size::parse(text.strip_suffix("/s").unwrap_or(text))? {
        0 => Err("a VM that gets nothing would wait for ever; use e.g. 64M/s".into()),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_sizes_a_second() {
        assert_eq!(rate("64M/s"), Ok(64 << 20));
        assert_eq!(rate("4096"), Ok(4096));
        assert!(rate("0").is_err() && rate("64M/h").is_err());
    }

    #[test]
    fn descriptors_say_how_many_vms_there_can_be() {
        assert_eq!(sessions_by_descriptors(None), u64::MAX);
        assert_eq!(sessions_by_descriptors(Some(descriptors_for(500))), 500);
        assert_eq!(sessions_by_descriptors(Some(10)), 1, "it tries");
    }
}
