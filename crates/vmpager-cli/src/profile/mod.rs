//! `vmpager profile`: which pages a guest touches.

mod record;
mod show;

use std::path::PathBuf;

use anyhow::Context;
use clap::Subcommand;
use serde::Serialize;
use vmpager_store::profile::{Profile, ProfileError};

use crate::image::{share, shown};
use crate::{output, size};

/// What to do with profiles.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ProfileCommand {
    /// Serve a VM, and record which pages it touches first.
    Record(record::RecordArgs),
    /// Show which pages a profile has, and when they were touched.
    Show(show::ShowArgs),
    /// Make one profile of several: all pages that any of them has.
    Merge(MergeArgs),
}

pub(crate) fn run(command: &ProfileCommand) -> anyhow::Result<()> {
    match command {
        ProfileCommand::Record(args) => record::run(args),
        ProfileCommand::Show(args) => show::run(args),
        ProfileCommand::Merge(args) => merge(args),
    }
}

/// Options of `vmpager profile merge`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager profile merge monday.vmprof tuesday.vmprof --output mem.vmprof\n\n\
    All of them must be of the same memory. A page comes when it was needed in the\n\
    session that needed it first.")]
pub(crate) struct MergeArgs {
    /// The profiles.
    #[arg(value_name = "PROFILE", required = true)]
    profiles: Vec<PathBuf>,
    /// The profile to make; it may be one of those merged.
    #[arg(long, value_name = "PROFILE")]
    output: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Which addresses are touched when, as SVG.
pub(crate) fn picture(profile: &Profile, path: &std::path::Path) -> String {
    show::svg(profile, &Summary::of(profile, path))
}

/// A profile in numbers.
#[derive(Debug, Serialize)]
struct Summary {
    profile: String,
    memory_bytes: u64,
    /// What an image calls the contents of the memory, if that is known.
    content: Option<String>,
    sessions: u32,
    pages: u64,
    bytes: u64,
    /// Pages that were touched in every session.
    pages_always: u64,
    /// From the beginning of a session to the last first touch.
    last_us: u32,
}

impl Summary {
    fn of(profile: &Profile, path: &std::path::Path) -> Self {
        let pages = profile.pages();
        let always = pages.iter().filter(|page| page.sessions == profile.sessions());
        Self {
            profile: shown(path),
            memory_bytes: profile.memory().memory_bytes(),
            content: profile.memory().content().map(|content| content.to_string()),
            sessions: profile.sessions(),
            pages: pages.len() as u64,
            bytes: pages.len() as u64 * 4096,
            pages_always: always.count() as u64,
            last_us: pages.last().map_or(0, |page| page.first_us),
        }
    }

    fn text(&self) -> String {
        format!(
            "{}: {} of {} of memory ({:.1} %), {} pages, {} of them in each of {} sessions; the \
             last one after {:.1} ms",
            self.profile,
            size::show(self.bytes),
            size::show(self.memory_bytes),
            share(self.bytes, self.memory_bytes) * 100.0,
            self.pages,
            self.pages_always,
            self.sessions,
            f64::from(self.last_us) / 1e3,
        )
    }

    fn print(&self, json: bool) -> anyhow::Result<()> {
        if json { output::json(self) } else { output::line(&self.text()) }
    }
}

fn merge(args: &MergeArgs) -> anyhow::Result<()> {
    let (first, others) = args.profiles.split_first().context("no profile to merge")?;
    let mut merged = Profile::open(first)?;
    for path in others {
        merged.merge(&Profile::open(path)?).map_err(|mismatch| ProfileError::OtherMemory {
            path: path.clone(),
            memory: format!("the memory of {}", shown(first)),
            mismatch,
        })?;
    }
    output::replace_file(&args.output, &merged.encode())?;
    Summary::of(&merged, &args.output).print(args.json)
}
