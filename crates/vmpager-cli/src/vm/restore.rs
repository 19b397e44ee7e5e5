//! `vmpager vm restore`: a saved VM runs on.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::ValueEnum;
use tracing::{info, warn};
use vmpager::core::PageSource;
use vmpager_store::RawFile;
use vmpager_store::faulty::{ALL, FaultySource};
use vmpager_store::image::MemoryInput;
use vmpager_store::profile::Profile;
use vmpager_vm::{
    AsyncFaults, Delivery, DeliveryCosts, ExitMechanism, InProcess, LinuxVm, OnRefusal,
    RestoreMemory, Snapshot, SnapshotPaths,
};

use super::control::ControlSocket;
use super::outcome::{EXIT_STATUS, since};
use super::session::{self, Session};
use super::terminal;
use crate::serve::Prefetch;

/// Options of `vmpager vm restore`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = format!("Examples:\n  \
    vmpager vm restore --state vm.state --memory vm.mem --memory-mode on-demand\n\n  \
    vmpager serve --socket pager.sock --memory vm.mem --background-fill &\n  \
    vmpager vm restore --state vm.state --memory vm.mem \\\n    \
    --memory-mode on-demand --pager pager.sock\n\n  \
    vmpager vm restore --state vm.state --memory vm.mem \\\n    \
    --delivery exit --async-pf 500\n\n  \
    vmpager vm restore --state vm.state --memory vm.mem --profile mem.vmprof --json\n\n\
    One snapshot can be restored any number of times at once; its files must not\n\
    change meanwhile. Console and keyboard are as with `vm run`.\n\n\
    {EXIT_STATUS}"))]
pub(crate) struct RestoreArgs {
    /// The state file of the snapshot.
    #[arg(long, value_name = "FILE")]
    state: PathBuf,
    /// Its memory file.
    #[arg(long, value_name = "FILE")]
    memory: PathBuf,
    /// How memory comes back.
    #[arg(long, value_enum, default_value_t = MemoryMode::OnDemand)]
    memory_mode: MemoryMode,
    /// First read the whole memory file and refuse it if it is damaged. Eager
    /// does so anyway; without this the others notice no damage.
    #[arg(long)]
    verify: bool,
    /// Hand absent memory to the pager that listens here (`vmpager serve`);
    /// without it, this process brings it.
    #[arg(long, value_name = "SOCKET")]
    pager: Option<PathBuf>,
    /// Have guest memory in a memfd and give that to the pager, too, so that
    /// other processes can take part in it: DIR is the pager's own --attach,
    /// where they come to.
    #[arg(long, value_name = "DIR", requires = "pager", conflicts_with = "huge_pages")]
    attach: Option<PathBuf>,
    /// Share the pages that the guest has not written to with other VMs of the image that
    /// the pager serves (`vmpager serve --share-clean`): they take memory once.
    #[arg(long, requires = "pager", conflicts_with_all = ["attach", "huge_pages"])]
    share_clean: bool,
    /// While nobody waits, bring in memory that was not touched; a pager has a
    /// switch of its own for that.
    #[arg(long, conflicts_with = "pager")]
    background_fill: bool,
    /// Have memory lie in huge pages: with --background-fill it comes by 2 MiB,
    /// else they are made of what is in place. (`vmpager serve --collapse` does
    /// so for a pager of its own.)
    #[arg(long, conflicts_with = "pager")]
    collapse: bool,
    /// How a vCPU's fault gets to the pager. Exit needs a pager in this process,
    /// or --attach.
    #[arg(long, value_enum, default_value_t = DeliveryArg::Uffd)]
    delivery: DeliveryArg,
    /// What makes a vCPU exit on a missing page, with --delivery exit [default:
    /// view].
    #[arg(long, value_enum, conflicts_with = "pager")]
    exit_mechanism: Option<MechanismArg>,
    /// Tell the guest of pages that are not at hand, so that it runs another task
    /// meanwhile: always, never, or when the wait is expected to be so many
    /// microseconds. With --delivery exit; without this the guest's device for that
    /// is KVM's, which is not told of exits.
    #[arg(long, value_name = "always|never|MICROSECONDS", value_parser = async_faults)]
    async_pf: Option<AsyncFaults>,
    /// Have each page that is read take so much longer, to see how a guest fares
    /// with a slow source: microseconds, or a range of them.
    #[arg(long, value_name = "MICROSECONDS|FROM-TO", value_parser = delay, conflicts_with = "pager")]
    source_delay: Option<RangeInclusive<Duration>>,
    /// What comes along with a page that is touched.
    #[arg(long, value_enum, default_value_t = Prefetch::Mixed, conflicts_with = "pager")]
    neighbours: Prefetch,
    /// Bring what this profile says before other pages (`vmpager profile record`);
    /// a pager has its own.
    #[arg(long, value_name = "FILE", conflicts_with = "pager")]
    profile: Option<PathBuf>,
    /// Before the guest runs, have KVM map the pages of the profile that are in place by
    /// then, for so many milliseconds at most; 0 to leave it. The guest then takes no
    /// stage-2 fault on them. Needs Linux 6.11 and nested paging, and is left out without;
    /// not with --exit-mechanism attributes.
    #[arg(long, value_name = "MILLISECONDS", requires = "profile", default_value_t = 5)]
    map_ahead: u16,
    /// Have guest memory in huge pages of 2 MiB.
    #[arg(long, requires = "pager")]
    huge_pages: bool,
    /// Listen here for `vm snapshot`, pause, resume, status and quit.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Print one JSON object when the guest has ended.
    #[arg(long)]
    json: bool,
}

