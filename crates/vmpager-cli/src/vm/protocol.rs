//! What is said over a VM's control socket: a connection carries one request
//! and its reply, each a line of JSON.
//!
//! ```text
//! {"command":"status"}       also: pause, resume, quit
//! {"command":"snapshot","state":"/abs/state","memory":"/abs/memory","stop":false}
//!
//! {"ok":{"state":"running","vcpus":2,"memory_bytes":268435456}}
//! {"error":"what went wrong, and what to do"}
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// What a VM can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Request {
    /// How it is.
    Status,
    /// To stop its vCPUs. One that is paused already stays so.
    Pause,
    /// To let them run on.
    Resume,
    /// To end.
    Quit,
    /// To save itself. It runs on as before unless `stop` is set.
    Snapshot {
        /// Absolute: the VM may have been started in another directory.
        state: PathBuf,
        memory: PathBuf,
        /// Whether it ends once it is saved.
        #[serde(default)]
        stop: bool,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Reply {
    /// It was done, and the VM is now like this.
    Ok(VmStatus),
    /// It was not done, and why.
    Error(String),
}

/// How a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VmStatus {
    pub(super) state: RunState,
    pub(super) vcpus: u64,
    pub(super) memory_bytes: u64,
}

/// Whether a VM runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RunState {
    Running,
    Paused,
    /// It is about to end.
    Ending,
}

/// The longest request.
const MAX_LINE: u64 = 16 << 10;
/// How long a peer may take to send a request, or to take a reply. The VM's
/// guest runs on meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asks a VM, and waits for its answer however long that takes: it may have
/// much memory to save.
pub(super) fn ask(socket: &Path, request: &Request) -> anyhow::Result<VmStatus> {
    let at = || format!("the VM's control socket {}", socket.display());
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(error) => bail!("{}: {error}; is a VM running with it as --control?", at()),
    };
    send(&mut stream, request).with_context(at)?;
    let mut reply = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut reply).with_context(at)?;
    if reply.is_empty() {
        bail!("{}: the VM ended before it answered", at());
    }
    match serde_json::from_str(&reply).with_context(at)? {
        Reply::Ok(status) => Ok(status),
        Reply::Error(error) => bail!("the VM says: {error}"),
    }
}

/// Reads a request that is to come soon.
pub(super) fn receive(stream: &UnixStream) -> anyhow::Result<Request> {
    let until = Instant::now() + PATIENCE;
    let mut line = Vec::new();
    let mut limited = Deadline { stream, until }.take(MAX_LINE);
    BufReader::new(&mut limited).read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        bail!("a request without an end: {} bytes, and no newline", line.len());
    }
    serde_json::from_slice(&line).context("not a request")
}

/// Sends a request or a reply.
pub(super) fn send(stream: &mut UnixStream, what: &impl Serialize) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(what).context("a path that is not UTF-8")?;
    line.push(b'\n');
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream.write_all(&line)?)
}

/// A stream that gives up reading at some time, however little comes at once.
struct Deadline<'a> {
    stream: &'a UnixStream,
    until: Instant,
}

impl Read for Deadline<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(bytes: &[u8]) -> anyhow::Result<Request> {
        let (mut peer, vm) = UnixStream::pair().unwrap();
        peer.write_all(bytes).unwrap();
        drop(peer);
        receive(&vm)
    }

    #[test]
    fn requests_are_what_the_page_says() {
        let line = b"{\"command\":\"snapshot\",\"state\":\"/s\",\"memory\":\"/m\"}\n";
        let (state, memory) = ("/s".into(), "/m".into());
        assert_eq!(received(line).unwrap(), Request::Snapshot { state, memory, stop: false });
        for (name, request) in [
            ("status", Request::Status),
            ("pause", Request::Pause),
            ("resume", Request::Resume),
            ("quit", Request::Quit),
        ] {
            let line = format!("{{\"command\":\"{name}\"}}\n");
            assert_eq!(received(line.as_bytes()).unwrap(), request);
        }
        let status = VmStatus { state: RunState::Paused, vcpus: 2, memory_bytes: 4096 };
        assert_eq!(
            serde_json::to_string(&Reply::Ok(status)).unwrap(),
            "{\"ok\":{\"state\":\"paused\",\"vcpus\":2,\"memory_bytes\":4096}}"
        );
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for (bytes, why) in [
            (&b""[..], "0 bytes"),
            (b"{\"command\":\"quit\"}", "no newline"),
            (b"quit\n", "not a request"),
            (b"{\"command\":\"explode\"}\n", "explode"),
            (b"{\"command\":\"snapshot\",\"state\":\"/s\"}\n", "memory"),
            (&[b' '; 20_000], "16384 bytes"),
        ] {
            let error = format!("{:#}", received(bytes).unwrap_err());
            assert!(error.contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn a_peer_that_sends_too_slowly_is_left() {
        let (mut peer, vm) = UnixStream::pair().unwrap();
        let until = Instant::now() + Duration::from_millis(30);
        let writer = std::thread::spawn(move || {
            while peer.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let started = Instant::now();
        let error = Deadline { stream: &vm, until }.read_to_end(&mut Vec::new()).unwrap_err();
        let timed_out = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        assert!(timed_out.contains(&error.kind()), "{error}");
        assert!(started.elapsed() < Duration::from_secs(1));
        drop(vm);
        writer.join().unwrap();
    }
}
