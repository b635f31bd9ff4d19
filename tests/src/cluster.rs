//! One node with Pods and an outside client in network namespaces, and the daemon under test on the node.

use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use sluice_bench::netns::NetNs;
use sluice_bench::serve::PodServer;
use sluice_bench::topology::{Pod, Topology, TopologyConfig};

use crate::manifests::{self, Endpoint};
use crate::{http, sluice_binary};

/// Where the daemon's admin API listens, inside the node's namespace.
pub const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// Bound on anything that should be done in a moment.
pub const SOON: Duration = Duration::from_secs(10);

/// The variable that has all daemons under test take packets another way.
pub const PACKET_PATH: &str = "SLUICE_TEST_PACKET_PATH";

/// A Pod that serves HTTP on 8080 and answers datagrams on 5353.
pub struct ServingPod {
    /// Its namespace and addresses.
    pub pod: Pod,
    /// Its servers.
    pub server: PodServer,
}

/// The whole set-up. Dropping it stops the daemon and removes everything.
pub struct Cluster {
    /// Namespaces.
    pub topology: Arc<Topology>,
    /// Pods, the first made first.
    pub pods: Vec<ServingPod>,
    folder: tempfile::TempDir,
    daemon: Option<Child>,
    arguments: Vec<String>,
    environment: Vec<(String, PathBuf)>,
    kubeconfig: Option<PathBuf>,
}

impl Cluster {
    /// A node without a daemon and without Pods.
    pub fn new() -> Result<Self> {
        let folder = tempfile::tempdir().context("a folder for manifests and state")?;
        fs::create_dir(folder.path().join("manifests"))?;
        let topology = Arc::new(Topology::new(TopologyConfig::default())?);
        let cluster = Self {
            topology,
            pods: Vec::new(),
            folder,
            daemon: None,
            arguments: Vec::new(),
            environment: Vec::new(),
            kubeconfig: None,
        };
        cluster.configure("localControllers: false\n")?;
        let addresses: Vec<IpAddr> = cluster.topology.config.node.iter().map(ipnet::IpNet::addr).collect();
        cluster.write("node.json", &[manifests::node(&addresses)])?;
        Ok(cluster)
    }

    /// A node with `pods` Pods behind the Service `web` (see [`manifests::service`]) and the daemon running.
    pub fn with_web(pods: u8) -> Result<Self> {
        Self::new()?.and_web(pods)
    }

    /// The same with this `packetPath`.
    pub fn with_web_by(path: &str, pods: u8) -> Result<Self> {
        let cluster = Self::new()?;
        cluster.configure(&format!("localControllers: false\npacketPath: {path}\n"))?;
        cluster.and_web(pods)
    }

    fn and_web(mut self, pods: u8) -> Result<Self> {
        for number in 1..=pods {
            self.add_pod(number)?;
        }
        self.publish_web(0..usize::from(pods))?;
        self.start()?;
        Ok(self)
    }

