//! One request for a part of an object, and what is believed of the answer.

use std::io::Read;
use std::ops::Range;
use std::time::Duration;

use ureq::http::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, IF_MATCH,
    IF_UNMODIFIED_SINCE, LAST_MODIFIED, RANGE, RETRY_AFTER,
};
use ureq::http::{Response, Uri};
use ureq::{Agent, BodyReader};

use super::RemoteOptions;
use super::error::Problem;
#[cfg(feature = "object-store")]
use super::store::Store;
#[cfg(feature = "tls")]
use super::tls;
use super::url::{At, ObjectUrl};

/// Longest way to an object over redirects.
const REDIRECTS: u32 = 4;
/// To find a host, and to connect to it.
const CONNECT: Duration = Duration::from_secs(5);
/// Connections that are kept for the next request.
const IDLE: usize = 16;

/// Makes requests for one object.
#[derive(Debug)]
pub(crate) enum Client {
    Server(Agent, Uri),
    #[cfg(feature = "object-store")]
    Store(Store),
}

/// What tells that an object is the one it was, as far as its server says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Validator {
    /// The server says nothing.
    #[default]
    None,
    /// Equal for the same bytes: what conditions are made of.
    Etag(String),
    /// May be equal for others; servers refuse conditions on it.
    Weak(String),
    Modified(String),
}

impl Validator {
    fn of(headers: &HeaderMap) -> Self {
        match (text(headers, ETAG), text(headers, LAST_MODIFIED)) {
            (Some(etag), _) if etag.starts_with('"') => Self::Etag(etag),
            (Some(etag), _) => Self::Weak(etag),
            (None, Some(modified)) => Self::Modified(modified),
            (None, None) => Self::None,
        }
    }
}

/// What is known of an object from an earlier answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Known {
    /// Bytes that it has.
    pub(crate) len: u64,
    pub(crate) validator: Validator,
}

/// The bytes that were asked for, on their way.
pub(crate) struct Body {
    reader: BodyReader<'static>,
    left: u64,
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn wrong(what: impl Into<String>) -> Problem {
    Problem::Wrong { what: what.into() }
}

/// A status and headers against what was asked for. Returns what they say of the
/// object.
fn check(
    status: u16,
    headers: &HeaderMap,
    asked: &Range<u64>,
    known: Option<&Known>,
) -> Result<Known, Problem> {
    let changed = |what: String| Problem::Changed { what };
    match status {
        206 => {}
        200 => return Err(Problem::NoRanges),
        401 | 403 | 407 => return Err(Problem::Refused { status }),
        404 | 410 => return Err(Problem::Missing { status }),
        412 => return Err(changed("the server says so".into())),
        416 if known.is_some() => return Err(changed("it ends earlier".into())),
        416 => return Err(Problem::Short { len: 0 }),
        408 | 425 | 429 | 500..=599 => {
            let seconds = text(headers, RETRY_AFTER).and_then(|text| text.trim().parse().ok());
            let retry_after = seconds.map(Duration::from_secs);
            return Err(Problem::Busy { status, retry_after });
        }
        _ => return Err(Problem::Status { status }),
    }
    if let Some(coding) = text(headers, CONTENT_ENCODING).filter(|coding| coding != "identity") {
        return Err(wrong(format!("the bytes come encoded ({coding}), which was not asked for")));
    }
    let (part, len) = text(headers, CONTENT_RANGE)
        .as_deref()
        .and_then(content_range)
        .ok_or_else(|| wrong("it does not say which part it is (Content-Range)"))?;
    let now = Known { len, validator: Validator::of(headers) };
    if let Some(known) = known {
        if known.len != len {
            return Err(changed(format!("it has {len} bytes, and had {}", known.len)));
        }
        if known.validator != now.validator && known.validator != Validator::None {
            return Err(changed("its ETag or time of change is another".into()));
        }
    }
    if known.is_none() && len < asked.end {
        return Err(Problem::Short { len });
    }
    if part != *asked {
        let (from, to) = (asked.start, asked.end);
        return Err(wrong(format!("bytes {from}..{to} were asked for, and {part:?} come")));
    }
    let bytes = text(headers, CONTENT_LENGTH).map(|text| text.trim().parse::<u64>());
    if bytes.is_some_and(|bytes| bytes != Ok(asked.end - asked.start)) {
        let length = text(headers, CONTENT_LENGTH).unwrap_or_default();
        return Err(wrong(format!(
            "it is {length:?} bytes long (Content-Length), and {} were asked for",
            asked.end - asked.start
        )));
    }
    Ok(now)
}

/// `bytes FIRST-LAST/LENGTH`, as what it says: a part, and the length of the whole.
fn content_range(text: &str) -> Option<(Range<u64>, u64)> {
    let (part, len) = text.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (first, last) = part.trim().split_once('-')?;
    let (first, last, len): (u64, u64, u64) =
        (first.parse().ok()?, last.parse().ok()?, len.trim().parse().ok()?);
    (first <= last && last < len).then_some((first..last + 1, len))
}

/// What makes requests. The timeout is for each thing that is waited for: the answer's
/// head, and each further piece of it.
fn agent(options: &RemoteOptions, redirects: u32, is_secure: bool) -> Result<Agent, Problem> {
    let timeout = options.timeout;
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(redirects)
        // None are followed: it is an answer as any other.
        .max_redirects_will_error(redirects > 0)
        // From where nobody can listen or write, no way leads to where they can.
        .https_only(is_secure)
        // What the environment says is meant for other programs.
        .proxy(None)
        .user_agent(concat!("vmpager/", env!("CARGO_PKG_VERSION")))
        // Parts of what is encoded on the way are parts of something else.
        .accept_encoding("identity")
        .max_idle_connections(IDLE)
        .max_idle_connections_per_host(IDLE)
        .timeout_resolve(Some(CONNECT.min(timeout)))
        .timeout_connect(Some(CONNECT.min(timeout)))
        .timeout_send_request(Some(timeout))
        .timeout_recv_response(Some(timeout))
        .timeout_per_read(Some(timeout));
    #[cfg(feature = "tls")]
    let config = config.tls_config(match tls::trusting(options.authorities.as_deref()) {
        Ok(trusting) => trusting,
        Err(problem) if is_secure || options.authorities.is_some() => return Err(problem),
        // It may not be needed.
        Err(_) => tls::trusting_nobody(),
    });
    Ok(config.build().into())
}

impl Client {
    /// For requests for the object that is there.
    pub(crate) fn new(url: &ObjectUrl, options: &RemoteOptions) -> Result<Self, Problem> {
        match url.at() {
            At::Server(uri) => {
                let is_secure = uri.scheme_str() == Some("https");
                Ok(Self::Server(agent(options, REDIRECTS, is_secure)?, uri.clone()))
            }
            #[cfg(feature = "object-store")]
            At::Store(object) => Ok(Self::Store(Store::open(object, &agent(options, 0, false)?)?)),
        }
    }

