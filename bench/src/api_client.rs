//! Requests of an administrator to an API server, on connections that are kept: thousands of objects are written in seconds.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use crate::netns::NetNs;

/// Bound on one request.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Most of an answer: lists of a hundred thousand endpoints are long.
const LIMIT: u64 = 1 << 30;

/// A client of one API server, whose connections are made in one namespace.
#[derive(Clone, Debug)]
pub struct ApiClient {
    ns: NetNs,
    server: String,
    agent: Agent,
}

impl ApiClient {
    /// A client of the server at `https://ADDRESS:6443`, told by this certificate, or by its own authority's in that file.
    pub fn new(ns: NetNs, address: &str, certificate: &Path) -> Result<Self> {
        let pem = fs::read(certificate).with_context(|| format!("cannot read {}", certificate.display()))?;
        let mut roots: Vec<Certificate<'static>> = Vec::new();
        for item in parse_pem(&pem) {
            if let PemItem::Certificate(certificate) = item? {
                roots.push(certificate);
            }
        }
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::from(roots))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let config = Agent::config_builder()
            .tls_config(tls.build())
            .proxy(None)
            .http_status_as_error(false)
            .timeout_global(Some(TIMEOUT))
            // Several threads share it.
            .max_idle_connections_per_host(32)
            .max_idle_connections(32);
        Ok(Self { ns, server: format!("https://{address}:6443"), agent: config.build().new_agent() })
    }

    /// A request from a thread of its own inside the namespace; the answer's text, or with any status but 2xx an error with it.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String> {
        self.ns.run(|| self.request_here(method, path, body))
    }

    /// The same from the calling thread, which is inside the namespace.
    pub fn request_here(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String> {
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let url = format!("{}{path}", self.server);
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(&url)
            .header("Authorization", "Bearer admin-token")
            .header("Content-Type", kind);
        let answer = match body {
            Some(body) => self.agent.run(request.body(body.to_string())?),
            None => self.agent.run(request.body(())?),
        };
        read(answer.with_context(|| format!("{method} {url}"))?).with_context(|| format!("{method} {url}"))
    }

    /// The lines of an answer that goes on for as long as the server wants, such as a watch.
    pub fn lines_here(&self, path: &str) -> Result<impl BufRead + Send + use<>> {
        let url = format!("{}{path}", self.server);
        let request = self.agent.get(&url).header("Authorization", "Bearer admin-token");
        let answer = request.config().timeout_global(None).build().call().with_context(|| url.clone())?;
        ensure!(answer.status().is_success(), "{url}: {}", answer.status());
        Ok(BufReader::new(answer.into_body().into_reader()))
    }

    /// Where requests are to be made from.
    #[must_use]
    pub fn namespace(&self) -> &NetNs {
        &self.ns
    }
}

fn read(mut answer: ureq::http::Response<Body>) -> Result<String> {
    let status = answer.status();
    let text = answer.body_mut().with_config().limit(LIMIT).read_to_string()?;
    if !status.is_success() {
        bail!("{status}: {text}");
    }
    Ok(text)
}