    /// Flags that every later start of the daemon gets too.
    pub fn arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(|text| (*text).to_owned()).collect();
    }

    /// A variable that every later start of the daemon has in its environment.
    pub fn environment(&mut self, name: &str, value: &std::path::Path) {
        self.environment.push((name.to_owned(), value.into()));
    }

    /// Every later start of the daemon watches an API server instead of the folder.
    pub fn watch_api(&mut self, kubeconfig: PathBuf) {
        self.kubeconfig = Some(kubeconfig);
    }

    /// Writes the configuration file anew, for the next start. Where it has no `packetPath`, that of [`PACKET_PATH`] is added.
    pub fn configure(&self, text: &str) -> Result<()> {
        let path = std::env::var(PACKET_PATH)
            .ok()
            .filter(|_| !text.contains("packetPath:") && !text.contains("KubeProxyConfiguration"));
        let path = path.map(|path| format!("packetPath: {path}\n")).unwrap_or_default();
        fs::write(self.folder.path().join("config.yaml"), format!("{text}{path}"))
            .context("cannot write the configuration")
    }

    /// Adds Pod `web-NUMBER` with the addresses 10.244.0.NUMBER and fd00:10:244::NUMBER.
    pub fn add_pod(&mut self, number: u8) -> Result<()> {
        let name = format!("web-{number}");
        let addresses = [
            IpAddr::V4(Ipv4Addr::new(10, 244, 0, number)),
            IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, number.into())),
        ];
        let pod = self.topology.add_pod(&name, &addresses)?;
        let server = PodServer::start(&pod.ns, &name, &[8080], &[5353])?;
        self.pods.push(ServingPod { pod, server });
        Ok(())
    }

    /// Publishes the Service `web` with the Pods of these positions as endpoints.
    pub fn publish_web(&self, pods: impl IntoIterator<Item = usize>) -> Result<()> {
        let endpoint = |position: usize| {
            let pod = &self.pods[position].pod;
            Endpoint::ready(&pod.name, &pod.addresses).with_uid(&format!("uid-{}", pod.name))
        };
        let pods: Vec<Endpoint> = pods.into_iter().map(endpoint).collect();
        let mut objects = vec![manifests::service("web", 10)];
        objects.extend(manifests::slices_of("web", &pods));
        self.write("web.json", &objects)
    }

    /// Writes a manifest file as a whole, as tools do: beside it, then renamed.
    pub fn write(&self, name: &str, objects: &[Value]) -> Result<()> {
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.write_text(name, &serde_json::to_string(&list)?)
    }

    /// Writes a manifest file with this text.
    pub fn write_text(&self, name: &str, text: &str) -> Result<()> {
        let hidden = self.manifests().join(format!(".{name}.new"));
        fs::write(&hidden, text)?;
        fs::rename(&hidden, self.manifests().join(name)).with_context(|| format!("cannot write {name}"))
    }

    /// The folder of manifests.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        self.folder.path().join("manifests")
    }

    /// The command `sluice run` for this node, not started.
    #[must_use]
    pub fn run_command(&self, state: &str) -> Command {
        let mut command = self.topology.node.command(sluice_binary());
        command.arg("run").envs(self.environment.iter().cloned());
        match &self.kubeconfig {
            Some(kubeconfig) => command.arg("--kubeconfig").arg(kubeconfig),
            None => command.arg("--manifests").arg(self.manifests()),
        };
        command.args(self.common_arguments(state));
        command
    }

    /// Arguments of `sluice run` for this node, all but where objects come from.
    #[must_use]
    pub fn common_arguments(&self, state: &str) -> Vec<OsString> {
        let path = |name| self.folder.path().join(name).into_os_string();
        let mut arguments = vec!["--config".into(), path("config.yaml"), "--state-dir".into(), path(state)];
        arguments.extend(["--node-name", manifests::NODE].map(OsString::from));
        arguments.extend(self.arguments.iter().map(OsString::from));
        arguments
    }

    /// Starts the daemon and waits until it serves.
    pub fn start(&mut self) -> Result<()> {
        self.begin()?;
        self.wait_until_served()
    }

    /// Starts the daemon, which may not get to serve yet.
    pub fn begin(&mut self) -> Result<()> {
        self.daemon = Some(self.spawn()?);
        Ok(())
    }

    /// The daemon of the state directory `state`; the log goes on from that of the last one.
    fn spawn(&self) -> Result<Child> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("daemon.log"))?;
        Ok(self.run_command("state").stderr(log).stdout(Stdio::null()).spawn()?)
    }

    /// Waits until a daemon that was begun serves.
    pub fn wait_until_served(&mut self) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while self.generation().is_err() {
            if let Some(status) = self.daemon.as_mut().and_then(|daemon| daemon.try_wait().transpose()) {
                bail!("the daemon ended: {}\n{}", status?, self.log());
            }
            ensure!(Instant::now() < deadline, "the daemon does not get ready\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Where the daemon keeps its state.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Starts another daemon beside the one that runs, which is to end by itself. Returns its exit code.
    pub fn take_over(&mut self) -> Result<Option<i32>> {
        let mut old = self.daemon.take().context("no daemon runs")?;
        self.daemon = Some(self.spawn()?);
        let deadline = Instant::now() + SOON;
        let status = loop {
            if let Some(status) = old.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                let _ = old.kill();
                let _ = old.wait();
                bail!("the old daemon does not end\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        self.wait_until_served()?;
        Ok(status.code())
    }

    /// Starts another daemon beside the one that runs, which is not to end by itself, and waits until it has taken over.
    /// Returns the old one.
    pub fn take_over_from_lingering(&mut self) -> Result<Child> {
        let old = self.daemon.take().context("no daemon runs")?;
        let served = self.log().matches("serving ").count();
        self.daemon = Some(self.spawn()?);
        let deadline = Instant::now() + SOON;
        while self.log().matches("serving ").count() == served {
            ensure!(Instant::now() < deadline, "no take-over\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.wait_until_served()?;
        Ok(old)
    }

    /// Ends the daemon with this signal and returns its exit code.
    pub fn stop(&mut self, signal: Signal) -> Result<Option<i32>> {
        let mut daemon = self.daemon.take().context("no daemon runs")?;
        kill(Pid::from_raw(daemon.id().try_into()?), signal)?;
        Ok(daemon.wait()?.code())
    }

    /// Memory of the daemon that is resident, in bytes.
    pub fn resident(&self) -> Result<u64> {
        let id = self.daemon.as_ref().context("no daemon runs")?.id();
        let status = fs::read_to_string(format!("/proc/{id}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.split_whitespace().next().context("no number")?.parse()?;
        Ok(kib * 1024)
    }

    /// What the daemon has written to its log.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("daemon.log")).unwrap_or_default()
    }

    /// Answer of the daemon's admin API.
    pub fn admin(&self, path: &str) -> Result<String> {
        let answer = http::get(&self.topology.node, ADMIN, path)?;
        ensure!(answer.status == 200, "GET {path}: {}", answer.status);
        Ok(answer.body)
    }

    /// Value of a metric whose line starts with this text (name and labels up to where they differ).
    pub fn metric(&self, start: &str) -> Result<f64> {
        let text = self.sluice(&["get", "metrics"]).or_else(|_| self.admin("/metrics"))?;
        let lines = text.lines().filter(|line| line.starts_with(start));
        let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum())
    }

    /// Generation of the routing table in force; an error before the first.
    pub fn generation(&self) -> Result<u64> {
        let text = self.admin("/metrics")?;
        let line =
            text.lines().find(|line| line.starts_with("sluice_table_generation ")).context("no generation yet")?;
        let value: f64 = line.rsplit(' ').next().context("no value")?.parse()?;
        ensure!(value >= 1.0, "no table yet");
        Ok(value as u64)
    }

    /// Waits until a table later than this one is in force.
    pub fn wait_for_table_after(&self, generation: u64) -> Result<u64> {
        let deadline = Instant::now() + SOON;
        loop {
            let now = self.generation()?;
            if now > generation {
                return Ok(now);
            }
            ensure!(Instant::now() < deadline, "no table after {generation}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Everything that is wrong now, as the daemon tells it.
    pub fn problems(&self) -> Result<String> {
        self.admin("/api/v1/problems")
    }

    /// Waits until the problems are as `accept` wants them.
    pub fn wait_for_problems(&self, what: &str, accept: impl Fn(&str) -> bool) -> Result<()> {
        let deadline = Instant::now() + SOON;
        loop {
            let problems = self.problems()?;
            if accept(&problems) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{what}: {problems}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs `sluice` with these arguments in the node's namespace and returns what it prints.
    pub fn sluice(&self, arguments: &[&str]) -> Result<String> {
        self.output(sluice_binary(), arguments)
    }

    /// Runs `sluice` with these arguments in the node's namespace: its exit code, and all that it prints.
    pub fn sluice_exit(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let output = self.topology.node.command(sluice_binary()).args(arguments).output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
    }

    /// Runs a program in the node's namespace and returns what it prints.
    pub fn output(&self, program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Result<String> {
        let output = self.topology.node.command(program).args(arguments).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {}: {error}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    /// All that a daemon may change on its host, as text: links, routes, rules, nftables, settings.
    pub fn host_state(&self) -> Result<String> {
        let mut text = String::new();
        for arguments in [
            &["-o", "link"][..],
            &["rule"],
            &["-6", "rule"],
            &["route", "show", "table", "all"],
            &["-6", "route", "show", "table", "all"],
        ] {
            text += &self.output("ip", arguments)?;
        }
        // Without counters: any packet of the host moves those of others' rules.
        text += &self.output("nft", &["-s", "list", "ruleset"])?;
        for setting in ["ip_local_reserved_ports", "tcp_early_demux"] {
            let path = format!("/proc/sys/net/ipv4/{setting}");
            text += &self.topology.node.run(|| Ok(fs::read_to_string(path)?))?;
        }
        Ok(text)
    }

    /// Where the Service `web` answers in this family: ClusterIP, node port, load-balancer address.
    #[must_use]
    pub fn web(&self, v4: bool) -> [SocketAddr; 3] {
        let node = self.topology.node_address(v4).expect("the node has both families");
        let (cluster_ip, load_balancer) = if v4 { ("10.96.0.10", "172.31.0.10") } else { ("fd00:96::a", "fd00:31::a") };
        let address = |text: &str| text.parse::<IpAddr>().expect("a constant address");
        [(address(cluster_ip), 80), (node, 30010), (address(load_balancer), 80)].map(SocketAddr::from)
    }

    /// Namespaces of the kinds of client: a Pod, the node, the outside.
    #[must_use]
    pub fn clients(&self) -> [(&'static str, &NetNs); 3] {
        [("pod", &self.pods[0].pod.ns), ("node", &self.topology.node), ("outside", &self.topology.client)]
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            // It is killed with its namespace; nothing is left to report to.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
    }
}
