//! What can go wrong between here and an object.

use std::time::Duration;

/// Why an object, or a part of it, cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{url}: {problem}")]
pub struct RemoteError {
    /// The object, without its query.
    pub url: String,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with an object or its server.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Problem {
    /// The URL is none that can be used.
    #[error("{why}")]
    Url {
        /// What is wrong with it, and what to give instead.
        why: &'static str,
    },
    /// No answer, or only a part of one.
    #[error("{what}; see whether the server runs and can be reached from here")]
    Unreachable {
        /// What happened, in the system's or the library's words.
        what: String,
    },
    /// The server says that it cannot now.
    #[error("the server answers {status}: it cannot now")]
    Busy {
        /// Its answer.
        status: u16,
        /// How long it wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// The server does not let us.
    #[error(
        "the server refuses access ({status}); give a URL that is signed and not expired, or have \
         the object made readable from here"
    )]
    Refused {
        /// Its answer.
        status: u16,
    },
    /// A store is to be asked, and it cannot be said by whom.
    #[error("there are no credentials for it ({what}); {remedy}")]
    Credentials {
        /// What was tried last, and what was wrong with it.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A store does not let whoever asks.
    #[error("the store refuses access ({answer}); {remedy}")]
    Denied {
        /// Its answer.
        answer: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A store has no such bucket, or container.
    #[error(
        "there is no such bucket ({answer}); see whether its name is right, and whether \
         {endpoint} names the store that has it"
    )]
    NoBucket {
        /// The store's answer.
        answer: String,
        /// What says which store it is.
        endpoint: &'static str,
    },
    /// A store has the bucket elsewhere.
    #[error("the bucket is in another region ({answer}); set AWS_REGION={region}")]
    Elsewhere {
        /// The store's answer.
        answer: String,
        /// Where it is.
        region: String,
    },
    /// A store would be told who asks where others can listen.
    #[error(
        "the store would be asked over http://, where others can listen; set {variable}=true if \
         that does not matter, or give it an https:// endpoint"
    )]
    Plain {
        /// What says that it may be.
        variable: &'static str,
    },
    /// The server cannot show that it is who it should be.
    #[error(
        "the server's certificate is not good: {what}; if it should be, give the authority that \
         issued it with --ca-file, or have this machine trust it (SSL_CERT_FILE)"
    )]
    Untrusted {
        /// What of it.
        what: String,
    },
    /// There is nobody to vouch for servers.
    #[error(
        "reading {from}: {what}; install the package ca-certificates, or give a file of PEM \
         certificates with --ca-file"
    )]
    Authorities {
        /// What was read.
        from: String,
        /// Why there are none.
        what: String,
    },
    /// There is no such object.
    #[error("there is no such object ({status}); see whether the URL is right")]
    Missing {
        /// The server's answer.
        status: u16,
    },
    /// The server sends all of an object whatever part is asked for.
    #[error(
        "the server ignores ranges (it answers 200 to a request for a part); images need one that \
         serves parts of files, as nginx and object stores do"
    )]
    NoRanges,
    /// It is too short for an image.
    #[error("it is no packed image: it has {len} bytes; make one with `vmpager image pack`")]
    Short {
        /// Its length.
        len: u64,
    },
    /// The server's answer contradicts the request or itself.
    #[error("the server's answer is wrong: {what}")]
    Wrong {
        /// What of it, and what it should be.
        what: String,
    },
    /// An answer nobody knows what to do with.
    #[error("the server answers {status}, to a request for a part of the object")]
    Status {
        /// The answer.
        status: u16,
    },
    /// The object is not the one that was opened.
    #[error("the object is not the one that was opened any more ({what})")]
    Changed {
        /// What shows it.
        what: String,
    },
    /// It was asked for as long as anybody waits.
    #[error("{what} (it was waited for {waited:?}, as long as --patience says)")]
    Late {
        /// What was wrong the last time, and what to do.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The bytes are not those that were written, however often they are asked for.
    #[error("frame {frame} is damaged: {what}")]
    Damaged {
        /// Which.
        frame: u32,
        /// What shows it.
        what: String,
    },
}

impl Problem {
    /// Whether the same request may succeed in a moment.
    pub(crate) fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Busy { .. })
    }

    /// Whether no request will succeed any more.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::Changed { .. } | Self::Damaged { .. } | Self::Url { .. })
    }

    /// How long the server wants to be left alone.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Busy { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
