//! `vmpager report`: a run as a picture, in one file that needs nothing else.

mod html;
mod picture;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use vmpager::SessionSummary;
use vmpager_store::profile::Profile;

use crate::image::{shown, write_file};
use crate::{output, size};

/// Options of `vmpager report`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager serve --socket /run/vm/pager.sock --memory /snap/mem --once \\\n      \
    --metrics-json run.json --record /snap/mem.vmprof\n  \
    vmpager report run.html --metrics-json run.json --profile /snap/mem.vmprof\n\n\
    Of a daemon that runs (serve --metrics):\n  \
    curl -s http://127.0.0.1:9464/sessions.json >now.json\n  \
    vmpager report now.html --metrics-json now.json\n\n\
    The page holds its pictures itself, runs no script and loads nothing. It shows, for\n\
    each session, how long somebody waited for pages, what is in place and what brought\n\
    it, and what a profile spared; of a profile, which addresses were touched when.")]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
pub(crate) struct ReportArgs {
    /// The HTML file to write.
    #[arg(value_name = "HTML")]
    html: PathBuf,
    /// Sessions: of `vmpager serve --metrics-json` or `--json`, of `/sessions.json`, or of
    /// `vmpager top --json`.
    #[arg(long, value_name = "FILE", group = "what")]
    metrics_json: Option<PathBuf>,
    /// What guests touched, and when (`vmpager serve --record`).
    #[arg(long, value_name = "PROFILE", group = "what")]
    profile: Option<PathBuf>,
    /// Only the session of this number.
    #[arg(long, value_name = "N", requires = "metrics_json")]
    session: Option<u64>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// The sessions of a file, whatever else is in it.
#[derive(Debug, Deserialize)]
struct Sessions {
    sessions: Vec<SessionSummary>,
}

/// The most bytes of a file with sessions: these are some 1 KiB each.
const MAX_FILE: u64 = 64 << 20;
/// The most sessions of a page; the last ones, if there are more.
const MAX_SESSIONS: usize = 100;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    html: &'a Path,
    bytes: u64,
    sessions: usize,
    sessions_left_out: usize,
    profile_pages: Option<usize>,
}

pub(crate) fn run(args: &ReportArgs) -> anyhow::Result<()> {
    let mut sessions = match &args.metrics_json {
        Some(path) => read(path)?,
        None => Vec::new(),
    };
    if let (Some(session), Some(path)) = (args.session, &args.metrics_json) {
        sessions.retain(|summary| summary.session == session);
        if sessions.is_empty() {
            bail!("{}: it has no session {session}", shown(path));
        }
    }
    let left_out = sessions.len().saturating_sub(MAX_SESSIONS);
    sessions.drain(..left_out);
    let profile = match &args.profile {
        Some(path) => Some((Profile::open(path)?, path.as_path())),
        None => None,
    };
    let page = html::page(&sessions, left_out, profile.as_ref().map(|(it, path)| (it, *path)));
    write_file(&args.html, &page)?;
    let outcome = Outcome {
        html: &args.html,
        bytes: page.len() as u64,
        sessions: sessions.len(),
        sessions_left_out: left_out,
        profile_pages: profile.as_ref().map(|(profile, _)| profile.pages().len()),
    };
    if args.json {
        return output::json(&outcome);
    }
    let what = format!("{} session(s)", outcome.sessions);
    output::line(&format!("{}: {what}, {}", shown(&args.html), size::show(outcome.bytes)))
}

fn read(path: &Path) -> anyhow::Result<Vec<SessionSummary>> {
    let read = || {
        let mut text = Vec::new();
        File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut text)?;
        Ok::<_, std::io::Error>(text)
    };
    let text = read().with_context(|| format!("reading {}", shown(path)))?;
    if text.len() as u64 > MAX_FILE {
        bail!("{}: it has more than {}; is it sessions?", shown(path), size::show(MAX_FILE));
    }
    let sessions: Sessions = serde_json::from_slice(&text).with_context(|| {
        format!(
            "{}: this is no JSON of sessions; give what `vmpager serve --metrics-json` keeps",
            shown(path)
        )
    })?;
    Ok(sessions.sessions)
}
