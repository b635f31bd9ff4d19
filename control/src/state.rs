//! What the daemon's tasks and its admin API share: objects, the packet path, and how far updates are.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use sluice_dataplane::dns::Answerer;
use sluice_dataplane::packet_path::Shared;
use sluice_dataplane::table::{Deadline, RoutingTable};

use crate::admin;
use crate::config::Config;
use crate::drains::Target;
use crate::problem::{Origin, Problem};
use crate::publish::Publisher;
use crate::source::Update;
use crate::upstream::Upstreams;

/// What the admin API shows.
pub struct State {
    /// The packet path.
    pub shared: Arc<Shared>,
    /// Configuration in force.
    pub config: Config,
    /// Since when an update waits to be applied, and when the last one was.
    pub progress: Mutex<Progress>,
    publisher: Mutex<Publisher>,
    /// Who answers names; nobody unless configured.
    pub names: Option<Arc<Answerer>>,
    /// Who is asked for names that are not ours.
    pub upstreams: Option<Arc<Upstreams>>,
    /// What is wrong with health check ports.
    pub health_problems: Mutex<Vec<Problem>>,
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

impl State {
    /// State in which nothing has happened yet.
    pub(crate) fn new(
        shared: Arc<Shared>,
        config: Config,
        publisher: Publisher,
        names: Option<Arc<Answerer>>,
        upstreams: Option<Arc<Upstreams>>,
    ) -> Self {
        let progress = Progress { pending_since: None, last_applied: Timestamp::now() };
        Self {
            shared,
            config,
            progress: Mutex::new(progress),
            publisher: Mutex::new(publisher),
            names,
            upstreams,
            health_problems: Mutex::default(),
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

    /// Takes in an update and swaps the table it makes in.
    pub(crate) fn apply(&self, update: Update) -> Option<Arc<RoutingTable>> {
        let begun = Instant::now();
        let mut publisher = self.publisher();
        let table = publisher.update(update);
        let table = self.publish(table, begun);
        self.publish_names(&mut publisher);
        self.save(&mut publisher);
        table
    }

    /// Takes in all there is at the start.
    pub(crate) fn apply_first(&self, update: Update) {
        let begun = Instant::now();
        let flows = self.shared.flows().map(|flow| (flow.endpoint.ip(), flow.endpoint_slot));
        let mut publisher = self.publisher();
        let table = publisher.first(update, flows);
        self.publish(Some(table), begun);
        self.publish_names(&mut publisher);
        self.save(&mut publisher);
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
        if let Some(zone) = publisher.zone(Timestamp::now()) {
            names.publish(zone);
        }
        let now = Timestamp::now();
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
        }
        *said = problems;
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
