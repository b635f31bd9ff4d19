//! One object at a real API server: it is written, and watched for when that is told.

use std::collections::BTreeMap;
use std::io::BufRead as _;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;
use sluice_bench::api_client::ApiClient;
use sluice_bench::control_plane::{collection, path};

/// Puts an object in place. When the API server said so, and the version it has now.
pub(super) fn replace(client: &ApiClient, object: &Value) -> Result<(Instant, String)> {
    client.namespace().run(|| {
        let answer = client.request_here("PUT", &path(object)?, Some(object))?;
        let accepted = Instant::now();
        Ok((accepted, version(&serde_json::from_str(&answer)?).context("an object has a version")?))
    })
}

fn version(object: &Value) -> Option<String> {
    object["metadata"]["resourceVersion"].as_str().map(str::to_owned)
}

/// A watch of our own on one object: what the API server alone takes to tell of a change.
pub(super) struct Watch {
    events: Receiver<(Instant, String)>,
    seen: BTreeMap<String, Instant>,
}

impl Watch {
    /// Watches this object until the API server ends.
    pub(super) fn start(client: &ApiClient, object: &Value) -> Result<Self> {
        let name = object["metadata"]["name"].as_str().context("a name")?;
        let path =
            format!("{}?watch=true&fieldSelector=metadata.name%3D{name}&timeoutSeconds=86400", collection(object)?);
        let (client, (sender, events)) = (client.clone(), channel());
        let body = move || {
            let lines = client.namespace().enter().and_then(|()| client.lines_here(&path));
            let Ok(lines) = lines.inspect_err(|error| eprintln!("the watch of our own: {error:#}")) else { return };
            // It ends with the API server.
            for line in lines.lines().map_while(Result::ok) {
                let now = Instant::now();
                let event: Value = serde_json::from_str(&line).unwrap_or_default();
                if version(&event["object"]).is_some_and(|version| sender.send((now, version)).is_err()) {
                    return;
                }
            }
        };
        thread::Builder::new().name("watch".to_owned()).spawn(body).context("cannot start a thread")?;
        Ok(Self { events, seen: BTreeMap::new() })
    }

    /// When the object came in this version.
    pub(super) fn when(&mut self, version: &str, patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        while !self.seen.contains_key(version) {
            let wait = deadline.saturating_duration_since(Instant::now());
            let (at, version) = self.events.recv_timeout(wait).context("the watch of our own tells nothing")?;
            self.seen.insert(version, at);
        }
        Ok(self.seen[version])
    }
}
