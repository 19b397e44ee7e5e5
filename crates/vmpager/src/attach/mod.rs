//! One memory, many processes.
//!
//! A [`Pager`](crate::Pager) whose memory lies in memfds can open a [`Door`]: a
//! socket where other processes ask to take part ([`Attached`]). Each maps the
//! memory with a userfaultfd of its own, and the pager's one engine serves the
//! faults of all of them: what one has missed is there for all. Who cannot have
//! a userfaultfd, or must not be stopped, looks at the present bits and asks by
//! the fault queue.
//!
//! Nothing of it is tied to this library: `docs/sharing.md` says what a program
//! in any language must do.

mod asker;
mod client;
mod custody;
mod door;
mod offer;
mod protocol;
mod queue;
mod wares;

pub use self::asker::{Asker, GuestRegion, Page, RemoteInstaller, RemotePages};
pub use self::client::{AttachError, Attached, AttachedRegion};
pub(crate) use self::custody::{Custody, LeftDoor, Resumed};
pub use self::door::Door;
pub(crate) use self::door::{Entrance, Kept};
pub use self::protocol::{FrameError, Region};
pub use self::queue::{FaultClient, FaultReader, QueueOwner, WaitError};
pub use self::wares::{ShareError, SharedRegion};
pub(crate) use self::wares::{Stock, Wares};
