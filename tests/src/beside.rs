//! Two nodes that are the same for whoever looks, but that Sluice serves one and the real kube-proxy the other: both read one
//! API server, and are asked and tried alike.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use serde_json::{Value, json};
use sluice_bench::client::Failure;
use sluice_bench::link::{LinkConfig, Route, veth};

use crate::api_cluster::ADDRESS;
use crate::cluster::{ADMIN, SOON};
use crate::control_plane::ControlPlane;
use crate::kube_proxy::{KubeProxy, configuration};
use crate::kube_proxy_rules::{Fate, Flow, Rules};
use crate::lab::{CLIENT_POD, ENDPOINT, Lab, pod_address, second_address};
use crate::manifests;
use crate::probe::{Protocol, ask};
use crate::world::{Change, ZONE, ZONES, cluster_ip};

/// Number of the Service that tells how far both have read.
const MARKER: u8 = 200;
/// How long nothing may come before we believe that nothing will.
const SILENCE: Duration = Duration::from_millis(400);
/// Threads of each kind of client.
const THREADS: usize = 8;

/// The nodes. Dropping it ends everything.
pub struct Twins {
    /// Sluice's node.
    pub sluice: Lab,
    /// kube-proxy's.
    pub other: Lab,
    /// What both read.
    pub plane: ControlPlane,
    proxy: Option<KubeProxy>,
    round: u16,
}

/// A flow of a kind of client, and what becomes of it by kube-proxy's rules.
#[derive(Clone, Debug)]
pub struct Decided {
    /// `pod`, `node` or `outside`.
    pub client: &'static str,
    /// Who dials what.
    pub flow: Flow,
    /// By kube-proxy's rules.
    pub fate: Fate,
}

impl Twins {
    /// Both nodes, with Pods that serve, and the API server; nobody reads it yet.
    pub fn new() -> Result<Self> {
        let (mut sluice, mut other) = (Lab::new()?, Lab::new()?);
        let pod = sluice.cluster.topology.add_pod("control-plane", &[ADDRESS.parse()?])?;
        let link = |name: &str, host: u8, routes| -> Result<LinkConfig> {
            let addresses = vec![format!("10.255.0.{host}/30").parse()?];
            Ok(LinkConfig { name: name.to_owned(), addresses, routes, ..LinkConfig::default() })
        };
        let route = Route {
            to: IpNet::from(ADDRESS.parse::<IpAddr>()?),
            via: Some([10, 255, 0, 2].into()),
            source: Some([10, 255, 0, 1].into()),
        };
        let ends = (link("api", 1, vec![route])?, link("eth1", 2, Vec::new())?);
        veth(&other.cluster.topology.node, &ends.0, &pod.ns, &ends.1)?;
        for lab in [&mut sluice, &mut other] {
            prepare(lab)?;
        }
        let plane = ControlPlane::start(pod.ns, ADDRESS)?;
        plane.create(&manifests::node(&addresses(&sluice)))?;
        Ok(Self { sluice, other, plane, proxy: None, round: 0 })
    }

    /// Starts both.
    pub fn start(&mut self, program: &std::path::Path) -> Result<()> {
        self.sluice
            .cluster
            .configure("localControllers: false\nclusterCIDRs: [10.244.0.0/16, 'fd00:10:244::/64']\n")?;
        self.sluice.cluster.watch_api(self.plane.kubeconfig("proxy"));
        let text = configuration("nftables", &self.plane.kubeconfig("proxy")) + "nftables: {minSyncPeriod: 10ms}\n";
        self.proxy = Some(KubeProxy::start_with(program, &self.other.cluster.topology.node, &text)?);
        self.sluice.cluster.start()
    }

    /// Makes a change. Whether the API server took it: a random object may break its rules.
    pub fn apply(&self, change: &Change) -> Result<bool> {
        let done = match change {
            Change::Create(object) => self.plane.create(object),
            Change::Replace(object) => self.plane.replace(object).and_then(|()| match object.get("status") {
                Some(status) => self.plane.patch_status(object, &json!({"status": status})),
                None => Ok(()),
            }),
            Change::Delete(object) => self.plane.delete(object),
            Change::Zone(zone) => {
                let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": manifests::NODE}});
                self.plane.patch(&node, &json!({"metadata": {"labels": {ZONE: zone}}}))
            }
        };
        match done {
            Ok(()) => Ok(true),
            Err(error) if format!("{error:#}").contains("422") => Ok(false),
            Err(error) => Err(error.context(format!("{change:?}"))),
        }
    }

