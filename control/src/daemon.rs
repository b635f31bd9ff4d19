//! The daemon's life: locks, first sync, host set-up, updates, and a clean end.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use jiff::Timestamp;
use sd_notify::NotifyState;
use sluice_dataplane::net::Family;
use sluice_dataplane::packet_path::{PacketPath, Settings, Shared, Tun};
use sluice_dataplane::table::RoutingTable;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::admin;
use crate::config::Config;
use crate::health_check::HealthServers;
use crate::host::lock::Lock;
use crate::host::{Host, LINK, Lacking, Plan, nft, sysctl};
use crate::loopback::LoopbackListeners;
use crate::node::NodeFacts;
use crate::problem::Problem;
use crate::publish::Publisher;
use crate::source::Update;
use crate::source::folder::{Folder, watch};

/// How often the host is looked at for what others changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// How long changes must pause before the log tells what is wrong with objects.
const REPORT_PAUSE: Duration = Duration::from_millis(100);
/// Updates that may wait.
const QUEUE: usize = 64;

/// What the admin API shows.
pub struct State {
    /// The packet path.
    pub shared: Arc<Shared>,
    /// Configuration in force.
    pub config: Config,
    /// Since when an update waits to be applied, and when the last one was.
    pub progress: Mutex<Progress>,
    publisher: Mutex<Publisher>,
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
    fn apply(&self, update: Update) -> Option<Arc<RoutingTable>> {
        let begun = Instant::now();
        let mut publisher = self.publisher();
        let table = publisher.update(update);
        let table = self.publish(table, begun);
        if let Some(Err(error)) = publisher.local_controllers().map(|local| local.save(&self.config.state_dir)) {
            tracing::warn!(%error, "allocated addresses and node ports cannot be saved");
        }
        table
    }

    /// Logs what is newly wrong with objects.
    fn report(&self) {
        let problems = admin::views::problems(self).items;
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        // Both are sorted.
        for problem in problems.iter().filter(|problem| said.binary_search(problem).is_err()) {
            tracing::warn!("{problem}");
        }
        *said = problems;
    }

    fn publish(&self, table: Option<Arc<RoutingTable>>, begun: Instant) -> Option<Arc<RoutingTable>> {
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

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: Config, manifests: &Path) -> Result<()> {
    admin::metrics::install()?;
    let host = Host::new()?;
    let _lock = Lock::take(&config.state_dir)?;
    require_environment()?;

    let mut folder = Folder::new(manifests, config.prune);
    if !manifests.exists() {
        bail!("{}: no such file or folder", manifests.display());
    }
    let first = folder.scan();
    let interfaces = host.addresses().await?;
    // What a killed daemon left is put right below; its link would only be in the way.
    host.remove_link().await?;

    let (settings, tun) = open_link(&config, &first, &interfaces)?;
    let shared = Shared::new(settings.clone());
    let mut publisher = Publisher::new(config.clone(), interfaces.clone(), Arc::clone(&shared.slots));
    if let Some(Err(error)) = publisher.local_controllers().map(|local| local.load(&config.state_dir)) {
        tracing::warn!(%error, "earlier allocated addresses and node ports cannot be read: they are derived anew");
    }
    let progress = Progress { pending_since: None, last_applied: Timestamp::now() };
    let state = Arc::new(State {
        shared: Arc::clone(&shared),
        config,
        progress: Mutex::new(progress),
        publisher: Mutex::new(publisher),
        health_problems: Mutex::default(),
        said: Mutex::default(),
    });
    let _ = state.apply(first);
    state.report();
    let path = PacketPath::start(tun, Arc::clone(&shared)).context("cannot start the packet threads")?;
    let mut daemon = Daemon {
        state,
        host,
        health: HealthServers::default(),
        loopback: LoopbackListeners::default(),
        masquerade: settings.masquerade_addresses,
        interfaces,
    };
    let served = match daemon.set_up_host().await {
        Ok(()) => daemon.serve(folder, &path).await,
        Err(error) => Err(error),
    };
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    let removed = daemon.host.clean_up().await;
    path.stop();
    served?;
    removed?;
    tracing::info!("stopped; nothing of ours is left on the host");
    Ok(())
}

/// Says what this host lacks before anything of it is changed.
fn require_environment() -> Result<()> {
    if let Err(error) = std::fs::metadata("/dev/net/tun") {
        return Err(Lacking(format!("no TUN device: /dev/net/tun: {error}: load the module tun")).into());
    }
    nft::require()?;
    sysctl::require_forwarding(Family::V4)
}

/// The settings of the packet path, and its link.
fn open_link(config: &Config, first: &Update, interfaces: &[IpAddr]) -> Result<(Settings, Tun)> {
    let masquerade = masquerade_addresses(config, first, interfaces)?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let settings = Settings {
        workers: config.workers.unwrap_or_else(|| cpus.min(8)),
        flow_capacity: config.flow_table_size,
        masquerade_addresses: masquerade,
        masquerade_ports: config.masquerade_ports.range(),
        seed: ahash::RandomState::new().hash_one(std::process::id()),
    };
    let tun = Tun::open(LINK, settings.workers).map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            anyhow::Error::new(Lacking(format!("cannot make the link {LINK}: needs CAP_NET_ADMIN: {error}")))
        }
        std::io::ErrorKind::NotFound => anyhow::Error::new(Lacking(format!("no TUN device: {error}"))),
        std::io::ErrorKind::ResourceBusy => {
            anyhow::Error::new(Lacking(format!("the link {LINK} belongs to another program: {error}")))
        }
        _ => anyhow::Error::new(error).context(format!("cannot make the link {LINK}")),
    })?;
    Ok((settings, tun))
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

