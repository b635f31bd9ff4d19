//! The real daemon: this very program's `sluice run`, in the node's namespace.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice_bench::netns::NetNs;

use super::interrupt::Interrupt;
use super::naming::LISTEN;
use crate::host::Lacking;

/// Where its admin API listens, inside the node's namespace.
const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// Bound on anything that it should do in a moment.
const SOON: Duration = Duration::from_secs(10);
/// How often it is asked meanwhile.
const POLL: Duration = Duration::from_millis(10);
/// What it exits with when the environment lacks something.
const LACKS: i32 = 3;
/// Lines of its log in an error.
const LOG_LINES: usize = 12;

/// The daemon, running. Dropping it stops it.
#[derive(Debug)]
pub(super) struct Daemon {
    child: Child,
    node: NetNs,
    log: PathBuf,
}

impl Daemon {
    /// Starts it on the objects in `manifests` and waits until it serves. `folder` gets its configuration, state and log.
    ///
    /// It ends with the calling thread.
    pub(super) fn start(
        node: &NetNs,
        node_name: &str,
        folder: &Path,
        manifests: &Path,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let config = folder.join("config.yaml");
        // The demo plays the controllers and names the ranges that they allocate from.
        let ranges: Vec<String> =
            crate::config::Config::default().service_cidrs().iter().map(ToString::to_string).collect();
        let text = serde_json::json!({"localControllers": false, "prune": true, "serviceCIDRs": ranges,
            "dns": {"listen": [LISTEN], "upstreams": []}});
        fs::write(&config, text.to_string()).context("cannot write the daemon's configuration")?;
        let log = folder.join("daemon.log");
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = node.command(program);
        command.arg("run").arg("--manifests").arg(manifests).arg("--config").arg(config);
        command.args(["--node-name", node_name, "--admin", &ADMIN.to_string()]);
        command.arg("--state-dir").arg(folder.join("state"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log)?);
        // A Ctrl-C in the terminal is for the demo, which stops the daemon in its turn.
        command.process_group(0);
        let child = command.spawn().context("cannot start the daemon")?;
        let mut daemon = Self { child, node: node.clone(), log };
        let deadline = Instant::now() + SOON;
        while daemon.generation().is_err() {
            daemon.check_alive()?;
            ensure!(Instant::now() < deadline, "the daemon does not get ready\n{}", daemon.log_tail());
            interrupt.sleep(POLL)?;
        }
        Ok(daemon)
    }

    /// Generation of the routing table in force; an error before the first.
    pub(super) fn generation(&self) -> Result<u64> {
        self.get("/healthz")?;
        let text = self.get("/metrics")?;
        let value = metric(&text, "sluice_table_generation").context("no routing table yet")?;
        ensure!(value >= 1.0, "no routing table yet");
        Ok(value as u64)
    }

    /// Waits until a table later than this one is in force.
    pub(super) fn wait_for_table_after(&mut self, generation: u64, interrupt: &Interrupt) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while self.generation().is_ok_and(|now| now <= generation) {
            self.check_alive()?;
            ensure!(
                Instant::now() < deadline,
                "the daemon has not taken up a change of endpoints within {SOON:?}\n{}",
                self.log_tail()
            );
            interrupt.sleep(POLL)?;
        }
        self.check_alive()
    }

    /// Stops it as an init system does. An error when it does not end in good order.
    pub(super) fn stop(mut self) -> Result<()> {
        self.terminate()
    }

    fn terminate(&mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGTERM).context("cannot stop the daemon")?;
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the daemon's end was not clean: {status}\n{}", self.log_tail());
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the daemon does not end on SIGTERM\n{}", self.log_tail());
            std::thread::sleep(POLL);
        }
    }

    fn check_alive(&mut self) -> Result<()> {
        let Some(status) = self.child.try_wait()? else { return Ok(()) };
        if status.code() == Some(LACKS) {
            bail!(Lacking(format!("the daemon cannot run here:\n{}", self.log_tail())));
        }
        bail!("the daemon ended: {status}\n{}", self.log_tail())
    }

    fn get(&self, path: &str) -> Result<String> {
        let url = format!("http://{ADMIN}{path}");
        self.node.run(|| {
            let agent = ureq::Agent::config_builder().timeout_global(Some(SOON)).build().new_agent();
            Ok(agent.get(&url).call()?.body_mut().read_to_string()?)
        })
    }

    fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // What it does not remove itself vanishes with the node's namespace.
        if !matches!(self.child.try_wait(), Ok(Some(_))) && self.terminate().is_err() {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

/// Value of a metric without labels.
fn metric(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        let text = "# TYPE a gauge\na_total 1\na{x=\"y\"} 2\na 3\n";
        assert_eq!(metric(text, "a"), Some(3.0));
        assert_eq!(metric(text, "b"), None);
    }
}
