//! The user's terminal as the guest's console.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcsetattr};
use vmpager_vm::ConsoleInput;

/// The prefix of what is for this program and not for the guest.
const CTRL_A: u8 = 1;
/// Reads of input that wait for a guest to take them.
const MAX_READS: usize = 64;

/// How the terminal was before it handed every key to the guest, while it does.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// A terminal that hands every key to the guest, until this is dropped, or
/// [`leave`] is called: then it is as it was.
#[derive(Debug)]
pub(super) struct RawTerminal(());

/// The terminal is as it was again.
pub(super) fn leave() {
    if let Some(saved) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // There is nobody left to tell, and nothing else to try.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &saved);
    }
}

impl RawTerminal {
    /// `None` if standard input is no terminal, or another job's.
    pub(super) fn enter() -> anyhow::Result<Option<Self>> {
        let stdin = io::stdin();
        // Changing it from the background would stop this process.
        if !stdin.is_terminal() || tcgetpgrp(&stdin).ok() != Some(getpgrp()) {
            return Ok(None);
        }
        let saved = tcgetattr(&stdin).context("reading the terminal's settings")?;
        let mut raw = saved.clone();
        raw.make_raw();
        // For this program's own messages.
        raw.output_modes |= saved.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        let entered = Self(());
        tcsetattr(&stdin, OptionalActions::Now, &raw).context("setting the terminal")?;
        Ok(Some(entered))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        leave();
    }
}

/// Sends standard input to the guest from threads of their own, for as long as
/// this process lives; `quit` hears when the user wants to leave.
pub(super) fn forward(
    console: ConsoleInput,
    is_terminal: bool,
    mut quit: UnixStream,
) -> anyhow::Result<()> {
    // Two threads: a guest that reads nothing must not keep the keyboard from
    // being watched for Ctrl-A x.
    let (keys, typed) = sync_channel(MAX_READS);
    spawn("keyboard", move || {
        if read_keys(&mut io::stdin(), is_terminal, &keys) {
            let _ = quit.write_all(&[0]);
        }
    })?;
    spawn("console-input", move || {
        for bytes in typed {
            send_all(&console, &bytes);
        }
    })
}

fn spawn(name: &str, thread: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(thread);
    spawned.map(drop).with_context(|| format!("starting the thread {name}"))
}

fn send_all(console: &ConsoleInput, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        bytes = &bytes[console.send(bytes, Duration::from_secs(60))..];
    }
}

/// Whether it ended by the user's wish.
fn read_keys(stdin: &mut impl Read, is_terminal: bool, guest: &SyncSender<Vec<u8>>) -> bool {
    let mut keys = Keys { has_escapes: is_terminal, ..Keys::default() };
    let mut buffer = [0; 256];
    loop {
        let Ok(read @ 1..) = stdin.read(&mut buffer) else { return false };
        let typed = keys.press(&buffer[..read]);
        if typed.quit {
            return true;
        }
        if is_terminal {
            // What a guest does not read is lost at last, as on a real line.
            let _ = guest.try_send(typed.for_guest);
        } else if guest.send(typed.for_guest).is_err() {
            return false;
        }
    }
}

/// Keys on their way to the guest.
#[derive(Debug, Default)]
struct Keys {
    /// Whether Ctrl-A is special.
    has_escapes: bool,
    /// The last one was Ctrl-A.
    after_ctrl_a: bool,
}

/// What became of keys.
#[derive(Debug, PartialEq, Eq)]
struct Typed {
    for_guest: Vec<u8>,
    /// Ctrl-A x was among them.
    quit: bool,
}

impl Keys {
    /// Ctrl-A x quits, Ctrl-A Ctrl-A is one Ctrl-A, before any other key it is
    /// one too.
    fn press(&mut self, keys: &[u8]) -> Typed {
        let mut typed = Typed { for_guest: Vec::new(), quit: false };
        for key in keys.iter().copied() {
            let was_after_ctrl_a = std::mem::take(&mut self.after_ctrl_a);
            match key {
                CTRL_A if !was_after_ctrl_a && self.has_escapes => self.after_ctrl_a = true,
                b'x' if was_after_ctrl_a => {
                    typed.quit = true;
                    break;
                }
                CTRL_A => typed.for_guest.push(CTRL_A),
                key if was_after_ctrl_a => typed.for_guest.extend([CTRL_A, key]),
                key => typed.for_guest.push(key),
            }
        }
        typed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(keys: &mut Keys, bytes: &[u8]) -> (Vec<u8>, bool) {
        let typed = keys.press(bytes);
        (typed.for_guest, typed.quit)
    }

    #[test]
    fn ctrl_a_x_quits_and_two_ctrl_a_are_one() {
        let mut keys = Keys { has_escapes: true, ..Keys::default() };
        assert_eq!(press(&mut keys, b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(press(&mut keys, b"a\x01\x01b"), (b"a\x01b".to_vec(), false));
        assert_eq!(press(&mut keys, b"\x01c"), (b"\x01c".to_vec(), false));
        assert_eq!(press(&mut keys, b"x\x01xls"), (b"x".to_vec(), true));
        // In two reads.
        assert_eq!(press(&mut keys, b"\x01"), (vec![], false));
        assert_eq!(press(&mut keys, b"x"), (vec![], true));
        // The second of two is no prefix.
        assert_eq!(press(&mut keys, b"\x01\x01x"), (b"\x01x".to_vec(), false));
    }

    #[test]
    fn a_pipe_has_no_escapes() {
        let mut keys = Keys::default();
        assert_eq!(press(&mut keys, b"\x01x\x01\x01"), (b"\x01x\x01\x01".to_vec(), false));
    }

    #[test]
    fn a_guest_that_reads_nothing_does_not_keep_the_user() {
        let (guest, _nobody_reads) = sync_channel(1);
        let mut stdin: &[u8] = &[&[b'k'; 10 * 256][..], b"\x01x"].concat();
        assert!(read_keys(&mut stdin, true, &guest));
    }

    #[test]
    fn a_pipe_loses_nothing_and_its_end_is_not_the_guests() {
        let (guest, typed) = sync_channel(1);
        let reader = std::thread::spawn(move || {
            let mut stdin: &[u8] = &[b'k'; 10 * 256];
            read_keys(&mut stdin, false, &guest)
        });
        assert_eq!(typed.iter().flatten().count(), 10 * 256);
        assert!(!reader.join().unwrap());
    }
}
