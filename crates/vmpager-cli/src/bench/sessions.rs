//! `vmpager bench sessions`: one daemon and more and more VMs.
//!
//! The daemon is `vmpager serve` with prefetch off, so that each page is a fault; the
//! VMs are threads of a few processes, each with memory, a userfaultfd and a
//! connection of its own. All touch their memory as fast as they can for the same
//! time, and compare what they find. Then nobody does anything for a while.

mod client;
mod keeper;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use serde::Serialize;
use vmpager_store::MemorySource;

use self::client::{Plan, Touch, Touched};
use self::keeper::KeeperCost;
use super::daemon::Daemon;
use super::{median, round, to_f64};
use crate::restore::process::{Running, vmpager_to_talk_to};
use crate::restore::{Cache, prepare_cache};
use crate::scratch::Scratch;
use crate::vm_process::monotonic_ns;
use crate::{output, size};

/// Options of `vmpager bench sessions`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager bench sessions --json\n  \
    vmpager bench sessions --sessions 1,100 --kill --rounds 5\n  \
    vmpager bench sessions --sessions 1 --keeper\n\n\
    Rounds are interleaved; each number is the median of its rounds. \"session\" is what\n\
    each idle session adds to the daemon's resident memory, beyond its page map;\n\
    fairness is Jain's index over the faults served to each, 1 if all got the same.")]
pub(crate) struct SessionsArgs {
    /// How many VMs at a time.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,10,100,500",
          value_parser = clap::value_parser!(u32).range(1..=4000))]
    sessions: Vec<u32>,
    /// Memory of each VM, and of the file all are served from.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    memory: u64,
    /// How long VMs touch their memory, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 1000,
          value_parser = clap::value_parser!(u64).range(1..=60_000))]
    busy_ms: u64,
    /// How long they do nothing afterwards.
    #[arg(long, value_name = "MS", default_value_t = 2000,
          value_parser = clap::value_parser!(u64).range(1..=60_000))]
    idle_ms: u64,
    /// Then kill the worker while they touch memory, and tell how long the longest
    /// touch took.
    #[arg(long)]
    kill: bool,
    /// Also tell what the keeper costs a warm fault, and what the page map does.
    #[arg(long)]
    keeper: bool,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Where to put the file [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Be a process that plays VMs.
    #[arg(long, hide = true)]
    play: Option<String>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    memory_bytes: u64,
    rounds: u32,
    rows: Vec<Row>,
    /// With `--keeper`.
    #[serde(skip_serializing_if = "Option::is_none")]
    keeper: Option<KeeperCost>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Row {
    sessions: u32,
    /// All sessions together.
    kfaults_s: f64,
    p50_us: f64,
    p99_us: f64,
    /// Jain's index over the faults served to each session.
    fairness: f64,
    /// Resident memory of keeper and worker.
    rss_mib: f64,
    /// CPU time of both while nobody touched anything, in percent of one CPU.
    idle_cpu_pct: f64,
    /// The rate over that of the first row.
    rate_ratio: f64,
    /// What each session that has touched one page adds to the resident memory,
    /// beyond its page map and what is mapped of files, a few MiB for all; null for
    /// fewer than ten.
    session_kib: Option<f64>,
    /// The longest touch while the worker was killed, with `--kill`.
    takeover_ms: Option<f64>,
}

/// Sessions in a process that plays VMs.
const IN_PROCESS: usize = 64;

pub(crate) fn run(args: &SessionsArgs) -> anyhow::Result<()> {
    if let Some(plan) = &args.play {
        return client::run(plan);
    }
    let bytes = args.memory.next_multiple_of(2 << 20);
    let scratch = Scratch::new(args.dir.as_deref(), bytes)?;
    let memory = scratch.path().join("memory");
    std::fs::write(&memory, MemorySource::numbered(bytes / 4096).bytes())
        .context("writing the memory file")?;
    let bar = ProgressBar::new_spinner();
    let mut rounds: Vec<Vec<Row>> = vec![Vec::new(); args.sessions.len()];
    for round in 1..=args.rounds {
        for (sessions, rows) in args.sessions.iter().zip(&mut rounds) {
            bar.set_message(format!("round {round} of {}, {sessions} sessions", args.rounds));
            bar.tick();
            prepare_cache(&memory, Cache::Warm)?;
            let one = Bench { args, sessions: *sessions, memory: &memory, dir: scratch.path() };
            rows.push(one.run(bytes)?);
        }
    }
    let cost = || keeper::cost(scratch.path(), &memory, bytes, args.rounds);
    let keeper = args.keeper.then(cost).transpose()?;
    bar.finish_and_clear();
    let mut rows: Vec<Row> = rounds.iter().map(|rows| middle(rows)).collect();
    let first = rows.first().map_or(1.0, |row| row.kfaults_s);
    rows.iter_mut().for_each(|row| row.rate_ratio = round(row.kfaults_s / first));
    let report = Report { memory_bytes: bytes, rounds: args.rounds, rows, keeper };
    if args.json { output::json(&report) } else { show(&report) }
}

/// Each number's median.
fn middle(rows: &[Row]) -> Row {
    let of = |which: fn(&Row) -> f64| round(median(rows.iter().map(which)));
    let some = |which: fn(&Row) -> Option<f64>| {
        let numbers: Option<Vec<f64>> = rows.iter().map(which).collect();
        numbers.map(|numbers| round(median(numbers)))
    };
    Row {
        sessions: rows.first().map_or(0, |row| row.sessions),
        kfaults_s: of(|row| row.kfaults_s),
        p50_us: of(|row| row.p50_us),
        p99_us: of(|row| row.p99_us),
        fairness: of(|row| row.fairness),
        rss_mib: of(|row| row.rss_mib),
        idle_cpu_pct: of(|row| row.idle_cpu_pct),
        rate_ratio: 1.0,
        session_kib: some(|row| row.session_kib),
        // The worst: it is a promise.
        takeover_ms: rows.iter().filter_map(|row| row.takeover_ms).max_by(f64::total_cmp),
    }
}

/// One daemon and so many VMs.
struct Bench<'a> {
    args: &'a SessionsArgs,
    sessions: u32,
    memory: &'a Path,
    dir: &'a Path,
}

