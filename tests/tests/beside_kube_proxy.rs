//! The real kube-proxy and Sluice read the same API server on two nodes that are alike, while random objects come, change and go:
//! at every quiet point both have the same frontends, the same fate for every flow, and packets meet it on both nodes.
//!
//! `SLUICE_BIG=1`: many rounds. `SLUICE_SEED=N`: other objects.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde_json::Value;
use sluice_tests::beside::{Decided, Twins};
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::SOON;
use sluice_tests::control_plane;
use sluice_tests::kube_proxy::{has_tool, program};
use sluice_tests::kube_proxy_rules::{Fate, Rules};
use sluice_tests::world::{World, name};

/// Services at most.
const SERVICES: u8 = 14;

#[test]
fn whatever_is_there_both_do_the_same() {
    const WHAT: &str = "Sluice beside kube-proxy";
    let Some(program) = program(WHAT) else { return };
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) || !has_tool("nft", WHAT) {
        return;
    }
    let is_big = std::env::var_os("SLUICE_BIG").is_some();
    let (rounds, changes, flows) = if is_big { (120, 20, 40) } else { (10, 12, 12) };
    let seed = std::env::var("SLUICE_SEED").map_or(1, |text| text.parse().unwrap());
    let mut twins = Twins::new().unwrap();
    twins.start(&program).unwrap();
    let mut world = World::new(seed, SERVICES);
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut counted = Counts::default();
    for round in 0..rounds {
        // At first there is little.
        for _ in 0..if round == 0 { 4 * changes } else { changes } {
            let accepted = world.step(|change| twins.apply(change)).unwrap();
            *if accepted { &mut counted.changes } else { &mut counted.refused } += 1;
        }
        let about = format!("seed {seed}, round {round}");
        let rules = twins.settle(world.zone()).unwrap_or_else(|error| panic!("{about}: {error:#}"));
        let decided = compare(&twins, &world, rules, &about, &mut counted);
        let tried = some(decided, flows, &mut rng);
        let wrong = twins.try_all(&tried);
        assert!(wrong.is_empty(), "{about}: {} of {} flows\n{}", wrong.len(), 2 * tried.len(), wrong.join("\n"));
        for decided in &tried {
            *counted.flows.entry((decided.client, word(&decided.fate))).or_default() += 1;
        }
    }
    println!("{counted:#?}");
    let flows: usize = counted.flows.values().sum();
    assert!(flows >= if is_big { 1000 } else { 50 } && counted.changes > 5 * counted.refused, "{counted:?}");
    assert!(["forward", "reject", "drop"].iter().all(|fate| counted.decisions[fate] > 50), "{counted:?}");
    assert!(counted.excepted < counted.decisions.values().sum::<usize>() / 4, "{counted:?}");
}

/// So many flows, as far as there are: half of them reach somebody.
fn some(mut decided: Vec<Decided>, count: usize, rng: &mut fastrand::Rng) -> Vec<Decided> {
    rng.shuffle(&mut decided);
    let mut left = BTreeMap::from([("forward", count / 2), ("reject", count / 4), ("drop", count / 4), ("pass", 0)]);
    decided.retain(|decided| {
        left.get_mut(word(&decided.fate)).is_some_and(|left| left.checked_sub(1).map(|less| *left = less).is_some())
    });
    decided
}

#[derive(Debug, Default)]
struct Counts {
    changes: usize,
    refused: usize,
    /// Flows that were asked about, by what becomes of them.
    decisions: BTreeMap<&'static str, usize>,
    /// Flows that `docs/differences.md` is about.
    excepted: usize,
    /// Flows by packets, on each node.
    flows: BTreeMap<(&'static str, &'static str), usize>,
}

fn word(fate: &Fate) -> &'static str {
    match fate {
        Fate::Forward { .. } => "forward",
        Fate::Reject => "reject",
        Fate::Drop => "drop",
        Fate::Pass => "pass",
    }
}

