//! The daemon's life: locks, first sync, host set-up, updates, and a clean end.

use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sd_notify::NotifyState;
use sluice_dataplane::flow::{FlowFile, Found};
use sluice_dataplane::net::Family;
use sluice_dataplane::packet_path::{PacketPath, Settings, Shared};
use sluice_dataplane::table::RoutingTable;
use tokio::task::{JoinError, JoinHandle};

use crate::at_links::{self, AtLinks};
use crate::config::Config;
use crate::drains::Drains;
use crate::early::Means;
use crate::events::{About, Events, Told};
use crate::first::{self, First};
use crate::health_check::HealthServers;
use crate::host::lock::{self, Standing};
use crate::host::{Host, LINK, Lacking, Plan, nft, sysctl};
use crate::loopback::LoopbackListeners;
use crate::node::NodeFacts;
use crate::publish::Publisher;
use crate::responder::Responder;
use crate::saving::{self, Saving};
use crate::signals::Signals;
use crate::source::{Feed, Source, Update};
use crate::state::{Repairs, State};
use crate::upstream::Upstreams;
use crate::{admin, early, lives, local_names, responder};

/// How often the host is looked at for what others changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// How often the packet path is asked whether it runs and what endpoints lived through.
const PATH_INTERVAL: Duration = Duration::from_millis(100);
/// How long another daemon may take to hand over.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(5);
/// How long changes must pause before the log tells what is wrong with objects.
const REPORT_PAUSE: Duration = Duration::from_millis(100);

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: Config, source: Source, names_for_host: bool) -> Result<()> {
    admin::metrics::install()?;
    let mut host = Host::new()?;
    let standing = lock::standing(&config.state_dir)?;
    require_environment()?;
    let events = source.access().map(|access| Events::start(access.clone(), config.node_name()));
    let described = source.to_string();
    let saved = source.access().map(|_| first::saved(&config)).transpose()?;
    let mut feed = source.open()?;
    let upstreams = config.dns.as_ref().map(Upstreams::new).transpose()?.flatten();
    let names = responder::answerer(&config, upstreams.clone(), workers(&config));
    let first = first::first(&mut feed, saved.as_ref(), &standing, &config.state_dir);
    let means = match (&standing, config.dns.as_ref().zip(names.as_ref())) {
        (Standing::Alone(_), Some((dns, names))) => {
            let (upstreams, queues) = (upstreams.as_ref(), workers(&config));
            Some(Means { dns, names, upstreams, host: &host, queues })
        }
        // Who is there already knows more than we do yet.
        (Standing::TakingOver, _) | (_, None) => None,
    };
    let (First { update: first, as_of }, early) = early::wait(first, means).await?;
    let (tun, early_responder) = early.map(|early| (early.tun, early.responder)).unzip();
    let interfaces = host.addresses().await?;
    let mut settings = settings(&config, &first, &interfaces)?;
    let tun = match tun {
        Some(tun) => tun,
        // Open before another daemon lets go: packets wait here meanwhile.
        None => host.open_link(settings.workers).await?,
    };
    tun.persist().with_context(|| format!("cannot keep the link {LINK}"))?;
    let at_links = AtLinks::start(&config, &mut settings, &mut host)?;
    let shared = open_flows(settings.clone(), &config.state_dir)?;
    if let (Some(dns), Some(names)) = (&config.dns, &names) {
        shared.answer_names(responder::for_packet_threads(dns, names));
    }
    let publisher = publisher(&config, &interfaces, &shared);
    let state = Arc::new(State::new(Arc::clone(&shared), config, described, events, publisher, names, upstreams));
    state.apply_first(first, as_of);
    lives::forget(&state);
    let path = at_links::start_packet_path(tun, &shared)?;
    // The daemon that handed over reads no packet any more: ours need not wait until it has ended, but the host must.
    let namespace = match standing {
        Standing::Alone(held) => held,
        Standing::TakingOver => lock::succeed().await?,
    };
    state.report();
    let mut signals = Signals::new()?;
    let mut daemon = Daemon {
        state,
        host: Arc::new(tokio::sync::Mutex::new(host)),
        repairing: None,
        health: HealthServers::default(),
        loopback: LoopbackListeners::default(),
        masquerade: settings.masquerade_addresses,
        interfaces,
        planned: None,
        saving: saved.map(|saved| Saving::new(saved, as_of.is_none())),
        at_links,
    };
    // Names are answered at an address that the host may get only now.
    let set_up = daemon.set_up_host().await.and_then(|()| match early_responder {
        Some(responder) => Ok(Some(responder)),
        None => daemon.start_responder(),
    });
    if names_for_host && set_up.is_ok() {
        local_names::announce(&daemon.state.config);
    }
    let served = match set_up {
        Ok(_responder) => daemon.serve(feed, &path, &mut signals).await,
        Err(error) => Err(error),
    };
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    if shared.is_superseded() {
        if let Some(saving) = &mut daemon.saving {
            saving.let_go().await;
        }
        tracing::info!("another daemon took over");
        if daemon.state.config.linger {
            // The other one waits for these.
            drop((path, namespace, daemon));
            signals.received().await;
        }
        return Ok(());
    }
    if let Some(saving) = &mut daemon.saving {
        saving.finish(&daemon.state).await;
    }
    if daemon.state.config.leave_on_stop && served.is_ok() {
        tracing::info!("stopped; the next start goes on with every flow");
        return Ok(());
    }
    let removed = daemon.host.lock().await.clean_up().await;
    path.stop();
    served?;
    removed?;
    tracing::info!("stopped; nothing of ours is left on the host");
    Ok(())
}

