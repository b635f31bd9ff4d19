//! The real kube-proxy in nftables mode, fed by a small API server.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use sluice_bench::control_plane::{self, ControlPlane};

use super::proxy::find_program;
use crate::lab::{CLUSTER_CIDR, Lab};
use crate::manifests::{self, NODE, WEB};

/// Bound on the API server's own objects, which it makes soon after it is ready.
const SOON: Duration = Duration::from_secs(30);

/// Why it cannot run here.
pub(crate) fn missing() -> Option<String> {
    let program = control_plane::missing(&["kube-apiserver", "kube-proxy"]);
    program.or_else(|| {
        find_program("nft").is_none().then(|| "nft is not installed (scripts/setup installs it)".to_owned())
    })
}

/// An API server beside the client outside, with the Service that is dialled, and the command of kube-proxy.
pub(super) fn prepare(lab: &Lab, folder: &Path) -> Result<(ControlPlane, Command)> {
    let plane = control_plane(lab)?;
    let slice = manifests::slice(WEB, &manifests::ready(lab.endpoints().iter().map(std::net::SocketAddr::ip)));
    for object in [manifests::node(lab), manifests::web(), slice] {
        plane.create(&object)?;
    }
    let command = command(lab, &plane, folder)?;
    Ok((plane, command))
}

/// An API server beside the client outside, with the `default` namespace.
pub(crate) fn control_plane(lab: &Lab) -> Result<ControlPlane> {
    let address = lab.topology.client_address(true).context("the client has an IPv4 address")?.to_string();
    let plane = ControlPlane::start(lab.topology.client.clone(), &address)?;
    let deadline = Instant::now() + SOON;
    while let Err(error) = plane.get("/api/v1/namespaces/default") {
        anyhow::ensure!(Instant::now() < deadline, "no default namespace: {error:#}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(plane)
}

/// kube-proxy on the lab's node.
pub(crate) fn command(lab: &Lab, plane: &ControlPlane, folder: &Path) -> Result<Command> {
    let config = folder.join("kube-proxy.yaml");
    fs::write(&config, configuration(&plane.kubeconfig("proxy"))).context("cannot write kube-proxy's configuration")?;
    let mut command = lab.topology.node.command(control_plane::folder().join("kube-proxy"));
    // It finds nft where a user's path does not always lead.
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    command.arg("--config").arg(config);
    Ok(command)
}

fn configuration(kubeconfig: &Path) -> String {
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n\
         clusterCIDR: {CLUSTER_CIDR}\nhostnameOverride: {NODE}\nclientConnection: {{kubeconfig: {}}}\n\
         nodePortAddresses: [primary]\n\
         conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n",
        kubeconfig.display()
    )
}