    /// Waits until both have read all that was changed so far. kube-proxy's rules.
    ///
    /// A Service, its slices and where it leads from the Node's zone are changed last in each of the three lists.
    pub fn settle(&mut self, zone: Option<&str>) -> Result<Rules> {
        self.round += 1;
        let (service, slices) = marker(self.round);
        for object in slices.iter().chain([&service]) {
            if self.round == 1 { self.plane.create(object)? } else { self.plane.replace(object)? }
        }
        let wanted = |v4: bool| -> BTreeSet<SocketAddr> {
            let all = ZONES.iter().zip(200..).filter(|(name, _)| zone.is_none_or(|zone| zone == **name));
            all.map(|(_, host)| SocketAddr::new(pod_address(host, v4), 10_000 + self.round)).collect()
        };
        let deadline = Instant::now() + 2 * SOON;
        loop {
            let rules = self.rules();
            let mut waiting = Vec::new();
            for v4 in [true, false] {
                let to = SocketAddr::new(cluster_ip(MARKER, v4), 1000 + self.round);
                let flow = Flow { from: pod_address(CLIENT_POD, v4), to, protocol: "tcp" };
                let fate = rules.as_ref().map_err(|error| format!("{error:#}")).map(|rules| rules.fate(flow));
                if !matches!(&fate, Ok(Ok(Fate::Forward { endpoints, .. })) if *endpoints == wanted(v4)) {
                    waiting.push(format!("kube-proxy: {fate:?}"));
                }
                let traced = self.traces(&[flow])?.remove(0);
                if endpoints_of(&traced)? != wanted(v4) {
                    waiting.push(format!("Sluice: {traced}"));
                }
            }
            match rules {
                Ok(rules) if waiting.is_empty() => return Ok(rules),
                _ if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(30)),
                _ => bail!("no quiet: {waiting:?}\n{}", self.proxy.as_ref().map(KubeProxy::log).unwrap_or_default()),
            }
        }
    }

    fn rules(&self) -> Result<Rules> {
        Rules::read(&self.other.cluster.topology.node, &addresses(&self.other))
    }

    /// What Sluice says of flows, as `sluice trace` does.
    pub fn traces(&self, flows: &[Flow]) -> Result<Vec<Value>> {
        self.sluice.cluster.topology.node.run(|| {
            let agent = ureq::Agent::config_builder().timeout_global(Some(SOON)).build().new_agent();
            let one = |flow: &Flow| {
                let Flow { from, to, protocol } = flow;
                let url = format!("http://{ADMIN}/api/v1/trace?from={from}&to={to}&proto={protocol}");
                agent.get(&url).call().and_then(|mut answer| answer.body_mut().read_json()).context(url)
            };
            flows.iter().map(one).collect()
        })
    }

    /// Frontends of one that the other does not have.
    pub fn frontends_differ(&self, rules: &Rules) -> Result<Vec<String>> {
        let listed: Value = serde_json::from_str(&self.sluice.cluster.admin("/api/v1/frontends")?)?;
        let mut ours = BTreeSet::new();
        for item in listed["items"].as_array().context("a list")? {
            let port = item["port"].as_u64().context("a port")?.try_into()?;
            let protocol = item["protocol"].as_str().context("a protocol")?.to_lowercase();
            let addresses = item["addresses"].as_array().context("addresses")?;
            if item["kind"] == "nodeport" {
                ours.insert((None, protocol, port));
                continue;
            }
            for address in addresses {
                ours.insert((Some(address.as_str().context("an address")?.parse()?), protocol.clone(), port));
            }
        }
        let theirs = rules.frontends();
        let only = |who: &str, some: &BTreeSet<_>, others: &BTreeSet<_>| {
            some.difference(others).map(|frontend| format!("only {who} serves {frontend:?}")).collect::<Vec<_>>()
        };
        Ok([only("Sluice", &ours, &theirs), only("kube-proxy", &theirs, &ours)].concat())
    }

    /// What each kind of client meets at these destinations by kube-proxy's rules.
    pub fn decide(&self, rules: &Rules, destinations: &[(SocketAddr, &'static str)]) -> Result<Vec<Decided>> {
        let mut decided = Vec::new();
        for (to, protocol) in destinations {
            for (client, from) in clients(&self.other, to.is_ipv4())? {
                let flow = Flow { from, to: *to, protocol };
                decided.push(Decided { client, flow, fate: rules.fate(flow)? });
            }
        }
        Ok(decided)
    }

    /// Flows of which Sluice says something else.
    pub fn differences<'a>(&self, flows: &'a [Decided]) -> Result<Vec<(&'a Decided, Value)>> {
        let asked: Vec<Flow> = flows.iter().map(|decided| decided.flow).collect();
        let mut found = Vec::new();
        for (decided, traced) in flows.iter().zip(self.traces(&asked)?) {
            if !agrees(decided, &traced)? {
                found.push((decided, traced));
            }
        }
        Ok(found)
    }

    /// Tries flows by real packets on both nodes; what was not as kube-proxy's rules say.
    pub fn try_all(&self, flows: &[Decided]) -> Vec<String> {
        let wrong = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for (who, lab) in [("Sluice", &self.sluice), ("kube-proxy", &self.other)] {
                // One thread for each address: an ICMP error about a flow must not be taken for another's.
                let mut groups: BTreeMap<(&str, IpAddr), Vec<&Decided>> = BTreeMap::new();
                for flow in flows {
                    groups.entry((flow.client, flow.flow.to.ip())).or_default().push(flow);
                }
                let groups = std::sync::Arc::new(Mutex::new(groups));
                for client in ["pod", "node", "outside"] {
                    for _ in 0..THREADS {
                        let (groups, wrong) = (std::sync::Arc::clone(&groups), &wrong);
                        scope.spawn(move || {
                            let next = || {
                                let mut groups = groups.lock().ok()?;
                                let key = groups.keys().find(|(kind, _)| *kind == client).copied()?;
                                groups.remove(&key)
                            };
                            let entered = lab.client(client).and_then(|ns| ns.enter());
                            let mut found: Vec<String> =
                                entered.err().map(|error| error.to_string()).into_iter().collect();
                            while let Some(group) = next() {
                                let one = |flow: &&Decided| Some(format!("{who}: {flow:?}: {}", tried(flow, lab)?));
                                found.extend(group.iter().filter_map(one));
                            }
                            wrong.lock().unwrap_or_else(std::sync::PoisonError::into_inner).extend(found);
                        });
                    }
                }
            }
        });
        wrong.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Opens a flow; what was not as it was to be.
