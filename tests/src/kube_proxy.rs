//! The real kube-proxy on a node, of programs that `scripts/kube/build` has built.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice_bench::netns::NetNs;

use crate::manifests::NODE;

/// kube-proxy that runs. Dropping it ends it; its rules stay.
pub struct KubeProxy {
    child: Child,
    folder: tempfile::TempDir,
}

/// The program; when it is not built, says on stderr what is left untested.
#[must_use]
pub fn program(what: &str) -> Option<PathBuf> {
    let program = crate::control_plane::folder().join("kube-proxy");
    if program.exists() {
        return Some(program);
    }
    eprintln!("not tested: {what}: needs Kubernetes' own kube-proxy: run scripts/kube/build");
    None
}

/// The configuration of kube-proxy for [`NODE`], its servers on other ports than Sluice's.
#[must_use]
pub fn configuration(mode: &str, kubeconfig: &Path) -> String {
    let kubeconfig = kubeconfig.display();
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: {mode}\n\
         clusterCIDR: 10.244.0.0/16,fd00:10:244::/64\nhostnameOverride: {NODE}\n\
         clientConnection: {{kubeconfig: {kubeconfig}}}\nnodePortAddresses: [primary]\n\
         healthzBindAddress: 0.0.0.0:10356\nmetricsBindAddress: 127.0.0.1:10349\n\
         conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n"
    )
}

impl KubeProxy {
    /// Starts it in this namespace.
    pub fn start(program: &Path, ns: &NetNs, mode: &str, kubeconfig: &Path) -> Result<Self> {
        Self::start_with(program, ns, &configuration(mode, kubeconfig))
    }

    /// The same with this configuration.
    pub fn start_with(program: &Path, ns: &NetNs, configuration: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("config.conf");
        std::fs::write(&file, configuration)?;
        let log = std::fs::File::create(folder.path().join("log"))?;
        let mut command = ns.command(program);
        // It finds iptables where a user's path does not always lead.
        command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
        let child = command.arg("--config").arg(&file).stdout(Stdio::null()).stderr(log).spawn();
        Ok(Self { child: child.context("cannot start kube-proxy")?, folder })
    }

    /// Ends it, as its DaemonSet does.
    pub fn stop(&mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGTERM)?;
        self.child.wait()?;
        Ok(())
    }

    /// What it has written to its log.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a tool of the system's is there; when not, says on stderr what is left untested.
#[must_use]
pub fn has_tool(tool: &str, what: &str) -> bool {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let is_there = Command::new(tool).arg("--version").env("PATH", path).output().is_ok();
    if !is_there {
        eprintln!("not tested: {what}: needs {tool}");
    }
    is_there
}
