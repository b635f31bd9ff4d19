//! One resource: list it in pages, watch it from there, go on after whatever happens.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::Api;
use kube::api::{ListParams, WatchEvent, WatchParams};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, timeout};

use super::access::Access;
use super::assembly::{Event, What};
use super::backoff::Backoff;
use super::failure::Failure;
use super::slim::Watched;
use crate::admin::metrics;
use crate::object::{Kind, Object};

/// Objects of one page.
const PAGE: u32 = 500;
/// Most that a page, or the beginning of a watch, may take.
const ANSWER_PATIENCE: Duration = Duration::from_secs(60);
/// A watch that lasted so long went well; one that ends sooner is not begun again at once.
const SETTLED: Duration = Duration::from_secs(1);
/// How long a server ends watches after, in seconds; at random, so that not all come back together.
const WATCH_SECONDS: std::ops::Range<u32> = 200..290;
/// Failures in a row, each answered by the server, after which our version is no longer believed.
const DISTRUST: u32 = 3;
/// How often to ask for a kind that the server did not know.
const UNKNOWN_INTERVAL: Duration = Duration::from_secs(300);
/// Between two log lines about failures of one resource.
const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// What is asked for.
#[derive(Clone, Debug)]
pub(super) struct Query {
    pub(super) kind: Kind,
    /// As roles name it.
    pub(super) resource: &'static str,
    pub(super) labels: Option<String>,
    pub(super) fields: Option<String>,
    /// After so long without a word of a watch, another connection goes on from the same version.
    pub(super) silence: Duration,
}

/// Why a round ended, other than by a failure.
enum Ended {
    /// The watch ended, or is silent.
    Watch,
    /// The server knows no such kind.
    Unknown,
    /// Nobody wants to know any more.
    Unheard,
}

/// Tells of one resource until nobody receives. `reached`: who meets the server tells all others that look for it.
pub(super) async fn follow<K: Watched>(
    access: Access,
    query: Query,
    events: mpsc::Sender<Event>,
    reached: Arc<Notify>,
) {
    let mut follower = Follower {
        access,
        query,
        events,
        reached: Arc::clone(&reached),
        client: None,
        version: None,
        begun: None,
        failures: 0,
        logged: None,
        is_logged: false,
    };
    let mut backoff = Backoff::default();
    loop {
        let ended = follower.round::<K>().await;
        let is_settled = follower.begun.take().is_some_and(|begun| begun.elapsed() >= SETTLED);
        if is_settled {
            backoff.reset();
            follower.failures = 0;
        }
        let delay = match ended {
            Ok(Ended::Unheard) => return,
            Ok(Ended::Unknown) => UNKNOWN_INTERVAL,
            Ok(Ended::Watch) if is_settled => Duration::ZERO,
            // Begun, so it is not refused: somebody in between cuts it off.
            Ok(Ended::Watch) => backoff.next(false, None, fastrand::f64()),
            Err(failure) => {
                let is_reached = failure.code.is_some();
                let delay = backoff.next(is_reached, failure.retry_after, fastrand::f64());
                if !follower.fail(failure).await {
                    return;
                }
                if is_reached {
                    reached.notify_waiters();
                    delay
                } else {
                    // Either is the time to try.
                    let _ = timeout(delay, reached.notified()).await;
                    Duration::ZERO
                }
            }
        };
        tokio::time::sleep(delay).await;
    }
}

struct Follower {
    access: Access,
    query: Query,
    events: mpsc::Sender<Event>,
    reached: Arc<Notify>,
    client: Option<kube::Client>,
    /// What the objects told of are as of; none: they are to be listed.
    version: Option<String>,
    /// When the watch of this round began.
    begun: Option<Instant>,
    failures: u32,
    logged: Option<Instant>,
    /// The log says that it fails.
    is_logged: bool,
}

