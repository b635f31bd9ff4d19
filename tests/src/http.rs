//! HTTP answers of the daemon, of any status and size.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use sluice_bench::netns::NetNs;

use crate::cluster::SOON;

/// Most of an answer: lists of thousands of endpoints are long.
const LIMIT: u64 = 64 << 20;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Body.
    pub body: String,
}

/// Asks from inside a namespace, on a new connection.
pub fn get(ns: &NetNs, address: SocketAddr, path: &str) -> Result<Answer> {
    ns.run(|| {
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(SOON)).build();
        let url = format!("http://{address}{path}");
        let mut response =
            ureq::Agent::new_with_config(config).get(&url).call().with_context(|| format!("GET {url}"))?;
        let text = |value: &ureq::http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        Ok(Answer {
            status: response.status().as_u16(),
            headers: response.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
            body: response.body_mut().with_config().limit(LIMIT).read_to_string()?,
        })
    })
}
