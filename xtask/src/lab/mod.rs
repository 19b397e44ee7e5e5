//! The lab: an emulated machine in which Linux has a real `/dev/kvm`, and the
//! lab's tests run on it. `docs/lab.md` tells how to use it.
//!
//! | module | what lives there |
//! |---|---|
//! | `build` | the programs that go in, and the list of their tests |
//! | `kernel` | kernels, from files, packages or directories, with their modules |
//! | `initramfs` | the file systems of the lab and of its guests |
//! | `boot` | one run of the emulator, watched line by line |
//! | `tally` | what a run's tests came to: none may be missing |
//! | `tool` | programs this needs, and the packages that have them |

mod boot;
mod build;
mod initramfs;
mod kernel;
mod tally;
mod tool;

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use boot::Boot;
use build::{Case, Programs};
use kernel::Kernel;
use tally::Tally;

/// How often a test is run that loses a guest, or its machine: the emulator does
/// that by itself now and then (`docs/lab.md`). A test that finds something wrong
/// has failed the first time.
const ATTEMPTS: usize = 3;

/// Each takes 2 GiB of memory.
const MOST_JOBS: usize = 3;

/// The boot of tests that are only run when asked for.
const LONG: &str = "long";

/// Options of `cargo xtask lab`.
#[derive(Debug, clap::Args)]
#[command(after_help = "A kernel is a bzImage, a Debian kernel package (.deb), or a directory\n\
    such a package was unpacked into. docs/lab.md tells how to get one.\n\n\
    Example:\n  cargo xtask lab --host-kernel ~/kernels/bzImage --filter restore")]
pub(crate) struct LabArgs {
    /// The kernel of the Linux guests [default: the host kernel].
    #[arg(long, value_name = "KERNEL", env = "VMPAGER_LAB_KERNEL")]
    kernel: Option<PathBuf>,
    /// The kernel of the emulated machine.
    #[arg(long, value_name = "KERNEL", env = "VMPAGER_LAB_HOST_KERNEL")]
    host_kernel: Option<PathBuf>,
    /// Only run tests whose name has this in it.
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// None of the tests with this in their name. May be given more than once.
    #[arg(long, value_name = "TEXT")]
    except: Vec<String>,
    /// Also run the tests that take minutes.
    #[arg(long, env = "VMPAGER_LAB_LONG")]
    long: bool,
    /// Print the tests and run none.
    #[arg(long)]
    list: bool,
    /// Run on this machine's own /dev/kvm, without the emulator.
    #[arg(long)]
    direct: bool,
    /// Give up after so many seconds, building not included.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    limit: u64,
    /// Emulated machines at a time [default: one for each CPU, three at most].
    #[arg(long, value_name = "N")]
    jobs: Option<NonZero<usize>>,
}

impl LabArgs {
    fn wants(&self, case: &Case) -> bool {
        case.name.contains(&self.filter)
            && !self.except.iter().any(|text| case.name.contains(text))
            && (self.long || case.boot != LONG)
    }

    /// A machine has two CPUs and keeps little more than one busy: its guests run on the
    /// second alone.
    fn jobs(&self) -> usize {
        let cpus = || thread::available_parallelism().map_or(1, NonZero::get);
        self.jobs.map_or_else(|| cpus().min(MOST_JOBS), NonZero::get)
    }
}

/// Builds, boots, watches; fails if any test failed or did not run.
pub(crate) fn run(root: &Path, args: &LabArgs) -> anyhow::Result<()> {
    let target = root.join("target").join("lab");
    fs::create_dir_all(&target).with_context(|| format!("making {}", target.display()))?;
    let programs = build::programs(root)?;
    let cases: Vec<Case> =
        build::cases(&programs)?.into_iter().filter(|case| args.wants(case)).collect();
    if cases.is_empty() {
        bail!("no test has `{}` in its name; --list prints them all", args.filter);
    }
    if args.list {
        for case in &cases {
            println!("{:<10} {:<44} {:>4} s at most", case.boot, case.name, case.limit.as_secs());
        }
        println!("{} tests", cases.len());
        return Ok(());
    }
    let begin = Instant::now();
    let deadline = begin + Duration::from_secs(args.limit);
    let tally = if args.direct {
        run_directly(args, &target, &programs, &cases, deadline)?
    } else {
        run_emulated(args, &target, &programs, &cases, deadline)?
    };
    println!("\nlab: {tally}, {} s", begin.elapsed().as_secs());
    let failures = tally.failures();
    for failure in &failures {
        println!("  {failure}");
    }
    for once in tally.unstable() {
        println!("  UNSTABLE: {once}; run again");
    }
    if failures.is_empty() { Ok(()) } else { bail!("the lab failed: {tally}") }
}

