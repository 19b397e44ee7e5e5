//! The first process of a machine: the emulated one's, or a guest's.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};
use rustix::termios::tcdrain;

use crate::cases::Lab;
use crate::held::Held;
use crate::report::Report;
use crate::{guest, runner};

/// Where the modules are that a stock kernel needs, in the order of their
/// names.
const MODULES: &str = "/lab/modules";

/// Where the outside listens. The console is the kernel's: lines of both would
/// mix there.
const REPORT: &str = "/dev/ttyS1";

/// Never returns while all is well: a machine without its first process
/// panics.
pub(crate) fn run() -> ExitCode {
    let result = mounts().and_then(|()| {
        let command_line = CommandLine::read()?;
        if ["lab.load", "lab.walk"].iter().any(|name| command_line.value(name).is_some()) {
            guest::run(&command_line)
        } else {
            host(&command_line)
        }
    });
    if let Err(error) = result {
        // The kernel's log: there may be no other place.
        let _ = fs::write("/dev/kmsg", format!("lab: {error:#}\n"));
    }
    ExitCode::FAILURE
}

fn mounts() -> anyhow::Result<()> {
    for (kind, at) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")]
    {
        // Some kernels mount /dev themselves.
        match mount(kind, at, kind, MountFlags::empty(), None) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(error).with_context(|| format!("mounting {at}")),
        }
    }
    Ok(())
}

/// Runs the tests named on the command line, then turns the machine off.
fn host(command_line: &CommandLine) -> anyhow::Result<()> {
    let to =
        OpenOptions::new().write(true).open(REPORT).with_context(|| format!("opening {REPORT}"))?;
    let line = to.try_clone().with_context(|| format!("keeping {REPORT}"))?;
    let mut report = Report::new(Box::new(to));
    let names: Vec<String> = command_line
        .value("lab.tests")
        .unwrap_or_default()
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect();
    let lab = Lab {
        vmpager: "/bin/vmpager".into(),
        matrix: "/bin/matrix".into(),
        kernel: "/lab/kernel".into(),
        host_kernel: "/lab/host-kernel".into(),
        initrd: "/lab/guest-initramfs".into(),
        scratch: "/tmp".into(),
        direct: false,
    };
    // Without KVM the tests say what is missing.
    if let Err(error) = load_modules() {
        report.text(&format!("{error:#}"));
    }
    let _held = Held::make().inspect_err(|error| report.text(&format!("no VM is held: {error:#}")));
    runner::run(&lab, &names, &mut report)?;
    // What is still in the kernel's buffer would be lost with the machine.
    tcdrain(&line).with_context(|| format!("waiting for {REPORT} to be read"))?;
    power_off()
}

fn load_modules() -> anyhow::Result<()> {
    let list = fs::read_dir(MODULES).with_context(|| format!("reading {MODULES}"))?;
    let mut files: Vec<PathBuf> = list.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    for file in files {
        let at = || format!("loading {}", file.display());
        finit_module(File::open(&file).with_context(at)?, c"", 0).with_context(at)?;
    }
    Ok(())
}

/// Turns the machine off.
pub(crate) fn power_off() -> anyhow::Result<()> {
    reboot(RebootCommand::PowerOff).context("turning the machine off")
}

/// Resets the machine.
pub(crate) fn reset() -> anyhow::Result<()> {
    reboot(RebootCommand::Restart).context("resetting the machine")
}

/// The words the kernel was started with.
#[derive(Debug)]
pub(crate) struct CommandLine(String);

impl CommandLine {
    fn read() -> anyhow::Result<Self> {
        let path = Path::new("/proc/cmdline");
        let text =
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self(text))
    }

    /// What follows `name=`.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.0.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// As [`value`](Self::value), a number; the default if there is none.
    pub(crate) fn number(&self, name: &str, default: usize) -> anyhow::Result<usize> {
        self.value(name).map_or(Ok(default), |value| {
            value.parse().with_context(|| format!("{name}={value} on the command line"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_their_whole_name() {
        let line = CommandLine("quiet lab.threads=2 x.lab.still=9 lab.still=16".into());
        assert_eq!(line.number("lab.threads", 1).expect("a number"), 2);
        assert_eq!(line.number("lab.still", 1).expect("a number"), 16);
        assert_eq!(line.number("lab.thread", 7).expect("the default"), 7);
        assert!(line.value("quiet").is_none());
    }
}
