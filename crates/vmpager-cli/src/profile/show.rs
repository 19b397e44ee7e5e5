//! `vmpager profile show`.

use std::fmt::Write;
use std::path::PathBuf;

use vmpager_store::profile::Profile;

use super::Summary;
use crate::image::{share, write_file};
use crate::{output, size};

/// Options of `vmpager profile show`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager profile show /snap/mem.vmprof --svg mem.svg")]
pub(crate) struct ShowArgs {
    /// The profile.
    #[arg(value_name = "PROFILE")]
    profile: PathBuf,
    /// Write a picture of addresses over time to this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Parts of the time, and of the memory, in the picture of a terminal.
const COLUMNS: usize = 64;
const ROWS: usize = 16;
/// And in that of a file.
const SVG_COLUMNS: usize = 320;
const SVG_ROWS: usize = 160;

pub(super) fn run(args: &ShowArgs) -> anyhow::Result<()> {
    let profile = Profile::open(&args.profile)?;
    let summary = Summary::of(&profile, &args.profile);
    if let Some(path) = &args.svg {
        write_file(path, &svg(&profile, &summary))?;
    }
    if args.json {
        return output::json(&summary);
    }
    output::line(&text(&profile, &summary))
}

/// Pages first touched in each part of the time, by part of the memory.
struct Grid {
    columns: usize,
    cells: Vec<u64>,
    /// Of touches in each session, by cell.
    always: Vec<u64>,
}

impl Grid {
    fn of(profile: &Profile, columns: usize, rows: usize) -> Self {
        let mut grid =
            Self { columns, cells: vec![0; columns * rows], always: vec![0; columns * rows] };
        let last = profile.pages().last().map_or(0, |page| page.first_us);
        let pages = profile.memory().memory_bytes() / 4096;
        for page in profile.pages() {
            let column = part(page.first_us.into(), u64::from(last) + 1, columns);
            let row = part(page.page.into(), pages, rows);
            let cell = row * columns + column;
            grid.cells[cell] += 1;
            grid.always[cell] += u64::from(page.sessions == profile.sessions());
        }
        grid
    }
}

/// Which of `parts` parts of `all` it is in.
fn part(nth: u64, all: u64, parts: usize) -> usize {
    let part = u128::from(nth) * parts as u128 / u128::from(all.max(1));
    usize::try_from(part).unwrap_or(usize::MAX).min(parts - 1)
}

fn text(profile: &Profile, summary: &Summary) -> String {
    let grid = Grid::of(profile, COLUMNS, ROWS);
    let most = grid.cells.iter().copied().max().unwrap_or(0);
    let mut text = format!(
        "{}\n\n  memory, {} a line, over time, {:.1} ms a sign: · nothing new; ░ ▒ ▓ █ up to {most} \
         pages\n",
        summary.text(),
        size::show(summary.memory_bytes.div_ceil(ROWS as u64)),
        f64::from(summary.last_us) / 1e3 / 64.0,
    );
    for row in grid.cells.chunks(grid.columns) {
        text.push_str("\n  ");
        text.extend(row.iter().map(|pages| match share(*pages, most) {
            0.0 => '·',
            ..=0.25 => '░',
            ..=0.5 => '▒',
            ..=0.75 => '▓',
            _ => '█',
        }));
    }
    text
}

/// Each part of time and memory as a small square: the darker, the more pages were
/// touched first then; blue in all sessions, red in some.
pub(super) fn svg(profile: &Profile, summary: &Summary) -> String {
    const SIDE: usize = 3;
    const TOP: usize = 60;
    let grid = Grid::of(profile, SVG_COLUMNS, SVG_ROWS);
    let most = grid.cells.iter().copied().max().unwrap_or(0);
    let (width, height) = (SVG_COLUMNS * SIDE + 20, SVG_ROWS * SIDE + TOP + 20);
    let name = output::escape(&summary.profile);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">{name}: {} pages of {}</text>\n\
         <text x=\"10\" y=\"38\">time to the right, {:.1} ms; addresses downwards; blue: in all \
         {} sessions, red: in some; the darkest: {most} pages</text>\n\
         <rect x=\"10\" y=\"{TOP}\" width=\"{}\" height=\"{}\" fill=\"rgb(248,248,248)\"/>\n",
        summary.pages,
        size::show(summary.memory_bytes),
        f64::from(summary.last_us) / 1e3,
        summary.sessions,
        SVG_COLUMNS * SIDE,
        SVG_ROWS * SIDE,
    );
    for (number, (pages, always)) in grid.cells.iter().zip(&grid.always).enumerate() {
        if *pages == 0 {
            continue;
        }
        let (x, y) = (10 + number % SVG_COLUMNS * SIDE, TOP + number / SVG_COLUMNS * SIDE);
        let colour = if 2 * always >= *pages { "31,119,180" } else { "214,39,40" };
        let dark = 0.3 + 0.7 * share(*pages, most);
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{SIDE}\" height=\"{SIDE}\" \
             fill=\"rgb({colour})\" fill-opacity=\"{dark:.2}\"/>"
        );
    }
    svg.push_str("</svg>\n");
    svg
}
