//! What a warm fault pays for living on: the keeper, and the page map.
//!
//! Two daemons serve a VM each, by turns: one with a keeper, confined as ever, and one
//! that serves in the process that was started. Both note what they do in a page map;
//! what that takes for a fault is measured by itself.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use serde::Serialize;
use vmpager::core::PageRun;
use vmpager::core::page_map::{PageMap, words_for};

use super::super::daemon::Daemon;
use super::super::{median, round, to_f64};
use super::client::Touch;
use super::{Vms, begin, percentile_us};
use crate::output;

/// Turns of each daemon in a round, and how long they take.
const TURNS: u32 = 10;
const TURN_MS: u64 = 100;

/// Faults on pages whose bytes are in the page cache, one VM at a time.
#[derive(Debug, Serialize)]
pub(super) struct KeeperCost {
    /// Half of all faults took so long with a keeper (and a system call filter).
    kept_p50_us: f64,
    /// Without.
    alone_p50_us: f64,
    ratio: f64,
    /// What a fault costs in a page map: looked up, claimed, made present.
    page_map_ns: f64,
    /// Its share of a fault, in percent.
    page_map_pct: f64,
}

/// Measures both for so many rounds. The VMs need memory enough to fault all the time.
pub(super) fn cost(
    dir: &Path,
    memory: &Path,
    bytes: u64,
    rounds: u32,
) -> anyhow::Result<KeeperCost> {
    let sockets = ["kept.sock", "alone.sock"].map(|name| dir.join(name));
    let [kept, alone] = &sockets;
    let daemons = [Daemon::start(kept, memory)?, Daemon::start_alone(alone, memory)?];
    let [mut kept, mut alone] = [Vms::start(kept, 1, bytes)?, Vms::start(alone, 1, bytes)?];
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..rounds * TURNS {
        for (vms, waits) in [(&mut kept, &mut with), (&mut alone, &mut without)] {
            let touch = Touch { start_ns: begin(), ms: TURN_MS, pause_us: 0 };
            let mut touched = vms.touch(touch)?;
            // Of a small memory nothing may be left.
            if !touched.waits_ns.is_empty() {
                waits.push(percentile_us(&mut touched.waits_ns, 50));
            }
        }
    }
    [kept, alone].into_iter().try_for_each(Vms::end)?;
    daemons.into_iter().try_for_each(|daemon| daemon.stop().map(drop))?;
    let (with, without, page_map_ns) = (median(with), median(without), page_map_ns());
    Ok(KeeperCost {
        kept_p50_us: round(with),
        alone_p50_us: round(without),
        ratio: round(with / without),
        page_map_ns: round(page_map_ns),
        page_map_pct: round(page_map_ns / with / 10.0),
    })
}

/// Over more pages than the caches hold words of, each far from the one before.
fn page_map_ns() -> f64 {
    const PAGES: u64 = 1 << 24;
    const FAULTS: u64 = 1 << 20;
    let words: Vec<AtomicU64> = (0..words_for(PAGES)).map(|_| AtomicU64::new(0)).collect();
    let map = PageMap::new(words, PAGES);
    let begin = Instant::now();
    let brought: u64 = (0..FAULTS)
        .map(|n| n.wrapping_mul(0x9e37_79b1) % PAGES)
        .filter(|page| !map.is_present(*page))
        .map(|page| map.publish(PageRun::new(page, map.claim_up(page, 1))))
        .sum();
    let took = to_f64(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX));
    took / to_f64(brought.max(1))
}

pub(super) fn show(cost: &KeeperCost) -> anyhow::Result<()> {
    output::line(&format!(
        "\na warm fault, one VM: {:.1} us with a keeper, {:.1} us without ({:.3}x); \
         {:.0} ns of it in the page map ({:.2}%)",
        cost.kept_p50_us, cost.alone_p50_us, cost.ratio, cost.page_map_ns, cost.page_map_pct
    ))
}
