//! The pictures of a session, as SVG within the page.

use std::fmt::Write;

use vmpager::SessionSummary;
use vmpager::metrics::STALL_BOUNDS_NS;

use crate::image::share;
use crate::size;

/// A part of a whole.
pub(super) struct Part {
    pub(super) name: &'static str,
    pub(super) bytes: u64,
    pub(super) colour: &'static str,
}

impl Part {
    /// How much of the whole it is, 0 to 1.
    pub(super) fn of(&self, whole: u64) -> f64 {
        share(self.bytes, whole).clamp(0.0, 1.0)
    }
}

const WIDTH: f64 = 960.0;

fn svg(height: u32, label: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" aria-label=\"{label}\" \
         viewBox=\"0 0 960 {height}\" width=\"960\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n"
    )
}

/// Parts side by side, with their names below. What is left of the whole stays
/// light.
pub(super) fn parts(parts: &[Part], whole: u64) -> String {
    // Pages that were given back come again: all together may be more than there is.
    let sum = parts.iter().fold(0_u64, |sum, part| sum.saturating_add(part.bytes));
    let whole = whole.max(sum);
    let mut text = svg(64, "what brought memory into place");
    let _ = writeln!(text, "<rect width=\"960\" height=\"28\" fill=\"#f0f0f0\"/>");
    let (mut x, mut name_x) = (0.0, 0.0);
    for part in parts {
        let width = part.of(whole) * WIDTH;
        let colour = part.colour;
        let _ = writeln!(
            text,
            "<rect x=\"{x:.2}\" width=\"{width:.2}\" height=\"28\" fill=\"{colour}\"/>\n\
             <rect x=\"{name_x:.0}\" y=\"40\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\n\
             <text x=\"{:.0}\" y=\"50\">{} {}</text>",
            name_x + 16.0,
            part.name,
            size::show(part.bytes)
        );
        x += width;
        name_x += WIDTH / 5.0;
    }
    text + "</svg>\n"
}

/// Stalls by how long they took. What a file says of buckets that there are not is
/// left out.
pub(super) fn stalls(of: &SessionSummary) -> String {
    const HEIGHT: f64 = 160.0;
    let counts = of.stall_buckets.get(..=STALL_BOUNDS_NS.len()).unwrap_or(&of.stall_buckets);
    let most = counts.iter().copied().max().unwrap_or(0);
    if most == 0 {
        return "<p>Nobody did, or it was not recorded how long.</p>\n".into();
    }
    let mut text = svg(210, "stalls by how long they took");
    let bounds = STALL_BOUNDS_NS.into_iter().map(bound).chain(["longer".into()]);
    let mut x = 0.0;
    for (count, bound) in counts.iter().zip(bounds) {
        // Every stall shall be seen.
        let height = if *count == 0 { 0.0 } else { (share(*count, most) * HEIGHT).max(1.0) };
        let y = 20.0 + HEIGHT - height;
        let _ = writeln!(
            text,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"38\" height=\"{height:.1}\" fill=\"#1f77b4\">\
             <title>{count} stalls of {bound}</title></rect>\n\
             <text x=\"{:.1}\" y=\"196\" text-anchor=\"middle\" font-size=\"10\">{bound}</text>",
            x + 19.0
        );
        if *count > 0 {
            let _ = writeln!(
                text,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"10\">{count}\
                 </text>",
                x + 19.0,
                y - 4.0
            );
        }
        x += WIDTH / 22.0;
    }
    text + "</svg>\n"
}

/// A bound of a bucket, for people.
fn bound(nanos: u64) -> String {
    match nanos {
        ..1_000_000 => format!("≤{} us", nanos / 1_000),
        1_000_000..1_000_000_000 => format!("≤{} ms", nanos / 1_000_000),
        _ => format!("≤{} s", nanos / 1_000_000_000),
    }
}
