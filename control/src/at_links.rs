//! What `packetPath: links` and `offload` ask of the daemon: answers for the packet threads, and news of links.

use std::io::ErrorKind;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use sluice_dataplane::offload::Offload;
use sluice_dataplane::packet_path::{PacketPath, Settings, Shared, Tun, Ways};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::config::{self, Config};
use crate::host::{Host, LINK, Lacking, MARK_UNTRACKED, ways};

/// The part of the daemon that follows links. With `packetPath: kernel` it does nothing.
pub(crate) struct AtLinks {
    changed: Arc<Notify>,
    finder: Option<JoinHandle<Result<()>>>,
}

impl AtLinks {
    /// Has packets sent on links, where the configuration says so, and connections carried by the kernel. The TUN link is there.
    pub(crate) fn start(config: &Config, settings: &mut Settings, host: &mut Host) -> Result<Self> {
        let changed = Arc::new(Notify::new());
        let finder = match config.packet_path {
            config::PacketPath::Kernel => None,
            path @ (config::PacketPath::Links | config::PacketPath::Offload) => {
                let ways = Arc::new(Ways::new().context("packetPath: no socket for questions")?);
                if path == config::PacketPath::Offload {
                    let offload = Arc::new(offload(settings.flow_capacity)?);
                    ways.tell(Arc::clone(&offload));
                    host.carry_with(Arc::clone(&offload));
                    settings.offload = Some(offload);
                }
                settings.ways = Some(Arc::clone(&ways));
                Some(tokio::spawn(ways::answer(ways, Arc::clone(&changed))))
            }
        };
        Ok(Self { changed, finder })
    }

    /// Waits until links came or went.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Fails when packet threads are not answered any more.
    pub(crate) async fn check(&mut self) -> Result<()> {
        match self.finder.take_if(|finder| finder.is_finished()) {
            Some(finder) => finder.await?.context("packetPath: ways of packets"),
            None => Ok(()),
        }
    }
}

fn offload(flow_capacity: usize) -> Result<Offload> {
    let tun = nix::net::if_::if_nametoindex(LINK).with_context(|| format!("the link {LINK} is gone"))?;
    let links = nix::net::if_::if_nameindex().context("cannot list the host's links")?;
    let links = links.iter().map(nix::net::if_::Interface::index);
    Offload::new(tun, MARK_UNTRACKED, flow_capacity, links).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => {
            Lacking(format!("packetPath: offload needs CAP_BPF and CAP_NET_ADMIN: {error}")).into()
        }
        ErrorKind::InvalidInput => Lacking(format!("packetPath: offload needs Linux 6.6 or later: {error}")).into(),
        _ => anyhow::Error::new(error).context("packetPath: offload: the kernel does not take the program"),
    })
}

/// Starts the packet threads.
pub(crate) fn start_packet_path(tun: Tun, shared: &Arc<Shared>) -> Result<PacketPath> {
    PacketPath::start(tun, Arc::clone(shared)).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => {
            Lacking(format!("packetPath: links and offload need CAP_NET_RAW to send on links: {error}")).into()
        }
        _ => anyhow::Error::new(error).context("cannot start the packet threads"),
    })
}