impl Bench<'_> {
    fn run(&self, bytes: u64) -> anyhow::Result<Row> {
        let socket = self.dir.join("pager.sock");
        let daemon = Daemon::start(&socket, self.memory)?;
        let empty = daemon.cost()?;
        let mut vms = Vms::start(&socket, usize::try_from(self.sessions)?, bytes)?;
        let connected = daemon.cost()?;
        let start_ns = begin();
        let mut busy = vms.touch(Touch { start_ns, ms: self.args.busy_ms, pause_us: 0 })?;
        let cost = daemon.cost()?;
        let idle_ms = Duration::from_millis(self.args.idle_ms);
        std::thread::sleep(SETTLE);
        let (before, since) = (daemon.cost()?.cpu_ns, Instant::now());
        std::thread::sleep(idle_ms);
        let (used, idle) = (daemon.cost()?.cpu_ns - before, since.elapsed());
        let takeover_ms = self.args.kill.then(|| takeover(&daemon, &mut vms)).transpose()?;
        vms.end()?;
        drop(daemon.stop()?);

        let faults: u64 = busy.pages.iter().sum();
        let seconds = to_f64(busy.end_ns.saturating_sub(start_ns)) / 1e9;
        let mut at = |share| round(percentile_us(&mut busy.waits_ns, share));
        let each = (to_f64(connected.own) - to_f64(empty.own)) / 1024.0;
        let each = each / f64::from(self.sessions);
        Ok(Row {
            sessions: self.sessions,
            kfaults_s: round(to_f64(faults) / seconds / 1e3),
            p50_us: at(50),
            p99_us: at(99),
            fairness: round(jain(&busy.pages)),
            rss_mib: round(to_f64(cost.rss) / f64::from(1 << 20)),
            idle_cpu_pct: round(to_f64(used) / 1e7 / idle.as_secs_f64()),
            rate_ratio: 1.0,
            session_kib: (self.sessions >= 10).then(|| round(each)),
            takeover_ms,
        })
    }
}

/// Until polling has ended, and threads of VMs too.
const SETTLE: Duration = Duration::from_millis(200);

/// When all VMs shall begin: once their threads have been started.
fn begin() -> u64 {
    monotonic_ns() + 200_000_000
}

/// Kills the worker under VMs that touch a page now and then. Returns how long the
/// longest touch took.
fn takeover(daemon: &Daemon, vms: &mut Vms) -> anyhow::Result<f64> {
    let start_ns = begin();
    vms.tell(Touch { start_ns, ms: 1500, pause_us: 200 })?;
    let kill_ns = start_ns + 300_000_000;
    std::thread::sleep(Duration::from_nanos(kill_ns.saturating_sub(monotonic_ns())));
    daemon.kill_worker()?;
    let touched = vms.hear()?;
    let longest = touched.waits_ns.iter().max().copied().unwrap_or(0);
    if touched.end_ns < kill_ns {
        bail!("all memory was touched before the worker was killed; give VMs more --memory");
    }
    Ok(round(f64::from(longest) / 1e6))
}

