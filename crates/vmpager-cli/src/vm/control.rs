//! The control socket, from both sides.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use tracing::warn;
use vmpager::daemon;

use super::outcome::show_vcpus;
use super::protocol::{self, Reply, Request, RunState};
use crate::{output, size};

/// Options of the commands that ask a VM for something.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager vm run --kernel vmlinuz --control /run/vm.sock &\n  \
    vmpager vm pause --control /run/vm.sock\n  \
    vmpager vm status --control /run/vm.sock --json\n  \
    vmpager vm resume --control /run/vm.sock\n  \
    vmpager vm quit --control /run/vm.sock")]
pub(crate) struct ControlArgs {
    /// The VM's control socket, as it was given to `vm run` or `vm restore`.
    #[arg(long, value_name = "SOCKET")]
    control: PathBuf,
    /// Print the VM's state as one JSON object.
    #[arg(long)]
    json: bool,
}

/// Asks, and says how the VM is then.
pub(super) fn run(args: &ControlArgs, request: &Request) -> anyhow::Result<()> {
    let status = protocol::ask(&args.control, request)?;
    if args.json {
        return output::json(&status);
    }
    let state = match status.state {
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::Ending => "ending",
    };
    let (vcpus, memory) = (show_vcpus(status.vcpus), size::show(status.memory_bytes));
    output::line(&format!("{state}, {vcpus}, {memory} of memory"))
}

/// The side of the VM. The socket goes when this does.
#[derive(Debug)]
pub(super) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    pub(super) fn bind(path: &Path) -> anyhow::Result<Self> {
        Ok(Self { listener: daemon::listen(path)?, path: path.to_owned() })
    }

    /// Serves a peer, if one waits. What a peer does wrong is its own problem.
    pub(super) fn serve(&self, answer: impl FnOnce(Request) -> Reply) {
        match self.listener.accept() {
            Ok((stream, _)) => serve(stream, answer),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => warn!("control socket {}: {error}", self.path.display()),
        }
    }
}

fn serve(mut stream: UnixStream, answer: impl FnOnce(Request) -> Reply) {
    let reply = match protocol::receive(&stream) {
        Ok(request) => answer(request),
        Err(error) => Reply::Error(format!("{error:#}")),
    };
    if let Err(error) = protocol::send(&mut stream, &reply) {
        warn!("control socket: a peer took no reply: {error:#}");
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
