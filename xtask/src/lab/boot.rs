//! One run of the lab's program, in the emulator or on this machine, watched
//! line by line until it ends or has been silent for too long.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::build::{Case, Programs};
use super::kernel::Kernel;
use super::tally::{Run, Tally};

/// From the start of the emulator to the first word of the lab's init.
const BOOTING: Duration = Duration::from_secs(90);

/// How long the emulator may take to come to life.
const STARTING: Duration = Duration::from_secs(20);

/// The lab's memory. The snapshots are in there too.
const MEMORY_MIB: u32 = 2048;

/// The lab's CPUs. Guests run on the second alone (`vmpager-lab`'s `cpus` tells why).
const CPUS: u32 = 2;

/// A boot with one CPU. Its tests make and end VMs without interrupt controllers by
/// the hundred; for each KVM patches its own code, and emulated kernels with more
/// CPUs were seen to trip over that (`docs/lab.md`).
const ALONE: &str = "matrix";

/// One line from the lab.
enum Line {
    /// The emulated machine's console: what its kernel says.
    Console(String),
    /// The lab's program.
    Protocol(String),
}

/// A run of the lab's program. Ends when dropped.
pub(super) struct Boot {
    child: Child,
    lines: Receiver<Line>,
    /// What is left to say when it could not start.
    errors: thread::JoinHandle<String>,
}

impl Drop for Boot {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Boot {
    /// Boots the emulated machine.
    pub(super) fn emulated(
        host: &Kernel,
        initramfs: &Path,
        socket: &Path,
        cases: &[Case],
    ) -> anyhow::Result<Self> {
        let cpus = if cases.iter().any(|case| case.boot == ALONE) { 1 } else { CPUS };
        let names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        let _ = fs::remove_file(socket); // of the boot before
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("listening on {}", socket.display()))?;
        // However this process ends, the emulator does.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command
            // No XSAVE: the emulator does not let KVM intercept XSETBV, so KVM would
            // run a guest that turns AVX on with it off.
            .args([
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "EPYC,+svm,+npt,-xsave",
                "-smp",
                &cpus.to_string(),
            ])
            .args(["-m", &MEMORY_MIB.to_string(), "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-chardev", &format!("socket,id=protocol,path={}", socket.display())])
            .args(["-serial", "chardev:protocol"])
            .arg("-kernel")
            .arg(host.image())
            .arg("-initrd")
            .arg(initramfs)
            .arg("-append")
            // On a panic the machine resets, which ends the emulator.
            .arg(format!(
                "console=ttyS0 quiet panic=-1 lab.tests={}{}",
                names.join(","),
                settings()
            ));
        let (sender, lines) = channel();
        let (mut child, errors) = start(&mut command)?;
        read(child.stdout.take(), &sender, Line::Console);
        // From here on the emulator ends whatever happens.
        let mut boot = Self { child, lines, errors };
        let protocol = boot.accept(&listener)?;
        read(Some(protocol), &sender, Line::Protocol);
        Ok(boot)
    }

    /// Runs the lab's program on this machine.
    pub(super) fn direct(
        programs: &Programs,
        guest: &Kernel,
        initrd: &Path,
        scratch: &Path,
        cases: &[Case],
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(&programs.lab);
        command.args(["run", "--direct"]).arg("--vmpager").arg(&programs.vmpager);
        command.arg("--matrix").arg(&programs.matrix);
        command.arg("--kernel").arg(guest.image()).arg("--initrd").arg(initrd);
        command.arg("--host-kernel").arg(guest.image());
        command.arg("--scratch").arg(scratch);
        command.args(cases.iter().map(|case| &case.name));
        let (sender, lines) = channel();
        let (mut child, errors) = start(&mut command)?;
        read(child.stdout.take(), &sender, Line::Protocol);
        Ok(Self { child, lines, errors })
    }

    /// Waits for the emulator to connect.
    fn accept(&mut self, listener: &UnixListener) -> anyhow::Result<UnixStream> {
        listener.set_nonblocking(true)?;
        let begin = Instant::now();
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
                Err(_) => {}
            }
            if let Some(status) = self.child.try_wait()? {
                let errors = std::mem::replace(&mut self.errors, thread::spawn(String::new));
                let errors = errors.join().unwrap_or_default();
                bail!("the emulator ended at once ({status}): {}", errors.trim());
            }
            if begin.elapsed() > STARTING {
                bail!("the emulator did not start in {} s", STARTING.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Settings of tests, which the kernel hands to its init as environment.
fn settings() -> String {
    let of_tests = std::env::vars().filter(|(name, _)| name.starts_with("VMPAGER_LAB_TEST_"));
    of_tests.map(|(name, value)| format!(" {name}={value}")).collect()
}

/// Starts a program, and collects what it says on standard error: the
/// emulator has opinions on CPU features there, of interest only if it fails.
fn start(command: &mut Command) -> anyhow::Result<(Child, thread::JoinHandle<String>)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("`{}` cannot be run", command.get_program().display()))?;
    let stderr = child.stderr.take();
    let errors = thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    });
    Ok((child, errors))
}

/// Sends on, from a thread, every line of a stream.
fn read(stream: Option<impl Read + Send + 'static>, to: &Sender<Line>, kind: fn(String) -> Line) {
    let Some(stream) = stream else { return };
    let to = to.clone();
    thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut bytes = Vec::new();
        while stream.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            if to.send(kind(line)).is_err() {
                return;
            }
            bytes.clear();
        }
    });
}

/// Streams a run's lines, each behind the boot's name, until it ends, is silent for
/// too long, or the deadline has come.
pub(super) fn watch(boot: &mut Boot, name: &str, cases: &[Case], deadline: Instant) -> Tally {
    let mut run = Run::new(cases);
    let mut patience = Instant::now() + BOOTING;
    loop {
        let until = patience.min(deadline);
        match boot.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Line::Console(line)) if line.is_empty() => {}
            Ok(Line::Console(line)) => {
                println!("{name:<8}  | {line}");
                run.console(&line);
            }
            Ok(Line::Protocol(line)) => {
                if let Some(text) = run.protocol(&line) {
                    println!("{name:<8}{text}");
                }
                patience = Instant::now() + run.patience();
            }
            Err(RecvTimeoutError::Timeout) if until == deadline => {
                run.give_up("the time for all tests is over (--limit)");
                break;
            }
            Err(RecvTimeoutError::Timeout) => {
                run.give_up("it has been silent for too long");
                break;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    run.end()
}