impl Follower {
    async fn round<K: Watched>(&mut self) -> Result<Ended, Failure> {
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let client = self.access.client().await.map_err(|error| unusable(&error))?;
                self.client.insert(client).clone()
            }
        };
        let api: Api<K> = Api::all(client);
        if self.version.is_none() {
            match self.list(&api).await {
                Ok((objects, version)) => {
                    if !self.tell(What::Listed(objects)).await {
                        return Ok(Ended::Unheard);
                    }
                    self.version = Some(version);
                }
                Err(failure) if failure.code == Some(404) && self.query.kind == Kind::ServiceCIDR => {
                    self.recover();
                    return Ok(if self.tell(What::Unknown).await { Ended::Unknown } else { Ended::Unheard });
                }
                Err(failure) => return Err(failure),
            }
        }
        self.watch(&api).await
    }

    /// Everything there is. No version is asked for: what is listed is the newest, so a list never goes back in time.
    async fn list<K: Watched>(&self, api: &Api<K>) -> Result<(Vec<Object>, String), Failure> {
        let mut params = ListParams {
            label_selector: self.query.labels.clone(),
            field_selector: self.query.fields.clone(),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        let mut objects = Vec::new();
        loop {
            let page = timeout(ANSWER_PATIENCE, api.list(&params)).await;
            let page = page.map_err(|_| Failure::late("list", ANSWER_PATIENCE))?;
            let page = page.map_err(|error| Failure::new("list", &error))?;
            objects.extend(page.items.into_iter().map(K::slim));
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                return Ok((objects, page.metadata.resource_version.unwrap_or_default()));
            }
        }
    }

    async fn watch<K: Watched>(&mut self, api: &Api<K>) -> Result<Ended, Failure> {
        let params = WatchParams {
            label_selector: self.query.labels.clone(),
            field_selector: self.query.fields.clone(),
            timeout: Some(fastrand::u32(WATCH_SECONDS)),
            bookmarks: true,
            ..WatchParams::default()
        };
        let version = self.version.clone().unwrap_or_default();
        let begun = timeout(ANSWER_PATIENCE, api.watch(&params, &version)).await;
        let begun = begun.map_err(|_| Failure::late("watch", ANSWER_PATIENCE))?;
        let mut stream = std::pin::pin!(begun.map_err(|error| Failure::new("watch", &error))?);
        self.begun = Some(Instant::now());
        self.recover();
        if !self.tell(What::Following).await {
            return Ok(Ended::Unheard);
        }
        loop {
            let Ok(next) = timeout(self.query.silence, stream.next()).await else {
                tracing::debug!(resource = self.query.resource, "the watch is silent: another goes on");
                // A connection of its own: the silent one may be dead.
                self.client = None;
                return Ok(Ended::Watch);
            };
            let Some(event) = next else { return Ok(Ended::Watch) };
            let (what, version) = match event.map_err(|error| Failure::new("watch", &error))? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    let version = object.meta().resource_version.clone();
                    (Some(What::Applied(object.slim())), version)
                }
                WatchEvent::Deleted(object) => {
                    let version = object.meta().resource_version.clone();
                    (Some(What::Deleted(object.slim().key())), version)
                }
                WatchEvent::Bookmark(bookmark) => (None, Some(bookmark.metadata.resource_version)),
                WatchEvent::Error(status) => return Err(Failure::answered("watch", &status)),
            };
            if let Some(what) = what
                && !self.tell(what).await
            {
                return Ok(Ended::Unheard);
            }
            self.failures = 0;
            self.version = version.filter(|version| !version.is_empty()).or_else(|| self.version.take());
        }
    }

    /// Whether anybody listens.
    async fn tell(&self, what: What) -> bool {
        self.events.send(Event { kind: self.query.kind, what }).await.is_ok()
    }

    fn recover(&mut self) {
        self.reached.notify_waiters();
        if std::mem::take(&mut self.is_logged) {
            tracing::info!(resource = self.query.resource, "the API server answers again");
        }
    }

    /// Draws what follows from a failure. Whether anybody listens.
    async fn fail(&mut self, failure: Failure) -> bool {
        metrics::source_failed(self.query.resource, failure.verb, failure.code);
        match failure.code {
            // Compacted: what we know is older than what the server remembers. Nothing is wrong yet.
            Some(410) if self.version.take().is_some() => {
                tracing::debug!(resource = self.query.resource, "our version has expired: listed again");
                return true;
            }
            // Files may hold newer credentials.
            Some(401) => self.client = None,
            Some(403 | 429) => {}
            // A version that the server has never had, say after it was restored, is refused in many ways.
            Some(_) => {
                self.failures += 1;
                if self.failures >= DISTRUST {
                    self.version = None;
                }
            }
            None => {}
        }
        let words = failure.words(self.query.resource);
        if self.logged.is_none_or(|logged| logged.elapsed() >= LOG_INTERVAL) {
            (self.logged, self.is_logged) = (Some(Instant::now()), true);
            tracing::warn!("{words}");
        } else {
            tracing::debug!("{words}");
        }
        self.tell(What::Failed(failure, self.query.resource)).await
    }
}

fn unusable(error: &anyhow::Error) -> Failure {
    Failure { verb: "", reason: format!("{error:#}"), code: None, retry_after: None }
}
