//! `vmpager bench`: measurements, side by side with the floor or a peer in one
//! run.

mod apf;
mod attach;
mod convert;
mod daemon;
mod exit;
mod fanout;
mod fault;
mod image;
mod prefetch;
mod restore;
mod sessions;

use clap::Subcommand;

/// What to measure.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// One 4 KiB fault, and the fill of all memory, against bare loops in the
    /// same process.
    Fault(fault::FaultArgs),
    /// Missing pages as vCPU exits, against vCPUs that wait in the kernel and
    /// against an oracle that knows the next page.
    Exit(exit::ExitArgs),
    /// Asynchronous page faults: a Linux guest in which one task computes and others
    /// wait for pages.
    Apf(apf::ApfArgs),
    /// Packed images: how small, how fast to make, how fast to restore from.
    Image(image::ImageArgs),
    /// Memory shared between processes: faults of one that takes part against
    /// the pager's own, the fault queue, a look at the page map.
    Attach(attach::AttachArgs),
    /// Pages converted between private and shared: how fast, against the bare calls,
    /// and how long other vCPUs' faults take meanwhile.
    Convert(convert::ConvertArgs),
    /// Prefetch policies on recorded traces, simulated: who waits, what comes in
    /// vain.
    Prefetch(prefetch::PrefetchArgs),
    /// A whole VM restored: eagerly, by mmap, on demand, against a handler
    /// that answers each fault with one page.
    Restore(restore::RestoreArgs),
    /// One daemon and more and more VMs: faults per second, how fair, what each
    /// costs.
    Sessions(sessions::SessionsArgs),
    /// Many VMs of one image: the memory they take, against as many copies.
    Fanout(fanout::FanoutArgs),
}

pub(crate) fn run(command: &BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Fault(args) => fault::run(args),
        BenchCommand::Exit(args) => exit::run(args),
        BenchCommand::Apf(args) => apf::run(args),
        BenchCommand::Image(args) => image::run(args),
        BenchCommand::Attach(args) => attach::run(args),
        BenchCommand::Convert(args) => convert::run(args),
        BenchCommand::Prefetch(args) => prefetch::run(args),
        BenchCommand::Restore(args) => restore::run(args),
        BenchCommand::Sessions(args) => sessions::run(args),
        BenchCommand::Fanout(args) => fanout::run(args),
    }
}

/// The middle one of some numbers; 0 of none.
fn median(numbers: impl IntoIterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.into_iter().collect();
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}

/// Rounded for people and JSON alike.
fn round(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "counts and sizes stay far below 2^53")]
fn to_f64(number: u64) -> f64 {
    number as f64
}
