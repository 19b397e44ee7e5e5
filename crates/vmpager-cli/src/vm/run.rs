//! `vmpager vm run`: boots Linux, or runs the built-in guest.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde::Serialize;
use vmpager_vm::{
    ConvertReport, ConvertWorkload, ConvertedContents, Cpu, LinuxBoot, LinuxConfig, LinuxVm,
    PrivateBackend, PrivateConfig, Vm, VmConfig, Workload,
};

use super::control::ControlSocket;
use super::outcome::{EXIT_STATUS, show_vcpus, since};
use super::session::{self, Session};
use crate::report::conversions::Conversions;
use crate::vm_process::{cpu_name, millis};
use crate::{output, size};

/// Options of `vmpager vm run`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = format!("Examples:\n  \
    vmpager vm run --kernel vmlinuz --initrd initrd.img --memory 512M --vcpus 2\n  \
    vmpager vm run --kernel vmlinuz --initrd initrd.img --control /run/vm.sock\n  \
    vmpager vm run --guest builtin --memory 1G\n  \
    vmpager vm run --guest builtin --private-memory --vcpus 2 --memory 64M\n\n\
    The guest's serial port is its console: standard input and output, or standard\n\
    error with --json. On a terminal Ctrl-A x ends the VM, Ctrl-A Ctrl-A sends one.\n\n\
    {EXIT_STATUS}"))]
pub(crate) struct RunArgs {
    /// A Linux kernel: a bzImage (vmlinuz), or an ELF vmlinux.
    #[arg(long, value_name = "FILE", required_unless_present = "guest")]
    kernel: Option<PathBuf>,
    /// Run the demo's guest, whose every page is known, instead of Linux.
    #[arg(long, value_enum, conflicts_with_all = [
        "kernel", "initrd", "cmdline", "huge_pages", "control",
    ])]
    guest: Option<OtherGuest>,
    /// The kernel's initial file system.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT", default_value = LinuxBoot::CMDLINE)]
    cmdline: String,
    /// Guest memory.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size::parse)]
    memory: u64,
    /// Processors: 1 to 8 for Linux.
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u8,
    /// Have guest memory in huge pages of 2 MiB (see /proc/sys/vm/nr_hugepages).
    #[arg(long)]
    huge_pages: bool,
    /// With the built-in guest: have memory that can be private to it, and let it
    /// convert pages to and fro, checking every byte.
    #[arg(long, value_enum, value_name = "WHERE", num_args = 0..=1, require_equals = true,
        default_missing_value = "auto", requires = "guest", conflicts_with = "kernel")]
    private_memory: Option<PrivatePlace>,
    /// Conversions of each processor with --private-memory.
    #[arg(long, value_name = "N", default_value_t = 256, requires = "private_memory")]
    conversions: u64,
    /// Convert at most so many pages at a time.
    #[arg(long, value_name = "N", default_value_t = 513, requires = "private_memory",
        value_parser = clap::value_parser!(u64).range(1..=513))]
    most_pages: u64,
    /// Keep what pages hold when they are converted; else they become zeroes.
    #[arg(long, requires = "private_memory")]
    preserve: bool,
    /// Write the log of conversions here, as JSON (see `vmpager report`).
    #[arg(long, value_name = "FILE", requires = "private_memory")]
    conversions_json: Option<PathBuf>,
    /// Listen here for `vm snapshot`, pause, resume, status and quit.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Print one JSON object when the guest has ended.
    #[arg(long)]
    json: bool,
}

/// A guest that is not Linux.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum OtherGuest {
    /// The demo's.
    Builtin,
}

/// Where private pages are.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum PrivatePlace {
    /// In a guest_memfd if this KVM has memory attributes, else in place.
    Auto,
    /// In a guest_memfd, in a software-protected VM.
    GuestMemfd,
    /// Where they were, and in none of the host's mappings but the vCPUs'.
    InPlace,
    /// The same, in a guest_memfd that the host can map.
    MappedGuestMemfd,
    /// In place, in a software-protected VM whose guest converts pages by touching
    /// them as what they are to become.
    ByAddress,
}

impl PrivatePlace {
    fn config(self, preserve: bool) -> PrivateConfig {
        let backend = match self {
            Self::Auto => PrivateBackend::Auto,
            Self::GuestMemfd => PrivateBackend::GuestMemfd,
            Self::InPlace => PrivateBackend::InPlace,
            Self::MappedGuestMemfd => PrivateBackend::MappedGuestMemfd,
            Self::ByAddress => PrivateBackend::ByAddress,
        };
        let contents = if preserve { ConvertedContents::Preserve } else { ConvertedContents::Zero };
        PrivateConfig { backend, contents }
    }
}

pub(super) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    match (&args.kernel, args.guest) {
        (Some(kernel), None) => run_linux(args, kernel.clone()),
        (_, Some(OtherGuest::Builtin)) => run_builtin(args),
        (None, None) => bail!("--kernel or --guest builtin is needed"),
    }
}

