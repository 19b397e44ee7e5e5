//! The socket VMMs connect to.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use super::DaemonError;

/// Listens on `path`, without blocking. The socket appears there only once it
/// accepts, so that a peer may take its existence for readiness. One that a
/// process left behind is replaced.
///
/// # Errors
///
/// [`DaemonError::Socket`], with what to do.
pub fn listen(path: &Path) -> Result<UnixListener, DaemonError> {
    listen_with(path, || Ok(())).map(|(listener, ())| listener)
}

/// As [`listen`]; does `first` before the socket appears, and once it is known that
/// nobody else listens there.
pub(crate) fn listen_with<T>(
    path: &Path,
    first: impl FnOnce() -> io::Result<T>,
) -> Result<(UnixListener, T), DaemonError> {
    let problem = |problem: String| DaemonError::Socket { path: path.into(), problem };
    make_way(path).map_err(problem)?;
    let beside = beside(path);
    let _ = std::fs::remove_file(&beside);
    let listener = UnixListener::bind(&beside).map_err(|error| problem(advice(path, &error)))?;
    let published = listener.set_nonblocking(true).and_then(|()| {
        let done = first()?;
        std::fs::rename(&beside, path).map(|()| done)
    });
    match published {
        Ok(done) => Ok((listener, done)),
        Err(error) => {
            let _ = std::fs::remove_file(&beside);
            Err(problem(error.to_string()))
        }
    }
}

/// Removes a socket of this process.
pub(crate) fn unlisten(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        warn!("removing {}: {error}", path.display());
    }
}

/// Removes what a crashed daemon left behind, and nothing else.
fn make_way(path: &Path) -> Result<(), String> {
    let metadata = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(advice(path, &error)),
        Ok(metadata) => metadata,
    };
    if !metadata.file_type().is_socket() {
        return Err("there is a file of that name which is no socket; choose another path".into());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("another process listens there; stop it or choose another path".into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            info!("{} was left by a process that has ended; replaced", path.display());
            std::fs::remove_file(path).map_err(|error| error.to_string())
        }
        Err(error) => Err(advice(path, &error)),
    }
}

fn advice(path: &Path, error: &io::Error) -> String {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
    match error.kind() {
        io::ErrorKind::NotFound => match directory {
            Some(directory) => {
                format!("the directory {} does not exist; create it first", directory.display())
            }
            None => error.to_string(),
        },
        io::ErrorKind::PermissionDenied => {
            format!("{error}; this user needs write access to its directory")
        }
        io::ErrorKind::InvalidInput => {
            format!("{error} (a socket's path has at most 107 bytes; choose a shorter one)")
        }
        _ => error.to_string(),
    }
}

/// A name of this process's own in the same directory.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}", std::process::id()));
    path.with_file_name(name)
}
