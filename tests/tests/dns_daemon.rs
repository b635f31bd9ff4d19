//! Names from a real daemon, asked by real clients: upstreams, search paths, sizes, updates, virtual and held Services.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sluice_bench::client::{self, Target};
use sluice_bench::netns::NetNs;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::dns::{By, as_json, ask, question};
use sluice_tests::name_server::{NameServer, Names};

const LISTEN: &str = "169.254.20.10:53";
const CONFIG: &str = "localControllers: false\nserviceCIDRs: [10.96.0.0/16, 'fd00:96::/64']\n";

fn server() -> SocketAddr {
    LISTEN.parse().unwrap()
}

/// Asks from a namespace.
fn asked(ns: &NetNs, name: &str, kind: &str) -> Value {
    ns.run(|| ask(server(), By::Datagram, name, kind, Some(1232), SOON).map(|answer| as_json(&answer))).unwrap()
}

/// Data of the answers, sorted.
fn data(answer: &Value) -> Vec<String> {
    let text = |record: &Value| record.as_str().unwrap().split(' ').nth(3).unwrap().to_owned();
    let mut data: Vec<String> = answer["answer"].as_array().unwrap().iter().map(text).collect();
    data.sort();
    data
}

fn service(name: &str, spec: Value, annotations: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name, "annotations": annotations}, "spec": spec})
}

fn headless(name: &str, annotations: Value) -> Value {
    let ports = json!([{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]);
    service(
        name,
        json!({"clusterIP": "None", "clusterIPs": ["None"], "ipFamilies": ["IPv4"], "ports": ports}),
        annotations,
    )
}

/// A slice of endpoints by host name and address, as the controller labels those of headless Services.
fn slice(service: &str, endpoints: &[(String, Ipv4Addr)]) -> Value {
    let endpoint = |(name, address): &(String, Ipv4Addr)| {
        json!({"addresses": [address.to_string()],
        "conditions": {"ready": true}, "hostname": name})
    };
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "default", "name": format!("{service}-1"), "labels": {
            "kubernetes.io/service-name": service, "service.kubernetes.io/headless": ""}},
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}]})
}

fn named(numbers: impl IntoIterator<Item = u8>) -> Vec<(String, Ipv4Addr)> {
    numbers.into_iter().map(|number| (format!("db-{number}"), Ipv4Addr::new(10, 244, 0, number))).collect()
}

