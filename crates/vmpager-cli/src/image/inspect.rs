//! `vmpager image inspect`.

use std::fmt::Write;
use std::path::PathBuf;

use serde::Serialize;
use vmpager_store::image::{Cell, Inspection, LayerInfo};

use super::{Parents, share, shown, write_file};
use crate::{output, size};

/// Options of `vmpager image inspect`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    vmpager image inspect /snap/mem.vmimg --svg mem.svg")]
pub(crate) struct InspectArgs {
    /// The image.
    #[arg(value_name = "IMAGE")]
    image: PathBuf,
    #[command(flatten)]
    parents: Parents,
    /// Write a picture of the memory to this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Inspected {
    content: String,
    memory_bytes: u64,
    zero_pages: u64,
    duplicate_pages: u64,
    distinct_pages: u64,
    index_bytes: u64,
    /// The bottom one first.
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
struct Layer {
    file: String,
    content: String,
    codec: &'static str,
    frame_bytes: u64,
    file_bytes: u64,
    packed_bytes: u64,
    stored_pages: u64,
    used_pages: u64,
    /// Of the bytes of its frames to those of its pages.
    compressed_share: f64,
}

impl From<&LayerInfo> for Layer {
    fn from(info: &LayerInfo) -> Self {
        Self {
            file: shown(&info.path),
            content: info.content.to_string(),
            codec: info.codec.name(),
            frame_bytes: info.frame_bytes,
            file_bytes: info.file_bytes,
            packed_bytes: info.packed_bytes,
            stored_pages: info.stored_pages,
            used_pages: info.used_pages,
            compressed_share: share(info.packed_bytes, info.stored_pages * 4096),
        }
    }
}

/// Parts of memory in a row of a picture.
const COLUMNS: u64 = 64;
/// Rows of the picture in a terminal, and in a file.
const ROWS: u64 = 12;
const SVG_ROWS: u64 = 48;

pub(super) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let image = args.parents.open(&args.image)?;
    if let Some(path) = &args.svg {
        write_file(path, &svg(&image.inspect(COLUMNS * SVG_ROWS), &shown(&args.image)))?;
    }
    let inspection = image.inspect(COLUMNS * ROWS);
    if args.json {
        return output::json(&Inspected {
            content: inspection.content.to_string(),
            memory_bytes: inspection.memory_bytes,
            zero_pages: inspection.zero_pages,
            duplicate_pages: inspection.duplicate_pages,
            distinct_pages: inspection.distinct_pages,
            index_bytes: inspection.index_bytes,
            layers: inspection.layers.iter().map(Layer::from).collect(),
        });
    }
    output::line(&text(&inspection))
}

fn text(inspection: &Inspection) -> String {
    let all = inspection.memory_bytes / 4096;
    let mut text = format!(
        "{} of memory, contents {}\n\n",
        size::show(inspection.memory_bytes),
        inspection.content
    );
    for (what, pages) in [
        ("zero", inspection.zero_pages),
        ("duplicate", inspection.duplicate_pages),
        ("distinct", inspection.distinct_pages),
    ] {
        let (size, percent) = (size::show(pages * 4096), share(pages, all) * 100.0);
        let _ = writeln!(text, "  {what:<10} {size:>11} {percent:>6.1} %");
    }
    text.push_str("\n  layers, the bottom one first:\n");
    for layer in &inspection.layers {
        let _ = writeln!(
            text,
            "  {}: {} ({}, {} frames, {:.2} of its pages), {} of memory come from it",
            shown(&layer.path),
            size::show(layer.file_bytes),
            layer.codec,
            size::show(layer.frame_bytes),
            share(layer.packed_bytes, layer.stored_pages * 4096),
            size::show(layer.used_pages * 4096),
        );
    }
    let cell = inspection.memory_bytes.div_ceil(COLUMNS * ROWS);
    let _ = write!(text, "\n  memory, {} a sign: ", size::show(cell));
    text.push_str("· zero; ░ ▒ ▓ █ up to 1/4, 1/2, 3/4, all of it has contents\n");
    for row in inspection.cells.chunks(64) {
        text.push_str("\n  ");
        text.extend(row.iter().map(sign));
    }
    text
}

fn sign(cell: &Cell) -> char {
    let data = cell.duplicate_pages + cell.distinct_pages.iter().sum::<u64>();
    match share(data, data + cell.zero_pages) {
        0.0 => '·',
        ..=0.25 => '░',
        ..=0.5 => '▒',
        ..=0.75 => '▓',
        _ => '█',
    }
}

/// Colours of layers, the bottom one's first; further layers begin anew.
const COLOURS: [(&str, [f64; 3]); 4] = [
    ("blue", [31.0, 119.0, 180.0]),
    ("orange", [255.0, 127.0, 14.0]),
    ("purple", [148.0, 103.0, 189.0]),
    ("red", [214.0, 39.0, 40.0]),
];
const DUPLICATE: [f64; 3] = [120.0, 190.0, 120.0];
const ZERO: [f64; 3] = [245.0, 245.0, 245.0];

/// Each part of memory as a square: a mixture of the colours of its pages.
fn svg(inspection: &Inspection, name: &str) -> String {
    const SIDE: u64 = 12;
    let rows = (inspection.cells.len() as u64).div_ceil(COLUMNS);
    let (width, top) = (COLUMNS * SIDE + 20, 70 + 16 * inspection.layers.len() as u64);
    let height = top + rows * SIDE + 20;
    let name = name.replace('&', "&amp;").replace('<', "&lt;");
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">{name}: {} of memory</text>\n\
         <text x=\"10\" y=\"40\">grey: zero ({}); green: duplicate ({}); each square {}</text>\n",
        size::show(inspection.memory_bytes),
        size::show(inspection.zero_pages * 4096),
        size::show(inspection.duplicate_pages * 4096),
        size::show(inspection.memory_bytes.div_ceil(COLUMNS * SVG_ROWS)),
    );
    for ((layer, y), (colour, _)) in
        inspection.layers.iter().zip((56..).step_by(16)).zip(COLOURS.iter().cycle())
    {
        let _ = writeln!(
            svg,
            "<text x=\"10\" y=\"{y}\">{colour}: layer {}, {:.2} of its pages by {}</text>",
            layer.content.to_string().get(..12).unwrap_or_default(),
            share(layer.packed_bytes, layer.stored_pages * 4096),
            layer.codec,
        );
    }
    for (number, cell) in (0..).zip(&inspection.cells) {
        let (x, y) = (10 + number % COLUMNS * SIDE, top + number / COLUMNS * SIDE);
        let [red, green, blue] = mixture(cell);
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"11\" height=\"11\" \
             fill=\"rgb({red:.0},{green:.0},{blue:.0})\"/>"
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn mixture(cell: &Cell) -> [f64; 3] {
    let distinct = COLOURS.iter().cycle().zip(&cell.distinct_pages);
    let parts = distinct.map(|((_, colour), pages)| (*colour, *pages));
    let parts: Vec<_> =
        parts.chain([(DUPLICATE, cell.duplicate_pages), (ZERO, cell.zero_pages)]).collect();
    let all = parts.iter().map(|(_, pages)| pages).sum();
    [0, 1, 2].map(|n| parts.iter().map(|(colour, pages)| colour[n] * share(*pages, all)).sum())
}
