//! The report as text: groups of lines with a mark, wrapped to the width.

use std::io::{self, Write};

use super::{Check, Report, State};

/// Where the words after mark and label begin.
const TEXT_COLUMN: usize = 26;

/// How to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style {
    colour: bool,
    width: usize,
}

impl Style {
    /// Colour on a terminal unless `NO_COLOR` asks for none; the width from
    /// `COLUMNS`, else 80.
    pub(super) fn detect(terminal: bool) -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let columns = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
        Self {
            colour: terminal && !dumb && !set("NO_COLOR"),
            width: columns.unwrap_or(80).clamp(60, 160),
        }
    }

    #[cfg(test)]
    pub(super) fn plain(width: usize) -> Self {
        Self { colour: false, width }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Writes the report.
pub(super) fn write(report: &Report, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let mut group = "";
    for check in &report.checks {
        if check.group() != group {
            if !group.is_empty() {
                writeln!(out)?;
            }
            group = check.group();
            writeln!(out, "{}", style.paint("1", group))?;
        }
        write_check(check, style, out)?;
    }
    writeln!(out)?;
    for line in wrap(&report.verdict.sentence(), style.width) {
        writeln!(out, "{}", style.paint("1", &line))?;
    }
    Ok(())
}

fn write_check(check: &Check, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let (mark, colour) = match check.state {
        State::Ok => ("✓", "32"),
        State::Limited => ("!", "33"),
        State::Missing => ("✗", "31"),
    };
    let room = style.width - TEXT_COLUMN;
    let mut lines = Vec::new();
    // The mark already says so.
    let plain = check.state == State::Ok && matches!(check.value.as_str(), "works" | "offered");
    if !plain {
        lines.extend(wrap(&check.value, room));
    }
    lines.extend(wrap(&check.consequence, room));
    let label = format!("{:<1$}", check.label, TEXT_COLUMN - 4);
    let mut lines = lines.iter();
    let first = lines.next().map_or("", String::as_str);
    writeln!(out, "  {} {label}{first}", style.paint(colour, mark))?;
    for line in lines {
        writeln!(out, "{:TEXT_COLUMN$}{line}", "")?;
    }
    if let Some(remedy) = &check.remedy {
        for (index, line) in wrap(remedy, room - 5).iter().enumerate() {
            let lead = if index == 0 { "fix: " } else { "     " };
            writeln!(out, "{:TEXT_COLUMN$}{}{line}", "", style.paint("36", lead))?;
        }
    }
    Ok(())
}

/// Breaks a text between words into lines of at most `width` characters; a
/// word longer than that stays whole.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        let longer = line.chars().count() + 1 + word.chars().count();
        if !line.is_empty() && longer > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words_only() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("a-very-long-word and", 6), ["a-very-long-word", "and"]);
        assert_eq!(wrap("ünïcödé wörds", 7), ["ünïcödé", "wörds"]);
        assert!(wrap("  ", 5).is_empty());
    }

    #[test]
    fn colour_is_for_terminals() {
        let piped = Style::detect(false);
        assert!(!piped.colour);
        assert_eq!(piped.paint("31", "x"), "x");
        assert_eq!(Style { colour: true, width: 80 }.paint("31", "x"), "\x1b[31mx\x1b[0m");
    }
}