fn tried(decided: &Decided, lab: &Lab) -> Option<String> {
    let protocol = if decided.flow.protocol == "tcp" { Protocol::Tcp } else { Protocol::Udp };
    let wait = if decided.fate == Fate::Drop { SILENCE } else { SOON };
    let answer = match (&decided.fate, ask(protocol, decided.flow.to, wait)) {
        (Fate::Forward { .. }, Ok(answer)) => answer,
        (Fate::Reject, Err(Failure::Refused)) | (Fate::Drop, Err(Failure::Timeout)) => return None,
        // What a rule stops on its way out of the node, who sends is told so at once.
        (Fate::Reject | Fate::Drop, Err(Failure::Other(ErrorKind::PermissionDenied))) if decided.client == "node" => {
            return None;
        }
        (_, other) => return Some(format!("{other:?}")),
    };
    let Fate::Forward { endpoints, masqueraded } = &decided.fate else { return None };
    let (name, port) = match answer.by.strip_suffix('b') {
        Some(name) => (name, ENDPOINT + 1),
        None => (&*answer.by, ENDPOINT),
    };
    let Ok(number) = name.parse() else { return Some(format!("{answer:?}")) };
    let endpoint = SocketAddr::new(pod_address(number, decided.flow.to.is_ipv4()), port);
    let source = if masqueraded.contains(&endpoint) {
        // The kernel takes any of them.
        addresses(lab).contains(&answer.seen.ip()) || answer.seen.ip() == second_address(answer.seen.is_ipv4())
    } else {
        answer.seen == answer.own
    };
    (!endpoints.contains(&endpoint) || !source).then(|| format!("{answer:?}"))
}