fn percentile_us(waits_ns: &mut [u32], share: usize) -> f64 {
    waits_ns.sort_unstable();
    let wait = waits_ns.get(waits_ns.len() * share / 100);
    f64::from(wait.copied().unwrap_or(0)) / 1e3
}

/// How even shares are: 1 if all are the same, 1/n if one has it all.
fn jain(shares: &[u64]) -> f64 {
    let sum: f64 = shares.iter().map(|share| to_f64(*share)).sum();
    let squares: f64 = shares.iter().map(|share| to_f64(*share).powi(2)).sum();
    if squares > 0.0 { sum * sum / (to_f64(shares.len() as u64) * squares) } else { 0.0 }
}

/// Processes that play VMs.
struct Vms {
    processes: Vec<(Running, ChildStdin, BufReader<ChildStdout>)>,
}

impl Vms {
    /// Starts them, and waits until each VM is served.
    fn start(socket: &Path, sessions: usize, bytes: u64) -> anyhow::Result<Self> {
        let mut processes = Vec::new();
        for first in (0..sessions).step_by(IN_PROCESS) {
            let plan = Plan {
                socket: socket.into(),
                sessions: IN_PROCESS.min(sessions - first),
                first,
                bytes: usize::try_from(bytes)?,
            };
            let plan = serde_json::to_string(&plan)?;
            let args = ["bench", "sessions", "--play", &plan].map(PathBuf::from);
            processes.push(vmpager_to_talk_to(&args)?);
        }
        let mut vms = Self { processes };
        for line in vms.lines()? {
            if line != "ready\n" {
                bail!("the VMs say {line:?}");
            }
        }
        Ok(vms)
    }

    fn touch(&mut self, what: Touch) -> anyhow::Result<Touched> {
        self.tell(what)?;
        self.hear()
    }

    fn tell(&mut self, what: Touch) -> anyhow::Result<()> {
        let line = serde_json::to_string(&what)? + "\n";
        for (_, to, _) in &mut self.processes {
            to.write_all(line.as_bytes()).context("telling the VMs what to do")?;
        }
        Ok(())
    }

    fn hear(&mut self) -> anyhow::Result<Touched> {
        let mut all = Touched::default();
        for line in self.lines()? {
            let some: Touched = serde_json::from_str(&line).context("what the VMs say")?;
            all.pages.extend(some.pages);
            all.waits_ns.extend(some.waits_ns);
            all.end_ns = all.end_ns.max(some.end_ns);
        }
        Ok(all)
    }

    /// What each process says next.
    fn lines(&mut self) -> anyhow::Result<Vec<String>> {
        let line = |(_, _, from): &mut (_, _, BufReader<ChildStdout>)| {
            let mut line = String::new();
            match from.read_line(&mut line).context("hearing the VMs")? {
                0 => bail!("a process that plays VMs has ended; it says why"),
                _ => Ok(line),
            }
        };
        self.processes.iter_mut().map(line).collect()
    }

    fn end(self) -> anyhow::Result<()> {
        for (running, to, from) in self.processes {
            drop((to, from));
            running.output().context("a process that plays VMs")?;
        }
        Ok(())
    }
}

fn show(report: &Report) -> anyhow::Result<()> {
    output::line(&format!(
        "{:>8} {:>10} {:>6} {:>11} {:>11} {:>8} {:>9} {:>12} {:>8} {:>9}",
        "sessions",
        "faults/s",
        "ratio",
        "p50",
        "p99",
        "fairness",
        "resident",
        "session",
        "idle CPU",
        "takeover"
    ))?;
    for row in &report.rows {
        let or_dash = |number: Option<f64>, unit| {
            number.map_or_else(|| "-".into(), |number| format!("{number:.1} {unit}"))
        };
        output::line(&format!(
            "{:>8} {:>9.1}k {:>6.2} {:>8.1} us {:>8.1} us {:>8.3} {:>5.1} MiB {:>12} {:>7.2}% {:>9}",
            row.sessions,
            row.kfaults_s,
            row.rate_ratio,
            row.p50_us,
            row.p99_us,
            row.fairness,
            row.rss_mib,
            or_dash(row.session_kib, "KiB"),
            row.idle_cpu_pct,
            or_dash(row.takeover_ms, "ms"),
        ))?;
    }
    report.keeper.as_ref().map_or(Ok(()), keeper::show)
}
