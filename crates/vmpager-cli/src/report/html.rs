//! The page: text around the pictures.

use std::fmt::Write;
use std::path::Path;

use vmpager::{EndReason, SessionSummary};
use vmpager_store::profile::Profile;

use super::conversions::Conversions;
use super::picture::{Part, parts, stalls};
use crate::image::shown;
use crate::output::escape;
use crate::profile::picture;
use crate::size;

/// Nothing is run, nothing is loaded: not even should something be smuggled in.
const HEAD: &str = "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
<meta http-equiv=\"Content-Security-Policy\" \
content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
<meta name=\"viewport\" content=\"width=device-width\">\n<title>vmpager report</title>\n<style>\n\
body { font: 14px/1.5 sans-serif; margin: 2em auto; max-width: 1000px; color: #222 }\n\
table { border-collapse: collapse; margin: 1em 0 }\n\
th, td { border-bottom: 1px solid #ddd; padding: .2em .8em; text-align: right }\n\
th { background: #f6f6f6 } svg { max-width: 100%; height: auto }\n\
</style>\n</head>\n<body>\n";

/// The whole page.
pub(super) fn page(
    sessions: &[SessionSummary],
    left_out: usize,
    profile: Option<(&Profile, &Path)>,
    conversions: Option<&Conversions>,
) -> String {
    let mut page = String::from(HEAD);
    let version = env!("CARGO_PKG_VERSION");
    let _ = writeln!(page, "<h1>vmpager report</h1>\n<p>By vmpager {version}.</p>");
    if let Some((profile, path)) = profile {
        of_profile(profile, path, &mut page);
    }
    if !sessions.is_empty() {
        overview(sessions, left_out, &mut page);
    }
    for session in sessions {
        of_session(session, &mut page);
    }
    if let Some(conversions) = conversions {
        conversions.section(&mut page);
    }
    page.push_str("</body>\n</html>\n");
    page
}

fn of_profile(profile: &Profile, path: &Path, page: &mut String) {
    let _ = writeln!(
        page,
        "<section>\n<h2>Addresses over time: {}</h2>\n<p>Each dot is memory that somebody touched \
         first at that time. Pages that were brought unasked are not among them.</p>\n{}</section>",
        escape(&shown(path)),
        picture(profile, path)
    );
}

/// One line a session.
fn overview(sessions: &[SessionSummary], left_out: usize, page: &mut String) {
    page.push_str(
        "<section>\n<h2>Sessions</h2>\n<table>\n<tr><th>session<th>pid<th>ended<th>memory<th>in \
         place<th>faults<th>p50<th>p99<th>longest<th>read<th>lasted</tr>\n",
    );
    for of in sessions {
        let reason = of.reason.as_ref().map_or_else(|| "goes on".into(), EndReason::to_string);
        let _ = writeln!(
            page,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{:.0}%<td>{}<td>{:.1} us<td>{:.1} us<td>{:.1} us\
             <td>{}<td>{:.0} ms</tr>",
            of.session,
            of.peer_pid,
            escape(&reason),
            size::show(of.memory_bytes),
            100.0 * resident(of).of(of.memory_bytes),
            of.faults.saturating_add(of.faults_exit),
            of.stall_p50_us,
            of.stall_p99_us,
            of.stall_max_us,
            size::show(of.bytes_read),
            of.duration_ms
        );
    }
    page.push_str("</table>\n");
    if left_out > 0 {
        let _ = writeln!(page, "<p>{left_out} earlier sessions are left out.</p>");
    }
    page.push_str("</section>\n");
}

/// Bytes of so many pages of a session.
fn bytes(of: &SessionSummary, pages: u64) -> u64 {
    pages.saturating_mul(if of.page_bytes == 0 { 4096 } else { of.page_bytes })
}

fn resident(of: &SessionSummary) -> Part {
    let missing = bytes(of, of.pages_missing);
    Part { name: "in place", bytes: of.memory_bytes.saturating_sub(missing), colour: "#7f7f7f" }
}

fn of_session(of: &SessionSummary, page: &mut String) {
    let _ = writeln!(
        page,
        "<section>\n<h2>Session {} (pid {})</h2>\n<h3>What brought memory into place</h3>",
        of.session, of.peer_pid
    );
    let part = |name, pages, colour| Part { name, bytes: bytes(of, pages), colour };
    let all = [
        part("demanded", of.pages_demand, "#d62728"),
        part("neighbours of these", of.pages_neighbour, "#ff9896"),
        part("by the profile", of.pages_profile, "#1f77b4"),
        part("by the fill", of.pages_fill, "#2ca02c"),
        part("zeroes", of.pages_zero, "#c7c7c7"),
    ];
    page.push_str(&parts(&all, of.memory_bytes));
    let missing = Part { name: "still missing", bytes: bytes(of, of.pages_missing), colour: "" };
    let _ = writeln!(
        page,
        "<p>{} in place or given back, {} still missing; {} pages given back, {} poisoned.</p>",
        size::show(resident(of).bytes),
        size::show(missing.bytes),
        of.pages_removed,
        of.pages_poisoned
    );
    prefetch(of, page);
    let _ = writeln!(page, "<h3>How long somebody waited for a page</h3>\n{}", stalls(of));
    origins(of, page);
    page.push_str("</section>\n");
}

/// What bringing pages ahead spared, and what it did not.
fn prefetch(of: &SessionSummary, page: &mut String) {
    let ahead = of.pages_neighbour.saturating_add(of.pages_profile).saturating_add(of.pages_fill);
    let _ = writeln!(
        page,
        "<h3>What prefetch hit and missed</h3>\n<p>{ahead} pages came before anybody asked; for \
         {} somebody had to wait, {} of the faults on pages that were on their way.</p>",
        of.pages_demand, of.faults_joined
    );
    if of.pages_profile > 0 || of.profile_missed > 0 || of.profile_late > 0 {
        let _ = writeln!(
            page,
            "<p>Of the profile {} pages were brought. {} faults were on pages that it lacks, {} on \
             pages of it that had yet to come.</p>",
            of.pages_profile, of.profile_missed, of.profile_late
        );
    }
}

fn origins(of: &SessionSummary, page: &mut String) {
    let named = [
        ("vCPUs", of.faults_vcpu),
        ("other threads of the VMM", of.faults_vmm),
        ("the kernel", of.faults_kernel),
        ("other processes", of.faults_attached),
        ("the fault queue", of.faults_queued),
        ("exits of vCPUs", of.faults_exit),
    ];
    page.push_str("<table>\n<tr><th>faults of<th></tr>\n");
    for (name, count) in named.into_iter().filter(|(_, count)| *count > 0) {
        let _ = writeln!(page, "<tr><td>{name}<td>{count}</tr>");
    }
    let _ = writeln!(page, "<tr><td>all<td>{}</tr>", of.faults.saturating_add(of.faults_exit));
    page.push_str("</table>\n");
}
