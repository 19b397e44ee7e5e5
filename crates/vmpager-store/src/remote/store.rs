//! Objects in S3, GCS and Azure: their addresses, who asks, and how it is signed are
//! `object_store`'s; requests go out, and answers are judged, as those of any server.
//!
//! ```text
//! part, condition -> object_store: credentials, signature -> Service -> Agent
//!                                                              |
//!            check (http) <- status, headers, body <- Slot <---+
//! ```
//!
//! What `object_store` makes of the answer is not looked at: it sees the head, and an
//! empty body. The requests for credentials that it makes besides it reads itself.

use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, ClientOptions, GetOptions, GetRange, ObjectStore, RetryConfig,
};
use ureq::http::header::{CONTENT_LENGTH, HeaderMap};
use ureq::http::{Request, Response};
use ureq::{Agent, Body};

use super::error::Problem;
use super::http::{Known, Validator, failed};
use super::provider::{Provider, StoreObject};

/// Of an answer that is no part of an object, no more is read.
const ANSWER: u64 = 1 << 20;
/// Of one that refuses, to find out why.
const REFUSAL: u64 = 16 << 10;

/// One object of a store.
pub(super) struct Store {
    store: Arc<dyn ObjectStore>,
    path: Path,
    provider: Provider,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing of what lets one read it.
        write!(f, "Store({:?} {})", self.provider, self.path)
    }
}

impl Store {
    /// Has requests for an object made by this agent, which follows no redirects: they
    /// would need other signatures. Nothing is asked for yet.
    pub(super) fn open(object: &StoreObject, agent: &Agent) -> Result<Self, Problem> {
        let (provider, bucket) = (object.provider, object.bucket.as_str());
        let path = Path::parse(&object.key).map_err(|_| Problem::Url {
            why: "a key has neither empty parts nor the parts . and .., nor does it end in /",
        })?;
        let connector = Connector { agent: agent.clone(), provider };
        // Who asks again, and when, is decided for all servers in one place.
        let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let store: object_store::Result<Arc<dyn ObjectStore>> = match provider {
            Provider::S3 => AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .with_retry(once)
                .with_http_connector(connector)
                .build()
                .map(|store| Arc::new(store) as _),
            Provider::Google => GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(bucket)
                .with_retry(once)
                .with_http_connector(connector)
                .build()
                .map(|store| Arc::new(store) as _),
            Provider::Azure => MicrosoftAzureBuilder::from_env()
                .with_container_name(bucket)
                .with_retry(once)
                .with_http_connector(connector)
                .build()
                .map(|store| Arc::new(store) as _),
        };
        let store = store.map_err(|error| no_credentials(provider, &error))?;
        Ok(Self { store, path, provider })
    }

    /// Asks for a part, on condition that the object is as it was known.
    pub(super) fn get(&self, part: &Range<u64>, known: Option<&Known>) -> Answer {
        let if_match = match known.map(|known| &known.validator) {
            Some(Validator::Etag(etag)) => Some(etag.clone()),
            // Stores tag what they have; what one says instead is compared.
            _ => None,
        };
        let slot = Slot::default();
        let mut options = GetOptions {
            range: Some(GetRange::Bounded(part.clone())),
            if_match,
            ..GetOptions::default()
        };
        options.extensions.insert(slot.clone());
        let ended = pollster::block_on(self.store.get_opts(&self.path, options));
        let answer = match (slot.take(), ended) {
            (Some(answer), _) => answer?,
            (None, Err(error)) => return Err(no_credentials(self.provider, &error)),
            (None, Ok(_)) => {
                let what = "it answered without being asked".into();
                return Err(Problem::Unreachable { what });
            }
        };
        if answer.status().is_success() {
            return Ok(answer);
        }
        let (head, body) = answer.into_parts();
        let code = code(&head.headers, body);
        match self.provider.refusal(head.status.as_u16(), code.as_deref(), &head.headers) {
            Some(problem) => Err(problem),
            None => Ok(Response::from_parts(head, Body::builder().data(Vec::new()))),
        }
    }
}

/// That it could not be said who asks: of what failed, only this comes before a request.
fn no_credentials(provider: Provider, error: &object_store::Error) -> Problem {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    Problem::Credentials { what: cause.to_string(), remedy: provider.credentials() }
}

