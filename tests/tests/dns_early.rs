//! Names before the API server has told anything: those of the cluster are not known, others are asked for.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use sluice_bench::netns::NetNs;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::dns::{By, as_json, ask};
use sluice_tests::fake_api::{FakeApi, Manner};
use sluice_tests::name_server::NameServer;
use sluice_tests::{api_cluster, can_run_in_namespaces, control_plane};

const LISTEN: &str = "169.254.20.10:53";
const NAME: &str = "web.default.svc.cluster.local.";

/// What is answered now, if anything is.
fn asked(ns: &NetNs, by: By, name: &str, kind: &str) -> Option<Value> {
    let server: SocketAddr = LISTEN.parse().unwrap();
    ns.run(|| Ok(ask(server, by, name, kind, Some(1232), Duration::from_millis(500)).ok().map(|it| as_json(&it))))
        .unwrap()
}

fn wait_for(cluster: &Cluster, code: &str) -> Value {
    let deadline = Instant::now() + SOON;
    loop {
        match asked(&cluster.topology.node, By::Datagram, NAME, "A") {
            Some(answer) if answer["rcode"] == code => return answer,
            other => assert!(Instant::now() < deadline, "{other:?} instead of {code}\n{}", cluster.log()),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn until_the_api_server_answers_names_of_the_cluster_are_not_known() {
    if !can_run_in_namespaces("names before the first objects") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    let names = BTreeMap::from([("real.example.org", vec![Ipv4Addr::new(192, 0, 2, 1)])]);
    let _upstream = NameServer::start(&cluster.topology.client, "192.168.50.2:53".parse().unwrap(), names).unwrap();
    cluster.configure(&format!("dns: {{listen: ['{LISTEN}'], upstreams: [192.168.50.2]}}\n")).unwrap();
    let api = SocketAddr::from((Ipv4Addr::LOCALHOST, 8081));
    let fake = FakeApi::start(&cluster.topology.node, api, Manner::Silent).unwrap();
    cluster.watch_api(fake.kubeconfig());
    let before = cluster.host_state().unwrap();
    cluster.begin().unwrap();
    let unknown = wait_for(&cluster, "SERVFAIL");
    assert_eq!((unknown["answer"].as_array().unwrap().len(), unknown["authority"].as_array().unwrap().len()), (0, 1));
    let node = &cluster.topology.node;
    for by in [By::Datagram, By::Connection] {
        let code = |name: &str, kind: &str| asked(node, by, name, kind).unwrap()["rcode"].clone();
        for (name, kind, expected) in [
            (NAME, "A", "SERVFAIL"),
            ("_http._tcp.web.default.svc.cluster.local.", "SRV", "SERVFAIL"),
            ("cluster.local.", "SOA", "NOERROR"),
            ("real.example.org.", "A", "NOERROR"),
            ("missing.example.org.", "A", "NXDOMAIN"),
        ] {
            assert_eq!(code(name, kind), expected, "{by:?} {name} {kind}");
        }
    }
    assert!(fake.asked() > 0 && cluster.generation().is_err());
    cluster.stop(Signal::SIGTERM).unwrap();
    assert_eq!(cluster.host_state().unwrap(), before, "nothing is left");
}

#[test]
fn names_are_known_as_soon_as_the_api_server_has_told_them() {
    const WHAT: &str = "names before and after the first objects";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (mut cluster, mut plane) = api_cluster::cluster();
    cluster.configure(&format!("dns: {{listen: ['{LISTEN}'], upstreams: []}}\n")).unwrap();
    cluster.watch_api(plane.kubeconfig("admin"));
    plane.kill_api_server().unwrap();
    cluster.begin().unwrap();
    wait_for(&cluster, "SERVFAIL");
    plane.start_api_server().unwrap();
    let known = wait_for(&cluster, "NOERROR");
    assert_eq!(known["answer"][0], format!("{NAME} 5 A 10.96.0.10"));
    cluster.wait_until_served().unwrap();
    let missing = asked(&cluster.topology.node, By::Datagram, "missing.default.svc.cluster.local.", "A").unwrap();
    assert_eq!(missing["rcode"], "NXDOMAIN");
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
}
