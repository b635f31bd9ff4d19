//! The responder's part of the daemon: made of the configuration, started where the host has its addresses.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use sluice_dataplane::dns::{Answerer, Server, ServerSettings, Upstream, Zone};
use sluice_dataplane::packet_path::Names;
use tokio::task::JoinHandle;

use crate::config::{Config, Dns};
use crate::host::Lacking;
use crate::upstream::Upstreams;

/// Sockets for datagrams to each address, at most.
const MOST_SOCKETS: usize = 4;
/// Connections at a time, and of one client.
const CONNECTIONS: usize = 512;
const CONNECTIONS_OF_CLIENT: usize = 64;
/// How long a connection may be silent (RFC 7766 §6.2.3 wants seconds).
const IDLE: Duration = Duration::from_secs(10);

/// A running responder, and what goes with it. Ends when dropped.
pub struct Responder {
    _server: Server,
    loops: Option<JoinHandle<()>>,
}

impl Drop for Responder {
    fn drop(&mut self) {
        if let Some(loops) = &self.loops {
            loops.abort();
        }
    }
}

/// Who answers, when names are configured: the responder, and so many packet threads. Nothing is known yet.
#[must_use]
pub fn answerer(config: &Config, upstreams: Option<Arc<Upstreams>>, packet_threads: usize) -> Option<Arc<Answerer>> {
    let dns = config.dns.as_ref()?;
    let upstream = upstreams.map(|upstreams| upstreams as Arc<dyn Upstream>);
    let threads = settings(dns).answering() + packet_threads;
    Some(Answerer::new(Arc::new(Zone::unknown(dns.zone())), upstream, threads))
}

/// What the packet threads need for answering names. Made for the threads that `names` was made for.
#[must_use]
pub fn for_packet_threads(dns: &Dns, names: &Arc<Answerer>) -> Names {
    Names { answerer: Arc::clone(names), listen: dns.listen.clone().into(), first_thread: settings(dns).answering() }
}

/// Opens the sockets. The host must have their addresses.
///
/// # Errors
/// When an address cannot be listened on.
pub fn start(dns: &Dns, names: &Arc<Answerer>, upstreams: Option<&Arc<Upstreams>>) -> Result<Responder> {
    let server = Server::start(names, &settings(dns)).map_err(|error| {
        Lacking(format!("names cannot be answered at {error}: choose another address with dns.listen"))
    })?;
    let listen: Vec<String> = dns.listen.iter().map(ToString::to_string).collect();
    tracing::info!(listen = listen.join(" "), services = names.zone().len(), "answering names");
    if upstreams.is_none() {
        tracing::info!("no server is configured for names outside: they are refused");
    }
    let loops = upstreams.map(|upstreams| tokio::spawn(Arc::clone(upstreams).watch_for_loops()));
    Ok(Responder { _server: server, loops })
}

fn settings(dns: &Dns) -> ServerSettings {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    ServerSettings {
        listen: dns.listen.clone(),
        threads: cpus.min(MOST_SOCKETS),
        connections: CONNECTIONS,
        connections_of_client: CONNECTIONS_OF_CLIENT,
        idle: IDLE,
        seed: fastrand::u64(..),
    }
}