/// Servers on both ports of every Pod, and a node whose kernel says all that rules want it to say.
fn prepare(lab: &mut Lab) -> Result<()> {
    for number in 1..=CLIENT_POD {
        lab.serve_in_pod(number, &format!("{number}b"), ENDPOINT + 1)?;
    }
    let topology = &lab.cluster.topology;
    for name in ["net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"] {
        topology.node.sysctl(name, "0")?;
    }
    // Without a route to a Service address the kernel never comes to kube-proxy's rules.
    for v4 in [true, false] {
        let client = topology.client_address(v4).context("the client has both families")?.to_string();
        lab.cluster.output("ip", &[if v4 { "-4" } else { "-6" }, "route", "add", "default", "via", &client])?;
    }
    Ok(())
}

fn addresses(lab: &Lab) -> Vec<IpAddr> {
    lab.cluster.topology.config.node.iter().map(IpNet::addr).collect()
}

fn clients(lab: &Lab, v4: bool) -> Result<[(&'static str, IpAddr); 3]> {
    let topology = &lab.cluster.topology;
    let (node, outside) = (topology.node_address(v4), topology.client_address(v4));
    let missing = "node and client have both families";
    Ok([("pod", pod_address(CLIENT_POD, v4)), ("node", node.context(missing)?), ("outside", outside.context(missing)?)])
}

/// The Service of this round, and its slices: an endpoint for each zone, of a port that tells the round.
fn marker(round: u16) -> (Value, [Value; 2]) {
    let both = [true, false].map(|v4| cluster_ip(MARKER, v4).to_string());
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "marker"},
        "spec": {
            "clusterIP": both[0], "clusterIPs": both, "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "ports": [{"name": "it", "port": 1000 + round}],
        },
    });
    let slice = |v4: bool| {
        let family = if v4 { "IPv4" } else { "IPv6" };
        let endpoint = |(zone, host): (&&str, u8)| json!({"addresses": [pod_address(host, v4).to_string()], "hints": {"forZones": [{"name": zone}]}});
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {
                "namespace": "default", "name": format!("marker-{}", family.to_lowercase()),
                "labels": {"kubernetes.io/service-name": "marker"},
            },
            "endpoints": ZONES.iter().zip(200..).map(endpoint).collect::<Vec<_>>(),
            "ports": [{"name": "it", "port": 10_000 + round}],
        })
    };
    (service, [slice(true), slice(false)])
}

fn endpoints_of(traced: &Value) -> Result<BTreeSet<SocketAddr>> {
    let all = traced["endpoints"].as_array().with_context(|| format!("{traced}"))?;
    all.iter().map(|it| Ok(it.as_str().context("an endpoint")?.parse()?)).collect()
}

/// Whether Sluice's answer is kube-proxy's.
fn agrees(decided: &Decided, traced: &Value) -> Result<bool> {
    let outcome = traced["outcome"].as_str().context("an outcome")?;
    Ok(match &decided.fate {
        Fate::Reject => outcome == "reject",
        Fate::Drop => outcome == "drop",
        Fate::Pass => outcome == "pass",
        Fate::Forward { endpoints, masqueraded } => {
            // An endpoint that reaches itself never sees itself; of others all see the same.
            let itself = |it: &SocketAddr| it.ip() == decided.flow.from;
            let others: BTreeSet<_> = endpoints.iter().filter(|it| !itself(it)).collect();
            let of_others = masqueraded.iter().filter(|it| !itself(it)).count();
            ensure!(of_others == 0 || of_others == others.len(), "masqueraded in part: {decided:?}");
            let masquerade = if others.is_empty() { !masqueraded.is_empty() } else { of_others > 0 };
            outcome == "forward" && endpoints_of(traced)? == *endpoints && traced["masquerade"] == masquerade
        }
    })
}
