//! What `vmpager top` shows: the model as cells, or as text.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row as TableRow, Table, TableState};
use vmpager::metrics::{FillState, STALL_BOUNDS_NS};

use super::model::{Model, Row, Sort, approximately};
use crate::size;

/// Columns: their title, their width, and what sorts by them.
const COLUMNS: [(&str, u16, Option<Sort>); 8] = [
    ("session", 8, Some(Sort::Session)),
    ("pid", 8, None),
    ("memory", 11, Some(Sort::Memory)),
    ("resident", 17, Some(Sort::Resident)),
    ("faults/s", 9, Some(Sort::Faults)),
    ("p99", 9, Some(Sort::Stall)),
    ("bytes/s", 12, Some(Sort::Bytes)),
    ("fill", 8, None),
];
/// Characters of a bar.
const BAR: usize = 10;
const KEYS: &str = "up/down select  Enter more  s sort  r reverse  q quit";

/// Draws everything.
pub(super) fn draw(model: &Model, frame: &mut Frame<'_>) {
    let areas =
        Layout::vertical([Constraint::Length(2), Constraint::Min(1), Constraint::Length(1)]);
    let [top, middle, bottom] = areas.areas(frame.area());
    frame.render_widget(Paragraph::new(Text::from_iter(heading(model))), top);
    table(model, frame, middle);
    let last = match &model.problem {
        Some(problem) => Line::styled(problem.as_str(), Style::new().fg(Color::Red)),
        None => Line::styled(KEYS, Style::new().add_modifier(Modifier::DIM)),
    };
    frame.render_widget(last, bottom);
    if let Some(row) = model.inspected() {
        inspect(row, frame, middle);
    }
}

/// Two lines about the daemon.
fn heading(model: &Model) -> [String; 2] {
    let Some(page) = model.page() else {
        return ["vmpager: waiting for the daemon".into(), String::new()];
    };
    let up = Duration::from_millis(page.uptime_ms).as_secs();
    let (hours, minutes, seconds) = (up / 3600, up / 60 % 60, up % 60);
    let first = format!(
        "vmpager {}  {}  {} threads  up {hours}:{minutes:02}:{seconds:02}  takeovers {}",
        plain(&page.version),
        plain(&page.source),
        page.workers,
        page.takeovers
    );
    let faults: f64 = model.rows().iter().filter_map(|row| row.faults_per_s).sum();
    let second = format!(
        "sessions {} now, {} ended, {} refused  {faults:.0} faults/s",
        page.sessions.len(),
        page.sessions_ended,
        page.refused
    );
    [first, second]
}

fn table(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    let (sort, reversed) = model.sort();
    let titles = COLUMNS.map(|(title, _, by)| match by == Some(sort) {
        true if reversed => format!("{title}^"),
        true => format!("{title}v"),
        false => title.into(),
    });
    let rows = model.rows().iter().map(|row| TableRow::new(cells(row).map(Cell::new)));
    let widths = COLUMNS.map(|(_, width, _)| Constraint::Length(width));
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let table = Table::new(rows, widths)
        .column_spacing(1)
        .header(TableRow::new(titles).style(bold))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected(model.selected());
    frame.render_stateful_widget(table, area, &mut state);
}

/// What is shown of a session.
fn cells(row: &Row) -> [String; 8] {
    let percent = format!("{:3.0}%", (row.resident() * 100.0).floor());
    let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |it| format!("{it:.0}"));
    [
        row.now.summary.session.to_string(),
        row.now.summary.peer_pid.to_string(),
        size::show(row.now.summary.memory_bytes),
        format!("{} {percent}", bar(row.resident(), BAR)),
        number(row.faults_per_s),
        row.recent_p99_us.map_or_else(|| "-".into(), time),
        row.bytes_per_s.map_or_else(|| "-".into(), bytes),
        fill(row.now.fill).into(),
    ]
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a number between 0 and the width"
)]
fn bar(part: f64, width: usize) -> String {
    let full = (part * approximately(width as u64)).floor().max(0.0) as usize;
    let full = full.min(width);
    "█".repeat(full) + &"░".repeat(width - full)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "for people")]
fn bytes(per_second: f64) -> String {
    size::show(per_second.max(0.0) as u64)
}

/// Microseconds for people.
pub(super) fn time(us: f64) -> String {
    match us {
        ..1e3 => format!("{us:.0} us"),
        1e3..1e6 => format!("{:.1} ms", us / 1e3),
        _ => format!("{:.1} s", us / 1e6),
    }
}

fn fill(state: FillState) -> &'static str {
    match state {
        FillState::Off => "off",
        FillState::Filling => "filling",
        FillState::Filled => "filled",
    }
}

/// Without what a terminal would obey.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// More about one session, over the table.
fn inspect(row: &Row, frame: &mut Frame<'_>, area: Rect) {
    let lines = details(row);
    let height = u16::try_from(lines.len() + 2).unwrap_or(u16::MAX).min(area.height);
    let width = 64.min(area.width);
    let at = Rect {
        x: area.x + (area.width - width) / 2,
        y: area.y + (area.height - height) / 2,
        width,
        height,
    };
    let title = format!(" session {} (Esc: back) ", row.now.summary.session);
    frame.render_widget(Clear, at);
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(title)), at);
}

