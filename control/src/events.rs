//! Events on Services and on the Node for what an administrator must see, where the API server is the source.
//!
//! The name of an Event follows from what it says, so that a thousand nodes that see the same mistake make one Event of it.

use std::time::Duration;

use ahash::AHashMap;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;
use sluice_dataplane::table::ServiceName;
use tokio::sync::mpsc;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

use crate::source::api::Access;

/// Who reports.
const CONTROLLER: &str = "sluice";
/// Events that may wait.
const QUEUE: usize = 256;
/// How long the API server keeps an Event by default: only then the same is said again.
const MEMORY: Duration = Duration::from_secs(3600);
/// Events at once, after a silence.
const BURST: f64 = 25.0;
/// Events a second in the long run.
const RATE: f64 = 0.1;
/// Between two attempts to reach the API server.
const PAUSE: Duration = Duration::from_secs(10);
/// Most bytes of a note.
const NOTE_LIMIT: usize = 1000;

/// What an Event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    /// A Service, with its uid.
    Service(ServiceName, Option<String>),
    /// The own Node.
    Node,
}

/// What an Event says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The object.
    pub about: About,
    /// A word for programs, such as `AddressConflict`.
    pub reason: &'static str,
    /// For people.
    pub note: String,
    /// Only this node says so.
    pub is_of_node: bool,
    /// Something is wrong.
    pub is_warning: bool,
}

/// Takes Events, and never waits.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Told>);

impl Events {
    /// Sends them as this node until the last clone is dropped.
    #[must_use]
    pub fn start(access: Access, node_name: String) -> Self {
        let (sender, told) = mpsc::channel(QUEUE);
        tokio::spawn(send(access, node_name, told));
        Self(sender)
    }

    /// Tells. Too much at once is left out.
    pub fn tell(&self, told: Told) {
        if self.0.try_send(told).is_err() {
            tracing::debug!("too many Events: one is left out");
        }
    }
}

async fn send(access: Access, node_name: String, mut queue: mpsc::Receiver<Told>) {
    let mut client = None;
    let mut said: AHashMap<String, Instant> = AHashMap::new();
    let mut bucket = Bucket { tokens: BURST, at: Instant::now() };
    let mut is_refused = false;
    while let Some(told) = queue.recv().await {
        let event = event(&told, &node_name, Timestamp::now());
        let name = event.metadata.name.clone().unwrap_or_default();
        said.retain(|_, at| at.elapsed() < MEMORY);
        if said.contains_key(&name) {
            continue;
        }
        let pause = bucket.take(Instant::now());
        tokio::time::sleep(pause).await;
        loop {
            let sent = match &client {
                Some(client) => create(client, &event).await,
                None => match access.client().await {
                    Ok(new) => create(client.insert(new), &event).await,
                    Err(error) => Err(Refusal { code: None, words: format!("{error:#}") }),
                },
            };
            match sent {
                Ok(()) => {
                    is_refused = false;
                    said.insert(name, Instant::now());
                    break;
                }
                Err(Refusal { code: None | Some(401 | 429 | 500..), words }) => {
                    tracing::debug!("cannot create events: {words}");
                    client = None;
                    tokio::time::sleep(PAUSE).await;
                }
                Err(Refusal { words, .. }) => {
                    if !std::mem::replace(&mut is_refused, true) {
                        tracing::warn!("cannot create events.events.k8s.io: {words}");
                    }
                    break;
                }
            }
        }
    }
}

struct Refusal {
    code: Option<u16>,
    words: String,
}

async fn create(client: &kube::Client, event: &Event) -> Result<(), Refusal> {
    let namespace = event.metadata.namespace.as_deref().unwrap_or("default");
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    match api.create(&PostParams::default(), event).await {
        Ok(_) => Ok(()),
        // Another node, or we before a restart, said so.
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(kube::Error::Api(status)) => Err(Refusal { code: Some(status.code), words: status.message.clone() }),
        Err(error) => Err(Refusal { code: None, words: error.to_string() }),
    }
}

fn event(told: &Told, node_name: &str, now: Timestamp) -> Event {
    let regarding = match &told.about {
        About::Service(name, uid) => ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(name.namespace.to_string()),
            name: Some(name.name.to_string()),
            uid: uid.clone(),
            ..ObjectReference::default()
        },
        About::Node => ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node_name.to_owned()),
            // What kubectl looks for, since the kubelet says it so.
            uid: Some(node_name.to_owned()),
            ..ObjectReference::default()
        },
    };
    let instance = if told.is_of_node { node_name } else { "" };
    let hash = xxh3_64(
        format!("{} {instance} {} {}", regarding.uid.as_deref().unwrap_or(""), told.reason, told.note).as_bytes(),
    );
    let mut note = told.note.clone();
    note.truncate(note.floor_char_boundary(NOTE_LIMIT));
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{hash:016x}", regarding.name.as_deref().unwrap_or(CONTROLLER))),
            namespace: Some(regarding.namespace.clone().unwrap_or_else(|| "default".to_owned())),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        action: Some("Serve".to_owned()),
        reason: Some(told.reason.to_owned()),
        note: Some(note),
        regarding: Some(regarding),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(node_name.to_owned()),
        type_: Some(if told.is_warning { "Warning" } else { "Normal" }.to_owned()),
        ..Event::default()
    }
}

/// Says how long to wait before the next.
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> Duration {
        self.tokens = (self.tokens + (now - self.at).as_secs_f64() * RATE).min(BURST);
        self.at = now;
        self.tokens -= 1.0;
        Duration::from_secs_f64((-self.tokens).max(0.0) / RATE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(note: &str, is_of_node: bool) -> Told {
        let about = About::Service(ServiceName::new("ns", "web"), Some("u-1".to_owned()));
        Told { about, reason: "InvalidObject", note: note.to_owned(), is_of_node, is_warning: true }
    }

    #[test]
    fn the_name_says_what_is_said_and_not_by_which_node() {
        let name = |told: &Told, node: &str| event(told, node, Timestamp::UNIX_EPOCH).metadata.name.unwrap();
        let (one, other) = (told("no", false), told("not", false));
        assert_eq!(name(&one, "a"), name(&one, "b"));
        assert_ne!(name(&one, "a"), name(&other, "a"));
        assert_ne!(name(&told("no", true), "a"), name(&told("no", true), "b"));
        assert!(name(&one, "a").starts_with("web."));
        let long = event(&told(&"ä".repeat(900), false), "a", Timestamp::UNIX_EPOCH);
        assert!(long.note.is_some_and(|note| note.len() <= NOTE_LIMIT));
    }

    #[test]
    fn a_burst_goes_through_and_then_one_after_another() {
        let begun = Instant::now();
        let mut bucket = Bucket { tokens: BURST, at: begun };
        for _ in 0..25 {
            assert_eq!(bucket.take(begun), Duration::ZERO);
        }
        assert_eq!(bucket.take(begun).as_secs(), 10);
        assert_eq!(bucket.take(begun + Duration::from_secs(10)).as_secs(), 10);
        assert_eq!(bucket.take(begun + Duration::from_secs(3600)), Duration::ZERO);
    }
}
