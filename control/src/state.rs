//! What the daemon's tasks and its admin API share: objects, the packet path, and how far updates are.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use sluice_dataplane::dns::Answerer;
use sluice_dataplane::net::Family;
use sluice_dataplane::packet_path::Shared;
use sluice_dataplane::table::{Deadline, RoutingTable, ServiceName};

use crate::admin::kube_proxy::{Changes, Extent};
use crate::admin::{self, kube_proxy};
use crate::config::Config;
use crate::drains::Target;
use crate::events::{About, Events, Told};
use crate::problem::{Origin, Problem, Reason, Severity};
use crate::programming;
use crate::publish::Publisher;
use crate::source::Update;
use crate::upstream::Upstreams;

/// What the admin API shows.
pub struct State {
    /// The packet path.
    pub shared: Arc<Shared>,
    /// Configuration in force.
    pub config: Config,
    /// Where objects come from, in words.
    pub source: String,
    /// Where administrators are told of what is wrong, with the API server as source.
    pub events: Option<Events>,
    /// What was put right on the host.
    pub repairs: Mutex<Repairs>,
    /// When this process began.
    pub started: Timestamp,
    /// Since when an update waits to be applied, and when the last one was.
    pub progress: Mutex<Progress>,
    freshness: Mutex<Freshness>,
    publisher: Mutex<Publisher>,
    /// Who answers names; nobody unless configured.
    pub names: Option<Arc<Answerer>>,
    /// Who is asked for names that are not ours.
    pub upstreams: Option<Arc<Upstreams>>,
    /// What is wrong with health check ports.
    pub health_problems: Mutex<Vec<Problem>>,
    /// New connections are another service proxy's.
    pub retiring: AtomicBool,
    /// Problems that the log has told of.
    said: Mutex<Vec<Problem>>,
}

/// How far the daemon is with its updates.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// When the oldest update that is not applied yet came.
    pub pending_since: Option<Instant>,
    /// When the last update was applied.
    pub last_applied: Timestamp,
}

/// What somebody else changed of ours on the host, and we put right.
#[derive(Clone, Copy, Debug, Default)]
pub struct Repairs {
    /// How often.
    pub count: u64,
    /// When last.
    pub last: Option<Instant>,
}

/// Whether the objects in force are those of the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freshness {
    /// The source has told all there is. Until then the objects of an earlier process are in force.
    pub is_synced: bool,
    /// Since when changes may have been missed; none: they come in.
    pub behind_since: Option<Timestamp>,
}

impl Freshness {
    /// They are all the source's, and none is missed.
    pub(crate) fn is_fresh(self) -> bool {
        self.is_synced && self.behind_since.is_none()
    }

    /// After this update, which came `now`.
    fn after(self, update: &Update, now: Timestamp) -> Self {
        if !(self.is_synced || update.is_whole) {
            return self;
        }
        let since = if update.is_whole { now } else { self.behind_since.unwrap_or(now) };
        Self { is_synced: true, behind_since: update.is_behind.then_some(since) }
    }
}

impl State {
    /// State in which nothing has happened yet.
    pub(crate) fn new(
        shared: Arc<Shared>,
        config: Config,
        source: String,
        events: Option<Events>,
        publisher: Publisher,
        names: Option<Arc<Answerer>>,
        upstreams: Option<Arc<Upstreams>>,
    ) -> Self {
        let progress = Progress { pending_since: None, last_applied: Timestamp::now() };
        Self {
            shared,
            config,
            source,
            events,
            repairs: Mutex::default(),
            started: Timestamp::now(),
            progress: Mutex::new(progress),
            freshness: Mutex::default(),
            publisher: Mutex::new(publisher),
            names,
            upstreams,
            health_problems: Mutex::default(),
            retiring: AtomicBool::new(false),
            said: Mutex::default(),
        }
    }

