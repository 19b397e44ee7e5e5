//! Linux guests that are told of missing pages, and run something else meanwhile.

use anyhow::{Context, ensure};
use serde_json::Value;

use super::Lab;
use super::guest::{SMALL, Size};
use super::saved::Saved;

const TOLD: [&str; 5] = ["on-demand", "--delivery", "exit", "--async-pf", "always"];
/// How much the load must do after a restore.
const WORK: u64 = 500;

const ONE: Size = Size { still: 1024, moving: 256, ..SMALL };
const BOTH: Size = Size { vcpus: 2, ..ONE };
/// Out of order: each page takes its own time.
const SLOW: [&str; 4] = ["--source-delay", "0-4000", "--neighbours", "off"];

pub(super) fn told_of_faults_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    restores(lab, &ONE, &[&TOLD[..], &SLOW].concat()).map(drop)
}

pub(super) fn told_of_faults_on_two_vcpus_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    restores(lab, &BOTH, &[&TOLD[..], &SLOW].concat()).map(drop)
}

/// Restores a guest under load so, and has its memory checked by itself and by the
/// host. What its device for asynchronous page faults came to.
fn restores(lab: &Lab, size: &Size, mode: &[&str]) -> anyhow::Result<Value> {
    let saved = Saved::shared(lab, size)?;
    let mut guest = saved.restore(lab, &[mode, &["--json"]].concat())?;
    guest.work(WORK)?;
    let summary = guest.end_summed_up()?;
    let told = summary["async_pf"].clone();
    println!("{} {told}", summary["exits"]);
    let number = |key: &str| told[key].as_u64().with_context(|| format!("no {key} in {told}"));
    ensure!(number("injected")? > 100, "{told}");
    Ok(told)
}