struct Daemon {
    state: Arc<State>,
    host: Host,
    health: HealthServers,
    loopback: LoopbackListeners,
    masquerade: Vec<IpAddr>,
    interfaces: Vec<IpAddr>,
}

impl Daemon {
    async fn set_up_host(&mut self) -> Result<()> {
        let plan = Plan::new(&self.state.shared.table(), &self.state.config, &self.masquerade);
        let changes = self.host.apply(plan).await?;
        tracing::info!(changes = changes.len(), "host is set up");
        Ok(())
    }

    async fn serve(&mut self, folder: Folder, path: &PacketPath) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (sender, mut updates) = mpsc::channel(QUEUE);
        let _watch = watch(folder, sender)?;
        let _servers = admin::serve(&self.state)?;
        let _ = sd_notify::notify(&[NotifyState::Ready]);
        let table = self.state.shared.table();
        tracing::info!(frontends = table.len(), admin = %self.state.config.admin, "serving");
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        let mut unreported = false;
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                update = updates.recv() => match update {
                    Some(update) => {
                        self.update(update).await?;
                        unreported = true;
                    }
                    None => bail!("the watch of the manifests ended"),
                },
                // Finding all that is wrong may take longer than a change: it waits until changes pause.
                () = tokio::time::sleep(REPORT_PAUSE), if unreported => {
                    let state = Arc::clone(&self.state);
                    tokio::task::spawn_blocking(move || state.report()).await?;
                    unreported = false;
                }
                _ = look.tick() => {
                    if !path.is_running() {
                        bail!("the link {LINK} was taken away");
                    }
                    self.look().await?;
                }
            }
        }
    }

    async fn update(&mut self, update: Update) -> Result<()> {
        self.state.progress().pending_since.get_or_insert_with(Instant::now);
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

    /// Brings the host's routes to a new table.
    async fn follow(&mut self, table: Option<Arc<RoutingTable>>) -> Result<()> {
        let Some(table) = table else { return Ok(()) };
        let plan = Plan::new(&table, &self.state.config, &self.masquerade);
        if plan != *self.host.plan() {
            self.host.apply(plan).await?;
        }
        Ok(())
    }

    /// Looks at what others may have changed: addresses, links, routes, rules.
    async fn look(&mut self) -> Result<()> {
        let interfaces = self.host.addresses().await?;
        if interfaces != self.interfaces {
            if let Some(lost) = self.masquerade.iter().find(|address| !interfaces.contains(address)) {
                bail!("the node's address {lost} is gone: start again to use another");
            }
            self.interfaces.clone_from(&interfaces);
            let table = self.state.publisher().set_interfaces(interfaces);
            let table = self.state.publish(table, Instant::now());
            self.follow(table).await?;
        }
        for what in self.host.repair().await? {
            tracing::warn!(what, "put right what somebody else changed");
            admin::metrics::host_repaired(&what);
        }
        self.serve_ports().await;
        self.state.publisher().release_idle();
        Ok(())
    }
}
