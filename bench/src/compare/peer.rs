//! Who is compared, and how is each started.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Serialize, Serializer};
use sluice_bench::workload;

use super::{flows, hop, kube_proxy, nft, proxy};
use crate::daemon::{self, PacketPath, Program};
use crate::lab::{Lab, Mode};
use crate::manifests::{self, Others, ready};
use crate::process::{Process, Usage};

/// Bound on starting.
const READY: Duration = Duration::from_secs(60);

/// A way from the client to the Pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// Dialling the Pods themselves: what all are measured by.
    Direct,
    /// The daemon beside this program.
    Sluice(Sluice),
    /// `mode tcp`.
    Haproxy,
    /// The stream module.
    Nginx,
    /// The rules that kube-proxy's nftables mode renders.
    Nft,
    /// Kubernetes' own, in nftables mode.
    KubeProxy,
    /// The least that a hop through TUN can cost.
    Hop,
}

/// With how much the daemon is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sluice {
    /// Packet threads, if not as many as cores.
    workers: Option<usize>,
    /// Its `packetPath`.
    path: PacketPath,
    /// Services beside the one that is dialled.
    others: usize,
    /// Flows in its table beside those of the load.
    flows: usize,
}

impl Peer {
    /// The same, with other Services and flows, where that makes a difference.
    pub(crate) fn with(self, others: usize, flows: usize) -> Self {
        match self {
            Self::Sluice(sluice) => Self::Sluice(Sluice { others, flows, ..sluice }),
            peer => peer,
        }
    }

    /// What it is the same as, but for other Services and flows.
    pub(crate) fn plain(self) -> Self {
        self.with(0, 0)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str("direct"),
            Self::Sluice(Sluice { workers, path, others, flows }) => {
                f.write_str(&prefix(*path))?;
                workers.map_or(Ok(()), |workers| write!(f, "-{workers}"))?;
                let services = others + 1;
                if *others > 0 { write!(f, " {services} Services") } else { Ok(()) }?;
                if *flows > 0 { write!(f, " {flows} flows") } else { Ok(()) }
            }
            Self::Haproxy => f.write_str("haproxy"),
            Self::Nginx => f.write_str("nginx"),
            Self::Nft => f.write_str("nft"),
            Self::KubeProxy => f.write_str("kube-proxy"),
            Self::Hop => f.write_str("hop"),
        }
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "direct" => Ok(Self::Direct),
            "haproxy" => Ok(Self::Haproxy),
            "nginx" => Ok(Self::Nginx),
            "nft" => Ok(Self::Nft),
            "kube-proxy" => Ok(Self::KubeProxy),
            "hop" => Ok(Self::Hop),
            _ => sluice(text).ok_or_else(|| {
                "use direct, sluice, sluice-links, sluice-offload (each also with -WORKERS), haproxy, nginx, kube-proxy, nft \
                 or hop"
                    .to_owned()
            }),
        }
    }
}

/// What the name of a daemon with this `packetPath` begins with.
fn prefix(path: PacketPath) -> String {
    match path {
        PacketPath::Kernel => "sluice".to_owned(),
        path => format!("sluice-{}", path.name()),
    }
}

fn sluice(text: &str) -> Option<Peer> {
    let named = PacketPath::ALL.into_iter().find_map(|path| match text.strip_prefix(&prefix(path))? {
        "" => Some((path, None)),
        workers => {
            Some((path, Some(workers.strip_prefix('-')?.parse().ok().filter(|workers| (1..=64).contains(workers))?)))
        }
    });
    named.map(|(path, workers)| Peer::Sluice(Sluice { workers, path, ..Sluice::default() }))
}

impl Serialize for Peer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What a peer runs in, once its configuration is written.
pub(super) enum Started {
    /// Nothing but kernel state.
    Kernel,
    /// A process.
    Process(std::process::Command),
    /// It cannot run here, and why.
    Missing(String),
}

/// A peer that is ready to be measured. Dropping it ends it.
pub(crate) struct Running {
    /// Where it is.
    pub(super) lab: Lab,
    /// What its clients dial.
    pub(super) targets: Vec<SocketAddr>,
    process: Option<Process>,
}

