//! vmpager brings a virtual machine's memory to it on demand.
//!
//! A VM restored from a snapshot starts at once; each page arrives when it is
//! first touched or, better, just before. This crate is what a VMM embeds
//! ([`Pager`]) and what the daemon that serves other VMMs is made of
//! ([`Daemon`]).
//!
//! | module | what lives there |
//! |---|---|
//! | [`attach`] | one memory for many processes: a door, views, the fault queue |
//! | [`pager`] | the pager inside a VMM: own memory, own source |
//! | [`daemon`] | the pager beside VMMs: a socket, sessions, workers |
//! | [`keeper`] | the process that holds what a daemon must not lose |
//! | [`sandbox`] | what a worker gives up before it listens to anybody |
//! | [`handshake`] | Firecracker's handler protocol |
//! | [`clean`] | one copy of the pages that VMs have not written to, for all VMs |
//! | [`metrics`] | what a daemon shows of itself |
//! | [`stats`] | what a session did, as numbers |
//! | `hot` | which of the pages that a profile names are in place |
//! | `worker` | the thread that serves: faults, finished reads, fill |
//! | `served` | the memory behind one userfaultfd: plans carried out |
//!
//! One fault's way through these files is told in `ARCHITECTURE.md`.
#![forbid(unsafe_code)]

mod arrival;
pub mod attach;
pub mod clean;
pub mod daemon;
pub mod handshake;
mod hot;
pub mod installer;
pub mod keeper;
#[cfg(not(feature = "kill-points"))]
mod kill;
#[cfg(feature = "kill-points")]
pub mod kill;
pub mod metrics;
pub mod pager;
mod placement;
mod polling;
mod reads;
pub mod refusal;
pub mod sandbox;
mod served;
mod shared;
pub mod stats;
mod worker;

pub use attach::{Attached, Door, SharedRegion};
pub use daemon::{Access, Daemon, DaemonConfig, DaemonError, KeeperLink};
pub use installer::Installer;
pub use keeper::{Keeper, KeeperConfig, KeeperEnd, KeeperError};
pub use pager::{Pager, PagerBuilder, PagerError};
pub use served::{ServeOptions, SessionLimits};
pub use stats::{EndReason, SessionSummary};
pub use vmpager_core as core;
pub use vmpager_core::prefetch::NeighbourPolicy;
pub use vmpager_core::{PageInstaller, Resolution};
pub use vmpager_store as store;
pub use vmpager_sys::memory::GuestRange;