/// Compares frontends and the fate of every flow. The flows that were compared.
fn compare(twins: &Twins, world: &World, rules: Rules, about: &str, counted: &mut Counts) -> Vec<Decided> {
    let topology = &twins.sluice.cluster.topology;
    let node = [true, false].map(|v4| topology.node_address(v4).unwrap());
    let undefined = undefined(world);
    let destinations = world.destinations(node);
    let (excepted, defined): (Vec<_>, Vec<_>) = destinations.into_iter().partition(|(to, protocol)| {
        let at = |ip| undefined.contains(&(ip, *protocol, to.port()));
        at(Some(to.ip())) || (node.contains(&to.ip()) && at(None))
    });
    let mut decided = twins.decide(&rules, &defined).unwrap();
    // What kube-proxy has no rule about is most of it, and Sluice would have to have a frontend there.
    let mut passes = 0_usize;
    decided.retain(|decided| {
        passes += usize::from(decided.fate == Fate::Pass);
        decided.fate != Fate::Pass || passes.is_multiple_of(8)
    });
    let deadline = Instant::now() + SOON;
    // All is read; that it is in force as well takes Sluice a moment yet.
    loop {
        let mut wrong = twins.frontends_differ(&rules).unwrap();
        let different = twins.differences(&decided).unwrap();
        wrong.extend(different.iter().map(|(decided, traced)| format!("{decided:?}\n  Sluice: {traced}")));
        if wrong.is_empty() {
            break;
        }
        if Instant::now() > deadline {
            let objects: Vec<String> = world.objects().map(Value::to_string).collect();
            panic!("{about}: {}\nobjects:\n{}", wrong.join("\n"), objects.join("\n"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    counted.excepted += 3 * excepted.len();
    for decided in &decided {
        *counted.decisions.entry(word(&decided.fate)).or_default() += 1;
    }
    decided
}

/// Address (`None`: the node's), protocol, port.
type Frontend = (Option<IpAddr>, &'static str, u16);

/// Frontends about which `docs/differences.md` says that kube-proxy's answer is undefined: claimed by two Services, or of a
/// Service with two entries for one endpoint that differ.
fn undefined(world: &World) -> BTreeSet<Frontend> {
    let (services, slices): (Vec<&Value>, Vec<&Value>) =
        world.objects().partition(|object| object["kind"] == "Service");
    let ambiguous = ambiguous(&slices);
    let mut claimed: BTreeMap<Frontend, usize> = BTreeMap::new();
    let mut undefined = BTreeSet::new();
    for service in services {
        for frontend in frontends(service) {
            *claimed.entry(frontend).or_default() += 1;
            if ambiguous.contains(name(service)) {
                undefined.insert(frontend);
            }
        }
    }
    undefined.extend(claimed.into_iter().filter(|(_, times)| *times > 1).map(|(frontend, _)| frontend));
    undefined
}

/// Services with two entries for one endpoint that differ.
fn ambiguous(slices: &[&Value]) -> BTreeSet<String> {
    let mut seen: BTreeMap<String, &Value> = BTreeMap::new();
    let mut found = BTreeSet::new();
    for slice in
        slices.iter().filter(|slice| slice["metadata"]["labels"].get("service.kubernetes.io/headless").is_none())
    {
        let service = slice["metadata"]["labels"]["kubernetes.io/service-name"].as_str().unwrap();
        for (port, endpoint) in slice["ports"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|port| slice["endpoints"].as_array().unwrap().iter().map(move |endpoint| (port, endpoint)))
        {
            let key = format!("{service} {port} {}", endpoint["addresses"]);
            if seen.insert(key, endpoint).is_some_and(|before| before != endpoint) {
                found.insert(service.to_owned());
            }
        }
    }
    found
}

/// Where a Service of ours answers.
fn frontends(service: &Value) -> Vec<Frontend> {
    let spec = &service["spec"];
    let is_hidden = service["metadata"]["labels"].get("service.kubernetes.io/service-proxy-name").is_some();
    if is_hidden || spec["clusterIP"] == "None" {
        return Vec::new();
    }
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let ingress = list(&service["status"]["loadBalancer"]["ingress"]);
    let ingress = ingress.iter().filter(|it| it["ipMode"] != "Proxy").map(|it| it["ip"].clone());
    let addresses = list(&spec["clusterIPs"]).into_iter().chain(list(&spec["externalIPs"])).chain(ingress);
    let addresses: Vec<IpAddr> = addresses.filter_map(|it| it.as_str()?.parse().ok()).collect();
    let mut found = Vec::new();
    for port in list(&spec["ports"]) {
        let protocol = if port["protocol"] == "TCP" { "tcp" } else { "udp" };
        let number = |field: &str| port[field].as_u64().map(|number| u16::try_from(number).unwrap());
        found.extend(addresses.iter().map(|ip| (Some(*ip), protocol, number("port").unwrap())));
        found.extend(number("nodePort").map(|node_port| (None, protocol, node_port)));
    }
    found
}

#[test]
fn what_is_undefined_is_told_by_rule() {
    let service = |number: u8, external: &str| {
        serde_json::json!({"kind": "Service", "metadata": {"name": format!("s{number}"), "labels": {}},
            "spec": {"clusterIPs": [format!("10.96.1.{number}")], "externalIPs": [external],
                "ports": [{"protocol": "TCP", "port": 80, "nodePort": 30001}]}})
    };
    let to: SocketAddr = "198.51.100.1:80".parse().unwrap();
    let found = frontends(&service(1, "198.51.100.1"));
    assert_eq!(found, [(Some([10, 96, 1, 1].into()), "tcp", 80), (Some(to.ip()), "tcp", 80), (None, "tcp", 30001)]);
    let slice = |ready: bool| {
        serde_json::json!({"kind": "EndpointSlice", "metadata": {"labels": {"kubernetes.io/service-name": "s1"}},
            "ports": [{"name": "http", "port": 8080}], "endpoints": [{"addresses": ["10.244.0.1"], "ready": ready}]})
    };
    let (one, other) = (slice(true), slice(false));
    assert!(ambiguous(&[&one, &one]).is_empty() && ambiguous(&[&one, &other]).contains("s1"));
}
