//! `vmpager profile record`.

use std::path::PathBuf;

use anyhow::bail;
use vmpager_store::profile::Profile;

use super::Summary;
use crate::image::{Parents, shown};
use crate::remote::RemoteArgs;
use crate::serve::limits::Limits;
use crate::serve::{AccessArgs, Prefetch, ServeArgs, serve};

/// Options of `vmpager profile record`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager profile record --socket /run/vm/pager.sock --image /snap/mem.vmimg \\\n      \
    --output /snap/mem.vmprof\n\n\
    Then restore a VM with that socket, let it do its work, and end it. Every page it\n\
    touches is recorded, which takes a fault for each; this session is slower than\n\
    others. If the output is there already, it is added to it.")]
pub(crate) struct RecordArgs {
    /// Unix socket to listen on; it exists once the VMM may connect.
    #[arg(long, value_name = "SOCKET")]
    socket: PathBuf,
    /// The memory file of the snapshot.
    #[arg(long, value_name = "FILE", required_unless_present = "image")]
    memory: Option<PathBuf>,
    /// A packed image of the memory instead.
    #[arg(long, value_name = "IMAGE", conflicts_with = "memory")]
    image: Option<PathBuf>,
    #[command(flatten)]
    parents: Parents,
    /// The profile to make, or to add to.
    #[arg(long, value_name = "PROFILE")]
    output: PathBuf,
    /// Accept VMs whose regions cover only part of the memory.
    #[arg(long)]
    partial: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &RecordArgs) -> anyhow::Result<()> {
    let report = serve(&ServeArgs {
        access: AccessArgs::default(),
        socket: args.socket.clone(),
        memory: args.memory.clone(),
        image: args.image.clone(),
        parents: args.parents.clone(),
        image_cache: None,
        remote: RemoteArgs::default(),
        profile: None,
        record: Some(args.output.clone()),
        background_fill: false,
        // What is brought in unasked is not seen to be touched.
        prefetch: Prefetch::Off,
        workers: None,
        limits: Limits::default(),
        partial: args.partial,
        handshake_timeout: 10,
        metrics_json: None,
        metrics: None,
        collapse: false,
        attach: None,
        once: true,
        share_clean: false,
        replace: false,
        no_seccomp: false,
        kept: false,
        alone: false,
        json: false,
    })?;
    if report.ended == 0 {
        bail!("no VM connected to {}; nothing was recorded", shown(&args.socket));
    }
    Summary::of(&Profile::open(&args.output)?, &args.output).print(args.json)
}
