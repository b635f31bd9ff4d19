//! A node whose Service `web` has endpoints that come, change and go: numbered Pods with a talking server each.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sluice_bench::netns::NetNs;
use sluice_bench::topology::Pod;

use crate::cluster::{Cluster, SOON};
use crate::manifests::{self, Endpoint};
use crate::talk::Listener;

/// Where the servers of Pods listen.
pub const ENDPOINT: u16 = 8080;

/// A Pod and its server.
pub struct Talker {
    /// Namespace and addresses.
    pub pod: Pod,
    /// Its server.
    pub listener: Listener,
}

/// The set-up.
pub struct Stage {
    /// Node and daemon.
    pub cluster: Cluster,
    /// Pods by number.
    pub talkers: BTreeMap<u8, Talker>,
    /// A Pod that is nobody's endpoint.
    pub client: Pod,
    /// What `metadata.annotations` of the Service has.
    pub annotations: Value,
}

impl Stage {
    /// These Pods as ready endpoints and the daemon running, with this added to its configuration.
    pub fn new(pods: impl IntoIterator<Item = u8>, config: &str) -> Result<Self> {
        let cluster = Cluster::new()?;
        cluster.configure(&format!("localControllers: false\n{config}"))?;
        let client = cluster.topology.add_pod("client", &addresses(200))?;
        let mut stage = Self { cluster, talkers: BTreeMap::new(), client, annotations: json!({}) };
        for number in pods {
            stage.add(number)?;
        }
        let all: Vec<Endpoint> = stage.talkers.keys().map(|number| ready(*number)).collect();
        stage.publish(&all)?;
        stage.cluster.start()?;
        Ok(stage)
    }

    /// Makes Pod `number` and its server.
    pub fn add(&mut self, number: u8) -> Result<()> {
        let pod = self.cluster.topology.add_pod(&format!("web-{number}"), &addresses(number))?;
        let listener = Listener::start(&pod.ns, number.into(), ENDPOINT)?;
        self.talkers.insert(number, Talker { pod, listener });
        Ok(())
    }

    /// Takes a Pod away: its link, then its server.
    pub fn remove(&mut self, number: u8) -> Result<()> {
        self.talkers.remove(&number).context("no such Pod")?;
        self.cluster.topology.remove_pod(&format!("web-{number}"))?;
        Ok(())
    }

    /// Writes the Service with these endpoints.
    pub fn publish(&self, endpoints: &[Endpoint]) -> Result<()> {
        let mut service = manifests::service("web", 10);
        service["metadata"]["annotations"] = self.annotations.clone();
        let objects = [vec![service], manifests::slices_of("web", endpoints)].concat();
        self.cluster.write("web.json", &objects)
    }

    /// Writes the Service with these endpoints and waits until that is in force. When it was written.
    pub fn change(&self, endpoints: &[Endpoint]) -> Result<Instant> {
        let generation = self.cluster.generation()?;
        let written = Instant::now();
        self.publish(endpoints)?;
        self.cluster.wait_for_table_after(generation)?;
        Ok(written)
    }

    /// A Pod's server stops listening as if nobody ever had: what its kernel took before is served.
    pub fn close(&mut self, number: u8) -> Result<()> {
        let talker = self.talkers.get_mut(&number).context("no such Pod")?;
        // Connections that wait to be accepted would be reset by the Pod's own kernel, which no proxy can help.
        let refuse = "table inet closing { chain in { type filter hook input priority 0; \
             tcp dport 8080 tcp flags & (syn | ack) == syn reject with tcp reset; }; }";
        run(&talker.pod.ns, "nft", &["add", refuse])?;
        let deadline = Instant::now() + SOON;
        while has_waiting(&talker.pod.ns)? {
            ensure!(Instant::now() < deadline, "connections wait to be accepted");
            std::thread::sleep(Duration::from_millis(5));
        }
        talker.listener.close();
        run(&talker.pod.ns, "nft", &["delete", "table", "inet", "closing"])
    }

    /// The ClusterIP of `web`.
    #[must_use]
    pub fn to(&self) -> SocketAddr {
        self.cluster.web(true)[0]
    }

    /// What `get endpoints` says of the TCP port of Pod `number`; the live one where the address had others before.
    pub fn endpoint(&self, number: u8) -> Result<Option<Value>> {
        let text = self.cluster.sluice(&["get", "endpoints", "-o", "json"])?;
        let list: Value = serde_json::from_str(&text)?;
        let address = SocketAddr::new(addresses(number)[0], ENDPOINT).to_string();
        let items = list["items"].as_array().context("no list")?;
        let mut meant: Vec<&Value> = items.iter().filter(|it| it["address"] == address.as_str()).collect();
        meant.sort_by_key(|it| it["state"] == "gone");
        Ok(meant.first().map(|it| (*it).clone()))
    }

    /// Waits until `get endpoints` says of Pod `number` what `accept` wants.
    pub fn wait_for_endpoint(&self, number: u8, what: &str, accept: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + SOON;
        loop {
            let found = self.endpoint(number)?;
            if let Some(found) = found.as_ref().filter(|found| accept(found)) {
                return Ok(found.clone());
            }
            ensure!(Instant::now() < deadline, "{what}: {found:?}\n{}", self.cluster.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Both addresses of Pod `number`.
#[must_use]
pub fn addresses(number: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 244, 0, number).into(), Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, number.into()).into()]
}

/// Pod `number` as a ready endpoint.
#[must_use]
pub fn ready(number: u8) -> Endpoint {
    Endpoint::ready(&format!("web-{number}"), &addresses(number)).with_uid(&format!("uid-{number}"))
}

/// Whether a namespace has connections to servers of ours that are half open or wait to be accepted.
fn has_waiting(ns: &NetNs) -> Result<bool> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}"));
    let text = ns.run(|| Ok(read("tcp")? + &read("tcp6")?))?;
    let port = format!(":{ENDPOINT:04X}");
    Ok(text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
        let [_, local, _, state, queues, ..] = fields[..] else { return false };
        // SYN_RECV; or LISTEN, of which the second number counts those that wait.
        local.ends_with(&port) && (state == "03" || (state == "0A" && !queues.ends_with(":00000000")))
    }))
}

/// TCP segments that came to a namespace so far.
pub fn segments(ns: &NetNs) -> Result<u64> {
    let text = ns.run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/snmp")?))?;
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:")).map(|line| line.split_whitespace());
    let (names, values) = (lines.next().context("no names")?, lines.next().context("no values")?);
    let (_, value) = names.zip(values).find(|(name, _)| *name == "InSegs").context("no InSegs")?;
    Ok(value.parse()?)
}

/// Runs a program inside a namespace.
pub fn run(ns: &NetNs, program: &str, arguments: &[&str]) -> Result<()> {
    let output = ns.command(program).args(arguments).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?}: {error}");
    Ok(())
}