    /// Objects and tables.
    pub fn publisher(&self) -> MutexGuard<'_, Publisher> {
        // An update that panicked half-way leaves the last table in force; the next one resolves anew.
        self.publisher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the daemon is.
    pub fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the objects in force are those of the source.
    pub fn freshness(&self) -> Freshness {
        *self.freshness.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in an update and swaps the table it makes in.
    pub(crate) fn apply(&self, update: Update) -> Option<Arc<RoutingTable>> {
        let begun = Instant::now();
        let families = self.families();
        let extent = if update.is_whole { Extent::All } else { Extent::Changes };
        let freshness = self.freshness().after(&update, Timestamp::now());
        kube_proxy::queued(&families, Changes::of(&update.changes));
        let mut publisher = self.publisher();
        let triggers = programming::triggers(publisher.store(), &update.changes, self.started);
        let table = publisher.update(update);
        let table = self.publish(table, begun);
        *self.freshness.lock().unwrap_or_else(PoisonError::into_inner) = freshness;
        kube_proxy::applied(&families, extent, begun.elapsed(), &triggers);
        self.publish_names(&mut publisher);
        self.save(&mut publisher);
        table
    }

    /// Takes in all there is at the start. `as_of`: when it was true, where it is not from the source.
    pub(crate) fn apply_first(&self, update: Update, as_of: Option<Timestamp>) {
        let freshness = Freshness { is_synced: as_of.is_none(), behind_since: as_of };
        *self.freshness.lock().unwrap_or_else(PoisonError::into_inner) = freshness;
        let begun = Instant::now();
        let flows = self.shared.flows().map(|flow| (flow.endpoint.ip(), flow.endpoint_slot));
        let mut publisher = self.publisher();
        let changes = Changes::of(&update.changes);
        let table = publisher.first(update, flows);
        self.publish(Some(table), begun);
        // Only now it is known which families are served.
        kube_proxy::queued(&self.families(), changes);
        kube_proxy::applied(&self.families(), Extent::All, begun.elapsed(), &[]);
        self.publish_names(&mut publisher);
        self.save(&mut publisher);
    }

    /// Families in which the node has an address.
    pub(crate) fn families(&self) -> Vec<Family> {
        let table = self.shared.table();
        let has = |family: &Family| table.node().spec().addresses.iter().any(|address| Family::of(*address) == *family);
        Family::BOTH.into_iter().filter(has).collect()
    }

    /// Drains endpoints by hand, or no longer. Returns whether the target was drained before.
    pub fn set_drain(&self, target: Target, until: Option<Deadline>) -> std::io::Result<bool> {
        if self.shared.is_superseded() {
            // It would be read by nobody: the next daemon has read them.
            return Err(std::io::Error::other("another daemon is taking over: ask again"));
        }
        let begun = Instant::now();
        let (known, table) = self.publisher().set_drain(target, until)?;
        self.publish(table, begun);
        Ok(known)
    }

    /// Swaps the zone, when there is another. The packet path has been told first: a name never leads where nobody is.
    fn publish_names(&self, publisher: &mut Publisher) {
        let Some(names) = &self.names else { return };
        let now = Timestamp::now();
        if let Some(zone) = publisher.zone(now) {
            names.publish(zone);
        }
        for (kind, triggered) in publisher.take_triggers() {
            // Clocks differ: what seems to come from the future took no time.
            admin::metrics::names_changed(kind, Duration::try_from(now.duration_since(triggered)).unwrap_or_default());
        }
    }

    fn save(&self, publisher: &mut Publisher) {
        if let Some(Err(error)) = publisher.local_controllers().map(|local| local.save(&self.config.state_dir)) {
            tracing::warn!(%error, "allocated addresses and node ports cannot be saved");
        }
    }

    /// Logs what is newly wrong with objects.
    pub(crate) fn report(&self) {
        let problems = admin::views::problems(self).items;
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        // Both are sorted.
        // What the API server refuses is not about objects, comes and goes, and its source logs it at a bounded rate.
        let is_of_source = |problem: &&Problem| problem.origin == Some(Origin::Api) && problem.object.is_none();
        let new = problems.iter().filter(|problem| said.binary_search(problem).is_err());
        for problem in new.filter(|problem| !is_of_source(problem)) {
            tracing::warn!("{problem}");
            self.tell(problem);
        }
        *said = problems;
    }

    /// Tells administrators of a problem of a Service or of its slices.
    fn tell(&self, problem: &Problem) {
        let (Some(events), Some(object), Severity::Error) = (&self.events, &problem.object, problem.severity) else {
            return;
        };
        let Some((kind, (namespace, name))) =
            object.split_once(' ').and_then(|(kind, name)| Some((kind, name.split_once('/')?)))
        else {
            return;
        };
        let publisher = self.publisher();
        let (store, named) = (publisher.store(), ServiceName::new(namespace, name));
        let service = match kind {
            "EndpointSlice" => store.services_of_slice(&named).next().cloned(),
            _ => Some(named),
        };
        let Some((name, service)) = service.and_then(|name| store.service(&name).map(|it| (name, it))) else { return };
        events.tell(Told {
            about: About::Service(name, service.object.metadata.uid.clone()),
            reason: problem.reason.word(),
            note: Problem { origin: None, ..problem.clone() }.to_string(),
            is_of_node: problem.reason == Reason::FailedToStartServiceHealthcheck,
            is_warning: true,
        });
    }

    /// Swaps a table in, when there is one, and notes that nothing waits.
    pub(crate) fn publish(&self, table: Option<Arc<RoutingTable>>, begun: Instant) -> Option<Arc<RoutingTable>> {
        if let Some(table) = &table {
            self.shared.publish(Arc::clone(table));
            admin::metrics::table_applied(begun.elapsed());
            tracing::debug!(generation = table.generation(), frontends = table.len(), "table in force");
        }
        let mut progress = self.progress();
        (progress.pending_since, progress.last_applied) = (None, Timestamp::now());
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_behind_from_the_first_failure_until_changes_come_in() {
        let update = |is_whole, is_behind| Update { is_whole, is_behind, ..Update::default() };
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let fresh = |is_synced, since: Option<i64>| Freshness { is_synced, behind_since: since.map(at) };
        let mut freshness = fresh(false, Some(5));
        for (second, update, wanted) in [
            (10, update(false, true), fresh(false, Some(5))),
            (11, update(false, false), fresh(false, Some(5))),
            (12, update(true, false), fresh(true, None)),
            (13, update(false, false), fresh(true, None)),
            (14, update(false, true), fresh(true, Some(14))),
            (15, update(false, true), fresh(true, Some(14))),
            (16, update(false, false), fresh(true, None)),
        ] {
            freshness = freshness.after(&update, at(second));
            assert_eq!(freshness, wanted, "at {second}");
        }
        assert_eq!(fresh(false, Some(5)).after(&update(true, true), at(9)), fresh(true, Some(9)));
    }
}