/// The result of this task, once there is one.
async fn finished<T>(task: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match task {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}

/// The publisher, with what an earlier process left for it.
fn publisher(config: &Config, interfaces: &[IpAddr], shared: &Shared) -> Publisher {
    let mut publisher = Publisher::new(config.clone(), interfaces.to_vec(), Arc::clone(&shared.slots));
    if let Some(Err(error)) = publisher.local_controllers().map(|local| local.load(&config.state_dir)) {
        tracing::warn!(%error, "earlier allocated addresses and node ports cannot be read: they are derived anew");
    }
    let drains = lock::boot_id().and_then(|boot| Ok(Drains::load(&config.state_dir, boot)?));
    match drains {
        Ok(drains) => publisher.set_drains(drains),
        Err(error) => tracing::warn!(%error, "earlier drains by hand cannot be read: they are forgotten"),
    }
    publisher
}

/// The flow file, with the flows of an earlier process of this network namespace.
fn open_flows(settings: Settings, state_dir: &Path) -> Result<Arc<Shared>> {
    let owner = lock::namespace_identity()?.into_bytes();
    let file = FlowFile { path: lock::flow_file(state_dir), owner, patience: HAND_OVER_PATIENCE };
    let shared = Shared::open(settings, &file)
        .map_err(|error| anyhow::Error::new(Lacking(format!("{error}: choose another directory with --state-dir"))))?;
    let recovery = shared.recovery();
    if let Found::Unusable { reason, kept } = &recovery.found {
        tracing::warn!(reason, kept = %kept.display(), "the flow file cannot be used and was set aside");
    }
    tracing::info!(
        flows = recovery.flows,
        dropped = recovery.dropped,
        took_over = recovery.took_over,
        "flows recovered"
    );
    Ok(shared)
}

/// Says what this host lacks before anything of it is changed.
fn require_environment() -> Result<()> {
    if let Err(error) = std::fs::metadata("/dev/net/tun") {
        return Err(Lacking(format!("no TUN device: /dev/net/tun: {error}: load the module tun")).into());
    }
    nft::require()?;
    sysctl::require_forwarding(Family::V4)
}

/// The settings of the packet path.
fn settings(config: &Config, first: &Update, interfaces: &[IpAddr]) -> Result<Settings> {
    Ok(Settings {
        workers: workers(config),
        flow_capacity: config.flow_table_size,
        masquerade_addresses: masquerade_addresses(config, first, interfaces)?,
        masquerade_ports: config.masquerade_ports.range(),
        slow_start: config.slow_start,
        eject_after: config.eject_after,
        seed: ahash::RandomState::new().hash_one(std::process::id()),
        ways: None,
        offload: None,
    })
}

/// Packet threads.
fn workers(config: &Config) -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    config.workers.unwrap_or_else(|| cpus.min(8))
}

