//! The daemon that is measured: a real one, in processes of its own.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::restore::process::{Running, vmpager};
use crate::serve::ServeReport;
use crate::smaps::{self, kib};

/// `vmpager serve`, killed when dropped.
#[derive(Debug)]
pub(super) struct Daemon {
    running: Running,
    keeper: u32,
}

/// What it costs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// Resident memory of keeper and worker.
    pub(super) rss: u64,
    /// The part of it that is neither a file's, of which the daemon maps a few MiB for
    /// all VMs together, nor a page map's.
    pub(super) own: u64,
    /// CPU time of all its threads so far.
    pub(super) cpu_ns: u64,
}

impl Daemon {
    /// Starts one that brings one page for each fault.
    pub(super) fn start(socket: &Path, memory: &Path) -> anyhow::Result<Self> {
        Self::with(socket, &["--prefetch".as_ref(), "off".as_ref(), "--memory".as_ref(), memory])
    }

    /// The same without a keeper.
    pub(super) fn start_alone(socket: &Path, memory: &Path) -> anyhow::Result<Self> {
        let options = ["--alone", "--prefetch", "off", "--memory"].map(Path::new);
        Self::with(socket, &[&options[..], &[memory]].concat())
    }

    /// Starts one with these options.
    pub(super) fn with(socket: &Path, options: &[&Path]) -> anyhow::Result<Self> {
        let args = ["serve", "--json", "--socket"].map(PathBuf::from).into_iter();
        let options = options.iter().map(|option| option.to_path_buf());
        let args: Vec<PathBuf> = args.chain([socket.into()]).chain(options).collect();
        let mut running = vmpager(&args)?;
        running.wait_for(socket)?;
        let keeper = running.id().context("the daemon has ended")?;
        Ok(Self { running, keeper })
    }

    /// Has it end, once its VMs have. Returns what it reports.
    pub(super) fn stop(self) -> anyhow::Result<ServeReport> {
        let keeper = Pid::from_raw(i32::try_from(self.keeper)?).context("a process id")?;
        kill_process(keeper, Signal::TERM).context("stopping the daemon")?;
        let report = self.running.output().context("the daemon")?;
        serde_json::from_str(&report).context("what the daemon reports")
    }

    /// The process that serves: the keeper's only child.
    fn worker(&self) -> anyhow::Result<u32> {
        let path = format!("/proc/{0}/task/{0}/children", self.keeper);
        let children = read(&path)?;
        match children.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>()?[..] {
            [worker] => Ok(worker),
            ref others => bail!("the keeper has {} children, not one worker", others.len()),
        }
    }

    /// Keeper and worker.
    pub(super) fn processes(&self) -> anyhow::Result<[u32; 2]> {
        Ok([self.keeper, self.worker()?])
    }

    pub(super) fn kill_worker(&self) -> anyhow::Result<()> {
        let worker = Pid::from_raw(i32::try_from(self.worker()?)?).context("a process id")?;
        kill_process(worker, Signal::KILL).context("killing the worker")
    }

    pub(super) fn cost(&self) -> anyhow::Result<Cost> {
        let mut cost = Cost { rss: 0, own: 0, cpu_ns: 0 };
        for pid in self.processes()? {
            let [all, of_files] = resident(pid)?;
            cost.rss += all;
            cost.own += all.saturating_sub(of_files + page_maps(pid)?);
            cost.cpu_ns += cpu_ns(pid)?;
        }
        Ok(cost)
    }
}

fn read(path: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {path}"))
}

/// Resident bytes, and those of files among them.
fn resident(pid: u32) -> anyhow::Result<[u64; 2]> {
    let status = read(&format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let field = status.lines().find_map(|line| line.strip_prefix(name)).and_then(kib);
        field.with_context(|| format!("{name} of process {pid}"))
    };
    Ok([field("VmRSS:")?, field("RssFile:")?])
}

/// Memory of a process, of that which others have too its share, in bytes.
pub(super) fn proportional(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let smaps = read(&path)?;
    let pss = smaps.lines().find_map(|line| line.strip_prefix("Pss:")).and_then(kib);
    pss.with_context(|| format!("Pss in {path}"))
}

/// Resident bytes of page maps.
fn page_maps(pid: u32) -> anyhow::Result<u64> {
    let smaps = read(&format!("/proc/{pid}/smaps"))?;
    Ok(smaps::sum(&smaps, &["Rss:"], |mapping| mapping.contains("/memfd:vmpager-page-map")))
}

/// By the scheduler's own count, in nanoseconds: `/proc/PID/stat` has ticks.
fn cpu_ns(pid: u32) -> anyhow::Result<u64> {
    let tasks = format!("/proc/{pid}/task");
    let mut all = 0;
    for task in std::fs::read_dir(&tasks).with_context(|| format!("reading {tasks}"))? {
        let path = task?.path().join("schedstat");
        let path = path.display().to_string();
        let text = read(&path)?;
        let first = text.split(' ').next().and_then(|first| first.parse::<u64>().ok());
        all += first.with_context(|| format!("the first number of {path}"))?;
    }
    Ok(all)
}