/// Every group of tests in a boot of its own.
fn run_emulated(
    args: &LabArgs,
    target: &Path,
    programs: &Programs,
    cases: &[Case],
    deadline: Instant,
) -> anyhow::Result<Tally> {
    let host = args.host_kernel.as_deref().context(
        "no kernel for the emulated machine: name one with --host-kernel or \
         VMPAGER_LAB_HOST_KERNEL; docs/lab.md tells how to get one",
    )?;
    let host = Kernel::open(host, target)?;
    let guest = args.kernel.as_deref().map(|path| Kernel::open(path, target)).transpose()?;
    let guest = guest.as_ref().unwrap_or(&host);
    tool::require("qemu-system-x86_64", "qemu-system-x86")?;
    tool::require("setpriv", "util-linux")?;
    println!("lab: Linux {} as host, Linux {} as guest", host.release(), guest.release());

    let scratch = scratch(target)?;
    let initramfs = scratch.path().join("initramfs");
    initramfs::host(&initramfs, &programs.stripped(scratch.path())?, &host, guest)?;
    let machine = Machine { host: &host, initramfs: &initramfs, deadline };
    let boots = Mutex::new(by_boot(cases));
    let tally = Mutex::new(Tally::default());
    // A function of its own, for the lock not to be held while a machine runs.
    let next = || lock(&boots).pop();
    thread::scope(|scope| {
        let one_after_the_other = || {
            while let Some((name, cases)) = next() {
                let socket = scratch.path().join(name);
                let run = machine.run(name, &cases, &socket)?;
                lock(&tally).add(run);
            }
            anyhow::Ok(())
        };
        let jobs: Vec<_> = (0..args.jobs()).map(|_| scope.spawn(one_after_the_other)).collect();
        let ended = jobs.into_iter().map(|job| match job.join() {
            Ok(ended) => ended,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        // Waits for all, whatever the first came to.
        ended.collect::<Vec<_>>().into_iter().collect::<anyhow::Result<()>>()
    })?;
    let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.refuse_skips();
    Ok(tally)
}

fn lock<T>(what: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What emulated machines are made of.
struct Machine<'a> {
    host: &'a Kernel,
    initramfs: &'a Path,
    deadline: Instant,
}

impl Machine<'_> {
    /// One boot, and more for what was lost in it.
    fn run(&self, name: &str, cases: &[Case], socket: &Path) -> anyhow::Result<Tally> {
        println!("{name:<8}  boot: {} tests", cases.len());
        let emulated = |cases: &[Case]| {
            let mut boot = Boot::emulated(self.host, self.initramfs, socket, cases)?;
            anyhow::Ok(boot::watch(&mut boot, name, cases, self.deadline))
        };
        let mut run = emulated(cases)?;
        for _ in 1..ATTEMPTS {
            let again = run.again(cases);
            if again.is_empty() {
                break;
            }
            println!("{name:<8}  boot once more, for what was lost: {} tests", again.len());
            run.replaced(emulated(&again)?);
        }
        Ok(run)
    }
}

/// The same tests on this machine.
fn run_directly(
    args: &LabArgs,
    target: &Path,
    programs: &Programs,
    cases: &[Case],
    deadline: Instant,
) -> anyhow::Result<Tally> {
    let kernel = args.kernel.as_deref().context(
        "no kernel for the guests: name one with --kernel or VMPAGER_LAB_KERNEL; docs/lab.md \
         tells how to get one",
    )?;
    let guest = Kernel::open(kernel, target)?;
    println!("lab: this machine as host, Linux {} as guest", guest.release());
    let scratch = scratch(target)?;
    let initrd = scratch.path().join("guest-initramfs");
    initramfs::guest(&initrd, &programs.stripped(scratch.path())?)?;
    let mut boot = Boot::direct(programs, &guest, &initrd, scratch.path(), cases)?;
    Ok(boot::watch(&mut boot, "direct", cases, deadline))
}

fn scratch(target: &Path) -> anyhow::Result<tempfile::TempDir> {
    // Not below the target directory: a socket's path must be short.
    let dir = tempfile::Builder::new().prefix("vmpager-lab-").tempdir();
    dir.with_context(|| format!("a directory for {}", target.display()))
}

/// What boots there are, and their tests; the one that may take longest last.
fn by_boot(cases: &[Case]) -> Vec<(&str, Vec<Case>)> {
    let mut boots: BTreeMap<&str, Vec<Case>> = BTreeMap::new();
    for case in cases {
        boots.entry(&case.boot).or_default().push(case.clone());
    }
    let mut boots: Vec<_> = boots.into_iter().collect();
    boots.sort_by_key(|(_, cases)| cases.iter().map(|case| case.limit).sum::<Duration>());
    boots
}
