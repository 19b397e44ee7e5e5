//! Where an object is: the URLs that are taken, and how they are shown.

use std::fmt;
use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::http::Uri;

use super::error::{Problem, RemoteError};

/// What stays as it is in a path segment.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The URL of an object. Shown without its query, which may be what lets one read
/// the object.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ObjectUrl {
    uri: Uri,
    shown: String,
}

/// Whether this is meant as a URL: it begins with a scheme and `://`. A file of such
/// a name is reached as `./NAME`.
pub(crate) fn is_url(path: &Path) -> bool {
    let scheme = path.to_str().and_then(|text| text.split_once("://")).map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| {
        scheme.starts_with(|first: char| first.is_ascii_alphabetic())
            && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
    })
}

impl ObjectUrl {
    /// The URL that a path is, if [`is_url`] says so.
    pub(crate) fn parse(path: &Path) -> Result<Self, RemoteError> {
        let text = path.to_string_lossy();
        let refused = |why: &'static str| RemoteError {
            url: without_secrets(&text),
            problem: Problem::Url { why },
        };
        let uri: Uri = text.parse().map_err(|_| refused("it is no valid URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") if cfg!(feature = "tls") => {}
            Some("https") => {
                return Err(refused(
                    "this program was built without TLS (the feature `tls`); let a proxy on this \
                     machine speak it, and give that one's http:// URL",
                ));
            }
            _ => return Err(refused("only http:// and https:// are known")),
        }
        let authority = uri.authority().map(ureq::http::uri::Authority::as_str);
        match authority {
            None | Some("") => return Err(refused("it names no host")),
            Some(authority) if authority.contains('@') => {
                return Err(refused(
                    "a password on the command line is everybody's; give a signed URL, or let a \
                     proxy on this machine add the credentials",
                ));
            }
            Some(_) => {}
        }
        Ok(Self::of(uri))
    }

    fn of(uri: Uri) -> Self {
        let query = if uri.query().is_some() { "?..." } else { "" };
        let authority = uri.authority().map_or("", ureq::http::uri::Authority::as_str);
        let shown = format!("{}://{authority}{}{query}", scheme_of(&uri), uri.path());
        Self { uri, shown }
    }

    /// Whether its server must show who it is.
    pub(crate) fn is_secure(&self) -> bool {
        scheme_of(&self.uri) == "https"
    }

    pub(crate) fn uri(&self) -> &Uri {
        &self.uri
    }

    /// What people may see of it.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    /// The object of that name beside this one.
    pub(crate) fn beside(&self, name: &str) -> Option<Self> {
        let authority = self.uri.authority()?.as_str();
        let (directory, _) = self.uri.path().rsplit_once('/')?;
        let name = utf8_percent_encode(name, SEGMENT);
        let scheme = scheme_of(&self.uri);
        Some(Self::of(format!("{scheme}://{authority}{directory}/{name}").parse().ok()?))
    }
}

fn scheme_of(uri: &Uri) -> &str {
    uri.scheme_str().unwrap_or_default()
}

/// A URL that was not understood, without what may be secret in it.
fn without_secrets(text: &str) -> String {
    let text = text.split('?').next().unwrap_or_default();
    match (text.split_once("://"), text.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, rest))) => format!("{scheme}://...@{rest}"),
        _ => text.to_owned(),
    }
}

impl fmt::Debug for ObjectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ObjectUrl, String> {
        ObjectUrl::parse(Path::new(text)).map_err(|error| error.to_string())
    }

    #[test]
    fn urls_are_told_from_paths() {
        for url in ["http://h/x", "https://h/x", "s3://bucket/key", "HTTP://h/x"] {
            assert!(is_url(Path::new(url)), "{url}");
        }
        for path in ["/snap/mem", "./http://h/x", "http:/h/x", "a b://c", "://x", "mem.vmimg"] {
            assert!(!is_url(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn what_a_query_says_is_not_shown() {
        let url = parse("http://h:81/a/b%20c.vmimg?signature=secret").unwrap();
        assert_eq!(url.shown(), "http://h:81/a/b%20c.vmimg?...");
        assert_eq!(format!("{url:?}"), url.shown());
        assert_eq!(url.uri().query(), Some("signature=secret"));
    }

    #[test]
    fn neighbours_are_beside_and_nowhere_else() {
        let url = parse("http://h:81/a/b.vmimg?signature=secret").unwrap();
        let beside = |name: &str| url.beside(name).unwrap().uri().to_string();
        assert_eq!(beside("base.vmimg"), "http://h:81/a/base.vmimg");
        assert_eq!(beside("b?s#e%2f é"), "http://h:81/a/b%3Fs%23e%252f%20%C3%A9");
        assert_eq!(parse("http://h").unwrap().beside("x").unwrap().uri().to_string(), "http://h/x");
    }

    #[test]
    fn secure_ones_stay_secure() {
        if cfg!(feature = "tls") {
            let url = parse("https://h/a/b.vmimg?signature=secret").unwrap();
            assert!(url.is_secure() && url.beside("c").unwrap().is_secure());
            assert_eq!(url.shown(), "https://h/a/b.vmimg?...");
        } else {
            let error = parse("https://h/x?key=secret").unwrap_err();
            assert!(error.contains("without TLS") && !error.contains("secret"), "{error}");
        }
        assert!(!parse("http://h/x").unwrap().is_secure());
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_a_remedy_and_without_secrets() {
        for (url, says) in [
            ("ftp://h/x?key=secret", "only http://"),
            ("http://user:secret@h/x", "signed URL"),
            ("http:///x", "no valid URL"),
            ("http://h/a b", "no valid URL"),
        ] {
            let error = parse(url).unwrap_err();
            assert!(error.contains(says) && !error.contains("secret"), "{url}: {error}");
        }
    }
}
