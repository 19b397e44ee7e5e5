//! `vmpager bench restore`.

mod report;
mod subject;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;

use self::report::{Report, Row};
use self::subject::Subject;
use crate::image::CodecArg;
use crate::restore::{Cache, Mode, Restored, Work, prepare_cache, restore, warm_up_memory};
use crate::serve::Prefetch;
use crate::size;
use crate::vm_process::{GuestCpu, millis};

/// Options of `vmpager bench restore`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager bench restore --touches 24576 --cache warm --rounds 5 --json\n  \
    vmpager bench restore --memory 256M,1G,4G,16G --filled 64M --modes mmap,on-demand\n  \
    vmpager bench restore --state vm.state --memory-file vm.mem\n  \
    vmpager bench restore --memory 1G --modes mmap,packed,packed+profile --cache cold\n  \
    vmpager bench restore --modes packed,remote,remote+profile --remote-latency-ms 20\n\n\
    Rounds are interleaved; each number is the median of its rounds. Ratios are of the\n\
    time from the start of the VM's process to the end of its work: below 1 is faster.\n\
    memslot_ms is the time in which KVM accepts as much memory in a VM that has nothing\n\
    else, and part of every first_instruction_ms; with shadow paging it grows with it.\n\
    Profiles are recorded beforehand, of a guest that does the same work.")]
pub(crate) struct RestoreArgs {
    /// Guest memory; several sizes are measured one after the other.
    #[arg(long, value_name = "SIZE", default_value = "100M", value_delimiter = ',', value_parser = size::parse)]
    memory: Vec<u64>,
    /// How much of it has contents; the rest is a hole of the memory file
    /// [default: all].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    filled: Option<u64>,
    /// Restore this snapshot of a Linux guest instead. Where Linux cannot run, its
    /// memory becomes the contents of the built-in guest's.
    #[arg(long, value_name = "FILE", requires = "memory_file", conflicts_with_all = ["memory", "filled"])]
    state: Option<PathBuf>,
    /// The memory of that snapshot; without --state, the contents of the built-in
    /// guest's memory.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["memory", "filled"])]
    memory_file: Option<PathBuf>,
    /// How long a restored Linux guest runs.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 500)]
    run_ms: u64,
    /// Distinct pages the built-in guest touches [default: 24576, or all].
    #[arg(long, value_name = "N")]
    touches: Option<u64>,
    /// Touch pages in ascending order instead of random order.
    #[arg(long)]
    sequential: bool,
    /// State of the page cache [default: warm, then cold].
    #[arg(long, value_enum)]
    cache: Option<Cache>,
    /// Ways to restore [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    modes: Option<Vec<Mode>>,
    /// What `vmpager serve` brings in beside what is touched [default: as it does].
    #[arg(long, value_enum)]
    prefetch: Option<Prefetch>,
    /// How the images of the packed ways are compressed.
    #[arg(long, value_enum, default_value_t = CodecArg::Lz4)]
    codec: CodecArg,
    /// Their frames.
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = size::parse)]
    frame_size: u64,
    /// How long the server of the remote ways takes to begin an answer: on loopback, in
    /// this process.
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 2)]
    remote_latency_ms: u64,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// What plays the vCPU.
    #[arg(long, value_enum, default_value_t = GuestCpu::Auto)]
    cpu: GuestCpu,
    /// Where to put the snapshot [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

const MODES: [Mode; 15] = [
    Mode::Naive,
    Mode::Mmap,
    Mode::OnDemand,
    Mode::OnDemandFill,
    Mode::OnDemandProfile,
    Mode::OnDemandWrong,
    Mode::Packed,
    Mode::PackedFill,
    Mode::PackedProfile,
    Mode::Layered,
    Mode::Remote,
    Mode::RemoteProfile,
    Mode::InProcessFill,
    Mode::InProcessHuge,
    Mode::Eager,
];

/// The same in all rounds: the work whose working set is known.
const SEED: u64 = 1;
/// That of another guest, whose working set is another.
const OTHER_SEED: u64 = 1000;

pub(crate) fn run(args: &RestoreArgs) -> anyhow::Result<()> {
    let mut report = Report::new(args.rounds);
    match (&args.state, &args.memory_file) {
        (Some(state), Some(memory)) => {
            measure(args, &Subject::given(args, state, memory)?, &mut report)?;
        }
        (None, Some(memory)) => measure(args, &Subject::with_contents(args, memory)?, &mut report)?,
        _ => {
            for memory_bytes in &args.memory {
                measure(args, &Subject::make(args, *memory_bytes)?, &mut report)?;
            }
        }
    }
    report.print(args.json)
}

fn measure(args: &RestoreArgs, subject: &Subject, report: &mut Report) -> anyhow::Result<()> {
    warm_up_memory(subject.contents_bytes)?;
    report.add(subject);
    let modes = args.modes.clone().unwrap_or_else(|| MODES.to_vec());
    subject.prepare(args, &modes, &|seed| work(args, subject, seed))?;
    let caches = args.cache.map_or_else(|| vec![Cache::Warm, Cache::Cold], |cache| vec![cache]);
    for cache in caches {
        let mut runs: Vec<Vec<Restored>> = vec![Vec::new(); modes.len()];
        let mut memslots = Vec::new();
        for _ in 0..args.rounds {
            if subject.vm == "kvm" {
                memslots.push(millis(vmpager_vm::memslot_cost(subject.memory_bytes)?));
            }
            for (mode, runs) in modes.iter().zip(&mut runs) {
                for file in mode.files(&subject.paths) {
                    prepare_cache(&file, cache)?;
                }
                let work = work(args, subject, SEED);
                let restored = restore(*mode, &subject.paths, subject.scratch.path(), &work)?;
                if restored.vm.mismatches > 0 {
                    bail!("{}: {} pages were wrong", mode.name(), restored.vm.mismatches);
                }
                runs.push(restored);
            }
        }
        report.rows.extend(Row::of(&modes, cache, subject, &runs, &memslots));
    }
    Ok(())
}

fn work(args: &RestoreArgs, subject: &Subject, seed: u64) -> Work {
    Work {
        touches: Some(subject.touches),
        sequential: args.sequential,
        seed,
        verify: false,
        threads: subject.vm == "threads",
        run_ms: Some(args.run_ms),
        prefetch: args.prefetch,
        latency: Duration::from_millis(args.remote_latency_ms),
    }
}
