//! Where a daemon's numbers are shown: an address, or a path.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::net::{SocketAddrUnix, getsockname};

use crate::daemon::{DaemonError, listen, unlisten};

/// Where a daemon's numbers are shown. Nobody is asked who he is: an address of the
/// loopback interface, or a path in a directory with the right permissions, says who
/// may look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A TCP address. Port 0 has the system choose one.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

/// Why numbers cannot be shown there.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// It is no endpoint.
    #[error("{0:?} is neither ADDRESS:PORT (as 127.0.0.1:9464 or [::1]:9464) nor unix:PATH")]
    Malformed(String),
    /// It cannot be listened on.
    #[error("metrics at {endpoint}: {problem}")]
    Listen {
        /// Where.
        endpoint: Endpoint,
        /// What is wrong, and what to do.
        problem: String,
    },
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => match text.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => Err(EndpointError::Malformed(text.into())),
            },
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Endpoint {
    /// Listens there, without blocking. A socket that a process left behind is
    /// replaced.
    ///
    /// # Errors
    ///
    /// If that cannot be had; the error says what to do.
    pub(crate) fn listen(&self) -> Result<OwnedFd, EndpointError> {
        let problem = |problem: String| EndpointError::Listen { endpoint: self.clone(), problem };
        match self {
            Self::Tcp(address) => {
                let listener = TcpListener::bind(address).and_then(|listener| {
                    listener.set_nonblocking(true)?;
                    Ok(listener.into())
                });
                listener.map_err(|error| problem(advice(&error)))
            }
            Self::Unix(path) => match listen(path) {
                Ok(listener) => Ok(listener.into()),
                Err(DaemonError::Socket { problem: what, .. }) => Err(problem(what)),
                Err(other) => Err(problem(other.to_string())),
            },
        }
    }

    /// Whether somebody listens there already.
    pub(crate) fn is_taken(&self) -> bool {
        match self {
            Self::Tcp(address) => TcpListener::bind(address)
                .is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse),
            Self::Unix(path) => UnixStream::connect(path).is_ok(),
        }
    }

    /// Whether this socket listens there. (One on port 0 listens elsewhere.)
    pub(crate) fn is_of(&self, socket: impl AsFd) -> bool {
        let Ok(bound) = getsockname(socket) else { return false };
        match self {
            Self::Tcp(address) => SocketAddr::try_from(bound).is_ok_and(|it| it == *address),
            // It was bound beside its path as NAME.PID, then renamed.
            Self::Unix(path) => {
                let bound = SocketAddrUnix::try_from(bound).ok();
                let bound = bound.as_ref().and_then(SocketAddrUnix::path_bytes);
                let bound = bound.and_then(|bound| Path::new(OsStr::from_bytes(bound)).file_stem());
                bound.is_some() && bound == path.file_name()
            }
        }
    }

    /// Where a socket that was made for this endpoint is reached.
    pub(crate) fn reached_at(&self, socket: impl AsFd) -> Self {
        let bound = getsockname(socket).ok().and_then(|bound| SocketAddr::try_from(bound).ok());
        match (self, bound) {
            (Self::Tcp(_), Some(bound)) => Self::Tcp(bound),
            _ => self.clone(),
        }
    }

    /// Listens there no longer.
    pub(crate) fn unlisten(&self) {
        if let Self::Unix(path) = self {
            unlisten(path);
        }
    }
}

fn advice(error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another process listens there; stop it, or choose another port"
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address; choose one of `ip address`"
        }
        io::ErrorKind::PermissionDenied => "ports below 1024 need CAP_NET_BIND_SERVICE",
        _ => return error.to_string(),
    };
    format!("{error}: {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(text: &str) -> Endpoint {
        text.parse().expect("an endpoint")
    }

    #[test]
    fn endpoints_are_read_and_shown_alike() {
        for text in ["127.0.0.1:9464", "[::1]:80", "unix:/run/a.sock", "unix:b c"] {
            assert_eq!(endpoint(text).to_string(), text);
        }
        for text in ["", "9464", "localhost:9464", "unix:", "/run/a.sock", "127.0.0.1:65536"] {
            let error = text.parse::<Endpoint>().expect_err(text).to_string();
            assert!(error.contains("unix:PATH") && error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn an_endpoint_knows_its_sockets() {
        let tcp = endpoint("127.0.0.1:0");
        let socket = tcp.listen().expect("some port");
        let reached = tcp.reached_at(&socket);
        assert!(reached.is_of(&socket) && !tcp.is_of(&socket), "{reached}");
        assert!(reached.is_taken() && !tcp.is_taken());
        let error = reached.listen().expect_err("taken").to_string();
        assert!(error.contains("choose another port"), "{error}");

        let dir = tempfile::tempdir().expect("a directory");
        let unix = endpoint(&format!("unix:{}", dir.path().join("a.sock").display()));
        assert!(!unix.is_taken());
        let socket = unix.listen().expect("a socket");
        assert!(unix.is_taken() && unix.is_of(&socket) && !tcp.is_of(&socket));
        assert!(!endpoint("unix:b.sock").is_of(&socket) && !unix.is_of(std::io::stderr()));
        assert_eq!(unix.reached_at(&socket), unix);
        unix.unlisten();
        assert!(!unix.is_taken());
    }
}
