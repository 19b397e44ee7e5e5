//! `vmpager top` on a terminal: looks on one thread, draws and hears keys on another,
//! so that a daemon that does not answer holds up nobody's keys. A third one ends the
//! program when the terminal goes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmpager::metrics::{Endpoint, LookError, SessionsPage};

use super::PATIENCE;
use super::draw::draw;
use super::model::Model;

/// How soon something new is drawn.
const TICK: Duration = Duration::from_millis(100);

type Look = (Result<SessionsPage, LookError>, Instant);

/// Shows the daemon's sessions until its user has seen enough.
pub(super) fn run(endpoint: Endpoint, interval: Duration) -> anyhow::Result<()> {
    // A daemon that is not there is told of as any command would.
    let first = endpoint.sessions(PATIENCE)?;
    let mut model = Model::default();
    model.saw(first, Instant::now());
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, ended.clone()).context("catching signals")?;
    }
    let (to, looks) = channel();
    std::thread::Builder::new()
        .name("look".into())
        .spawn(move || look(&endpoint, interval, &to))
        .context("starting a thread")?;
    std::thread::Builder::new()
        .name("terminal".into())
        .spawn(end_with_terminal)
        .context("starting a thread")?;
    let mut terminal = ratatui::try_init().context("drawing on the terminal")?;
    let shown = show(&mut terminal, &mut model, &looks, &ended);
    ratatui::try_restore().context("giving the terminal back")?;
    shown
}

/// Ends the program when its terminal has gone, since what hears keys goes on trying to
/// read them. There is nobody to tell, and nothing to give back.
fn end_with_terminal() {
    let terminal = std::io::stdin();
    loop {
        // A hang-up is told of without being asked for.
        let mut looked = [PollFd::new(&terminal, PollFlags::empty())];
        match poll(&mut looked, None) {
            Ok(_) if looked[0].revents().is_empty() => {}
            Err(rustix::io::Errno::INTR) => {}
            _ => std::process::exit(1),
        }
    }
}

fn look(endpoint: &Endpoint, interval: Duration, to: &Sender<Look>) {
    loop {
        std::thread::sleep(interval);
        let seen = endpoint.sessions(PATIENCE);
        if to.send((seen, Instant::now())).is_err() {
            return;
        }
    }
}

fn show(
    terminal: &mut DefaultTerminal,
    model: &mut Model,
    looks: &Receiver<Look>,
    ended: &AtomicBool,
) -> anyhow::Result<()> {
    while !ended.load(Ordering::Relaxed) {
        terminal.draw(|frame| draw(model, frame)).context("drawing")?;
        if event::poll(TICK).context("hearing keys")?
            && let Event::Key(key) = event::read().context("hearing keys")?
            && key.kind != KeyEventKind::Release
            && !obey(key, model)
        {
            return Ok(());
        }
        for (seen, at) in looks.try_iter() {
            match seen {
                Ok(page) => model.saw(page, at),
                Err(error) => model.missed(error.to_string()),
            }
        }
    }
    Ok(())
}

/// Does what a key says. False if that is to end.
fn obey(key: KeyEvent, model: &mut Model) -> bool {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('c') if control => return false,
        KeyCode::Char('q') => return false,
        KeyCode::Esc if !std::mem::take(&mut model.inspecting) => return false,
        KeyCode::Down | KeyCode::Char('j') => model.select(true),
        KeyCode::Up | KeyCode::Char('k') => model.select(false),
        KeyCode::Char('s') => model.sort_by_next(),
        KeyCode::Char('r') => model.reverse(),
        KeyCode::Enter => {
            if model.selected().is_none() {
                model.select(true);
            }
            model.inspecting = !model.inspecting;
        }
        _ => {}
    }
    true
}
