//! What a daemon shows of itself: OpenMetrics for scrapers, JSON for `vmpager top`.
//!
//! ```text
//!   keeper      binds the endpoint, holds it, hands it to each worker process
//!   control     notes on the board which memories are served, and what ended
//!   metrics     a thread of its own: answers HTTP, asks workers for numbers
//! ```
//!
//! The thread that answers asks a worker thread for one memory's numbers at a time,
//! between two rounds of that one's work, and at most four times a second whatever
//! the number of scrapers: that costs a fault some microseconds at worst. It never
//! holds what a worker needs. Whoever is slow to ask, or to take an answer, costs one
//! of 64 places, and gives it up to whoever comes.
//!
//! Every metric is described in `docs/metrics.md`.

mod board;
mod buckets;
mod client;
mod endpoint;
mod page;
mod request;
mod server;
mod text;

pub(crate) use self::board::{Board, Keeping, Refusal};
pub use self::buckets::STALL_BOUNDS_NS;
pub(crate) use self::buckets::{SourceStats, counts};
pub use self::client::LookError;
pub use self::endpoint::{Endpoint, EndpointError};
pub use self::page::{FillState, SessionNow, SessionsPage};
pub(crate) use self::server::Server;
