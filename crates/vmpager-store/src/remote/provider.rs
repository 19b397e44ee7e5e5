//! The object stores that are known: what their URLs are, what of the environment they
//! heed, and what they mean by what they answer.

use std::fmt;

use ureq::http::header::HeaderMap;

use super::error::Problem;

/// A kind of store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Provider {
    S3,
    Google,
    Azure,
}

/// An object of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoreObject {
    pub(crate) provider: Provider,
    pub(crate) bucket: String,
    /// As it is: nothing of it is encoded.
    pub(crate) key: String,
}

impl StoreObject {
    /// What a URL of a store names; `None` if it is none.
    pub(super) fn parse(text: &str) -> Option<Result<Self, &'static str>> {
        let (scheme, rest) = text.split_once("://")?;
        let provider = Provider::of_scheme(scheme)?;
        let (bucket, key) = rest.split_once('/').unwrap_or_default();
        if bucket.is_empty() || key.is_empty() {
            return Some(Err("it must name a bucket and a key: s3://BUCKET/KEY, and so on"));
        }
        Some(Ok(Self { provider, bucket: bucket.to_owned(), key: key.to_owned() }))
    }

    /// The object of that name beside this one.
    pub(super) fn beside(&self, name: &str) -> Self {
        let directory = self.key.rsplit_once('/').map(|(directory, _)| format!("{directory}/"));
        Self { key: directory.unwrap_or_default() + name, ..self.clone() }
    }
}

impl fmt::Display for StoreObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}/{}", self.provider.scheme(), self.bucket, self.key)
    }
}

impl Provider {
    /// The one that URLs of this scheme are of.
    fn of_scheme(scheme: &str) -> Option<Self> {
        [Self::S3, Self::Google, Self::Azure].into_iter().find(|one| one.scheme() == scheme)
    }

    fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }

    /// What to do if there are no credentials, or the wrong ones.
    pub(super) fn credentials(self) -> &'static str {
        match self {
            Self::S3 => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to those of somebody who may \
                 read it, or run where a role is given; AWS_SKIP_SIGNATURE=true for public ones"
            }
            Self::Google => {
                "set GOOGLE_APPLICATION_CREDENTIALS to the file of somebody who may read it, or \
                 run where a service account is given; GOOGLE_SKIP_SIGNATURE=true for public ones"
            }
            Self::Azure => {
                "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or \
                 AZURE_STORAGE_SAS_TOKEN to one that may read it, or run where an identity is \
                 given; AZURE_SKIP_SIGNATURE=true for public ones"
            }
        }
    }

    /// What says that the store may be asked without TLS.
    pub(super) fn allow_http(self) -> &'static str {
        match self {
            Self::S3 => "AWS_ALLOW_HTTP",
            Self::Google => "GOOGLE_ALLOW_HTTP",
            Self::Azure => "AZURE_ALLOW_HTTP",
        }
    }

    /// What says where the store is.
    fn endpoint(self) -> &'static str {
        match self {
            Self::S3 => "AWS_ENDPOINT_URL",
            Self::Google => "GOOGLE_BASE_URL",
            Self::Azure => "AZURE_STORAGE_ACCOUNT_NAME or AZURE_STORAGE_ENDPOINT",
        }
    }

    /// What is wrong, if it is for one of these reasons that other servers do not have.
    pub(super) fn refusal(
        self,
        status: u16,
        code: Option<&str>,
        headers: &HeaderMap,
    ) -> Option<Problem> {
        let answer = match code {
            Some(code) => format!("{status} {code}"),
            None => status.to_string(),
        };
        match (status, code) {
            (404, Some("NoSuchBucket" | "ContainerNotFound")) => {
                Some(Problem::NoBucket { answer, endpoint: self.endpoint() })
            }
            (301 | 307, _)
            | (400, Some("AuthorizationHeaderMalformed" | "IllegalLocationConstraintException")) => {
                let region = headers.get("x-amz-bucket-region");
                let region = region.and_then(|region| region.to_str().ok()).unwrap_or("its region");
                Some(Problem::Elsewhere { answer, region: region.to_owned() })
            }
            (403, Some("RequestTimeTooSkewed")) => {
                Some(Problem::Denied { answer, remedy: "set this machine's clock right" })
            }
            (400 | 401 | 403, _) => Some(Problem::Denied { answer, remedy: self.credentials() }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_their_reason_and_a_remedy() {
        for (status, code, says) in [
            (403, Some("InvalidAccessKeyId"), "(403 InvalidAccessKeyId); set AWS_ACCESS_KEY_ID"),
            (400, Some("ExpiredToken"), "(400 ExpiredToken); set AWS_ACCESS_KEY_ID"),
            (401, None, "(401); set AWS_ACCESS_KEY_ID"),
            (403, Some("RequestTimeTooSkewed"), "clock"),
            (404, Some("NoSuchBucket"), "AWS_ENDPOINT_URL"),
            (301, Some("PermanentRedirect"), "AWS_REGION=eu-central-1"),
            (400, Some("AuthorizationHeaderMalformed"), "AWS_REGION=eu-central-1"),
        ] {
            let headers =
                [("x-amz-bucket-region".parse().unwrap(), "eu-central-1".parse().unwrap())];
            let headers = headers.into_iter().collect();
            let problem = Provider::S3.refusal(status, code, &headers).unwrap();
            assert!(problem.to_string().contains(says), "{problem}");
            assert!(!problem.is_passing() && !problem.is_final());
        }
        for (status, code) in
            [(404, Some("NoSuchKey")), (404, None), (503, Some("SlowDown")), (412, None)]
        {
            assert!(Provider::S3.refusal(status, code, &HeaderMap::new()).is_none(), "{status}");
        }
    }
}
