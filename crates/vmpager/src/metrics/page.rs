//! What `/sessions.json` shows: every session, for those who look at one.

use serde::{Deserialize, Serialize};

use crate::stats::SessionSummary;

/// All sessions of a daemon, as `/sessions.json` shows them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionsPage {
    /// The program's version.
    pub version: String,
    /// What is served, as the user named it.
    pub source: String,
    /// Threads that serve.
    pub workers: u64,
    /// How long the worker process has been there, in milliseconds. Everything but
    /// `takeovers` is counted from its start.
    pub uptime_ms: u64,
    /// How many worker processes had to be replaced.
    pub takeovers: u64,
    /// Sessions that began, those taken over included.
    pub sessions_started: u64,
    /// Sessions that have ended.
    pub sessions_ended: u64,
    /// Peers that were turned away.
    pub refused: u64,
    /// Sessions being served, oldest first.
    pub sessions: Vec<SessionNow>,
}

/// A session being served.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SessionNow {
    /// Its numbers so far.
    #[serde(flatten)]
    pub summary: SessionSummary,
    /// Bytes of its memory that are in place, or were given back.
    pub resident_bytes: u64,
    /// Bytes that were installed, for whatever reason.
    pub installed_bytes: u64,
    /// Whether all of its memory is being brought in.
    pub fill: FillState,
    /// Another process served it before.
    pub taken_over: bool,
}

/// Whether all of a session's memory is being brought in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FillState {
    /// Only what is asked for, and what lies beside it.
    Off,
    /// It is.
    Filling,
    /// It has been.
    Filled,
}