/// What a store calls what is wrong: in a header (Azure), or an XML document.
fn code(headers: &HeaderMap, body: Body) -> Option<String> {
    let named = headers.get("x-ms-error-code").and_then(|code| code.to_str().ok());
    let code = match named {
        Some(code) => code.to_owned(),
        None => {
            let mut bytes = Vec::new();
            body.into_reader().take(REFUSAL).read_to_end(&mut bytes).ok()?;
            let text = String::from_utf8_lossy(&bytes);
            let (_, rest) = text.split_once("<Code>")?;
            rest.split_once("</Code>")?.0.to_owned()
        }
    };
    // It is shown to people.
    let is_name = !code.is_empty() && code.len() < 64;
    (is_name && code.bytes().all(|byte| byte.is_ascii_alphanumeric())).then_some(code)
}

type Answer = Result<Response<Body>, Problem>;

/// Where the answer to a request for an object is put.
#[derive(Clone, Default)]
struct Slot(Arc<Mutex<Option<Answer>>>);

impl Slot {
    fn put(&self, answer: Answer) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
    }

    fn take(&self) -> Option<Answer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Has `object_store` make its requests by the agent.
#[derive(Debug)]
struct Connector {
    agent: Agent,
    provider: Provider,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let allowed = options.get_config_value(&ClientConfigKey::AllowHttp);
        Ok(HttpClient::new(Service {
            agent: self.agent.clone(),
            provider: self.provider,
            may_be_plain: allowed.as_deref() == Some("true"),
        }))
    }
}

#[derive(Debug)]
struct Service {
    agent: Agent,
    provider: Provider,
    /// Whether requests may go where others can listen.
    may_be_plain: bool,
}

/// An error for `object_store`, in our words.
fn told(problem: Problem) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, problem)
}

impl Service {
    fn send(&self, request: HttpRequest) -> Answer {
        if request.uri().scheme_str() != Some("https") && !self.may_be_plain {
            return Err(Problem::Plain { variable: self.provider.allow_http() });
        }
        let (mut head, body) = request.into_parts();
        let body = body.as_bytes().map(|bytes| bytes.to_vec()).unwrap_or_default();
        let sent = if body.is_empty() {
            // What has no body has no length of one.
            head.headers.remove(CONTENT_LENGTH);
            self.agent.run(Request::from_parts(head, ()))
        } else {
            self.agent.run(Request::from_parts(head, body))
        };
        sent.map_err(|error| failed(&error))
    }
}

#[async_trait::async_trait]
impl HttpService for Service {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let slot = request.extensions_mut().remove::<Slot>();
        let answer = self.send(request);
        let Some(slot) = slot else {
            let (head, body) = answer.map_err(told)?.into_parts();
            let mut bytes = Vec::new();
            let read = body.into_reader().take(ANSWER).read_to_end(&mut bytes);
            read.map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
            return Ok(Response::from_parts(head, bytes.into()));
        };
        let seen = match &answer {
            Ok(answer) => {
                let mut seen = Response::new(HttpResponseBody::from(Vec::new()));
                *seen.status_mut() = answer.status();
                seen.headers_mut().clone_from(answer.headers());
                Ok(seen)
            }
            Err(problem) => Err(told(problem.clone())),
        };
        slot.put(answer);
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_found_in_a_header_or_a_document() {
        let body = |text: &str| Body::builder().data(text.to_owned());
        let nothing = HeaderMap::new();
        let document = "<?xml?><Error><Code>NoSuchBucket</Code><Message>m</Message></Error>";
        assert_eq!(code(&nothing, body(document)).as_deref(), Some("NoSuchBucket"));
        for unclear in ["", "<Code>", "<Code></Code>", "<Code>\x1b[31mred</Code>", "it is not"] {
            assert_eq!(code(&nothing, body(unclear)), None, "{unclear:?}");
        }
        let mut named = HeaderMap::new();
        named.insert("x-ms-error-code", "BlobNotFound".parse().unwrap());
        assert_eq!(code(&named, body(document)).as_deref(), Some("BlobNotFound"));
    }
}