    /// Asks for a part, which is not empty.
    pub(crate) fn get(
        &self,
        part: &Range<u64>,
        known: Option<&Known>,
    ) -> Result<(Known, Body), Problem> {
        let response = match self {
            Self::Server(agent, uri) => ask(agent, uri, part, known)?,
            #[cfg(feature = "object-store")]
            Self::Store(store) => store.get(part, known)?,
        };
        let (head, body) = response.into_parts();
        let now = check(head.status.as_u16(), &head.headers, part, known)?;
        Ok((now, Body { reader: body.into_reader(), left: part.end - part.start }))
    }
}

/// Asks a server for a part of an object, on condition that it is as it was known.
fn ask(
    agent: &Agent,
    uri: &Uri,
    part: &Range<u64>,
    known: Option<&Known>,
) -> Result<Response<ureq::Body>, Problem> {
    let mut request = agent
        .get(uri)
        .header(RANGE, format!("bytes={}-{}", part.start, part.end.saturating_sub(1)));
    match known.map(|known| &known.validator) {
        Some(Validator::Etag(etag)) => request = request.header(IF_MATCH, etag),
        Some(Validator::Modified(time)) => request = request.header(IF_UNMODIFIED_SINCE, time),
        Some(Validator::Weak(_) | Validator::None) | None => {}
    }
    request.call().map_err(|error| failed(&error))
}

/// Why there is no answer.
pub(super) fn failed(error: &ureq::Error) -> Problem {
    #[cfg(feature = "tls")]
    if let Some(problem) = tls::problem(error) {
        return problem;
    }
    match error {
        ureq::Error::TooManyRedirects => wrong(format!("it redirects more than {REDIRECTS} times")),
        ureq::Error::RedirectFailed
        | ureq::Error::TlsRequired
        | ureq::Error::RequireHttpsOnly(_) => {
            wrong(format!("it redirects to where this program does not go ({error})"))
        }
        _ => Problem::Unreachable { what: error.to_string() },
    }
}

impl Body {
    /// Reads as many bytes as `to` has room for.
    pub(crate) fn read_exact(&mut self, to: &mut [u8]) -> Result<(), Problem> {
        let mut done = 0;
        while done < to.len() {
            match self.reader.read(&mut to[done..]) {
                Ok(0) => {
                    let what = format!("the answer ends {} bytes early", self.left);
                    return Err(Problem::Unreachable { what });
                }
                Ok(count) => {
                    done += count;
                    self.left = self.left.saturating_sub(count as u64);
                }
                Err(error) => {
                    let what = format!("the answer breaks off, {} bytes early: {error}", self.left);
                    return Err(Problem::Unreachable { what });
                }
            }
        }
        Ok(())
    }

