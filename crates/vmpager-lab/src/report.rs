//! What the lab tells the outside, a line each:
//!
//! ```text
//! plan N                         so many tests will run
//! begin NAME
//! text WHATEVER                  said by the test that runs
//! end NAME passed|failed|lost|skipped MILLISECONDS
//! over                           no more tests
//! ```

use std::fmt;
use std::io::Write;
use std::time::Duration;

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    Failed,
    /// It hung, or a guest did or was gone. Nothing was found to be wrong.
    Lost,
    Skipped,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Lost => "lost",
            Self::Skipped => "skipped",
        })
    }
}

/// Where the lines go.
pub(crate) struct Report {
    to: Box<dyn Write>,
}

impl Report {
    pub(crate) fn new(to: Box<dyn Write>) -> Self {
        Self { to }
    }

    pub(crate) fn plan(&mut self, tests: usize) {
        self.line(&format!("plan {tests}"));
    }

    pub(crate) fn begin(&mut self, name: &str) {
        self.line(&format!("begin {name}"));
    }

    pub(crate) fn text(&mut self, text: &str) {
        for line in text.lines() {
            self.line(&format!("text {line}"));
        }
    }

    pub(crate) fn end(&mut self, name: &str, outcome: Outcome, took: Duration) {
        self.line(&format!("end {name} {outcome} {}", took.as_millis()));
    }

    pub(crate) fn over(&mut self) {
        self.line("over");
    }

    fn line(&mut self, line: &str) {
        // Nobody could be told of a failure; the outside counts what it heard.
        let _ = self.to.write_all(format!("{line}\n").as_bytes());
        let _ = self.to.flush();
    }
}
