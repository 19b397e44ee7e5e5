//! What a pager says to a VMM whose memory it does not serve: one line of text,
//! `refused: ` and the reason, before it ends the connection. A VMM that listens need
//! not wait for pages that never come; Firecracker does not, and is not disturbed.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;

use rustix::net::SendFlags;

/// What such a line begins with.
const PREFIX: &str = "refused: ";

/// The most bytes of a line.
const MAX_LINE: usize = 1024;

/// Tells a peer why it is refused. It may be gone, or have no room for more: then it is
/// told by the end of the connection alone.
pub(crate) fn tell(socket: impl AsFd, problem: &str) {
    let _ = rustix::net::send(
        socket,
        line(problem).as_bytes(),
        SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
    );
}

fn line(problem: &str) -> String {
    let problem = problem.replace(['\n', '\r'], " ");
    let mut line = PREFIX.to_owned();
    // What follows, and the end of the line, must have room.
    let has_room = |(at, c): &(usize, char)| PREFIX.len() + at + c.len_utf8() < MAX_LINE;
    line.extend(problem.char_indices().take_while(has_room).map(|(_, c)| c));
    line.push('\n');
    line
}

/// Waits until a pager that was handed memory refuses it, or ends the connection.
/// Returns why it refuses.
///
/// # Errors
///
/// If the connection cannot be read, or something else comes.
pub fn wait(connection: impl Read) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    BufReader::new(connection.take(MAX_LINE as u64)).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    let line = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(&line));
    match line.strip_prefix(PREFIX) {
        Some(why) => Ok(Some(why.to_owned())),
        None => Err(io::Error::other(format!("a pager says {line:?}, not why it refuses"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_one_line_however_long_the_reason() {
        for reason in ["no room", "two\nlines", &"ä".repeat(4096)] {
            let line = line(reason);
            assert!(line.len() <= MAX_LINE, "{} bytes", line.len());
            assert_eq!(line.matches('\n').count(), 1, "{line}");
            let heard = wait((line + "refused: more\n").as_bytes()).expect("it is a refusal");
            let heard = heard.expect("it is a refusal");
            assert!(reason.replace('\n', " ").starts_with(&heard) && heard.len() > 6, "{heard}");
        }
    }

    #[test]
    fn an_end_is_no_refusal_and_nothing_else_is_taken_for_one() {
        assert_eq!(wait(&b""[..]).expect("nothing was said"), None);
        let error = wait(&b"hello\n"[..]).expect_err("no refusal").to_string();
        assert!(error.contains("hello"), "{error}");
    }
}
