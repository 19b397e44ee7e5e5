//! `vmpager report`: a run as a picture, in one file that needs nothing else.

pub(crate) mod conversions;
mod html;
mod picture;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmpager::SessionSummary;
use vmpager_store::profile::Profile;

use conversions::Conversions;

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
    it, and what a profile spared; of a profile, which addresses were touched when; of a\n\
    VM with private memory, which ranges were converted, by whom, and what came of it:\n  \
    vmpager vm run --guest builtin --private-memory --conversions-json log.json\n  \
    vmpager report log.html --conversions-json log.json")]
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
    /// Conversions between private and shared memory (`vmpager vm run
    /// --conversions-json`).
    #[arg(long, value_name = "FILE", group = "what")]
    conversions_json: Option<PathBuf>,
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
    conversions: Option<usize>,
}

pub(crate) fn run(args: &ReportArgs) -> anyhow::Result<()> {
    let mut sessions = match &args.metrics_json {
        Some(path) => {
            read::<Sessions>(path, "sessions; give what `vmpager serve --metrics-json` keeps")?
                .sessions
        }
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
    let conversions = match &args.conversions_json {
        Some(path) => Some(read::<Conversions>(
            path,
            "conversions; give what `vmpager vm run --conversions-json` writes",
        )?),
        None => None,
    };
    let of_profile = profile.as_ref().map(|(it, path)| (it, *path));
    let page = html::page(&sessions, left_out, of_profile, conversions.as_ref());
    write_file(&args.html, &page)?;
    let outcome = Outcome {
        html: &args.html,
        bytes: page.len() as u64,
        sessions: sessions.len(),
        sessions_left_out: left_out,
        profile_pages: profile.as_ref().map(|(profile, _)| profile.pages().len()),
        conversions: conversions.as_ref().map(Conversions::len),
    };
    if args.json {
        return output::json(&outcome);
    }
    let what = format!("{} session(s)", outcome.sessions);
    output::line(&format!("{}: {what}, {}", shown(&args.html), size::show(outcome.bytes)))
}

/// What a file of JSON has, which should be `what`.
fn read<T: DeserializeOwned>(path: &Path, what: &str) -> anyhow::Result<T> {
    let read = || {
        let mut text = Vec::new();
        File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut text)?;
        Ok::<_, std::io::Error>(text)
    };
    let text = read().with_context(|| format!("reading {}", shown(path)))?;
    if text.len() as u64 > MAX_FILE {
        bail!("{}: it has more than {}; is it a report's?", shown(path), size::show(MAX_FILE));
    }
    serde_json::from_slice(&text)
        .with_context(|| format!("{}: this is no JSON of {what}", shown(path)))
}