fn run_linux(args: &RunArgs, kernel: PathBuf) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let control = args.control.as_deref().map(ControlSocket::bind).transpose()?;
    let (initrd, cmdline) = (args.initrd.clone(), args.cmdline.clone());
    let config = LinuxConfig {
        boot: LinuxBoot { kernel, initrd, cmdline },
        memory_bytes: args.memory,
        vcpus: args.vcpus,
        huge_pages: args.huge_pages,
    };
    let vm = LinuxVm::boot(&config, session::console_output(args.json))?;
    let vcpus = args.vcpus.into();
    let session = Session { vm, vcpus, control, started, made_ms: since(started) };
    session.run()?.report(args.json)
}

/// What `--json` prints of the built-in guest's run.
#[derive(Debug, Serialize)]
struct BuiltinSummary {
    cpu: &'static str,
    vcpus: u8,
    memory_bytes: u64,
    /// Generating memory, and letting the guest compute its checksums.
    prepared_ms: f64,
    /// Touching every page in random order.
    workload_ms: f64,
    pages: u64,
    mismatches: u64,
    /// With private memory.
    conversions: Option<ConversionSummary>,
}

/// What the guest's conversions came to.
#[derive(Debug, Serialize)]
struct ConversionSummary {
    backend: &'static str,
    conversions: u64,
    took_ms: f64,
    to_private_pages: u64,
    to_shared_pages: u64,
    /// Conversions that waited for others, and faults that were tried again.
    waited: u64,
    retried: u64,
    /// Conversions that accesses asked for.
    implicit: u64,
    private_pages: u64,
    /// Pages in which the guest found a wrong byte.
    mismatches: u64,
    host_pages: u64,
    /// Shared pages in which the host found one.
    host_mismatches: u64,
}

fn convert(args: &RunArgs, vm: &mut Vm) -> anyhow::Result<ConversionSummary> {
    let mut workload = ConvertWorkload {
        conversions: args.conversions,
        implicit: matches!(args.private_memory, Some(PrivatePlace::ByAddress)),
        ..ConvertWorkload::default()
    };
    workload.sizes.retain(|pages| *pages <= args.most_pages);
    let ConvertReport {
        conversions,
        took,
        mismatches,
        host_pages,
        host_mismatches,
        private_pages,
        ..
    } = vm.convert(&workload)?;
    let private = vm.private().context("private memory")?;
    if let Some(path) = &args.conversions_json {
        let log = serde_json::to_vec_pretty(&Conversions::of(private))?;
        output::replace_file(path, &log)?;
    }
    let stats = private.stats();
    Ok(ConversionSummary {
        backend: private.backend(),
        conversions,
        took_ms: millis(took),
        to_private_pages: stats.private_pages,
        to_shared_pages: stats.shared_pages,
        waited: stats.waited,
        retried: stats.retried,
        implicit: stats.implicit,
        private_pages,
        mismatches,
        host_pages,
        host_mismatches,
    })
}

fn run_builtin(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let config = VmConfig {
        memory_bytes: args.memory,
        vcpus: args.vcpus.into(),
        cpu: Cpu::Auto,
        private: args.private_memory.map(|place| place.config(args.preserve)),
        ..VmConfig::default()
    };
    let mut vm = Vm::build(&config)?;
    let converted = match config.private {
        Some(_) => Some(convert(args, &mut vm)?),
        None => None,
    };
    vm.prepare().context("letting the guest compute its checksums")?;
    let prepared_ms = since(started);
    let report = vm.run(&Workload::default(), Instant::now())?;
    let summary = BuiltinSummary {
        cpu: cpu_name(vm.cpu()),
        vcpus: args.vcpus,
        memory_bytes: args.memory,
        prepared_ms,
        workload_ms: millis(report.workload),
        pages: report.pages,
        mismatches: report.mismatches,
        conversions: converted,
    };
    let converted = summary.conversions.as_ref();
    let wrong = converted.map_or(0, |c| c.mismatches + c.host_mismatches) + summary.mismatches;
    if args.json {
        output::json(&summary)?;
    } else {
        if let Some(c) = converted {
            output::line(&format!(
                "the built-in guest did {} conversions in {:.0} ms ({}), {} pages are private; it \
                 found {} wrong pages, the host {} in the {} it has",
                c.conversions,
                c.took_ms,
                c.backend,
                c.private_pages,
                c.mismatches,
                c.host_mismatches,
                c.host_pages,
            ))?;
        }
        output::line(&format!(
            "the built-in guest touched {} pages of {} in {:.0} ms on {} ({}); {} were wrong",
            summary.pages,
            size::show(summary.memory_bytes),
            summary.workload_ms,
            show_vcpus(summary.vcpus.into()),
            summary.cpu,
            summary.mismatches,
        ))?;
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
