//! A Linux VM in this process, from its start to its end: the terminal, the
//! control socket and the signals that it is run with.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use vmpager_vm::{LinuxVm, SnapshotPaths};

use super::async_pf::AsyncPf;
use super::control::ControlSocket;
use super::outcome::{Ahead, Ended, Exits, RunSummary, since};
use super::protocol::{Reply, Request, RunState, VmStatus};
use super::terminal::{self, RawTerminal};
use crate::smaps;
use crate::vm_process::millis;

/// Where the guest's console goes: standard output is for JSON if that was
/// asked for.
pub(super) fn console_output(json: bool) -> Box<dyn Write + Send> {
    if json { Box::new(io::stderr()) } else { Box::new(io::stdout()) }
}

/// A VM that is about to run.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) vm: LinuxVm,
    pub(super) vcpus: u64,
    pub(super) control: Option<ControlSocket>,
    /// When the command began.
    pub(super) started: Instant,
    /// How long it took to make the VM.
    pub(super) made_ms: f64,
}

impl Session {
    /// Runs the guest until it ends, or its user has it end.
    pub(super) fn run(mut self) -> anyhow::Result<RunSummary> {
        let (quit, wants_quit) = UnixStream::pair().context("a pair of sockets")?;
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            pipe::register(signal, wants_quit.try_clone()?).context("catching signals")?;
        }
        let terminal = RawTerminal::enter()?;
        if terminal.is_some() {
            eprintln!("vmpager: Ctrl-A x ends the VM");
        }
        terminal::forward(self.vm.console(), terminal.is_some(), wants_quit)?;
        self.vm.resume()?;
        let end = self.until_end(&quit)?;
        drop(terminal);
        let entered = self.vm.entered();
        let (exits, async_pf) = (self.vm.exit_stats(), self.vm.async_fault_stats());
        let memory = self.vm.memory();
        let memory_bytes = memory.len() as u64;
        Ok(RunSummary {
            end,
            vcpus: self.vcpus,
            memory_bytes,
            made_ms: self.made_ms,
            first_instruction_ms: entered.map(|at| millis(at.duration_since(self.started))),
            ran_ms: since(self.started),
            exits: exits.map(Exits::from),
            async_pf: async_pf.zip(exits).map(|(stats, exits)| AsyncPf::new(stats, exits)),
            mapped_ahead: self.vm.mapped_ahead().map(Ahead::from),
            stage2_faults: self.vm.stage2_faults(),
            huge_bytes: smaps::huge_bytes(memory.hva(), memory_bytes).ok(),
        })
    }

    fn until_end(&mut self, quit: &UnixStream) -> anyhow::Result<Ended> {
        loop {
            let mut fds =
                vec![PollFd::new(&self.vm, PollFlags::IN), PollFd::new(quit, PollFlags::IN)];
            fds.extend(self.control.as_ref().map(|control| PollFd::new(control, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for the guest to end"),
            }
            let is_ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if let Some(end) = self.vm.wait(Duration::ZERO)? {
                return Ok(end.into());
            }
            if is_ready[1] || is_ready.get(2) == Some(&true) && self.serve() {
                self.vm.pause();
                return Ok(Ended::Stopped);
            }
        }
    }

    /// Serves a peer of the control socket. Whether the VM is to end.
    fn serve(&mut self) -> bool {
        let Some(control) = &self.control else { return false };
        let (vm, vcpus, mut ends) = (&mut self.vm, self.vcpus, false);
        control.serve(|request| {
            ends = matches!(request, Request::Quit | Request::Snapshot { stop: true, .. });
            match carry_out(vm, &request) {
                Ok(()) => Reply::Ok(status(vm, vcpus, ends)),
                Err(error) => {
                    ends = false;
                    Reply::Error(format!("{error:#}"))
                }
            }
        });
        ends
    }
}

fn carry_out(vm: &mut LinuxVm, request: &Request) -> anyhow::Result<()> {
    match request {
        Request::Status | Request::Quit => Ok(()),
        Request::Pause => {
            vm.pause();
            Ok(())
        }
        Request::Resume => Ok(vm.resume()?),
        Request::Snapshot { state, memory, stop } => snapshot(vm, state, memory, *stop),
    }
}

/// Saves the VM, which then runs on if it ran, unless it is to stop. One that
/// cannot be saved runs on in any case.
fn snapshot(vm: &mut LinuxVm, state: &Path, memory: &Path, stop: bool) -> anyhow::Result<()> {
    for path in [state, memory] {
        if !path.is_absolute() {
            bail!("{} is no absolute path, and the VM may run elsewhere", path.display());
        }
    }
    let paths = SnapshotPaths { state: state.to_owned(), memory: memory.to_owned() };
    let was_running = vm.is_running();
    if stop {
        vm.pause();
    }
    let saved = vm.snapshot(&paths).map(drop).context("the VM could not be saved");
    if stop && was_running && saved.is_err() {
        vm.resume()?;
    }
    saved
}

fn status(vm: &LinuxVm, vcpus: u64, ends: bool) -> VmStatus {
    let state = match (ends, vm.is_running()) {
        (true, _) => RunState::Ending,
        (false, true) => RunState::Running,
        (false, false) => RunState::Paused,
    };
    VmStatus { state, vcpus, memory_bytes: vm.memory().len() as u64 }
}
