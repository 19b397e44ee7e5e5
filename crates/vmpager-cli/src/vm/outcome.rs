//! How a VM's run ended, and what its process says of it.

use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use vmpager_vm::{ExitStats, GuestEnd, MappedAhead};

use super::async_pf::AsyncPf;

use crate::vm_process::millis;
use crate::{output, size};

/// How a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Ended {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// Its user had it end: by keyboard, signal or control socket.
    Stopped,
}

/// Exit status of a guest that panicked.
const PANICKED: u8 = 3;
/// Exit status of a guest that reset itself.
const RESET: u8 = 4;

/// For the help of the commands that run a VM.
pub(super) const EXIT_STATUS: &str = "Exit status: 0 the guest switched itself off or its user \
    had it end,\n1 failed, 2 wrong usage, 3 the guest's kernel panicked, 4 it reset itself.";

impl From<GuestEnd> for Ended {
    fn from(end: GuestEnd) -> Self {
        match end {
            GuestEnd::PowerOff => Self::PowerOff,
            GuestEnd::Reset => Self::Reset,
            GuestEnd::Panic => Self::Panic,
        }
    }
}

impl Ended {
    fn exit_code(self) -> ExitCode {
        match self {
            Self::PowerOff | Self::Stopped => ExitCode::SUCCESS,
            Self::Panic => PANICKED.into(),
            Self::Reset => RESET.into(),
        }
    }

    fn show(self) -> &'static str {
        match self {
            Self::PowerOff => "the guest switched itself off",
            Self::Reset => "the guest reset itself; this VM does not start it again",
            Self::Panic => "the guest's kernel panicked",
            Self::Stopped => "ended by its user",
        }
    }
}

/// What `--json` prints of a run.
#[derive(Debug, Serialize)]
pub(super) struct RunSummary {
    pub(super) end: Ended,
    pub(super) vcpus: u64,
    pub(super) memory_bytes: u64,
    /// From the start of the command to the VM being made, its memory mapped,
    /// and loaded or handed over if that is the way.
    pub(super) made_ms: f64,
    /// From the start of the command to a vCPU's first entry into the guest.
    pub(super) first_instruction_ms: Option<f64>,
    /// From the start of the command to the end.
    pub(super) ran_ms: f64,
    /// What vCPUs did about missing pages, if these were exits.
    pub(super) exits: Option<Exits>,
    /// What the guest was told of them, if vmpager played its device.
    pub(super) async_pf: Option<AsyncPf>,
    /// Which pages of the profile KVM mapped before the guest ran; `null` without a
    /// profile, if that was not wanted, or if this KVM cannot.
    pub(super) mapped_ahead: Option<Ahead>,
    /// Stage-2 faults that all vCPUs took; `null` if this KVM does not tell.
    pub(super) stage2_faults: Option<u64>,
    /// Of guest memory, so much lay in huge pages in the end; `null` without `/proc`.
    pub(super) huge_bytes: Option<u64>,
}

/// What mapping pages before the guest ran came to.
#[derive(Debug, Serialize)]
pub(super) struct Ahead {
    /// Pages of 4 KiB that were mapped: so many stage-2 faults at most were saved.
    pub(super) pages: u64,
    /// Pages that KVM did not map.
    pub(super) refused: u64,
    /// Pages that were in place, and for which there was no time.
    pub(super) left: u64,
    /// How long it kept the guest from running.
    pub(super) took_ms: f64,
}

impl From<MappedAhead> for Ahead {
    fn from(mapped: MappedAhead) -> Self {
        let MappedAhead { pages, refused, left, took } = mapped;
        Self { pages, refused, left, took_ms: millis(took) }
    }
}

/// What exits on missing pages came to, on all vCPUs.
#[derive(Debug, Serialize)]
pub(super) struct Exits {
    /// How many there were.
    pub(super) exits: u64,
    /// Pages installed by the vCPU's own thread.
    pub(super) installed: u64,
    /// Exits whose page was being fetched.
    pub(super) waited: u64,
    /// Pages asked for again, after a wait.
    pub(super) asked_again: u64,
    /// Exits with nothing missing any more.
    pub(super) reentered: u64,
    /// Changes of memory attributes.
    pub(super) cleared: u64,
    /// Pages whose attribute another vCPU changed than the one that installed them.
    pub(super) overtaken: u64,
    /// Pages KVM mapped before the vCPU entered the guest.
    pub(super) mapped: u64,
    /// Faults left to the userfaultfd, the page being unknown.
    pub(super) fallbacks: u64,
}

impl From<ExitStats> for Exits {
    fn from(stats: ExitStats) -> Self {
        let ExitStats {
            exits,
            installed,
            waited,
            asked_again,
            reentered,
            cleared,
            overtaken,
            mapped,
            fallbacks,
        } = stats;
        Self {
            exits,
            installed,
            waited,
            asked_again,
            reentered,
            cleared,
            overtaken,
            mapped,
            fallbacks,
        }
    }
}

impl RunSummary {
    /// Says how it ended, on standard output as JSON or else on standard error:
    /// standard output is the guest's console then.
    pub(super) fn report(&self, json: bool) -> anyhow::Result<ExitCode> {
        if json {
            output::json(self)?;
        } else {
            let seconds = Duration::from_secs_f64(self.ran_ms / 1e3);
            let (end, memory) = (self.end.show(), size::show(self.memory_bytes));
            let vcpus = show_vcpus(self.vcpus);
            eprintln!("vmpager: {end} ({vcpus}, {memory}, {seconds:.1?})");
            if let Some(ahead) = &self.mapped_ahead {
                eprintln!("vmpager: {}", self.show_mapped(ahead));
            }
        }
        Ok(self.end.exit_code())
    }

    fn show_mapped(&self, ahead: &Ahead) -> String {
        let mut text = format!("{} pages mapped ahead in {:.1} ms", ahead.pages, ahead.took_ms);
        if let Some(faults) = self.stage2_faults {
            text.push_str(&format!(", {faults} stage-2 faults after that"));
        }
        if let Some(huge) = self.huge_bytes {
            text.push_str(&format!(", {} of memory in huge pages", size::show(huge)));
        }
        text
    }
}

/// `1 vCPU`, `2 vCPUs`.
pub(super) fn show_vcpus(n: u64) -> String {
    format!("{n} vCPU{}", if n == 1 { "" } else { "s" })
}

/// Milliseconds since a command began.
pub(super) fn since(started: std::time::Instant) -> f64 {
    millis(started.elapsed())
}
