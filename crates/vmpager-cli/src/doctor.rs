//! `vmpager doctor`: what this kernel, user and machine can do for a restore,
//! each finding with its consequence and its remedy.
//!
//! The probes (`vmpager_sys::probe`, `vmpager_kvm::probe`) bring facts; this
//! module and the tables below it give them words.

mod kvm;
mod render;
mod system;
mod userfaultfd;
mod verdict;

use std::io::{self, IsTerminal, Write};

use anyhow::{Context, bail};
use rustix::io::Errno;
use serde::Serialize;
use vmpager_kvm::probe::{KvmPaths, KvmProbeError, KvmReport};
use vmpager_sys::probe::Host;

use self::render::Style;
use self::verdict::{Answer, Verdict};

/// Options of `vmpager doctor`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  vmpager doctor --json | jq .verdict\n\n\
    Run it as the user the VMM runs as: permissions differ.\n\
    Exit status: 0 if on-demand restore works, 1 if userfaultfd is unusable.")]
pub(crate) struct DoctorArgs {
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Probes this machine, prints the report, and fails if userfaultfd is
/// unusable.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let host = vmpager_sys::probe::host();
    let kvm_paths = KvmPaths::default();
    let kvm = vmpager_kvm::probe::kvm_at(&kvm_paths);
    let report = Report::new(&host, &kvm, &kvm_paths);

    let stdout = io::stdout();
    let style = Style::detect(stdout.is_terminal());
    let mut out = stdout.lock();
    let written = if args.json {
        report.write_json(&mut out)
    } else {
        render::write(&report, style, &mut out)
    };
    match written.and_then(|()| out.flush()) {
        // The reader has seen enough (`vmpager doctor | head`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.context("writing the report to standard output")?,
    }
    if report.verdict.on_demand_restore == Answer::No {
        let remedy = userfaultfd::remedy(&host).unwrap_or_else(|| "see the report".to_owned());
        bail!(
            "userfaultfd is unusable for this user, so nothing can be restored on demand: {remedy}"
        );
    }
    Ok(())
}

/// All findings, and what they add up to.
#[derive(Debug)]
struct Report {
    kernel: String,
    checks: Vec<Check>,
    verdict: Verdict,
}

impl Report {
    fn new(host: &Host, kvm: &Result<KvmReport, KvmProbeError>, kvm_paths: &KvmPaths) -> Self {
        let mut checks = system::kernel_checks(host);
        checks.extend(userfaultfd::checks(host));
        checks.extend(system::memory_checks(host));
        checks.extend(kvm::checks(kvm, vmpager_kvm::probe::vendor(kvm_paths)));
        checks.extend(system::system_checks(host));
        let verdict = Verdict::new(host, kvm.as_ref().ok());
        Self { kernel: host.kernel_release.clone(), checks, verdict }
    }

    fn write_json(&self, out: &mut dyn Write) -> io::Result<()> {
        #[derive(Serialize)]
        struct Json<'a> {
            kernel: &'a str,
            checks: Vec<JsonCheck<'a>>,
            verdict: &'a Verdict,
        }
        #[derive(Serialize)]
        struct JsonCheck<'a> {
            id: &'a str,
            group: &'a str,
            state: State,
            value: &'a str,
            consequence: &'a str,
            remedy: Option<&'a str>,
        }
        let checks = self
            .checks
            .iter()
            .map(|check| JsonCheck {
                id: check.id,
                group: check.group(),
                state: check.state,
                value: &check.value,
                consequence: &check.consequence,
                remedy: check.remedy.as_deref(),
            })
            .collect();
        let json = Json { kernel: &self.kernel, checks, verdict: &self.verdict };
        serde_json::to_writer_pretty(&mut *out, &json)?;
        writeln!(out)
    }
}

/// How a finding stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// There, and enough.
    Ok,
    /// There in part, or replaced by something lesser.
    Limited,
    /// Not there, or not for this user.
    Missing,
}

/// One finding. Everything that is not [`State::Ok`] has a remedy.
#[derive(Clone, Debug)]
struct Check {
    /// Stable name, `group.what`: programs rely on it.
    id: &'static str,
    /// What people call it.
    label: &'static str,
    state: State,
    /// What was found.
    value: String,
    /// What that means for vmpager.
    consequence: String,
    /// The command or setting that would change it.
    remedy: Option<String>,
}

impl Check {
    fn group(&self) -> &'static str {
        self.id.split('.').next().unwrap_or(self.id)
    }
}

/// A finding whose meaning is still to be stated.
struct Finding {
    id: &'static str,
    label: &'static str,
    value: String,
}

fn found(id: &'static str, label: &'static str, value: impl Into<String>) -> Finding {
    Finding { id, label, value: value.into() }
}

impl Finding {
    fn ok(self, consequence: impl Into<String>) -> Check {
        self.check(State::Ok, consequence.into(), None)
    }

    fn limited(self, consequence: impl Into<String>, remedy: impl Into<String>) -> Check {
        self.check(State::Limited, consequence.into(), Some(remedy.into()))
    }

    fn missing(self, consequence: impl Into<String>, remedy: impl Into<String>) -> Check {
        self.check(State::Missing, consequence.into(), Some(remedy.into()))
    }

    fn check(self, state: State, consequence: String, remedy: Option<String>) -> Check {
        let Self { id, label, value } = self;
        Check { id, label, state, value, consequence, remedy }
    }
}

/// The name people search for, `EPERM` rather than 1.
fn errno_name(errno: Errno) -> String {
    let name = match errno {
        Errno::PERM => "EPERM",
        Errno::ACCESS => "EACCES",
        Errno::NOENT => "ENOENT",
        Errno::NOSYS => "ENOSYS",
        Errno::INVAL => "EINVAL",
        Errno::NXIO => "ENXIO",
        Errno::NODEV => "ENODEV",
        Errno::NOMEM => "ENOMEM",
        Errno::MFILE => "EMFILE",
        Errno::NFILE => "ENFILE",
        Errno::NOTTY => "ENOTTY",
        Errno::NOPROTOOPT => "ENOPROTOOPT",
        Errno::BUSY => "EBUSY",
        other => return format!("errno {}", other.raw_os_error()),
    };
    name.to_owned()
}

/// Whether a release like `6.12.3-cloud` is at least this version; a release
/// that cannot be read is taken for a new one.
fn release_at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= wanted,
        _ => true,
    }
}

#[cfg(test)]
mod tests;
