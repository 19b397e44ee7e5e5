//! `vmpager vm snapshot`: has a running VM save itself.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use serde::Serialize;

use super::outcome::show_vcpus;
use super::protocol::{self, Request};
use crate::vm_process::millis;
use crate::{output, size};

/// Options of `vmpager vm snapshot`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager vm run --kernel vmlinuz --initrd initrd.img --control /run/vm.sock &\n  \
    vmpager vm snapshot --control /run/vm.sock --state vm.state --memory vm.mem --stop\n  \
    vmpager vm restore --state vm.state --memory vm.mem --memory-mode on-demand\n\n\
    The VM is paused while it is saved. Its memory file has holes for zero pages. Files\n\
    that exist are replaced, each once its successor is complete.")]
pub(crate) struct SnapshotArgs {
    /// The VM's control socket.
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    /// Where its state goes: processors, interrupt controllers, devices.
    #[arg(long, value_name = "FILE")]
    state: PathBuf,
    /// Where its memory goes.
    #[arg(long, value_name = "FILE")]
    memory: PathBuf,
    /// End the VM once it is saved.
    #[arg(long)]
    stop: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Saved<'a> {
    state: &'a Path,
    memory: &'a Path,
    memory_bytes: u64,
    vcpus: u64,
    stopped: bool,
    took_ms: f64,
}

pub(super) fn run(args: &SnapshotArgs) -> anyhow::Result<()> {
    let absolute = |path: &Path| {
        std::path::absolute(path).with_context(|| format!("the path {}", path.display()))
    };
    let (state, memory) = (absolute(&args.state)?, absolute(&args.memory)?);
    let request =
        Request::Snapshot { state: state.clone(), memory: memory.clone(), stop: args.stop };
    let started = Instant::now();
    let status = protocol::ask(&args.control, &request)?;
    let took_ms = millis(started.elapsed());
    let (memory_bytes, vcpus) = (status.memory_bytes, status.vcpus);
    if args.json {
        let stopped = args.stop;
        let (state, memory) = (&state, &memory);
        return output::json(&Saved { state, memory, memory_bytes, vcpus, stopped, took_ms });
    }
    output::line(&format!(
        "saved {} and {} of memory to {} and {} in {took_ms:.0} ms",
        show_vcpus(vcpus),
        size::show(memory_bytes),
        state.display(),
        memory.display()
    ))
}
