//! Which servers are believed to be who they say they are.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::{CertificateError, Error as TlsError};
use rustls_native_certs::{CertificateResult, load_certs_from_paths, load_native_certs};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::error::Problem;

/// The authorities that this machine trusts, or why there are none; read once, and when
/// first needed.
static SYSTEM: OnceLock<Result<RootCerts, String>> = OnceLock::new();

/// Trusts servers that the authorities in this file vouch for; without one, those of
/// the machine.
pub(super) fn trusting(file: Option<&Path>) -> Result<TlsConfig, Problem> {
    let (roots, from) = match file {
        Some(path) => (roots(load_certs_from_paths(Some(path), None)), path.display().to_string()),
        None => (
            SYSTEM.get_or_init(|| roots(load_native_certs())).clone(),
            "the authorities that this machine trusts".to_owned(),
        ),
    };
    let roots = roots.map_err(|what| Problem::Authorities { from, what })?;
    Ok(with(roots))
}

/// Trusts no server.
pub(super) fn trusting_nobody() -> TlsConfig {
    with(RootCerts::Specific(Arc::default()))
}

fn with(roots: RootCerts) -> TlsConfig {
    let crypto = Arc::new(rustls::crypto::ring::default_provider());
    TlsConfig::builder().root_certs(roots).unversioned_rustls_crypto_provider(crypto).build()
}

/// What was loaded. That some of it cannot be read is no reason to go without the rest.
fn roots(loaded: CertificateResult) -> Result<RootCerts, String> {
    let certs = loaded.certs.iter().map(|cert| Certificate::from_der(cert).to_owned());
    let certs: Vec<_> = certs.collect();
    if certs.is_empty() {
        let error = loaded.errors.first().map(ToString::to_string);
        return Err(error.unwrap_or_else(|| "there is no certificate in it".into()));
    }
    Ok(RootCerts::Specific(Arc::new(certs)))
}

/// What was wrong, if it was the server's certificate, or that it has none.
pub(super) fn problem(error: &ureq::Error) -> Option<Problem> {
    let error = match error {
        ureq::Error::Rustls(error) => error,
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref()?,
        _ => return None,
    };
    match error {
        // Who has the name of an authority, and not its key, is none.
        TlsError::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => {
            let what = "it was issued by nobody who is trusted here".into();
            Some(Problem::Untrusted { what })
        }
        TlsError::InvalidCertificate(why) => Some(Problem::Untrusted { what: why.to_string() }),
        TlsError::InvalidMessage(_) => Some(Problem::Wrong {
            what: "it is no TLS; give another port, or, if this server has none, an http:// URL"
                .into(),
        }),
        _ => None,
    }
}