/// A program, run in a namespace with a resolv.conf that a Pod of `default` has. Nothing when it is not there.
fn with_resolv_conf(ns: &NetNs, program: &str, arguments: &[&str]) -> Option<String> {
    if !["/usr/bin", "/bin"].iter().any(|folder| std::path::Path::new(folder).join(program).exists()) {
        eprintln!("not tested: {program} is not installed");
        return None;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let search = "search default.svc.cluster.local svc.cluster.local cluster.local";
    std::fs::write(file.path(), format!("nameserver 169.254.20.10\n{search}\noptions ndots:5 timeout:2\n")).unwrap();
    let script = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
    let mut command = ns.command("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(file.path()).arg(program).args(arguments);
    let output = command.output().unwrap();
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn programs_find_names_through_the_search_path() {
    if !can_run_in_namespaces("names for programs") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.configure(&format!("{CONFIG}dns: {{listen: ['{LISTEN}'], upstreams: []}}\n")).unwrap();
    cluster.add_pod(1).unwrap();
    let many: Vec<(String, Ipv4Addr)> = (0..200).map(|n| (format!("m-{n}"), Ipv4Addr::new(10, 245, 0, n))).collect();
    let objects = [
        headless("db", json!({})),
        slice("db", &named(1..=3)),
        headless("many", json!({})),
        slice("many", &many),
        service(
            "web",
            json!({"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{"port": 80}]}),
            json!({}),
        ),
    ];
    cluster.write("db.json", &objects).unwrap();
    cluster.start().unwrap();
    let pod = cluster.pods[0].pod.ns.clone();
    let all = ["10.244.0.1", "10.244.0.2", "10.244.0.3"];
    for ns in [&pod, &cluster.topology.node] {
        assert_eq!(data(&asked(ns, "db.default.svc.cluster.local.", "A")), all);
    }
    // glibc asks for both families at once, and walks the search path.
    for name in ["db", "db.default", "db.default.svc", "db.default.svc.cluster.local"] {
        if let Some(text) = with_resolv_conf(&pod, "getent", &["ahosts", name]) {
            assert!(all.iter().all(|address| text.contains(address)), "getent {name}: {text:?}");
        }
    }
    if let Some(text) = with_resolv_conf(&pod, "getent", &["hosts", "10.244.0.2"]) {
        assert!(text.contains("db-2.db.default.svc.cluster.local"), "{text:?}");
    }
    if let Some(text) = with_resolv_conf(&pod, "dig", &["+short", "+search", "many"]) {
        assert_eq!(text.lines().count(), 200, "after a truncated datagram over a connection");
    }
    if let Some(text) = with_resolv_conf(&pod, "dig", &["+noedns", "+ignore", "many.default.svc.cluster.local"]) {
        assert!(text.contains(" tc ") && text.contains("MSG SIZE  rcvd: 5"), "{text}");
    }
    if let Some(text) = with_resolv_conf(&pod, "dig", &["+tcp", "_http._tcp.db.default.svc.cluster.local", "SRV"]) {
        assert!(text.contains("8080 db-2.db.default.svc.cluster.local.") && text.contains("ADDITIONAL: 4"), "{text}");
    }
    if let Some(text) = with_resolv_conf(&pod, "drill", &["db-2.db.default.svc.cluster.local"]) {
        assert!(text.contains("10.244.0.2"), "{text}");
    }
    let from = ["resolve", "db", "--from", "default", "--admin", "127.0.0.1:10249", "-o", "json"];
    let resolved: Value = serde_json::from_str(&cluster.sluice(&from).unwrap()).unwrap();
    assert_eq!(data(&resolved), all);
    assert!(cluster.metric("coredns_dns_requests_total{").unwrap() > 8.0);
    assert!(cluster.metric("coredns_dns_responses_total{").unwrap() > 8.0);
    assert!(cluster.metric("coredns_dns_request_duration_seconds_count{").unwrap() > 8.0);
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
    let addresses = cluster.output("ip", &["address"]).unwrap();
    assert!(!addresses.contains("169.254.20.10"), "the address goes with the daemon");
}

#[test]
fn names_outside_are_asked_for_once_and_remembered() {
    if !can_run_in_namespaces("upstreams") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    let many: Vec<Ipv4Addr> = (0..60).map(|n| Ipv4Addr::new(192, 0, 2, n)).collect();
    let one = vec![Ipv4Addr::new(192, 0, 2, 1)];
    let names: Names = BTreeMap::from([
        ("real.example.org", one.clone()),
        ("alias.example.org", one.clone()),
        ("slow.example.org", one),
        ("many.example.org", many),
    ]);
    let upstream = NameServer::start(&cluster.topology.client, "192.168.50.2:53".parse().unwrap(), names).unwrap();
    // Nobody answers at the first one.
    let upstreams = "upstreams: [192.168.50.77, 192.168.50.2], maxConcurrent: 4";
    cluster.configure(&format!("{CONFIG}dns: {{listen: ['{LISTEN}'], {upstreams}}}\n")).unwrap();
    let outside =
        |name: &str, target: &str| service(name, json!({"type": "ExternalName", "externalName": target}), json!({}));
    let objects = [
        outside("out", "real.example.org"),
        outside("further", "alias.example.org"),
        outside("nowhere", "no.example.org"),
    ];
    cluster.arguments(&["--log-level", "debug"]);
    cluster.write("outside.json", &objects).unwrap();
    cluster.start().unwrap();
    let node = cluster.topology.node.clone();
    assert_eq!(data(&asked(&node, "real.example.org.", "A")), ["192.0.2.1"]);
    let before = upstream.asked();
    for _ in 0..5 {
        let answer = asked(&node, "REAL.example.org.", "A");
        assert_eq!((answer["rcode"].as_str().unwrap(), data(&answer)), ("NOERROR", vec!["192.0.2.1".to_owned()]));
    }
    assert_eq!(upstream.asked(), before, "it is remembered");
    assert!(cluster.metric("coredns_cache_hits_total{").unwrap() >= 5.0);

    assert_eq!(asked(&node, "missing.example.org.", "A")["rcode"], "NXDOMAIN");
    let before = upstream.asked();
    let missing = asked(&node, "missing.example.org.", "A");
    assert_eq!((missing["rcode"].as_str().unwrap(), missing["authority"].as_array().unwrap().len()), ("NXDOMAIN", 1));
    assert_eq!(upstream.asked(), before, "that it is missing is remembered too");

    let many = asked(&node, "many.example.org.", "A");
    assert_eq!(data(&many).len(), 60, "{many} {}", upstream.connections());
    assert!(upstream.connections() > 0, "a truncated answer is asked for again over a connection");

    let out = asked(&node, "out.default.svc.cluster.local.", "A");
    assert_eq!(out["answer"][0], "out.default.svc.cluster.local. 5 CNAME real.example.org.");
    assert!(out["answer"][1].as_str().unwrap().starts_with("real.example.org. "), "{out}");
    let further = asked(&node, "further.default.svc.cluster.local.", "A");
    assert_eq!(further["answer"].as_array().unwrap().len(), 3, "{further}");
    let nowhere = asked(&node, "nowhere.default.svc.cluster.local.", "A");
    assert_eq!((nowhere["rcode"].as_str().unwrap(), data(&nowhere)), ("NOERROR", vec!["no.example.org.".to_owned()]));

    // More than four at a time are refused, at once.
    upstream.set_delay(Duration::from_millis(400));
    let codes: Vec<ResponseCode> = node
        .run(|| {
            let ask = |n: u32| {
                let name = format!("n{n}.example.org.");
                move || ask(server(), By::Datagram, &name, "A", None, SOON).unwrap().response_code
            };
            Ok(std::thread::scope(|scope| {
                let threads: Vec<_> = (0..12)
                    .map(|n| {
                        let (ask, node) = (ask(n), &node);
                        scope.spawn(move || node.run(|| Ok(ask())).unwrap())
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            }))
        })
        .unwrap();
    assert!(codes.contains(&ResponseCode::Refused), "{codes:?}");
    assert!(cluster.metric("coredns_forward_max_concurrent_rejects_total").unwrap() > 0.0);
    upstream.set_delay(Duration::ZERO);
}

#[test]
fn an_upstream_that_asks_us_is_noticed() {
    if !can_run_in_namespaces("a loop of name servers") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    // To its second address, its own: nothing in the configuration tells.
    let second = "169.254.20.11:53";
    let dns = format!("{{listen: ['{LISTEN}', '{second}'], upstreams: [169.254.20.12]}}");
    cluster.configure(&format!("{CONFIG}dns: {dns}\n")).unwrap();
    cluster.output("ip", &["address", "add", "169.254.20.12/32", "dev", "lo"]).unwrap();
    let redirect = "add table ip loop; add chain ip loop out { type nat hook output priority -100; }; \
        add rule ip loop out ip daddr 169.254.20.12 dnat to 169.254.20.11";
    cluster.output("nft", &[redirect]).unwrap();
    cluster.start().unwrap();
    let deadline = Instant::now() + SOON;
    while cluster.metric("sluice_dns_upstream_loop ").unwrap() < 1.0 {
        assert!(Instant::now() < deadline, "the loop is not noticed\n{}", cluster.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(asked(&cluster.topology.node, "example.org.", "A")["rcode"], "REFUSED");
}

#[test]
fn a_rolling_restart_is_seen_in_a_moment() {
    if !can_run_in_namespaces("names while Pods are replaced") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.configure(&format!("{CONFIG}dns: {{listen: ['{LISTEN}'], upstreams: []}}\n")).unwrap();
    cluster.write("db.json", &[headless("db", json!({})), slice("db", &named(1..=3))]).unwrap();
    cluster.start().unwrap();
    let node = cluster.topology.node.clone();
    let mut took = Vec::new();
    for round in 1..=4_u8 {
        for pod in 1..=3_u8 {
            let mut endpoints = named(1..=3);
            for (number, (_, address)) in (1_u8..).zip(&mut endpoints) {
                *address = Ipv4Addr::new(10, 244, if number <= pod { round } else { round - 1 }, number);
            }
            let wanted = endpoints[usize::from(pod) - 1].1.to_string();
            // First it is gone, then it is back with another address.
            for (endpoints, answer) in [
                (endpoints.iter().filter(|it| it.0 != format!("db-{pod}")).cloned().collect(), Vec::new()),
                (endpoints, vec![wanted]),
            ] {
                cluster.write("db.json", &[headless("db", json!({})), slice("db", &endpoints)]).unwrap();
                let begun = Instant::now();
                while data(&asked(&node, &format!("db-{pod}.db.default.svc.cluster.local."), "A")) != answer {
                    assert!(begun.elapsed() < SOON, "db-{pod} is to answer {answer:?}\n{}", cluster.log());
                    std::thread::sleep(Duration::from_millis(1));
                }
                took.push(begun.elapsed());
            }
        }
    }
    took.sort();
    let median = took[took.len() / 2];
    // The bound is for the median: a machine that stands still for a while is nobody's fault.
    assert!(median < Duration::from_millis(100), "{took:?}");
}

#[test]
fn a_virtual_headless_service_is_balanced_evenly() {
    if !can_run_in_namespaces("virtual headless Services") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    let dns = format!("dns: {{listen: ['{LISTEN}'], upstreams: []}}\nslowStart: 0s\n");
    cluster.configure(&format!("{CONFIG}{dns}")).unwrap();
    for number in 1..=5 {
        cluster.add_pod(number).unwrap();
    }
    let annotations = json!({"sluice.dev/headless": "virtual", "sluice.dev/load-balancer": "round-robin"});
    cluster.write("db.json", &[headless("db", annotations), slice("db", &named(1..=5))]).unwrap();
    cluster.start().unwrap();
    let client = cluster.topology.client.clone();
    let node = cluster.topology.node.clone();
    let answer = data(&asked(&node, "db.default.svc.cluster.local.", "A"));
    let address: IpAddr = answer[0].parse().unwrap();
    assert!(answer.len() == 1 && answer[0].starts_with("240.241."), "{answer:?}");
    assert_eq!(data(&asked(&node, "db-3.db.default.svc.cluster.local.", "A")), ["10.244.0.3"]);
    let mut by = BTreeMap::<String, u32>::new();
    let connections = 10_000;
    client
        .run(|| {
            for number in 0..connections {
                // The port of the Service, and that of its Pods, which clients of headless Services know.
                let target = Target::Http(SocketAddr::new(address, if number % 2 == 0 { 80 } else { 8080 }));
                let answer = client::ask(target, SOON);
                let name = answer.result.map_err(|failure| anyhow::anyhow!("{failure}"))?;
                *by.entry(name).or_default() += 1;
            }
            Ok(())
        })
        .unwrap();
    let even = connections / 5;
    assert_eq!(by.len(), 5, "{by:?}");
    assert!(by.values().all(|count| count.abs_diff(even) <= even * 3 / 100), "{by:?}");
}

#[test]
fn connections_wait_for_a_first_endpoint() {
    if !can_run_in_namespaces("held connections") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.configure(CONFIG).unwrap();
    cluster.add_pod(1).unwrap();
    let spec = json!({"clusterIP": "10.96.0.77", "clusterIPs": ["10.96.0.77"], "ipFamilies": ["IPv4"],
        "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]});
    let held = service("lazy", spec, json!({"sluice.dev/hold": "3s"}));
    let mut ready = slice("lazy", &named([1]));
    ready["metadata"]["labels"].as_object_mut().unwrap().remove("service.kubernetes.io/headless");
    cluster.write("lazy.json", std::slice::from_ref(&held)).unwrap();
    cluster.start().unwrap();
    let client = cluster.topology.client.clone();
    let target = Target::Http("10.96.0.77:80".parse().unwrap());
    let wait = || {
        client
            .run(|| {
                let begun = Instant::now();
                Ok((client::ask(target, SOON).result, begun.elapsed()))
            })
            .unwrap()
    };
    let (result, after) = wait();
    assert!(result.is_err() && after >= Duration::from_secs(2) && after < SOON, "{result:?} after {after:?}");
    let (result, ready_after) = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let (result, _) = wait();
            (result, Instant::now())
        });
        let deadline = Instant::now() + SOON;
        while cluster.metric("sluice_held_clients{").unwrap() < 1.0 {
            assert!(Instant::now() < deadline, "nobody waits\n{}", cluster.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        // Between the client's second SYN, after 1 s, and its third, after 3 s: only a release is in time.
        std::thread::sleep(Duration::from_millis(1300));
        let generation = cluster.generation().unwrap();
        cluster.write("lazy.json", &[held.clone(), ready.clone()]).unwrap();
        cluster.wait_for_table_after(generation).unwrap();
        let begun = Instant::now();
        let (result, ended) = waiting.join().unwrap();
        (result, ended.saturating_duration_since(begun))
    });
    assert_eq!(result.unwrap(), "web-1");
    assert!(ready_after < Duration::from_millis(500), "released {ready_after:?} after the table");
    assert_eq!(cluster.metric("sluice_held_clients_total{").unwrap(), 2.0);
    assert_eq!(cluster.metric("sluice_held_clients{").unwrap(), 0.0);
}

#[test]
fn the_address_of_kube_dns_is_answered_here() {
    if !can_run_in_namespaces("the ClusterIP of kube-dns") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    let one = BTreeMap::from([("real.example.org", vec![Ipv4Addr::new(192, 0, 2, 1)])]);
    let _upstream = NameServer::start(&cluster.topology.client, "192.168.50.2:53".parse().unwrap(), one).unwrap();
    let dns = format!("dns: {{listen: ['{LISTEN}'], upstreams: [192.168.50.2], service: default/kube-dns}}\n");
    cluster.configure(&format!("{CONFIG}{dns}")).unwrap();
    cluster.arguments(&["--dns-local"]);
    cluster.add_pod(1).unwrap();
    let ports =
        json!([{"name": "dns", "protocol": "UDP", "port": 53}, {"name": "dns-tcp", "protocol": "TCP", "port": 53}]);
    let kube_dns = service(
        "kube-dns",
        json!({"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": ports}),
        json!({}),
    );
    cluster.write("dns.json", &[kube_dns, headless("db", json!({})), slice("db", &named(1..=3))]).unwrap();
    cluster.start().unwrap();
    let pod = cluster.pods[0].pod.ns.clone();
    let server: SocketAddr = "10.96.0.10:53".parse().unwrap();
    let flows = || cluster.metric("sluice_flow_table_entries").unwrap();
    for (by, is_flow) in [(By::Datagram, false), (By::Connection, true)] {
        for ns in [&pod, &cluster.topology.node, &cluster.topology.client] {
            let (name, before) = ("db.default.svc.cluster.local.", flows());
            let answer = ns.run(|| ask(server, by, name, "A", None, SOON)).unwrap();
            assert_eq!(answer.answers.len(), 3, "{by:?}");
            assert_eq!(flows() > before, is_flow, "a datagram is answered where it is: {by:?}");
        }
    }
    // The zone does not know: the responder does, and asks.
    for by in [By::Datagram, By::Connection] {
        let answer = pod.run(|| ask(server, by, "real.example.org.", "A", None, SOON)).unwrap();
        assert_eq!(answer.answers.len(), 1, "{by:?}");
    }
    assert!(flows() > 3.0 && cluster.metric("coredns_dns_requests_total{").unwrap() >= 8.0);
    assert!(cluster.log().contains("nameserver 169.254.20.10") || cluster.log().contains("systemd-resolved"));
}

#[test]
fn both_families_are_answered_and_several_questions_of_one_connection() {
    if !can_run_in_namespaces("names over IPv6") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    let listen = format!("['{LISTEN}', '[fd00:169:254::10]:53']");
    cluster.configure(&format!("{CONFIG}dns: {{listen: {listen}, upstreams: []}}\n")).unwrap();
    cluster.add_pod(1).unwrap();
    cluster.write("db.json", &[headless("db", json!({})), slice("db", &named(1..=3))]).unwrap();
    cluster.start().unwrap();
    let pod = cluster.pods[0].pod.ns.clone();
    let server: SocketAddr = "[fd00:169:254::10]:53".parse().unwrap();
    for by in [By::Datagram, By::Connection] {
        let answer = pod.run(|| ask(server, by, "db.default.svc.cluster.local.", "A", Some(1232), SOON)).unwrap();
        assert_eq!(answer.answers.len(), 3, "{by:?}");
    }
    // All questions at once, then all answers.
    let answers = pod
        .run(|| {
            let mut stream = TcpStream::connect_timeout(&server, SOON)?;
            stream.set_read_timeout(Some(SOON))?;
            for id in 0..20 {
                let question = question(id, "db-1.db.default.svc.cluster.local.", "A", None)?;
                stream.write_all(&[&(question.len() as u16).to_be_bytes()[..], &question].concat())?;
            }
            let mut ids = BTreeSet::new();
            for _ in 0..20 {
                let mut length = [0; 2];
                stream.read_exact(&mut length)?;
                let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut answer)?;
                ids.insert([answer[0], answer[1]]);
            }
            Ok(ids.len())
        })
        .unwrap();
    assert_eq!(answers, 20);
    // One client may have so many connections, and no more: the others are closed, and nobody else notices.
    let open = pod
        .run(|| {
            let streams: Vec<TcpStream> =
                (0..80).map(|_| TcpStream::connect_timeout(&server, SOON)).collect::<Result<_, _>>()?;
            std::thread::sleep(Duration::from_millis(500));
            let is_open = |stream: &&TcpStream| {
                let _ = stream.set_nonblocking(true);
                let mut byte = [0];
                matches!((&mut &**stream).read(&mut byte), Err(error) if error.kind() == ErrorKind::WouldBlock)
            };
            let open = streams.iter().filter(is_open).count();
            assert_eq!(
                cluster
                    .topology
                    .node
                    .run(|| ask(server, By::Connection, "cluster.local.", "SOA", None, SOON))?
                    .answers
                    .len(),
                1
            );
            Ok(open)
        })
        .unwrap();
    assert!((32..=64).contains(&open), "{open} of 80 are open");
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
}

#[test]
fn the_command_is_there() {
    let output = Command::new(sluice_tests::sluice_binary()).args(["resolve", "--help"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("search path"));
}
