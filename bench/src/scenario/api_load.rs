//! One object at a real API server: it is written, and watched for when that is told.

use std::collections::BTreeMap;
use std::io::BufRead as _;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
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

/// Tells of every version of what is watched until nobody listens. A server may end a watch at any time: then there is another.
fn follow(client: &ApiClient, path: &str, told: &Sender<(Instant, String)>) -> Result<()> {
    loop {
        for line in client.lines_here(path)?.lines().map_while(Result::ok) {
            let now = Instant::now();
            let event: Value = serde_json::from_str(&line)?;
            if version(&event["object"]).is_some_and(|version| told.send((now, version)).is_err()) {
                return Ok(());
            }
        }
    }
}

/// A watch of our own on one object: what the API server alone takes to tell of a change.
pub(super) struct Watch {
    events: Receiver<(Instant, String)>,
    seen: BTreeMap<String, Instant>,
    /// While it is there, that the watch fails is told.
    _wanted: Arc<()>,
}

impl Watch {
    /// Watches this object until the API server ends.
    pub(super) fn start(client: &ApiClient, object: &Value) -> Result<Self> {
        let name = object["metadata"]["name"].as_str().context("a name")?;
        // From whatever version it has in memory: to be as new as etcd, it would wait for a change of another object.
        let which = format!("fieldSelector=metadata.name%3D{name}&resourceVersion=0&timeoutSeconds=86400");
        let path = format!("{}?watch=true&{which}", collection(object)?);
        let (client, (sender, events)) = (client.clone(), channel());
        let wanted = Arc::new(());
        let is_wanted = Arc::downgrade(&wanted);
        let body = move || {
            let ended = client.namespace().enter().and_then(|()| follow(&client, &path, &sender));
            if let (Err(error), 1..) = (ended, is_wanted.strong_count()) {
                eprintln!("the watch of our own: {error:#}");
            }
        };
        thread::Builder::new().name("watch".to_owned()).spawn(body).context("cannot start a thread")?;
        Ok(Self { events, seen: BTreeMap::new(), _wanted: wanted })
    }

    /// When the object came in this version.
    pub(super) fn when(&mut self, version: &str, patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        while !self.seen.contains_key(version) {
            let wait = deadline.saturating_duration_since(Instant::now());
            let (at, version) = self.events.recv_timeout(wait).context("the watch of our own tells nothing")?;
            // The first word of it counts.
            self.seen.entry(version).or_insert(at);
        }
        Ok(self.seen[version])
    }
}