fn details(row: &Row) -> Vec<Line<'static>> {
    let of = &row.now.summary;
    let taken_over = if row.now.taken_over { ", taken over" } else { "" };
    let mut lines = vec![
        format!("pid {}, {} region(s){taken_over}", of.peer_pid, of.regions),
        format!(
            "{} of {} in place",
            size::show(row.now.resident_bytes),
            size::show(of.memory_bytes)
        ),
        format!(
            "faults {}: vCPU {}, VMM {}, kernel {}, attached {}, queued {}; exits {}",
            of.faults,
            of.faults_vcpu,
            of.faults_vmm,
            of.faults_kernel,
            of.faults_attached,
            of.faults_queued,
            of.faults_exit
        ),
        format!(
            "joined {}, present {}, retries {}",
            of.faults_joined, of.faults_confirmed, of.retries
        ),
        format!(
            "pages: demanded {}, neighbours {}, profile {}, fill {}, zero {}",
            of.pages_demand, of.pages_neighbour, of.pages_profile, of.pages_fill, of.pages_zero
        ),
        format!(
            "given back {}, poisoned {}, huge {}, moved {}",
            of.pages_removed, of.pages_poisoned, of.pages_huge, of.pages_moved
        ),
        format!(
            "stalls: p50 {}, p99 {}, longest {}",
            time(of.stall_p50_us),
            time(of.stall_p99_us),
            time(of.stall_max_us)
        ),
    ];
    let most = of.stall_buckets.iter().max().copied().unwrap_or(0).max(1);
    let bounds = STALL_BOUNDS_NS.into_iter().map(Some).chain([None]);
    for (count, bound) in of.stall_buckets.iter().zip(bounds).filter(|(count, _)| **count > 0) {
        let bound = match bound {
            Some(bound) => format!("<= {}", time(approximately(bound) / 1e3)),
            None => "longer".into(),
        };
        let part = approximately(*count) / approximately(most);
        lines.push(format!("{bound:>10} {} {count}", bar(part, 30)));
    }
    lines.into_iter().map(Line::from).collect()
}

/// The table as text, for `--once`.
pub(super) fn text(model: &Model) -> String {
    let [first, second] = heading(model);
    let mut text = format!("{first}\n{second}\n");
    let titles = COLUMNS.map(|(title, ..)| title.to_owned());
    for cells in std::iter::once(titles).chain(model.rows().iter().map(cells)) {
        let cells = cells.iter().zip(COLUMNS);
        let line: Vec<String> = cells
            .map(|(cell, (_, width, _))| format!("{cell:width$}", width = usize::from(width)))
            .collect();
        text.push_str(line.join(" ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::tests::{model, page};
    use super::*;

    fn drawn(model: &Model, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(90, height)).expect("a terminal");
        terminal.draw(|frame| draw(model, frame)).expect("drawn");
        let buffer = terminal.backend().buffer().clone();
        let lines = buffer.content.chunks(90).map(|line| {
            let line: String = line.iter().map(|cell| cell.symbol()).collect();
            line.trim_end().to_owned()
        });
        lines.collect()
    }

    #[test]
    fn sessions_are_shown() {
        let mut model = model();
        model.sort_by_next();
        assert_eq!(
            drawn(&model, 7),
            [
                "vmpager 0.1.0  /snap/mem  2 threads  up 0:01:01  takeovers 1",
                "sessions 3 now, 2 ended, 0 refused  2250 faults/s",
                "session  pid      memoryv     resident          faults/s  p99       bytes/s      fill",
                "3        4003     768.00 MiB  ██████████ 100%   2000      50 us     0 B          off",
                "2        4002     512.00 MiB  ███░░░░░░░  37%   0         -         64.00 MiB    filling",
                "1        4001     256.00 MiB  █████░░░░░  50%   250       10 us     64.00 MiB    off",
                "up/down select  Enter more  s sort  r reverse  q quit",
            ]
        );
    }

    #[test]
    fn a_session_is_inspected() {
        let mut model = model();
        model.select(true);
        model.inspecting = true;
        let lines = drawn(&model, 16).join("\n");
        for part in [
            "session 1 (Esc: back)",
            "pid 4001, 1 region(s)",
            "128.00 MiB of 256.00 MiB in place",
            "stalls: p50 8 us, p99 44 us, longest 120 us",
            "<= 10 us ██████████████████████████████ 350",
        ] {
            assert!(lines.contains(part), "{part:?} is not in\n{lines}");
        }
    }

    #[test]
    fn nothing_is_too_small_or_too_strange_to_draw_on() {
        let mut model = Model::default();
        assert!(drawn(&model, 4).join("").contains("waiting for the daemon"));
        model.missed("nobody is there".into());
        assert!(drawn(&model, 4).join("").contains("nobody is there"));
        let mut strange = page(1, &[(1, 1)]);
        strange.source = "a\x1b[2Jb".into();
        model.saw(strange, std::time::Instant::now());
        assert!(drawn(&model, 4)[0].contains("a?[2Jb"));
        model.select(true);
        model.inspecting = true;
        for (width, height) in [(1, 1), (3, 2), (200, 3), (20, 50)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
            terminal.draw(|frame| draw(&model, frame)).expect("drawn");
        }
    }

    #[test]
    fn times_are_for_people() {
        assert_eq!([0.0, 999.0, 1500.0, 2e6].map(time), ["0 us", "999 us", "1.5 ms", "2.0 s"]);
        assert_eq!(
            [0.0, 0.05, 0.1, 1.0, 7.0].map(|part| bar(part, 10).matches('█').count()),
            [0, 0, 1, 10, 10]
        );
    }
}
