//! What scrapers say, and what they are told: just enough of HTTP/1.1 (RFC 9112).
//! Each connection is for one request.

use httparse::{EMPTY_HEADER, Error, Request, Status};

/// The most bytes of a request.
pub(super) const MAX_REQUEST: usize = 8 * 1024;
/// The most headers of a request.
const MAX_HEADERS: usize = 64;

/// What is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    /// OpenMetrics text.
    Metrics,
    /// All sessions, as JSON.
    Sessions,
}

/// What a peer has asked for so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// It has not said all yet.
    More,
    /// A page; with its contents, or (HEAD) without.
    Page(Page, bool),
    /// Something else: a status line, and what is wrong.
    Other(&'static str, &'static str),
}

/// What a peer asks for, by the bytes it sent so far.
pub(super) fn understand(bytes: &[u8]) -> Asked {
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut request = Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(Status::Complete(_)) => {}
        Ok(Status::Partial) if bytes.len() < MAX_REQUEST => return Asked::More,
        Ok(Status::Partial) | Err(Error::TooManyHeaders) => {
            return Asked::Other(
                "431 Request Header Fields Too Large",
                "a request has 8 KiB and 64 header fields at most",
            );
        }
        Err(_) => return Asked::Other("400 Bad Request", "this is no HTTP/1.1 request"),
    }
    let contents = match request.method {
        Some("GET") => true,
        Some("HEAD") => false,
        _ => return Asked::Other("405 Method Not Allowed", "only GET and HEAD do something here"),
    };
    let path = request.path.unwrap_or_default();
    match path.split_once('?').map_or(path, |(path, _)| path) {
        "/metrics" => Asked::Page(Page::Metrics, contents),
        "/sessions.json" => Asked::Page(Page::Sessions, contents),
        _ => Asked::Other("404 Not Found", "there are /metrics and /sessions.json"),
    }
}

/// An answer with a page; `contents` says whether the page itself is wanted.
pub(super) fn answer(page: Page, body: &str, contents: bool) -> Vec<u8> {
    let kind = match page {
        Page::Metrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        Page::Sessions => "application/json",
    };
    let mut bytes = head("200 OK", kind, body.len(), "").into_bytes();
    if contents {
        bytes.extend_from_slice(body.as_bytes());
    }
    bytes
}

/// An answer that says what is wrong.
pub(super) fn refusal(status: &str, what: &str) -> Vec<u8> {
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let head = head(status, "text/plain; charset=utf-8", what.len() + 1, allow);
    format!("{head}{what}\n").into_bytes()
}

fn head(status: &str, kind: &str, len: usize, more: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\n\
         Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n{more}\
         Connection: close\r\n\r\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(bytes: &[u8]) -> &'static str {
        match understand(bytes) {
            Asked::Other(status, _) => status.split(' ').next().unwrap_or_default(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_are_understood_whole_and_not_before() {
        let request = b"GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n";
        for len in 0..request.len() {
            assert_eq!(understand(&request[..len]), Asked::More, "{len}");
        }
        assert_eq!(understand(request), Asked::Page(Page::Metrics, true));
        let head = b"HEAD /sessions.json?pretty HTTP/1.0\r\n\r\n";
        assert_eq!(understand(head), Asked::Page(Page::Sessions, false));
    }

    #[test]
    fn what_is_not_understood_is_told_so() {
        assert_eq!(status(b"\x16\x03\x01\x02\x00\x01"), "400", "TLS");
        assert_eq!(status(b"GET /metrics HTTP/2\r\n\r\n"), "400");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "405");
        assert_eq!(status(b"GET /metrics/../x HTTP/1.1\r\n\r\n"), "404");
        let many = "a: b\r\n".repeat(MAX_HEADERS + 1);
        assert_eq!(status(format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes()), "431");
        let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(MAX_REQUEST));
        assert_eq!(status(&long.as_bytes()[..MAX_REQUEST]), "431");
    }

    #[test]
    fn an_answer_has_the_length_it_says() {
        let whole = String::from_utf8(answer(Page::Metrics, "body", true)).expect("text");
        let (head, body) = whole.split_once("\r\n\r\n").expect("a head");
        assert!(head.contains("Content-Length: 4") && body == "body", "{whole}");
        assert!(answer(Page::Metrics, "body", false).ends_with(b"\r\n\r\n"));
        let refused = String::from_utf8(refusal("405 No", "why")).expect("text");
        assert!(refused.contains("Content-Length: 4") && refused.ends_with("\r\n\r\nwhy\n"));
        assert!(refused.contains("Allow: GET, HEAD\r\n"));
    }
}
