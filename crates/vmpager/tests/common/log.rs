//! What is logged, kept to be looked at.

use std::fmt::Write;
use std::sync::{Arc, Mutex, OnceLock};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// A log in memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Waits for a line, from the `from`th on, that has all these words.
    pub(crate) fn wait_for(&self, from: usize, words: &[&str]) -> String {
        let mut found = None;
        super::eventually(&format!("a log line with {words:?} in {:#?}", self.lines()), || {
            let lines = self.0.lock().unwrap();
            found = lines[from.min(lines.len())..]
                .iter()
                .find(|line| words.iter().all(|word| line.contains(word)))
                .cloned();
            found.is_some()
        });
        found.unwrap()
    }

    /// Whether a line has all these words.
    pub(crate) fn has(&self, words: &[&str]) -> bool {
        self.lines().iter().any(|line| words.iter().all(|word| line.contains(word)))
    }
}

/// The log of all threads that have none of their own: the workers'.
pub(crate) fn everywhere() -> Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    let log = LOG.get_or_init(|| {
        let log = Log::default();
        tracing::subscriber::set_global_default(log.clone()).unwrap();
        log
    });
    log.clone()
}

struct Line<'a>(&'a mut String);

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let line = &mut self.0;
        let result = match field.name() {
            "message" => write!(line, "{value:?} "),
            name => write!(line, "{name}={value:?} "),
        };
        result.unwrap();
    }
}

impl Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = format!("{} ", event.metadata().level());
        event.record(&mut Line(&mut line));
        if std::env::var_os("VMPAGER_TEST_LOG").is_some() {
            eprintln!("[{}] {line}", std::process::id());
        }
        self.0.lock().unwrap().push(line);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
