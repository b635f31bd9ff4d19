//! The responder's part of the daemon: made of the configuration, started once the host has its addresses.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use jiff::Timestamp;
use sluice_dataplane::dns::{Answerer, Server, ServerSettings, Upstream};
use tokio::task::JoinHandle;

use crate::config::{Config, Dns};
use crate::host::Lacking;
use crate::publish::Publisher;
use crate::state::State;
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

/// Who answers, when names are configured. Nothing is known yet.
#[must_use]
pub fn answerer(
    config: &Config,
    publisher: &mut Publisher,
    upstreams: Option<Arc<Upstreams>>,
) -> Option<Arc<Answerer>> {
    let dns = config.dns.as_ref()?;
    let zone = publisher.zone(Timestamp::now())?;
    let upstream = upstreams.map(|upstreams| upstreams as Arc<dyn Upstream>);
    Some(Answerer::new(zone, upstream, settings(dns).answering()))
}

/// Opens the sockets, when names are configured.
///
/// # Errors
/// When an address cannot be listened on.
pub fn start(state: &State) -> Result<Option<Responder>> {
    let (Some(dns), Some(answerer)) = (&state.config.dns, &state.names) else { return Ok(None) };
    let server = Server::start(answerer, &settings(dns)).map_err(|error| {
        Lacking(format!("names cannot be answered at {error}: choose another address with dns.listen"))
    })?;
    let listen: Vec<String> = dns.listen.iter().map(ToString::to_string).collect();
    tracing::info!(listen = listen.join(" "), services = answerer.zone().len(), "answering names");
    if state.upstreams.is_none() {
        tracing::info!("no server is configured for names outside: they are refused");
    }
    let loops = state.upstreams.clone().map(|upstreams| tokio::spawn(upstreams.watch_for_loops()));
    Ok(Some(Responder { _server: server, loops }))
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