/// How memory comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MemoryMode {
    /// All of it is read, and verified, before the guest runs.
    Eager,
    /// The file is mapped, privately.
    Mmap,
    /// Each page comes when it is first touched, or just before.
    OnDemand,
}

/// How a fault is learned of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DeliveryArg {
    /// The vCPU waits in the kernel; a userfaultfd tells the pager's thread.
    Uffd,
    /// The vCPU leaves the guest, and its own thread installs the page, or asks
    /// the pager for it.
    Exit,
    /// Whichever of the two is the cheaper one here, by a few faults on a VM made for
    /// the purpose. That takes about a millisecond.
    Auto,
}

/// What makes an access to a missing page an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MechanismArg {
    /// A mapping that KVM cannot pin for reading. Works on any KVM; the page is
    /// found by decoding the instruction.
    View,
    /// Memory attributes, by which KVM tells the page itself. Needs a host
    /// kernel with software-protected VMs, which Linux has for development and
    /// testing.
    Attributes,
}

fn async_faults(text: &str) -> Result<AsyncFaults, String> {
    match text {
        "always" => Ok(AsyncFaults::Always),
        "never" => Ok(AsyncFaults::Never),
        _ => microseconds(text).map(AsyncFaults::LongerThan),
    }
}

fn delay(text: &str) -> Result<RangeInclusive<Duration>, String> {
    let (from, to) = text.split_once('-').unwrap_or((text, text));
    let (from, to) = (microseconds(from)?, microseconds(to)?);
    if from > to {
        return Err(format!("{text} ends before it begins; use for example 0-20000"));
    }
    Ok(from..=to)
}

fn microseconds(text: &str) -> Result<Duration, String> {
    let number: u32 = text
        .parse()
        .map_err(|error| format!("`{text}` is no number of microseconds ({error}); use 500"))?;
    Ok(Duration::from_micros(number.into()))
}

impl RestoreArgs {
    fn async_faults(&self) -> anyhow::Result<Option<AsyncFaults>> {
        if self.async_pf.is_some() && self.delivery != DeliveryArg::Exit {
            bail!("--async-pf needs --delivery exit; with uffd KVM itself tells the guest")
        }
        Ok(self.async_pf)
    }

    /// The memory file, made slow.
    fn slow_source(&self) -> anyhow::Result<Option<Arc<dyn PageSource>>> {
        let Some(delay) = &self.source_delay else { return Ok(None) };
        let source = FaultySource::wrap(RawFile::open(&self.memory)?);
        source.delay_between(ALL, delay.clone());
        Ok(Some(source))
    }

    /// What is brought first, if it is a profile of this memory.
    fn profile(&self) -> anyhow::Result<Option<Arc<Profile>>> {
        let Some(path) = &self.profile else { return Ok(None) };
        let profile = Profile::open_for(path, &MemoryInput::raw(&self.memory)?)?;
        Ok(Some(Arc::new(profile)))
    }

    fn delivery(&self) -> anyhow::Result<Delivery> {
        Ok(match (self.delivery, self.exit_mechanism) {
            (DeliveryArg::Auto, None) => cheaper_delivery(),
            (DeliveryArg::Auto, Some(_)) => {
                bail!("--exit-mechanism needs --delivery exit; auto chooses between uffd and view")
            }
            (DeliveryArg::Uffd, None) => Delivery::Userfaultfd,
            (DeliveryArg::Uffd, Some(_)) => {
                bail!("--exit-mechanism needs --delivery exit; with uffd vCPUs do not exit")
            }
            (DeliveryArg::Exit, None | Some(MechanismArg::View)) => {
                Delivery::Exit(ExitMechanism::View)
            }
            (DeliveryArg::Exit, Some(MechanismArg::Attributes)) => {
                Delivery::Exit(ExitMechanism::Attributes)
            }
        })
    }

