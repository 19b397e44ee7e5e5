//! The socket VMMs connect to.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, chmod, chown, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen as start, socket_with,
};
use tracing::{info, warn};

use super::{Access, DaemonError};

/// Connections that wait to be accepted; the system's limit is lower, most often.
const BACKLOG: i32 = 4096;

/// Listens on `path`, without blocking. The socket appears there only once it
/// accepts, so that a peer may take its existence for readiness. One that a
/// process left behind is replaced.
///
/// # Errors
///
/// [`DaemonError::Socket`], with what to do.
pub fn listen(path: &Path) -> Result<UnixListener, DaemonError> {
    listen_with(path, &Access::default(), || Ok(())).map(|(listener, ())| listener)
}

/// As [`listen`], for those who have access; does `first` before the socket appears,
/// and once it is known that nobody else listens there.
pub(crate) fn listen_with<T>(
    path: &Path,
    access: &Access,
    first: impl FnOnce() -> io::Result<T>,
) -> Result<(UnixListener, T), DaemonError> {
    let problem = |problem: String| DaemonError::Socket { path: path.into(), problem };
    make_way(path).map_err(problem)?;
    let beside = beside(path);
    let _ = std::fs::remove_file(&beside);
    let listener = listen_at(&beside, access).map_err(|error| problem(advice(path, &error)))?;
    let published = permit(&beside, access).and_then(|()| {
        let done = first().map_err(|error| error.to_string())?;
        std::fs::rename(&beside, path).map(|()| done).map_err(|error| error.to_string())
    });
    match published {
        Ok(done) => Ok((listener, done)),
        Err(error) => {
            let _ = std::fs::remove_file(&beside);
            Err(problem(error))
        }
    }
}

fn listen_at(path: &Path, access: &Access) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    if access.file_mode().is_some() {
        // What the file begins with: nobody else slips in before it has its own.
        fchmod(&socket, Mode::RWXU)?;
    }
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    start(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Gives the socket's file the group and the permissions it is to have.
pub(crate) fn permit(path: &Path, access: &Access) -> Result<(), String> {
    if let Some(group) = access.group {
        chown(path, None, Some(Gid::from_raw(group))).map_err(|error| {
            format!("giving it to group {group}: {error}; only root, or a member, may do that")
        })?;
    }
    match access.file_mode() {
        Some(mode) => chmod(path, Mode::from_raw_mode(mode))
            .map_err(|error| format!("giving it mode {mode:o}: {error}")),
        None => Ok(()),
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
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidFilename => {
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
