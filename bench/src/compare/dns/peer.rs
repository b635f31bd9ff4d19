//! Who answers names here: Sluice and CoreDNS, each on one core of the node, fed by one API server.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use sluice_bench::control_plane::{self, ControlPlane};
use sluice_bench::link::{LinkConfig, configure};
use sluice_bench::name_client::NameClient;

use super::objects;
use crate::compare::proxy::find_program;
use crate::lab::Lab;
use crate::manifests::{NODE, SERVICE_CIDR};
use crate::process::{Process, Usage};

/// Bound on learning all objects.
const PATIENCE: Duration = Duration::from_secs(180);

/// A name server.
pub(super) struct Peer {
    pub(super) name: &'static str,
    pub(super) address: SocketAddr,
    process: Process,
    /// From its start to the first answer from the objects.
    pub(super) ready_after: Duration,
}

impl Peer {
    /// Sluice with the API server's objects.
    pub(super) fn sluice(
        lab: &Lab,
        program: &Path,
        plane: &ControlPlane,
        core: usize,
        services: usize,
    ) -> Result<Self> {
        let address = address(10);
        let folder = tempfile::tempdir().context("a folder for the configuration")?;
        let config = folder.path().join("config.yaml");
        let text = format!("serviceCIDRs: [{SERVICE_CIDR}]\ndns: {{listen: ['{address}'], ttl: 30s, upstreams: []}}\n");
        fs::write(&config, text).context("cannot write the configuration")?;
        let mut command = lab.topology.node.command(program);
        command.arg("run").arg("--kubeconfig").arg(plane.kubeconfig("admin")).arg("--config").arg(config);
        command.args(["--node-name", NODE, "--state-dir"]).arg(folder.path().join("state"));
        Self::start(lab, "sluice", address, (command, folder), core, services)
    }

    /// CoreDNS as kubeadm installs it, or without its cache: that answers what it has seen for up to 30 s.
    pub(super) fn coredns(
        lab: &Lab,
        program: &Path,
        plane: &ControlPlane,
        core: usize,
        services: usize,
        cached: bool,
    ) -> Result<Self> {
        let address = address(if cached { 11 } else { 12 });
        // It binds to an address that is there; Sluice makes its own.
        let addresses = vec![address.ip().into()];
        configure(&lab.topology.node, &LinkConfig { name: "lo".to_owned(), addresses, ..LinkConfig::default() })?;
        let folder = tempfile::tempdir().context("a folder for the Corefile")?;
        let corefile = folder.path().join("Corefile");
        let text = format!(
            ".:53 {{\n    bind {}\n    errors\n    kubernetes cluster.local in-addr.arpa ip6.arpa {{\n        kubeconfig {}\n\
             \x20       pods insecure\n        fallthrough in-addr.arpa ip6.arpa\n        ttl 30\n    }}\n    {}loadbalance\n}}\n",
            address.ip(),
            plane.kubeconfig("admin").display(),
            if cached { "cache 30\n    " } else { "" },
        );
        fs::write(&corefile, text).context("cannot write the Corefile")?;
        let mut command = lab.topology.node.command(program);
        command.arg("-conf").arg(corefile);
        let name = if cached { "coredns" } else { "coredns without cache" };
        Self::start(lab, name, address, (command, folder), core, services)
    }

    fn start(
        lab: &Lab,
        name: &'static str,
        address: SocketAddr,
        (command, folder): (std::process::Command, tempfile::TempDir),
        core: usize,
        services: usize,
    ) -> Result<Self> {
        let begun = Instant::now();
        let process = on_core(core, || Process::start(command, folder))?;
        let mut peer = Self { name, address, process, ready_after: Duration::ZERO };
        let last = objects::question(services - 1)?;
        let mut client = lab.client_pod().run(|| NameClient::new(address))?;
        while client.addresses(&last)?.is_none_or(|addresses| addresses.is_empty()) {
            if let Some(status) = peer.process.ended()? {
                bail!("{name} ended: {status}\n{}", peer.process.log());
            }
            ensure!(begun.elapsed() < PATIENCE, "{name} does not answer\n{}", peer.process.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        peer.ready_after = begun.elapsed();
        Ok(peer)
    }

    pub(super) fn usage(&self) -> Usage {
        self.process.usage()
    }
}

fn address(last: u8) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(169, 254, 20, last), 53))
}

/// The CoreDNS to compare with, or why there is none.
pub(super) fn find_coredns(wanted: Option<&Path>) -> Result<PathBuf, String> {
    let built = control_plane::folder().join("coredns");
    let found = match wanted {
        Some(path) => path.exists().then(|| path.to_owned()),
        None => find_program("coredns").or_else(|| built.exists().then_some(built)),
    };
    let name = wanted.map_or_else(|| "coredns".to_owned(), |path| path.display().to_string());
    found.ok_or_else(|| format!("{name} is not there: say --coredns FILE, or put it into PATH"))
}

/// Does something on one core; what is started there stays there.
pub(super) fn on_core<T>(core: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let this = Pid::from_raw(0);
    let before = sched_getaffinity(this).context("cores of this thread")?;
    let mut only = CpuSet::new();
    only.set(core).context("no such core")?;
    sched_setaffinity(this, &only).with_context(|| format!("cannot stay on core {core}"))?;
    let result = work();
    sched_setaffinity(this, &before).context("cannot leave a core")?;
    result
}
