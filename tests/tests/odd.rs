//! Unusual objects in a running daemon: they are reported, and nothing else suffers.
#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Instant;

use serde_json::{Value, json};
use sluice_bench::client::{Failure, Target, ask};
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::{can_run_in_namespaces, manifests};

fn dial(cluster: &Cluster, to: &str) -> Result<String, Failure> {
    dial_at(cluster, to.parse().unwrap())
}

fn dial_at(cluster: &Cluster, to: SocketAddr) -> Result<String, Failure> {
    cluster.topology.client.run(|| Ok(ask(Target::Http(to), SOON).result)).unwrap()
}

/// The Service `web`, over both families and all frontends.
fn assert_web_answers(cluster: &Cluster, after: &str) {
    for frontend in [true, false].into_iter().flat_map(|v4| cluster.web(v4)) {
        let answer = dial_at(cluster, frontend);
        assert!(answer.as_ref().is_ok_and(|pod| pod.starts_with("web-")), "{frontend} after {after}: {answer:?}");
    }
}

/// Waits until the Service answers so: a change takes a moment.
fn wait_for(cluster: &Cluster, to: &str, want: Result<&str, Failure>) {
    let deadline = Instant::now() + SOON;
    loop {
        let found = dial(cluster, to);
        if found.as_deref().map_err(|failure| *failure) == want {
            return;
        }
        assert!(Instant::now() < deadline, "{to}: {found:?} instead of {want:?}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn wait_until(reached: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !reached() {
        assert!(Instant::now() < deadline, "not reached in time");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn service(name: &str, ip: &str, spec: Value) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"], "ports": [{"name": "http", "port": 80}]},
    });
    for (field, value) in spec.as_object().unwrap() {
        service["spec"][field] = value.clone();
    }
    service
}

fn slice(name: &str, service: &str, addresses: &[&str], port: u16) -> Value {
    let endpoint = |address: &&str| json!({"addresses": [address], "conditions": {"ready": true}});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "endpoints": addresses.iter().map(endpoint).collect::<Vec<_>>(),
        "ports": [{"name": "http", "protocol": "TCP", "port": port}],
    })
}

#[test]
fn of_two_services_with_one_frontend_the_older_serves_until_it_goes() {
    if !can_run_in_namespaces("Services that share a frontend") {
        return;
    }
    let cluster = Cluster::with_web(2).unwrap();
    let node_port = json!({"ports": [{"name": "http", "port": 80, "nodePort": 31_500}], "type": "NodePort"});
    let balanced = json!({"loadBalancer": {"ingress": [{"ip": "172.31.5.5"}]}});
    for (what, to, ips, spec, status) in [
        ("cluster-ip", "10.96.5.1:80", ["10.96.5.1", "10.96.5.1"], json!({}), Value::Null),
        ("node-port", "192.168.50.1:31500", ["10.96.5.2", "10.96.5.3"], node_port, Value::Null),
        ("load-balancer", "172.31.5.5:80", ["10.96.5.4", "10.96.5.5"], json!({"type": "LoadBalancer"}), balanced),
    ] {
        // The younger one comes first in every order but that of age.
        let make = |name: &str, ip: &str, year: u16, endpoint: &str| {
            let mut service = service(name, ip, spec.clone());
            service["metadata"]["creationTimestamp"] = format!("{year}-01-01T00:00:00Z").into();
            service["status"] = status.clone();
            [service, slice(name, name, &[endpoint], 8080)]
        };
        let younger = make("a-younger", ips[1], 2026, "10.244.0.2");
        let older = make("b-older", ips[0], 2025, "10.244.0.1");
        cluster.write("two.json", &[younger.clone(), older].concat()).unwrap();
        wait_for(&cluster, to, Ok("web-1"));
        let is_told = |text: &str| text.contains("default/a-younger") && text.contains("older Service default/b-older");
        cluster.wait_for_problems(what, is_told).unwrap();
        (0..8).for_each(|_| assert_eq!(dial(&cluster, to).as_deref(), Ok("web-1"), "{what}"));
        cluster.write("two.json", &younger).unwrap();
        wait_for(&cluster, to, Ok("web-2"));
        cluster.wait_for_problems(what, |problems| !problems.contains("younger")).unwrap();
        assert_web_answers(&cluster, what);
        cluster.write("two.json", &[]).unwrap();
    }
}