/// Starts a peer and waits until it serves; `Err` inside if it is not installed.
pub(super) fn start(peer: Peer, mode: Mode, pods: u8, sluice: &Path) -> Result<Result<Running, String>> {
    let lab = Lab::new(pods)?;
    let folder = tempfile::tempdir().context("a folder for configuration")?;
    let mut control_plane = None;
    let started = match peer {
        Peer::Direct => Started::Kernel,
        Peer::Sluice(with) => match daemon::not_built(sluice) {
            Some(why) => Started::Missing(why),
            None => {
                let endpoints = ready(lab.endpoints().iter().map(SocketAddr::ip));
                let others = Others { services: with.others, endpoints: 5 * with.others, ..Others::default() };
                let program = Program { workers: with.workers, ..Program::new(Some(sluice), with.path)? };
                let command = daemon::prepare(&lab, folder.path(), &program, Some(&others), &endpoints)?;
                if with.flows > 0 {
                    daemon::add(folder.path(), "silent.json", &manifests::silent(&endpoints))?;
                }
                Started::Process(command)
            }
        },
        Peer::Haproxy => proxy::haproxy(&lab, folder.path())?,
        Peer::Nginx => proxy::nginx(&lab, folder.path())?,
        Peer::Nft => nft::load(&lab)?,
        Peer::KubeProxy => match kube_proxy::missing() {
            Some(why) => Started::Missing(why),
            None => {
                let (plane, command) = kube_proxy::prepare(&lab, folder.path())?;
                control_plane = Some(plane);
                Started::Process(command)
            }
        },
        Peer::Hop => hop::prepare(&lab, mode)?,
    };
    let targets = match peer {
        Peer::Direct => lab.endpoints(),
        Peer::Sluice(_) | Peer::Nft | Peer::KubeProxy | Peer::Hop => vec![lab.service(mode)],
        Peer::Haproxy | Peer::Nginx => vec![lab.node_port()],
    };
    let process = match started {
        Started::Missing(why) => return Ok(Err(why)),
        Started::Kernel => None,
        Started::Process(command) => Some(Process::start(command, folder)?),
    };
    let mut running = Running { lab, targets, process };
    if let Err(error) = running.wait_until_ready(mode) {
        let log = running.process.as_ref().map(Process::log).unwrap_or_default();
        return Err(error.context(format!("{peer} does not serve\n{log}")));
    }
    if let Peer::Sluice(Sluice { flows: flows @ 1.., .. }) = peer {
        flows::fill(&running.lab, flows)?;
    }
    // Its rules stay as they are; an API server would take its part of the processors from everybody.
    drop(control_plane);
    running.lab.forget_finished_connections();
    Ok(Ok(running))
}

impl Running {
    fn wait_until_ready(&mut self, mode: Mode) -> Result<()> {
        let deadline = Instant::now() + READY;
        for target in &self.targets {
            while let Err(failure) = workload::probe(Some(self.lab.client(mode)), *target, Duration::from_millis(500))?
            {
                if let Some(status) = self.process.as_mut().map_or(Ok(None), Process::ended)? {
                    bail!("it ended: {status}");
                }
                if Instant::now() > deadline {
                    bail!("{target}: {failure}");
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// What its process and the children of that use.
    pub(super) fn usage(&self) -> Usage {
        self.process.as_ref().map_or_else(Usage::default, Process::usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive() {
        for name in [
            "direct",
            "sluice",
            "sluice-2",
            "sluice-links",
            "sluice-links-2",
            "sluice-offload",
            "sluice-offload-2",
            "haproxy",
            "nginx",
            "nft",
            "kube-proxy",
        ] {
            assert_eq!(name.parse::<Peer>().unwrap().to_string(), name);
        }
        for name in ["", "sluice-", "sluice-0", "sluice-links-", "sluice-links-0", "ipvs"] {
            assert!(name.parse::<Peer>().is_err(), "{name}");
        }
        let sluice: Peer = "sluice-2".parse().unwrap();
        assert_eq!(sluice.with(99, 5).to_string(), "sluice-2 100 Services 5 flows");
        assert_eq!(sluice.with(99, 5).plain(), sluice);
        assert_eq!(Peer::Nft.with(99, 5), Peer::Nft);
    }
}
