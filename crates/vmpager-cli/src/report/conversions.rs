//! The log of conversions between private and shared memory: what `vm run
//! --conversions-json` writes, and what the page shows of it.

use std::fmt::Write;

use serde::{Deserialize, Serialize};
use vmpager::core::convert::State;
use vmpager_kvm::private::{Cause, Logged, PrivateMemory, failed_step};

use crate::output::escape;
use crate::size;

/// A VM's conversions.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Conversions {
    /// Where private pages are.
    backend: String,
    /// How many were asked for, by whom.
    explicit: u64,
    implicit: u64,
    host: u64,
    /// Pages converted.
    to_private_pages: u64,
    to_shared_pages: u64,
    /// Conversions that failed and left all as it was, or something changed.
    undone: u64,
    stands: u64,
    refused: u64,
    /// Conversions that waited for others, and faults that were tried again.
    waited: u64,
    retried: u64,
    /// The latest, the last one last.
    latest: Vec<Conversion>,
}

/// One of them.
#[derive(Debug, Serialize, Deserialize)]
struct Conversion {
    number: u64,
    /// `hypercall`, `access` or `host`.
    asked_by: String,
    gpa: u64,
    bytes: u64,
    to: String,
    took_us: f64,
    /// `done`, `undone` or `stands`.
    outcome: String,
    converted_pages: u64,
    unconverted_pages: u64,
    closed_pages: u64,
    /// The step that failed.
    failed: Option<String>,
}

impl Conversions {
    /// Of a VM, so far.
    pub(crate) fn of(private: &PrivateMemory) -> Self {
        let stats = private.stats();
        Self {
            backend: private.backend().to_owned(),
            explicit: stats.explicit,
            implicit: stats.implicit,
            host: stats.host,
            to_private_pages: stats.private_pages,
            to_shared_pages: stats.shared_pages,
            undone: stats.undone,
            stands: stats.stands,
            refused: stats.refused,
            waited: stats.waited,
            retried: stats.retried,
            latest: private.log().iter().map(Conversion::of).collect(),
        }
    }

    /// How many it tells of.
    pub(super) fn len(&self) -> usize {
        self.latest.len()
    }

    /// Their section of the page.
    pub(super) fn section(&self, page: &mut String) {
        let _ = writeln!(
            page,
            "<section>\n<h2>Private and shared memory</h2>\n<p>Private pages are in: {}. {} \
             conversions were asked for by hypercalls, {} by accesses, {} by the VMM; {} pages \
             became private, {} shared. {} conversions failed and were undone, {} failed and left \
             something changed, {} requests were refused; {} waited for others, {} faults were \
             tried again.</p>",
            escape(&self.backend),
            self.explicit,
            self.implicit,
            self.host,
            self.to_private_pages,
            self.to_shared_pages,
            self.undone,
            self.stands,
            self.refused,
            self.waited,
            self.retried
        );
        let _ = writeln!(
            page,
            "<h3>The latest {}</h3>\n<table>\n<tr><th>number<th>asked by<th>gpa<th>bytes<th>to\
             <th>took<th>outcome<th>pages converted<th>not<th>open to nobody<th>failed</tr>",
            self.latest.len()
        );
        self.latest.iter().for_each(|conversion| conversion.row(page));
        page.push_str("</table>\n</section>\n");
    }
}

impl Conversion {
    fn of(logged: &Logged) -> Self {
        let Logged { number, cause, request, outcome, took } = logged;
        let asked_by = match cause {
            Cause::Hypercall => "hypercall",
            Cause::Fault => "access",
            Cause::Host => "host",
        };
        let state = match outcome.state() {
            State::Done => "done",
            State::Undone => "undone",
            State::Stands => "stands",
        };
        Self {
            number: *number,
            asked_by: asked_by.to_owned(),
            gpa: request.gpa,
            bytes: request.len,
            to: request.to.to_string(),
            took_us: took.as_secs_f64() * 1e6,
            outcome: state.to_owned(),
            converted_pages: outcome.converted.pages(),
            unconverted_pages: outcome.unconverted.pages(),
            closed_pages: outcome.closed.pages(),
            failed: outcome.failed.as_ref().map(failed_step),
        }
    }

    fn row(&self, page: &mut String) {
        let _ = writeln!(
            page,
            "<tr><td>{}<td>{}<td>{:#x}<td>{}<td>{}<td>{:.1} us<td>{}<td>{}<td>{}<td>{}<td>{}</tr>",
            self.number,
            escape(&self.asked_by),
            self.gpa,
            size::show(self.bytes),
            escape(&self.to),
            self.took_us,
            escape(&self.outcome),
            self.converted_pages,
            self.unconverted_pages,
            self.closed_pages,
            escape(self.failed.as_deref().unwrap_or(""))
        );
    }
}