/// The address in each family that stands in for clients: the Node's, where this host has it, else the host's first.
fn masquerade_addresses(config: &Config, first: &Update, interfaces: &[IpAddr]) -> Result<Vec<IpAddr>> {
    let name = config.node_name();
    let node = first.changes.iter().find_map(|change| change.node(&name));
    let facts = NodeFacts::new(&name, node, interfaces);
    let mut addresses = Vec::new();
    for family in Family::BOTH {
        let known = facts
            .primary
            .iter()
            .chain(interfaces)
            .find(|address| Family::of(**address) == family && interfaces.contains(address));
        let Some(address) = known else { continue };
        match sysctl::require_forwarding(family) {
            Ok(()) => addresses.push(*address),
            Err(reason) => tracing::warn!(%reason, "{family} Services are not served"),
        }
    }
    if addresses.is_empty() {
        return Err(Lacking("this network namespace has no address but loopback".to_owned()).into());
    }
    Ok(addresses)
}

/// Tells systemd, where it wants to know, that this loop turns and the packet path runs.
struct Watchdog {
    interval: Option<Duration>,
    last: Instant,
}

impl Watchdog {
    fn new() -> Self {
        // Twice as often as is asked for.
        Self { interval: sd_notify::watchdog_enabled().map(|interval| interval / 2), last: Instant::now() }
    }

    fn ping(&mut self) {
        if self.interval.is_some_and(|interval| self.last.elapsed() >= interval) {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            self.last = Instant::now();
        }
    }
}

struct Daemon {
    state: Arc<State>,
    host: Arc<tokio::sync::Mutex<Host>>,
    /// What others changed is being put right.
    repairing: Option<JoinHandle<Result<Vec<String>>>>,
    health: HealthServers,
    loopback: LoopbackListeners,
    masquerade: Vec<IpAddr>,
    interfaces: Vec<IpAddr>,
    /// The [`RoutingTable::host_version`] that the host is set up for.
    planned: Option<u64>,
    /// Keeps objects for the next process, where their source may be out of reach then.
    saving: Option<Saving>,
    at_links: AtLinks,
}

impl Daemon {
    async fn set_up_host(&mut self) -> Result<()> {
        let table = self.state.shared.table();
        let changes = self.host.lock().await.apply(Plan::new(&table, &self.state.config, &self.masquerade)).await?;
        self.planned = Some(table.host_version());
        tracing::info!(changes = changes.len(), "host is set up");
        Ok(())
    }

    fn start_responder(&self) -> Result<Option<Responder>> {
        let State { config, names, upstreams, .. } = &*self.state;
        let both = config.dns.as_ref().zip(names.as_ref());
        both.map(|(dns, names)| responder::start(dns, names, upstreams.as_ref())).transpose()
    }

    async fn serve(&mut self, feed: Feed, path: &PacketPath, signals: &mut Signals) -> Result<()> {
        let mut servers = admin::serve(&self.state)?;
        let _ = sd_notify::notify(&[NotifyState::Ready]);
        let table = self.state.shared.table();
        tracing::info!(frontends = table.len(), admin = %self.state.config.admin, "serving");
        let started = format!("{} began at {}", env!("CARGO_PKG_VERSION"), self.state.started);
        self.tell_of_node("Starting", started, false);
        let served = self.work(feed, path, signals).await;
        if let Some(repairing) = self.repairing.take() {
            // What is done to the host from now on is not to be undone by it; how it ends is no matter any more.
            let _ = repairing.await;
        }
        // A daemon that takes over wants their ports.
        servers.shutdown().await;
        served
    }

    /// Takes in updates and looks after host and packet path, until a signal comes or another daemon takes over.
    async fn work(&mut self, mut feed: Feed, path: &PacketPath, signals: &mut Signals) -> Result<()> {
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        let mut unreported = false;
        let mut save = tokio::time::interval(saving::INTERVAL);
        let mut watchdog = Watchdog::new();
        let mut has_retired = false;
        let mut watch_path = tokio::time::interval(PATH_INTERVAL);
        loop {
            tokio::select! {
                () = signals.received() => return Ok(()),
                update = feed.next() => {
                    self.update(update?).await?;
                    unreported = true;
                }
                // Finding all that is wrong may take longer than a change: it waits until changes pause.
                () = tokio::time::sleep(REPORT_PAUSE), if unreported => {
                    let state = Arc::clone(&self.state);
                    tokio::task::spawn_blocking(move || state.report()).await?;
                    unreported = false;
                }
                _ = watch_path.tick() => {
                    if self.state.shared.is_superseded() {
                        return Ok(());
                    }
                    if !path.is_running() {
                        bail!("the link {LINK} was taken away");
                    }
                    self.at_links.check().await?;
                    lives::tell(&self.state);
                    watchdog.ping();
                    if !has_retired && self.state.retiring.load(Relaxed) {
                        has_retired = true;
                        self.retire().await?;
                        tracing::info!(flows = self.state.shared.flow_count(), "new connections are left to another service proxy");
                    }
                }
                _ = look.tick() => self.look().await?,
                changes = finished(&mut self.repairing) => {
                    self.repairing = None;
                    self.repaired(changes??);
                }
                () = self.at_links.changed() => {
                    if let Err(error) = self.host.lock().await.follow_links().await {
                        tracing::warn!(error = format!("{error:#}"), "packets of a new link go the ordinary way until the next look");
                    }
                }
                _ = save.tick() => {
                    if let Some(saving) = &mut self.saving {
                        saving.go_on(&self.state).await;
                    }
                }
            }
        }
    }