    /// Reads bytes that nobody wants.
    pub(crate) fn skip(&mut self, mut bytes: u64) -> Result<(), Problem> {
        let mut unwanted = [0; 4096];
        while bytes > 0 {
            let piece = usize::try_from(bytes).unwrap_or(usize::MAX).min(unwanted.len());
            self.read_exact(&mut unwanted[..piece])?;
            bytes -= piece as u64;
        }
        Ok(())
    }

    /// Reads the end, so that the connection can be used again. More bytes than were
    /// asked for are not looked at: then it cannot.
    pub(crate) fn finish(mut self) {
        let _ = self.reader.read(&mut [0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ureq::http::HeaderValue;

    fn headers(lines: &[(HeaderName, &str)]) -> HeaderMap {
        let value = |text: &str| HeaderValue::from_str(text).unwrap();
        lines.iter().map(|(name, text)| (name.clone(), value(text))).collect()
    }

    /// Checks an answer to a request for bytes 100 to 199 of 1000.
    fn answer(status: u16, lines: &[(HeaderName, &str)]) -> Result<Known, Problem> {
        let known = Known { len: 1000, validator: Validator::Etag("\"a\"".into()) };
        check(status, &headers(lines), &(100..200), Some(&known))
    }

    const GOOD: [(HeaderName, &str); 3] =
        [(CONTENT_RANGE, "bytes 100-199/1000"), (CONTENT_LENGTH, "100"), (ETAG, "\"a\"")];

    #[test]
    fn what_was_asked_for_is_taken() {
        let known = answer(206, &GOOD).unwrap();
        assert_eq!(known, Known { len: 1000, validator: Validator::Etag("\"a\"".into()) });
        // A server may send it in pieces of no known length.
        assert!(answer(206, &[GOOD[0].clone(), GOOD[2].clone()]).is_ok());
    }

    #[test]
    fn lies_are_found_one_by_one() {
        for (name, lie) in [
            (CONTENT_RANGE, "bytes 0-99/1000"),
            (CONTENT_RANGE, "bytes 100-198/1000"),
            (CONTENT_RANGE, "bytes 100-200/1000"),
            (CONTENT_RANGE, "bytes 100-199/*"),
            (CONTENT_RANGE, "bytes 199-100/1000"),
            (CONTENT_RANGE, "bytes 100-1000/1000"),
            (CONTENT_RANGE, "pages 100-199/1000"),
            (CONTENT_RANGE, "bytes 100-99999999999999999999/1000"),
            (CONTENT_LENGTH, "99"),
            (CONTENT_LENGTH, "101"),
            (CONTENT_LENGTH, "many"),
            (CONTENT_ENCODING, "gzip"),
        ] {
            let mut lines = GOOD.to_vec();
            lines.retain(|(other, _)| *other != name);
            lines.push((name, lie));
            assert!(matches!(answer(206, &lines), Err(Problem::Wrong { .. })), "{lie}");
        }
        assert!(matches!(answer(206, &GOOD[1..]), Err(Problem::Wrong { .. })), "no range");
    }

    #[test]
    fn another_object_is_noticed() {
        for (name, now) in [(CONTENT_RANGE, "bytes 100-199/1001"), (ETAG, "\"b\"")] {
            let mut lines = GOOD.to_vec();
            lines.retain(|(other, _)| *other != name);
            lines.push((name, now));
            assert!(matches!(answer(206, &lines), Err(Problem::Changed { .. })), "{now}");
        }
        assert!(matches!(answer(206, &GOOD[..2]), Err(Problem::Changed { .. })), "no ETag");
        assert!(matches!(answer(412, &[]), Err(Problem::Changed { .. })));
        assert!(matches!(answer(416, &[]), Err(Problem::Changed { .. })));
    }

    #[test]
    fn other_answers_say_what_they_mean() {
        assert!(matches!(answer(200, &GOOD), Err(Problem::NoRanges)));
        for status in [401, 403] {
            assert!(answer(status, &[]).unwrap_err().to_string().contains("signed"));
        }
        assert!(matches!(answer(404, &[]), Err(Problem::Missing { .. })));
        assert!(matches!(answer(302, &[]), Err(Problem::Status { .. })));
        for status in [429, 500, 503] {
            let busy = answer(status, &[(RETRY_AFTER, "7")]).unwrap_err();
            assert_eq!(busy.retry_after(), Some(Duration::from_secs(7)));
            assert!(busy.is_passing());
            let date = answer(status, &[(RETRY_AFTER, "Fri, 31 Dec 1999 23:59:59 GMT")]);
            assert_eq!(date.unwrap_err().retry_after(), None);
        }
    }

    #[test]
    fn weak_tags_are_compared_and_make_no_condition() {
        let lines = headers(&[(ETAG, "W/\"a\""), (LAST_MODIFIED, "then")]);
        assert_eq!(Validator::of(&lines), Validator::Weak("W/\"a\"".into()));
        let lines = headers(&[(LAST_MODIFIED, "then")]);
        assert_eq!(Validator::of(&lines), Validator::Modified("then".into()));
        assert_eq!(Validator::of(&HeaderMap::new()), Validator::None);
    }
}