#[test]
fn odd_objects_are_told_of_and_the_rest_is_served() {
    if !can_run_in_namespaces("odd objects in a running daemon") {
        return;
    }
    let cluster = Cluster::with_web(2).unwrap();
    let ports: Vec<Value> = (1..=1000).map(|port| json!({"name": format!("p{port}"), "port": port})).collect();
    let mut thousand = slice("thousand", "thousand", &["10.244.0.1"], 0);
    thousand["ports"] = ports.iter().map(|port| json!({"name": port["name"], "port": 8080})).collect();
    let many: Vec<String> = (0..5000).map(|n| format!("10.244.{}.{}", 100 + n / 250, 1 + n % 250)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let mut unlabelled = slice("unlabelled", "web", &["10.244.0.1"], 8080);
    unlabelled["metadata"]["labels"] = json!({});
    let one = || slice("odd", "odd", &["10.244.0.1"], 8080);
    let odd = |spec| vec![service("odd", "10.96.5.1", spec), one()];
    let with_port = |port: i64| odd(json!({"ports": [{"name": "http", "port": port}]}));
    type Row<'a> = (&'a str, Vec<Value>, &'a str, Option<(&'a str, Result<&'a str, Failure>)>);
    let rows: Vec<Row> = vec![
        ("a ClusterIP that is none", vec![service("odd", "here", json!({})), one()], "here", None),
        (
            "an external address that is none",
            odd(json!({"externalIPs": ["999.1.1.1"]})),
            "999.1.1.1",
            Some(("10.96.5.1:80", Ok("web-1"))),
        ),
        ("port 0", with_port(0), "ports[0].port", None),
        ("port 70000", with_port(70_000), "ports[0].port", None),
        ("port -1", with_port(-1), "ports[0].port", None),
        (
            "a node port that is none",
            odd(json!({"ports": [{"name": "http", "port": 80, "nodePort": 99_999}]})),
            "nodePort",
            Some(("10.96.5.1:80", Ok("web-1"))),
        ),
        (
            "the first of 1,000 ports",
            vec![service("thousand", "10.96.5.2", json!({"ports": ports})), thousand.clone()],
            "",
            Some(("10.96.5.2:1", Ok("web-1"))),
        ),
        (
            "the last of 1,000 ports",
            vec![service("thousand", "10.96.5.2", json!({"ports": ports})), thousand],
            "",
            Some(("10.96.5.2:1000", Ok("web-1"))),
        ),
        (
            "5,000 endpoints",
            vec![service("many", "10.96.5.3", json!({})), slice("many", "many", &many, 8080)],
            "",
            None,
        ),
        (
            "a slice for no Service",
            vec![slice("lost", "nobody", &["10.244.0.1"], 8080)],
            "no Service default/nobody",
            None,
        ),
        ("a slice without label", vec![unlabelled], "EndpointSlice default/unlabelled", None),
        (
            "an address that is none",
            vec![service("odd", "10.96.5.1", json!({})), slice("odd", "odd", &["nowhere", "10.244.0.1"], 8080)],
            "nowhere",
            Some(("10.96.5.1:80", Ok("web-1"))),
        ),
        (
            "duplicates in one slice",
            vec![service("odd", "10.96.5.1", json!({})), slice("odd", "odd", &["10.244.0.2", "10.244.0.2"], 8080)],
            "",
            Some(("10.96.5.1:80", Ok("web-2"))),
        ),
        (
            "an endpoint on the node port of its own Service",
            vec![
                service("odd", "10.96.5.1", json!({"ports": [{"name": "http", "port": 80, "nodePort": 31_500}]})),
                slice("odd", "odd", &["192.168.50.1"], 31_500),
            ],
            "a loop",
            Some(("10.96.5.1:80", Err(Failure::Refused))),
        ),
    ];
    for (what, objects, told, reached) in rows {
        cluster.write("odd.json", &objects).unwrap();
        if !told.is_empty() {
            cluster.wait_for_problems(what, |problems| problems.contains(told)).unwrap();
        }
        if let Some((to, want)) = reached {
            wait_for(&cluster, to, want);
        }
        if what.starts_with("5,000") {
            let trace =
                ["trace", "--from", "10.244.0.7", "--to", "10.96.5.3:80", "--admin", "127.0.0.1:10249", "-o", "json"];
            let found = || serde_json::from_str::<Value>(&cluster.sluice(&trace).unwrap()).unwrap();
            wait_until(|| found()["endpoints"].as_array().is_some_and(|endpoints| endpoints.len() == 5000));
        }
        assert_web_answers(&cluster, what);
        cluster.write("odd.json", &[]).unwrap();
        cluster.wait_for_problems(what, |problems| told.is_empty() || !problems.contains(told)).unwrap();
    }
}

#[test]
fn an_endpoint_that_is_a_frontend_makes_no_loop() {
    if !can_run_in_namespaces("endpoints that are frontends") {
        return;
    }
    let cluster = Cluster::with_web(1).unwrap();
    // One leads to another Service, two lead to each other, one to another Service's node port.
    let pairs = [
        ("to-web", "10.96.5.1", "10.96.0.10", 80),
        ("to-right", "10.96.5.2", "10.96.5.3", 80),
        ("to-left", "10.96.5.3", "10.96.5.2", 80),
        ("to-node-port", "10.96.5.4", "192.168.50.1", 30_010),
    ];
    let objects = |(name, ip, endpoint, port): (&str, &str, &str, u16)| {
        [service(name, ip, json!({})), slice(name, name, &[endpoint], port)]
    };
    // Routes come a moment after the table, in the order of addresses: the last one shows that all are there.
    let last = ("last", "10.96.5.9", "10.244.0.1", 8080);
    cluster.write("loops.json", &pairs.into_iter().chain([last]).flat_map(objects).collect::<Vec<_>>()).unwrap();
    wait_for(&cluster, "10.96.5.9:80", Ok("web-1"));
    let all_told = |text: &str| pairs.iter().all(|(name, ..)| text.contains(&format!("Service default/{name}")));
    cluster.wait_for_problems("loops", |problems| problems.contains("a loop") && all_told(problems)).unwrap();
    let packets = || {
        let text = cluster.output("ip", &["-j", "-s", "link", "show", "sluice0"]).unwrap();
        let link: Value = serde_json::from_str(&text).unwrap();
        link[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
    };
    for (name, ip, ..) in pairs {
        let (before, dropped) = (packets(), cluster.metric("sluice_drops_total{reason=\"loop\"").unwrap());
        let target = Target::Http(SocketAddr::new(ip.parse().unwrap(), 80));
        let wait = std::time::Duration::from_millis(500);
        let answer = cluster.topology.client.run(|| Ok(ask(target, wait).result)).unwrap();
        assert_eq!(answer, Err(Failure::Timeout), "{name}");
        assert!(cluster.metric("sluice_drops_total{reason=\"loop\"").unwrap() > dropped, "{name}: dropped as a loop");
        let more = packets() - before;
        assert!(more < 10, "{name}: {more} packets of one SYN");
    }
    assert_web_answers(&cluster, "loops");
}

#[test]
fn everything_may_go_while_there_are_20_000_flows() {
    if !can_run_in_namespaces("20,000 flows, then no objects") {
        return;
    }
    // The third Pod is the client: a Pod's flows need no masquerade ports, of which there are fewer.
    let cluster = Cluster::with_web(3).unwrap();
    cluster.publish_web(0..2).unwrap();
    wait_until(|| cluster.metric("sluice_endpoints{").unwrap() == 8.0);
    let frontends = [cluster.web(true)[0], cluster.web(false)[0]];
    let open = |to: SocketAddr, port: u16| -> std::io::Result<()> {
        let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = loop {
            match UdpSocket::bind((any, port)) {
                // A program that another test starts just now holds the last one until it is there.
                Err(error) if error.kind() == ErrorKind::AddrInUse => std::thread::yield_now(),
                bound => break bound?,
            }
        };
        socket.connect((to.ip(), 53))?;
        socket.set_read_timeout(Some(SOON))?;
        socket.send(b"who")?;
        socket.recv(&mut [0; 64]).map(drop)
    };
    let all = || -> anyhow::Result<()> {
        for port in 20_000..30_000 {
            frontends.iter().try_for_each(|frontend| open(*frontend, port))?;
        }
        Ok(())
    };
    cluster.pods[2].pod.ns.run(all).unwrap();
    assert_eq!(cluster.metric("sluice_flows_opened_total{").unwrap(), 20_000.0);
    for round in 0..3 {
        let generation = cluster.generation().unwrap();
        cluster.write("web.json", &[]).unwrap();
        cluster.wait_for_table_after(generation).unwrap();
        assert!(dial_at(&cluster, frontends[0]).is_err(), "nothing is there in round {round}");
        let services: Value = serde_json::from_str(&cluster.admin("/api/v1/services").unwrap()).unwrap();
        assert_eq!(services["items"], json!([]));
        let addresses = [true, false].map(|v4| cluster.topology.node_address(v4).unwrap());
        cluster.write("node.json", &[manifests::node(&addresses)]).unwrap();
        let generation = cluster.generation().unwrap();
        cluster.publish_web(0..2).unwrap();
        cluster.wait_for_table_after(generation).unwrap();
        // Routes come a moment after the table, this one as the last.
        wait_until(|| dial_at(&cluster, frontends[1]).is_ok());
        assert_web_answers(&cluster, "everything came back");
    }
}
