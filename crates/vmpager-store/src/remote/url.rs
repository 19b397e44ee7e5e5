//! Where an object is: the URLs that are taken, and how they are shown.

use std::fmt;
use std::path::Path;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::http::Uri;

use super::error::{Problem, RemoteError};
#[cfg(feature = "object-store")]
use super::provider::StoreObject;

/// What stays as it is in a path segment.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The URL of an object. Shown without its query, which may be what lets one read
/// the object.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ObjectUrl {
    at: At,
    shown: String,
}

/// Where an object is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// At a server.
    Server(Uri),
    /// In a store.
    #[cfg(feature = "object-store")]
    Store(StoreObject),
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
        if let Some(in_store) = in_store(&text) {
            return in_store.map_err(refused);
        }
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
            _ => {
                return Err(refused("only http://, https://, s3://, gs:// and az:// are known"));
            }
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
        Self { at: At::Server(uri), shown }
    }

    #[cfg(feature = "object-store")]
    fn in_store(object: StoreObject) -> Self {
        let shown = object.to_string();
        Self { at: At::Store(object), shown }
    }

    pub(crate) fn at(&self) -> &At {
        &self.at
    }

    /// What tells it from other objects: not for people.
    pub(crate) fn identity(&self) -> String {
        match &self.at {
            At::Server(uri) => uri.to_string(),
            #[cfg(feature = "object-store")]
            At::Store(object) => object.to_string(),
        }
    }

    /// What people may see of it.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    /// The object of that name beside this one.
    pub(crate) fn beside(&self, name: &str) -> Option<Self> {
        match &self.at {
            At::Server(uri) => beside(uri, name).map(Self::of),
            #[cfg(feature = "object-store")]
            At::Store(object) => Some(Self::in_store(object.beside(name))),
        }
    }
}

fn beside(uri: &Uri, name: &str) -> Option<Uri> {
    let authority = uri.authority()?.as_str();
    let (directory, _) = uri.path().rsplit_once('/')?;
    let name = utf8_percent_encode(name, SEGMENT);
    let scheme = scheme_of(uri);
    format!("{scheme}://{authority}{directory}/{name}").parse().ok()
}

/// An object of a store, if this is the URL of one, or what is wrong with it. Keys are as
/// they are: nothing of them is decoded, and there is no query.
#[cfg(feature = "object-store")]
fn in_store(text: &str) -> Option<Result<ObjectUrl, &'static str>> {
    let object = StoreObject::parse(text)?;
    Some(object.map(ObjectUrl::in_store))
}

#[cfg(not(feature = "object-store"))]
const WITHOUT_STORES: &str = "this program was built without object stores: build it with \
    `--features object-store`, or give a signed https:// URL";

#[cfg(not(feature = "object-store"))]
fn in_store(text: &str) -> Option<Result<ObjectUrl, &'static str>> {
    let is_one = ["s3://", "gs://", "az://"].iter().any(|scheme| text.starts_with(scheme));
    is_one.then_some(Err(WITHOUT_STORES))
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

    fn uri(url: &ObjectUrl) -> &Uri {
        match url.at() {
            At::Server(uri) => uri,
            #[cfg(feature = "object-store")]
            At::Store(object) => panic!("{object} is at no server"),
        }
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
        assert_eq!(uri(&url).query(), Some("signature=secret"));
    }

    #[test]
    fn neighbours_are_beside_and_nowhere_else() {
        let url = parse("http://h:81/a/b.vmimg?signature=secret").unwrap();
        let beside = |name: &str| url.beside(name).unwrap().identity();
        assert_eq!(beside("base.vmimg"), "http://h:81/a/base.vmimg");
        assert_eq!(beside("b?s#e%2f é"), "http://h:81/a/b%3Fs%23e%252f%20%C3%A9");
        assert_eq!(parse("http://h").unwrap().beside("x").unwrap().identity(), "http://h/x");
    }

    #[test]
    fn secure_ones_stay_secure() {
        if cfg!(feature = "tls") {
            let url = parse("https://h/a/b.vmimg?signature=secret").unwrap();
            assert_eq!(url.beside("c").unwrap().identity(), "https://h/a/c");
            assert_eq!(url.shown(), "https://h/a/b.vmimg?...");
        } else {
            let error = parse("https://h/x?key=secret").unwrap_err();
            assert!(error.contains("without TLS") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    #[cfg(feature = "object-store")]
    fn keys_are_as_they_are() {
        let url = parse("s3://bucket/a b/c%20d?e#f.vmimg").unwrap();
        assert_eq!(url.shown(), "s3://bucket/a b/c%20d?e#f.vmimg");
        assert_eq!(url.beside("g h").unwrap().shown(), "s3://bucket/a b/g h");
        assert_eq!(parse("az://c/x").unwrap().beside("y").unwrap().shown(), "az://c/y");
        let At::Store(object) = url.at() else { panic!("{url:?}") };
        assert_eq!(
            (object.bucket.as_str(), object.key.as_str()),
            ("bucket", "a b/c%20d?e#f.vmimg")
        );
        for url in ["s3://", "gs://bucket", "az://container/", "s3:///key"] {
            assert!(parse(url).unwrap_err().contains("bucket and a key"), "{url}");
        }
    }

    #[test]
    #[cfg(not(feature = "object-store"))]
    fn stores_that_were_not_built_in_say_so() {
        for url in ["s3://bucket/key", "gs://bucket/key", "az://container/key"] {
            assert!(parse(url).unwrap_err().contains("--features object-store"), "{url}");
        }
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