    /// The first of the options that only make sense while memory is missing.
    fn on_demand_option(&self) -> Option<&'static str> {
        let given = [
            (self.pager.is_some(), "--pager"),
            (self.share_clean, "--share-clean"),
            (self.background_fill, "--background-fill"),
            (self.collapse, "--collapse"),
            (self.delivery != DeliveryArg::Uffd, "--delivery"),
            (self.exit_mechanism.is_some(), "--exit-mechanism"),
            (self.async_pf.is_some(), "--async-pf"),
            (self.source_delay.is_some(), "--source-delay"),
            (self.neighbours != Prefetch::Mixed, "--neighbours"),
            (self.profile.is_some(), "--profile"),
        ];
        given.into_iter().find(|(is_given, _)| *is_given).map(|(_, name)| name)
    }
}

/// What costs less here. Where that cannot be found out, what works everywhere.
fn cheaper_delivery() -> Delivery {
    match DeliveryCosts::measure() {
        Ok(costs) => {
            info!(
                "a missing page costs {:?} by an exit, {:?} by uffd",
                costs.exit, costs.userfaultfd
            );
            costs.delivery()
        }
        Err(error) => {
            warn!("what missing pages cost here could not be measured ({error}): taking uffd");
            Delivery::Userfaultfd
        }
    }
}

pub(super) fn run(args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let from = restore_memory(args)?;
    let control = args.control.as_deref().map(ControlSocket::bind).transpose()?;
    let paths = SnapshotPaths { state: args.state.clone(), memory: args.memory.clone() };
    let snapshot = Snapshot::open(&paths)?;
    if args.verify && !matches!(from, RestoreMemory::Eager) {
        snapshot.verify_memory()?;
    }
    let vm = LinuxVm::restore(&snapshot, from, session::console_output(args.json))?;
    let vcpus = snapshot.vcpus();
    let session = Session { vm, vcpus, control, started, made_ms: since(started) };
    session.run()?.report(args.json)
}

/// The VM of a pager that refuses it will never have its memory: this process ends, and
/// says why.
fn end_if_refused(args: &RestoreArgs, socket: &Path) -> OnRefusal {
    let (socket, control) = (socket.to_path_buf(), args.control.clone());
    OnRefusal::call(move |why| {
        terminal::leave();
        if let Some(control) = &control {
            // It is about to be nobody's.
            let _ = std::fs::remove_file(control);
        }
        eprintln!("error: the pager at {} refuses this VM's memory: {why}", socket.display());
        // Threads that wait for a page end with the process, and not before.
        std::process::exit(1)
    })
}

fn by_pager(args: &RestoreArgs, socket: &Path) -> anyhow::Result<RestoreMemory> {
    let refused = end_if_refused(args, socket);
    let socket = socket.to_path_buf();
    Ok(match (&args.attach, args.delivery) {
        (None, DeliveryArg::Uffd) if args.share_clean => {
            RestoreMemory::CleanShared { socket, refused }
        }
        (None, DeliveryArg::Uffd) => {
            RestoreMemory::OnDemand { socket, huge_pages: args.huge_pages, refused }
        }
        (_, DeliveryArg::Auto) => {
            bail!("--delivery auto is for a pager in this process; with --pager, choose")
        }
        (None, DeliveryArg::Exit) => {
            bail!(
                "--delivery exit with --pager needs --attach: vCPUs ask for pages at the \
                 pager's door (vmpager serve --attach DIR)"
            )
        }
        (Some(_), DeliveryArg::Uffd) => RestoreMemory::Shared { socket, exits: None, refused },
        (Some(doors), DeliveryArg::Exit) => {
            RestoreMemory::Shared { socket, exits: Some(doors.clone()), refused }
        }
    })
}

fn restore_memory(args: &RestoreArgs) -> anyhow::Result<RestoreMemory> {
    if args.memory_mode != MemoryMode::OnDemand
        && let Some(option) = args.on_demand_option()
    {
        let mode = args.memory_mode.to_possible_value();
        let mode = mode.as_ref().map_or("", |mode| mode.get_name());
        bail!("{option} needs --memory-mode on-demand; with {mode} nothing is left to bring")
    }
    Ok(match (args.memory_mode, &args.pager) {
        (MemoryMode::OnDemand, Some(socket)) => by_pager(args, socket)?,
        (MemoryMode::OnDemand, None) => RestoreMemory::InProcess(InProcess {
            background_fill: args.background_fill,
            collapse: args.collapse,
            delivery: args.delivery()?,
            async_faults: args.async_faults()?,
            neighbours: args.neighbours.into(),
            source: args.slow_source()?,
            profile: args.profile()?,
            map_ahead: Duration::from_millis(args.map_ahead.into()),
        }),
        (MemoryMode::Eager, _) => RestoreMemory::Eager,
        (MemoryMode::Mmap, _) => RestoreMemory::Mmap,
    })
}
