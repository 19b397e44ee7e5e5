//! Guests on huge pages, and with more vCPUs than two.

use std::fs;

use anyhow::{Context, ensure};

use super::Lab;
use super::guest::{Guest, Size, TWO};
use super::pager::Serve;
use super::restore::work_and_compare;
use super::saved::Saved;

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Guest memory in huge pages of 2 MiB, saved and brought back so.
pub(super) fn restored_on_huge_pages_it_goes_on(lab: &Lab) -> anyhow::Result<()> {
    let huge_pages = u64::try_from(TWO.memory_mib(lab)? / 2)?;
    let _pool = Pool::with(huge_pages)?;
    let mut guest = Guest::boot_with(lab, &TWO, &["--huge-pages"])?;
    guest.work(500)?;
    let saved = Saved::of(lab, guest, &TWO)?;
    let serve = Serve::start(lab, &saved.memory, &[])?;
    let mut guest = saved.restore(lab, &["on-demand", "--pager", "pager.sock", "--huge-pages"])?;
    let all = read(POOL)? - free_huge_pages()?;
    work_and_compare(lab, &saved, &mut guest)?;
    guest.end_well()?;
    let sessions = serve.stop()?;
    let [session] = &sessions[..] else { anyhow::bail!("{} sessions, not one", sessions.len()) };
    println!("{all} huge pages when it went on, {} faults in the end", session.faults);
    ensure!(session.pages_poisoned == 0, "{session:?}");
    ensure!((1..=huge_pages).contains(&all), "{all} huge pages of {huge_pages}");
    ensure!(session.faults > 0, "{session:?}");
    Ok(())
}

/// Huge pages of 2 MiB, given back when dropped.
struct Pool {
    before: u64,
}

impl Pool {
    fn with(pages: u64) -> anyhow::Result<Self> {
        let pool = Self { before: read(POOL)? };
        let wanted = pages.max(pool.before);
        fs::write(POOL, wanted.to_string()).with_context(|| format!("writing {POOL}"))?;
        let free = free_huge_pages()?;
        ensure!(free >= pages, "{free} huge pages are free, {pages} are needed");
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Nobody could be told.
        let _ = fs::write(POOL, self.before.to_string());
    }
}

fn free_huge_pages() -> anyhow::Result<u64> {
    read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
}

fn read(path: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    text.trim().parse().with_context(|| format!("{path} has {text:?}"))
}

const FOUR: Size = Size { vcpus: 4, still: 512, moving: 128, ..TWO };

/// With the host's kernel as guest, which may be one for more CPUs. vCPUs that the
/// guest's kernel has no use for stay where they are after reset.
pub(super) fn four_vcpus_restored_on_demand_go_on(lab: &Lab) -> anyhow::Result<()> {
    const WORK: u64 = 200;
    let lab = Lab { kernel: lab.host_kernel.clone(), ..lab.clone() };
    let mut guest = Guest::boot(&lab, &FOUR)?;
    let cpus = guest.cpus()?;
    if !lab.direct {
        let most = read("/sys/devices/system/cpu/kernel_max")? + 1;
        ensure!(cpus == most.min(4), "{cpus} CPUs in a guest with 4 and a kernel for {most}");
    }
    println!("{cpus} CPUs");
    guest.work(WORK)?;
    let saved = Saved::of(&lab, guest, &FOUR)?;
    for mode in [&["on-demand"][..], &["on-demand", "--delivery", "exit"]] {
        let mut guest = saved.restore(&lab, mode)?;
        guest.work(WORK)?;
        guest.end_well()?;
    }
    Ok(())
}
