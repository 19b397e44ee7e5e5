//! What the emulator did, by its own account: whether it kept its guests apart
//! from their host.
//!
//! A processor leaves a guest once for each time it enters one. Rarely the
//! emulator leaves one twice: having loaded the host's registers it takes a fault
//! through the nested page tables that are no longer in use, and saves the *host's*
//! registers as the guest's (`docs/lab.md`). The guest then resets itself or
//! stops. No program in the machine can do that, so a boot in which it happened
//! says nothing about a test that failed in it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::Context;

/// How the messages of an entry and of an exit begin; they are of one length.
const ENTRY: &[u8] = b"vmrun! ";
const EXIT: &[u8] = b"vmexit(";

/// The emulator's options for writing a trace to `path`: the messages of entries
/// and exits belong to the log of translated code, of which the range of
/// addresses leaves nothing else.
pub(super) fn options(path: &Path) -> Vec<String> {
    let path = path.display().to_string();
    ["-d", "in_asm", "-dfilter", "0x1000+1", "-D", &path].map(String::from).to_vec()
}

/// Reads a trace: by how many the exits from guests exceeded the entries, at
/// worst.
///
/// # Errors
///
/// If it cannot be read, or has no entry at all: a trace in another form than
/// this knows must not pass for a clean one.
pub(super) fn surplus_exits(path: &Path) -> anyhow::Result<i64> {
    let file = File::open(path).with_context(|| format!("the trace {}", path.display()))?;
    let (surplus, entries) =
        count(BufReader::new(file)).with_context(|| format!("reading {}", path.display()))?;
    anyhow::ensure!(entries > 0, "the emulator's trace {} shows no guest entered", path.display());
    Ok(surplus)
}

fn count(mut trace: impl BufRead) -> std::io::Result<(i64, u64)> {
    let (mut inside, mut surplus, mut entries) = (0_i64, 0, 0);
    let mut line = Vec::new();
    while trace.read_until(b'\n', &mut line)? > 0 {
        // A message that has no end of line of its own may stand before.
        match line.windows(ENTRY.len()).find(|word| [ENTRY, EXIT].contains(word)) {
            Some(ENTRY) => (inside, entries) = (inside + 1, entries + 1),
            Some(_) => inside -= 1,
            None => {}
        }
        surplus = surplus.max(-inside);
        line.clear();
    }
    Ok((surplus, entries))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two processors; the second has one exit for its entry.
    const SOUND: [&str; 6] = [
        "vmrun! 0000000002bce000",
        "vmrun! 0000000005059000",
        "Injecting(0): INTR  0xec 0",
        "vmexit(0000007b, 0000000003fd0011, ffffffff81647404, ffffffff81647403)!",
        "vmrun! 0000000002bce000",
        "vmexit(0000007c, 0000000000000001, 0000000000000000, ffffffff812ac066)!",
    ];
    const SECOND: &str = "vmexit(00000400, 0000000200000006, 00000000029b6ff8, ffffffff8182db7c)!";

    fn counted(lines: &[&str]) -> (i64, u64) {
        count(lines.join("\n").as_bytes()).unwrap()
    }

    #[test]
    fn an_exit_for_each_entry_is_sound() {
        assert_eq!(counted(&SOUND), (0, 3));
        assert_eq!(counted(&[]), (0, 0));
    }

    #[test]
    fn an_exit_too_many_is_found() {
        let lines = [&SOUND[..], &[SECOND, SECOND]].concat();
        assert_eq!(counted(&lines), (1, 3));
    }

    #[test]
    fn messages_may_share_a_line() {
        let injected = format!("Injecting(0): EXEPT{SECOND}");
        assert_eq!(counted(&[SOUND[0], &injected, &injected]), (1, 1));
    }

    #[test]
    fn no_trace_is_no_clean_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace");
        assert!(surplus_exits(&path).unwrap_err().to_string().contains("trace"));
        std::fs::write(&path, "IN:\n").unwrap();
        assert!(surplus_exits(&path).unwrap_err().to_string().contains("no guest entered"));
    }
}
