//! Who may connect: as far as the socket's file lets them, and as far as they are
//! admitted.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::process::geteuid;
use tracing::error;
use vmpager_sys::peer::{Peer, end, groups};

use super::Daemon;

/// Who may hand over memory. By default whoever the socket's file lets in: with the
/// usual umask of 022 the user it belongs to, and root.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Users that are admitted, beside root and the user of this process. If these
    /// and [`gids`](Self::gids) are empty, everybody is.
    pub uids: Vec<u32>,
    /// Groups whose members are admitted.
    pub gids: Vec<u32>,
    /// Permissions of the socket's file. To connect is to write. None leaves them to
    /// the umask or, if somebody is admitted by name, lets everybody try.
    pub mode: Option<u32>,
    /// The group of the socket's file, if not this process's.
    pub group: Option<u32>,
}

impl Access {
    fn is_open(&self) -> bool {
        self.uids.is_empty() && self.gids.is_empty()
    }

    /// The permissions that the socket's file is given.
    pub(super) fn file_mode(&self) -> Option<u32> {
        const EVERYBODY: u32 = 0o666;
        self.mode.or((!self.is_open()).then_some(EVERYBODY))
    }

    /// Whether the process at the other end of `socket` is admitted, by who it was
    /// when it connected.
    ///
    /// # Errors
    ///
    /// With the reason and the remedy, if it is not.
    pub(crate) fn admit(&self, socket: impl AsFd, peer: &Peer) -> Result<(), String> {
        let uid = peer.uid;
        if self.is_open() || uid == 0 || uid == geteuid().as_raw() || self.uids.contains(&uid) {
            return Ok(());
        }
        let groups = groups(socket).map_err(|error| format!("asking for its groups: {error}"))?;
        if groups.iter().any(|gid| self.gids.contains(gid)) {
            return Ok(());
        }
        Err(format!(
            "user {uid} (groups {groups:?}) is not admitted; to admit it, start the daemon with \
             --allow-uid {uid}, or with --allow-gid and one of its groups"
        ))
    }
}

impl Daemon {
    /// Somebody has come to this process's own socket.
    pub(super) fn meet(&mut self, socket: UnixStream) -> io::Result<()> {
        let peer = Peer::of(&socket)?;
        let (peer_pid, peer_uid) = (peer.pid, peer.uid);
        if let Err(problem) = self.config.access.admit(&socket, &peer) {
            error!(peer_pid, peer_uid, "refused: {problem}");
            return end(&socket);
        }
        let id = self.next_connection;
        self.next_connection += 1;
        self.welcome(id, socket, peer, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(access: &Access, uid: u32) -> Result<(), String> {
        let (socket, _other) = UnixStream::pair().expect("two descriptors");
        access.admit(&socket, &Peer { pid: 1, uid, pidfd: None })
    }

    #[test]
    fn who_is_named_is_admitted_and_so_are_root_and_oneself() {
        let nobody_named = Access::default();
        assert_eq!(judged(&nobody_named, 12345), Ok(()));
        let one = Access { uids: vec![7], ..Access::default() };
        assert_eq!(judged(&one, 7), Ok(()));
        assert_eq!(judged(&one, 0), Ok(()));
        assert_eq!(judged(&one, geteuid().as_raw()), Ok(()));
        let refused = judged(&one, 12345).expect_err("not named");
        assert!(refused.contains("user 12345"), "{refused}");
        assert!(refused.contains("--allow-uid 12345"), "{refused}");
    }

    #[test]
    fn groups_admit_their_members() {
        // The pair's ends are this process's, and so are their groups.
        let ours = rustix::process::getegid().as_raw();
        let by_group = Access { gids: vec![ours], ..Access::default() };
        assert_eq!(judged(&by_group, 12345), Ok(()));
        let by_another = Access { gids: vec![54321], ..Access::default() };
        assert!(judged(&by_another, 12345).is_err());
    }

    #[test]
    fn a_socket_is_open_to_those_who_are_admitted_by_name() {
        assert_eq!(Access::default().file_mode(), None);
        assert_eq!(Access { gids: vec![1], ..Access::default() }.file_mode(), Some(0o666));
        let closed = Access { uids: vec![1], mode: Some(0o600), ..Access::default() };
        assert_eq!(closed.file_mode(), Some(0o600));
    }
}
