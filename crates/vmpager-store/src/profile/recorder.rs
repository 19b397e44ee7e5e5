//! Where the sessions of a pager leave what they recorded.

use std::sync::{Mutex, PoisonError};

use super::{Profile, Touch};

/// Collects sessions into a profile; shared by all who serve one memory.
#[derive(Debug)]
pub struct Recorder(Mutex<Profile>);

impl Recorder {
    /// Adds to this profile.
    pub fn new(profile: Profile) -> Self {
        Self(Mutex::new(profile))
    }

    /// A session has ended, in which these pages were touched.
    pub fn add_session(&self, touches: &[Touch]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).add_session(touches);
    }

    /// What was recorded so far.
    pub fn profile(&self) -> Profile {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
