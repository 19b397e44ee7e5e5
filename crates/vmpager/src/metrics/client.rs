//! Looking at a daemon's numbers, from another process.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::{Endpoint, SessionsPage};

/// An answer of more bytes is not taken: some 1 KiB a session.
const MAX_ANSWER: u64 = 64 << 20;

/// Why a daemon's numbers cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// Nobody answers there.
    #[error("{endpoint}: {error}; is a daemon running with --metrics {endpoint}?")]
    Nobody {
        /// Where.
        endpoint: Endpoint,
        /// The system's own words.
        error: io::Error,
    },
    /// What answers is no daemon of this program, or of another version.
    #[error("{endpoint}: {problem}; is it a vmpager daemon of this version?")]
    Nonsense {
        /// Where.
        endpoint: Endpoint,
        /// What is wrong.
        problem: String,
    },
}

impl Endpoint {
    /// All sessions of the daemon there. Waits so long at most for each thing that the
    /// daemon says.
    ///
    /// # Errors
    ///
    /// If nobody answers there, or no daemon does.
    pub fn sessions(&self, patience: Duration) -> Result<SessionsPage, LookError> {
        let answer = self.ask("/sessions.json", patience).map_err(|error| {
            let endpoint = self.clone();
            match error.kind() {
                io::ErrorKind::InvalidData => {
                    LookError::Nonsense { endpoint, problem: error.to_string() }
                }
                _ => LookError::Nobody { endpoint, error },
            }
        })?;
        let page = body(&answer).and_then(|body| {
            serde_json::from_slice(body).map_err(|error| format!("its answer: {error}"))
        });
        page.map_err(|problem| LookError::Nonsense { endpoint: self.clone(), problem })
    }

    fn ask(&self, page: &str, patience: Duration) -> io::Result<Vec<u8>> {
        let request = format!("GET {page} HTTP/1.1\r\nHost: vmpager\r\nConnection: close\r\n\r\n");
        match self {
            Self::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, patience)?;
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))?;
                exchange(stream, &request)
            }
            Self::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))?;
                exchange(stream, &request)
            }
        }
    }
}

fn exchange(mut stream: impl Read + Write, request: &str) -> io::Result<Vec<u8>> {
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    if answer.len() as u64 == MAX_ANSWER {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its answer has no end"));
    }
    Ok(answer)
}

/// The contents of an answer that is one.
fn body(answer: &[u8]) -> Result<&[u8], String> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(answer) {
        Ok(httparse::Status::Complete(head)) if response.code == Some(200) => {
            Ok(answer.get(head..).unwrap_or_default())
        }
        Ok(httparse::Status::Complete(_)) => {
            let reason = response.reason.unwrap_or_default();
            Err(format!("its answer: {} {reason}", response.code.unwrap_or_default()))
        }
        Ok(httparse::Status::Partial) => Err("its answer ends early".into()),
        Err(error) => Err(format!("its answer: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart() {
        assert_eq!(body(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n{}"), Ok(&b"{}"[..]));
        for (answer, why) in [
            (&b"HTTP/1.1 404 Not Found\r\n\r\n"[..], "404 Not Found"),
            (b"HTTP/1.1 200 OK\r\nA:", "ends early"),
            (b"", "ends early"),
            (b"SSH-2.0-x\r\n\r\n", "answer"),
        ] {
            let error = body(answer).expect_err(why);
            assert!(error.contains(why), "{error}");
        }
    }
}