    async fn update(&mut self, update: Update) -> Result<()> {
        self.state.progress().pending_since.get_or_insert_with(Instant::now);
        if let Some(saving) = &mut self.saving {
            saving.note(&update, self.state.freshness().is_synced);
        }
        let state = Arc::clone(&self.state);
        let table = tokio::task::spawn_blocking(move || state.apply(update)).await?;
        self.follow(table).await?;
        self.serve_ports().await;
        Ok(())
    }

    /// Ports that are no part of the packet path: health checks, and node ports on `::1`.
    async fn serve_ports(&mut self) {
        let table = self.state.shared.table();
        self.loopback.apply(&self.state, &table).await;
        let mut addresses = table.node().spec().node_port_addresses.clone();
        addresses.retain(|address| self.interfaces.contains(address));
        let wanted = self.state.publisher().health_checks().clone();
        let problems = self.health.apply(&wanted, &addresses, &self.state).await;
        *self.state.health_problems.lock().unwrap_or_else(PoisonError::into_inner) = problems;
    }

    /// Leaves all but the flows that are there to another service proxy. Some open while it is done: they are taken in at the
    /// second look.
    async fn retire(&mut self) -> Result<()> {
        for _ in 0..2 {
            self.host.lock().await.retire(self.state.shared.flows()).await?;
        }
        Ok(())
    }

    /// Brings the host's routes to a new table.
    async fn follow(&mut self, table: Option<Arc<RoutingTable>>) -> Result<()> {
        let Some(table) = table else { return Ok(()) };
        if self.planned == Some(table.host_version()) {
            return Ok(());
        }
        let plan = Plan::new(&table, &self.state.config, &self.masquerade);
        let mut host = self.host.lock().await;
        if plan != *host.plan() {
            host.apply(plan).await?;
        }
        self.planned = Some(table.host_version());
        Ok(())
    }

    /// An Event on the own Node, where there is an API server.
    fn tell_of_node(&self, reason: &'static str, note: String, is_warning: bool) {
        if let Some(events) = &self.state.events {
            events.tell(Told { about: About::Node, reason, note, is_of_node: true, is_warning });
        }
    }

    /// Looks at what others may have changed: addresses, links, routes, rules.
    async fn look(&mut self) -> Result<()> {
        let interfaces = self.host.lock().await.addresses().await?;
        if interfaces != self.interfaces {
            if let Some(lost) = self.masquerade.iter().find(|address| !interfaces.contains(address)) {
                bail!("the node's address {lost} is gone: start again to use another");
            }
            self.interfaces.clone_from(&interfaces);
            let table = self.state.publisher().set_interfaces(interfaces);
            let table = self.state.publish(table, Instant::now());
            self.follow(table).await?;
        }
        if self.state.retiring.load(Relaxed) {
            self.retire().await?;
        }
        if self.repairing.is_none() {
            let host = Arc::clone(&self.host);
            // It takes longer than a change, and is seldom in its way.
            self.repairing = Some(tokio::spawn(async move { host.lock().await.repair().await }));
        }
        self.serve_ports().await;
        self.state.publisher().release_idle();
        Ok(())
    }

    /// Tells what was put right on the host.
    fn repaired(&self, changes: Vec<String>) {
        for what in changes {
            tracing::warn!(what, "put right what somebody else changed");
            admin::metrics::host_repaired(&what);
            self.tell_of_node("HostStateChanged", format!("put right what somebody else changed: {what}"), true);
            let mut repairs = self.state.repairs.lock().unwrap_or_else(PoisonError::into_inner);
            *repairs = Repairs { count: repairs.count + 1, last: Some(Instant::now()) };
        }
    }
}
