//! How far it has come, and whether the user wants it to stop.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmpager_store::image::Progress;

/// A bar on a terminal's stderr, nothing elsewhere; and an end to the work when
/// the user interrupts it.
#[derive(Debug)]
pub(super) struct Bar {
    bar: ProgressBar,
    stop: Arc<AtomicBool>,
    started: Instant,
    done_bytes: u64,
}

impl Bar {
    pub(super) fn new(what: &'static str, json: bool) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, stop.clone()).context("catching signals")?;
        }
        // Hidden by itself where stderr is no terminal.
        let target = if json { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(0), target).with_message(what);
        let style = "{msg} {wide_bar} {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta}";
        bar.set_style(ProgressStyle::with_template(style).context("the bar's template")?);
        Ok(Self { bar, stop, started: Instant::now(), done_bytes: 0 })
    }

    pub(super) fn step(&mut self, progress: Progress) -> ControlFlow<()> {
        self.done_bytes = progress.done_bytes;
        self.bar.set_length(progress.total_bytes);
        self.bar.set_position(progress.done_bytes);
        match self.stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Takes the bar away. Returns how long it took, and how many bytes of memory
    /// were worked on.
    pub(super) fn finish(self) -> (Duration, u64) {
        self.bar.finish_and_clear();
        (self.started.elapsed(), self.done_bytes)
    }
}
