//! What the tests of all crates share.
#![forbid(unsafe_code)]

pub mod http;
pub mod proxy;
#[cfg(feature = "tls")]
pub mod secure;

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

/// Says that the calling test cannot run here, and why. The line goes to
/// standard error past the test harness, which shows what passing tests print
/// to nobody; each test binary numbers its own.
pub fn skipped(why: &str) {
    static SKIPPED: AtomicU32 = AtomicU32::new(0);
    let number = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let line = format!("skipped: {why} (no. {number} here: {test})\n");
    // In one piece, for lines not to mix. Nobody is there to hear of a failure.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_skipped_test_is_seen_and_counted() {
        // Runs itself, and looks at what reached standard error.
        if std::env::var_os("VMPAGER_SKIP_ONCE").is_some() {
            super::skipped("no such thing");
            super::skipped("nor that");
            return;
        }
        let test = std::env::current_exe().expect("tests have a program");
        let output = std::process::Command::new(test)
            .args(["a_skipped_test_is_seen_and_counted", "--test-threads=1"])
            .env("VMPAGER_SKIP_ONCE", "1")
            .output()
            .expect("a test can run again");
        let seen = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(seen.contains("skipped: no such thing (no. 1 here: "), "{seen:?}");
        assert!(seen.contains("skipped: nor that (no. 2 here: "), "{seen:?}");
    }
}
