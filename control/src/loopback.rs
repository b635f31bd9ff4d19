//! Node ports on `::1`: listeners that pass connections on. The kernel takes no packet to `::1` from a link, so that the
//! packet path, which serves 127.0.0.0/8, cannot serve it. TCP only, as in kube-proxy (KEP-6032).

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use sluice_dataplane::decide::{NewFlow, Verdict};
use sluice_dataplane::net::{Family, Protocol};
use sluice_dataplane::table::{FrontendKey, RoutingTable};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use crate::daemon::State;

const LOOPBACK: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// The listeners, by node port. A listener that goes takes its connections with it.
#[derive(Default)]
pub struct LoopbackListeners {
    listeners: BTreeMap<u16, Listener>,
}

struct Listener(JoinHandle<()>);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl LoopbackListeners {
    /// Brings the listeners to what the table serves on `::1`: without endpoints there is none, and clients are refused.
    pub async fn apply(&mut self, state: &Arc<State>, table: &RoutingTable) {
        if table.node().spec().node_port_loopback.is_empty() && self.listeners.is_empty() {
            return;
        }
        let wanted: Vec<u16> = table
            .frontends()
            .filter_map(|frontend| match frontend.key {
                FrontendKey::NodePort(Family::V6, Protocol::Tcp, port) => Some(port),
                FrontendKey::NodePort(..) | FrontendKey::Address(..) => None,
            })
            .filter(|port| !endpoints(table, *port).is_empty())
            .collect();
        self.listeners.retain(|port, _| wanted.contains(port));
        for port in wanted {
            if self.listeners.contains_key(&port) {
                continue;
            }
            match TcpListener::bind(SocketAddr::new(LOOPBACK, port)).await {
                Ok(listener) => {
                    let task = tokio::spawn(accept(listener, port, Arc::clone(state)));
                    self.listeners.insert(port, Listener(task));
                }
                Err(error) => tracing::warn!(port, %error, "node port cannot be served on ::1"),
            }
        }
    }
}

/// The endpoints that a client on the node gets at `[::1]:port`.
fn endpoints(table: &RoutingTable, port: u16) -> Vec<SocketAddr> {
    let flow = NewFlow { client: LOOPBACK, destination: SocketAddr::new(LOOPBACK, port), protocol: Protocol::Tcp };
    match table.decide(&flow).verdict {
        Verdict::Forward { endpoints, .. } => endpoints.iter().map(|endpoint| endpoint.address).collect(),
        Verdict::Reject | Verdict::Drop | Verdict::Pass => Vec::new(),
    }
}

async fn accept(listener: TcpListener, port: u16, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    let endpoints = endpoints(&state.shared.table(), port);
                    connections.spawn(pass_on(client, endpoints, port));
                }
                // Out of descriptors, as a rule: others end, then there are some again.
                Err(error) => {
                    tracing::warn!(port, %error, "a connection to ::1 cannot be accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn pass_on(mut client: TcpStream, endpoints: Vec<SocketAddr>, port: u16) {
    let mut run = async || -> io::Result<()> {
        let endpoint = fastrand::choice(&endpoints).ok_or(io::ErrorKind::ConnectionRefused)?;
        let mut server = TcpStream::connect(endpoint).await?;
        tokio::io::copy_bidirectional(&mut client, &mut server).await?;
        Ok(())
    };
    if let Err(error) = run().await {
        tracing::debug!(port, %error, "a connection to ::1 ended");
    }
}
