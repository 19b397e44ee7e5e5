//! On-demand restores from sources that are slow, or fail.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use vmpager::NeighbourPolicy;
use vmpager::core::ByteRange;
use vmpager::store::RawFile;
use vmpager::store::faulty::{ALL, FaultySource, Times};

use super::Lab;
use super::guest::{Size, TWO};
use super::pager::OwnDaemon;
use super::saved::Saved;

const SOCKET: &str = "pager.sock";
const THROUGH_PAGER: [&str; 3] = ["on-demand", "--pager", SOCKET];

/// In the end the guest touches every page, which takes as long as there are
/// pages.
const SIZE: Size = Size { still: 512, moving: 128, ..TWO };

/// How much the load must do after a restore.
const WORK: u64 = 300;

/// Each page takes a millisecond, and comes alone.
pub(super) fn restored_from_a_slow_source_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let saved = Saved::shared(lab, &SIZE)?;
    let source = FaultySource::wrap(RawFile::open(&saved.memory)?);
    source.delay(ALL, Duration::from_millis(1));
    let daemon = OwnDaemon::start(Path::new(SOCKET), source, |config| {
        config.options.neighbours = NeighbourPolicy::Off;
    })?;
    let mut guest = saved.restore(lab, &THROUGH_PAGER)?;
    guest.work(WORK)?;
    guest.end_well()?;
    let sessions = daemon.stop()?;
    ensure!(sessions.iter().all(|s| s.pages_poisoned == 0 && s.faults > 0), "{sessions:?}");
    Ok(())
}

/// Every read fails once, wherever it is; the pages are asked for again.
pub(super) fn restored_from_a_source_that_fails_once_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let saved = Saved::shared(lab, &SIZE)?;
    let source = FaultySource::wrap(RawFile::open(&saved.memory)?);
    let pieces = u64::try_from(SIZE.memory_mib(lab)?)?;
    for piece in 0..pieces {
        source.fail(ByteRange::new(piece << 20, 1 << 20), Times::Often(1));
    }
    let daemon = OwnDaemon::start(Path::new(SOCKET), Arc::clone(&source) as _, |_| ())?;
    let mut guest = saved.restore(lab, &THROUGH_PAGER)?;
    guest.work(WORK)?;
    guest.end_well()?;
    let sessions = daemon.stop()?;
    let again = source.all_fetches().iter().filter(|&&fetches| fetches > 1).count();
    ensure!(again > 0, "no page had to be asked for again");
    ensure!(sessions.iter().all(|s| s.pages_poisoned == 0 && s.faults > 0), "{sessions:?}");
    Ok(())
}
