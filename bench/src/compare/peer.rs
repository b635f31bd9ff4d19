//! Who is compared, and how is each started.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Serialize, Serializer};
use sluice_bench::workload;

use super::lab::Lab;
use super::{Mode, hop, nft, proxy, sluice};

/// Bound on starting and on stopping.
const SOON: Duration = Duration::from_secs(15);
/// What one tick in /proc/PID/stat is, on every Linux.
pub(super) const TICK_US: f64 = 10_000.0;

/// A way from the client to the Pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// Dialling the Pods themselves: what all are measured by.
    Direct,
    /// The daemon beside this program; with as many packet threads as cores, or with this many.
    Sluice(Option<usize>),
    /// `mode tcp`.
    Haproxy,
    /// The stream module.
    Nginx,
    /// The rules that kube-proxy's nftables mode renders.
    Nft,
    /// The least that a hop through TUN can cost.
    Hop,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str("direct"),
            Self::Sluice(None) => f.write_str("sluice"),
            Self::Sluice(Some(workers)) => write!(f, "sluice-{workers}"),
            Self::Haproxy => f.write_str("haproxy"),
            Self::Nginx => f.write_str("nginx"),
            Self::Nft => f.write_str("nft"),
            Self::Hop => f.write_str("hop"),
        }
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "direct" => Ok(Self::Direct),
            "sluice" => Ok(Self::Sluice(None)),
            "haproxy" => Ok(Self::Haproxy),
            "nginx" => Ok(Self::Nginx),
            "nft" => Ok(Self::Nft),
            "hop" => Ok(Self::Hop),
            _ => match text.strip_prefix("sluice-").map(str::parse) {
                Some(Ok(workers @ 1..=64)) => Ok(Self::Sluice(Some(workers))),
                _ => Err("use direct, sluice, sluice-WORKERS, haproxy, nginx, nft or hop".to_owned()),
            },
        }
    }
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
    process: Option<Child>,
    folder: tempfile::TempDir,
}

/// Starts a peer and waits until it serves; `Err` inside if it is not installed.
pub(super) fn start(peer: Peer, mode: Mode, pods: u8, sluice: &Path) -> Result<Result<Running, String>> {
    let lab = Lab::new(pods)?;
    let folder = tempfile::tempdir().context("a folder for configuration")?;
    let started = match peer {
        Peer::Direct => Started::Kernel,
        Peer::Sluice(workers) => sluice::prepare(&lab, folder.path(), sluice, workers)?,
        Peer::Haproxy => proxy::haproxy(&lab, folder.path())?,
        Peer::Nginx => proxy::nginx(&lab, folder.path())?,
        Peer::Nft => nft::load(&lab)?,
        Peer::Hop => hop::prepare(&lab, mode)?,
    };
    let targets = match peer {
        Peer::Direct => lab.endpoints(),
        Peer::Sluice(_) | Peer::Nft | Peer::Hop => vec![lab.service(mode)],
        Peer::Haproxy | Peer::Nginx => vec![lab.node_port()],
    };
    let process = match started {
        Started::Missing(why) => return Ok(Err(why)),
        Started::Kernel => None,
        Started::Process(mut command) => {
            let log = fs::File::create(folder.path().join("log"))?;
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            Some(command.spawn().with_context(|| format!("cannot start {peer}"))?)
        }
    };
    let mut running = Running { lab, targets, process, folder };
    running.wait_until_ready(mode).with_context(|| format!("{peer} does not serve\n{}", running.log()))?;
    running.lab.forget_finished_connections();
    Ok(Ok(running))
}

impl Running {
    fn wait_until_ready(&mut self, mode: Mode) -> Result<()> {
        let deadline = Instant::now() + SOON;
        for target in &self.targets {
            while let Err(failure) = workload::probe(Some(self.lab.client(mode)), *target, Duration::from_millis(500))?
            {
                if let Some(status) = self.process.as_mut().and_then(|process| process.try_wait().transpose()) {
                    bail!("it ended: {}", status?);
                }
                if Instant::now() > deadline {
                    bail!("{target}: {failure}");
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Processor time of its process and the children of that, in microseconds.
    pub(super) fn cpu_us(&self) -> f64 {
        let Some(process) = &self.process else { return 0.0 };
        let id = process.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|id| id.parse().ok());
        children.chain([id]).map(ticks).sum::<f64>() * TICK_US
    }
}

/// User and system time of a process; nothing for one that has ended.
fn ticks(id: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // The name may hold anything, so fields are counted from its end: state is the third, utime the fourteenth.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum()
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(process) = &mut self.process else { return };
        if let Ok(id) = process.id().try_into() {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        let deadline = Instant::now() + SOON;
        while matches!(process.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        drop(process.kill());
        drop(process.wait());
    }
}

/// A program in the path, or where administrators' programs are.
pub(super) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive() {
        for name in ["direct", "sluice", "sluice-2", "haproxy", "nginx", "nft"] {
            assert_eq!(name.parse::<Peer>().unwrap().to_string(), name);
        }
        for name in ["", "sluice-", "sluice-0", "ipvs"] {
            assert!(name.parse::<Peer>().is_err(), "{name}");
        }
    }
}
