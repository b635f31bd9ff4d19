//! Endpoints that leave, die and come back, and daemons that are killed and replaced, under real connections.
//! `SLUICE_BIG=1` plays the full sizes; figures are printed.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use sluice_bench::client::{self, Connection, Failure, Target};
use sluice_bench::load::{Plan, run};
use sluice_bench::pattern::Pattern;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::web::Web;

/// `small` in an ordinary run, `big` when full sizes are asked for.
fn size(small: usize, big: usize) -> usize {
    if std::env::var_os("SLUICE_BIG").is_some() { big } else { small }
}

/// Until the connection's end is reset, which must be soon.
fn time_to_reset(connection: &mut Connection) -> Duration {
    let begun = Instant::now();
    // A request that nobody answers: what is read is the reset.
    let result = connection.get("/slow/60000");
    assert_eq!(result, Err(Failure::Reset));
    begun.elapsed()
}

#[test]
fn a_rolling_update_fails_no_open_and_resets_only_what_outlives_the_grace() {
    if !can_run_in_namespaces("rolling update") {
        return;
    }
    let clients = size(20, 200);
    let mut web = Web::new(1..=3);
    let mut kept: Vec<(String, Connection)> = (0..clients).map(|_| web.connect()).collect();
    let load = web.load(clients.min(32));
    for old in 1..=3u8 {
        let new = old + 10;
        web.add(new, new);
        let others: Vec<u8> = (1..=3).map(|number| if number <= old { number + 10 } else { number }).collect();
        let endpoints = |old_state: Option<&'static str>| -> Vec<(u8, &'static str)> {
            let ready = others.iter().map(|number| (*number, "ready"));
            ready.chain(old_state.map(|state| (old, state))).collect()
        };
        web.publish(&endpoints(Some("ready")));
        web.publish(&endpoints(Some("terminating")));
        let name = format!("web-{old}");
        for (pod, connection) in &mut kept {
            assert_eq!(connection.get("/").as_ref(), Ok(&*pod), "nothing is reset while the grace period lasts");
        }
        web.publish(&endpoints(None));
        let changed = Instant::now();
        let (gone, rest): (Vec<_>, Vec<_>) = kept.into_iter().partition(|(pod, _)| *pod == name);
        kept = rest;
        assert!(!gone.is_empty(), "{name} had connections");
        for (_, mut connection) in gone {
            time_to_reset(&mut connection);
        }
        assert!(changed.elapsed() < Duration::from_secs(1), "{:?}", changed.elapsed());
        // Its server ends with the Pod.
        web.servers.remove(&old).unwrap().finish(Duration::ZERO);
        web.cluster.topology.remove_pod(&name).unwrap();
    }
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{:?}", tally.failures);
    println!("rolling update: {} opens, 0 failed, {clients} long-lived connections", tally.answers());
    assert!(web.cluster.metric("sluice_flows_ended_total{reason=\"endpoint_gone\"}").unwrap() >= clients as f64);
}

#[test]
fn a_server_that_is_gone_before_its_slice_says_so_fails_no_open() {
    if !can_run_in_namespaces("retries") {
        return;
    }
    let mut web = Web::new(1..=3);
    let load = web.load(8);
    for old in 1..=2u8 {
        // It refuses from now on; the slice follows later.
        web.servers.remove(&old).unwrap().finish(Duration::from_millis(500));
        std::thread::sleep(Duration::from_millis(300));
        let left: Vec<(u8, &str)> = (old + 1..=3).map(|number| (number, "ready")).collect();
        web.publish(&left);
    }
    let tally = load.stop();
    // A connection that is open when its server ends is the server's own to close or reset.
    let is_after_open = |failure: &Failure| matches!(failure, Failure::Reset | Failure::Closed);
    let opens_failed = tally.failures.keys().filter(|failure| !is_after_open(failure)).count();
    assert_eq!(opens_failed, 0, "{:?}", tally.failures);
    let retries = web.cluster.metric("sluice_connect_retries_total{").unwrap();
    assert!(retries > 0.0);
    println!("servers gone first: {} opens, 0 failed, {retries} retries", tally.answers());
}

#[test]
fn a_pod_that_is_cut_off_is_left_and_its_clients_learn_it() {
    if !can_run_in_namespaces("a Pod that is cut off") {
        return;
    }
    let web = Web::new(1..=2);
    let mut kept: Vec<(String, Connection)> = (0..12).map(|_| web.connect()).collect();
    web.publish(&[(1, "terminating"), (2, "ready")]);
    let link = web.cluster.topology.pods().into_iter().find(|pod| pod.name == "web-1").unwrap().node_link;
    web.cluster.output("ip", &["link", "set", &link, "down"]).unwrap();
    web.publish(&[(2, "ready")]);
    let changed = Instant::now();
    for (_, connection) in kept.iter_mut().filter(|(pod, _)| pod == "web-1") {
        time_to_reset(connection);
    }
    assert!(changed.elapsed() < Duration::from_secs(1), "{:?}", changed.elapsed());

    // A slice that still names a Pod nobody reaches: every open succeeds all the same.
    web.publish(&[(1, "ready"), (2, "ready")]);
    let plan = Plan { connections: Some(30), ..Plan::new(vec![Target::Http(web.frontend())]) };
    let tally = run(web.outside(), &plan).unwrap();
    assert_eq!((tally.answers(), tally.failed()), (30, 0), "{:?}", tally.failures);
    assert_eq!(tally.answered.keys().collect::<Vec<_>>(), ["web-2"]);
}

#[test]
fn an_address_that_another_pod_has_inherits_nothing() {
    if !can_run_in_namespaces("a re-used address") {
        return;
    }
    let mut web = Web::new(1..=1);
    let (pod, mut connection) = web.connect();
    assert_eq!(pod, "web-1");
    // It leaves without having been terminating: its connections go on, until somebody else has the address.
    web.publish(&[]);
    assert_eq!(connection.get("/").as_deref(), Ok("web-1"));
    let generation = web.cluster.generation().unwrap();
    web.write_named(&[(2, 1, "ready")], json!({}));
    web.cluster.wait_for_table_after(generation).unwrap();
    web.servers.remove(&1).unwrap();
    web.cluster.topology.remove_pod("web-1").unwrap();
    web.add(2, 1);
    assert_eq!(web.connect().0, "web-2");
    // The other Pod would answer a segment of the old connection with a RST of its own; it must not even see one.
    let seen = || {
        let pods = web.cluster.topology.pods();
        let text = pods[0].ns.run(|| Ok(std::fs::read_to_string("/proc/net/snmp")?)).unwrap();
        let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
        let position = lines.next().unwrap().split(' ').position(|name| name == "OutRsts").unwrap();
        lines.next().unwrap().split(' ').nth(position).unwrap().parse::<u64>().unwrap()
    };
    let before = seen();
    assert!(connection.get("/").is_err(), "it never becomes a connection to the other Pod");
    assert_eq!(seen(), before);
}

#[test]
fn an_operator_drains_an_endpoint() {
    if !can_run_in_namespaces("drains by hand") {
        return;
    }
    let mut web = Web::new(1..=2);
    let mut kept: Vec<(String, Connection)> = (0..8).map(|_| web.connect()).collect();
    let sluice = |web: &Web, arguments: &[&str]| {
        let output = web.cluster.topology.node.command(sluice_tests::sluice_binary()).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, text) = sluice(&web, &["drain", "10.244.0.1:8080", "--timeout", "60s"]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(web.endpoint(1).unwrap()["state"], "draining");
    let plan = Plan { connections: Some(40), ..Plan::new(vec![Target::Http(web.frontend())]) };
    let only_two = |web: &Web| {
        let tally = run(web.outside(), &plan).unwrap();
        assert_eq!(tally.answered.keys().collect::<Vec<_>>(), ["web-2"], "{:?}", tally.failures);
    };
    only_two(&web);
    for (pod, connection) in &mut kept {
        assert_eq!(connection.get("/").as_ref(), Ok(&*pod), "its connections go on");
    }
    // It is not forgotten when the daemon is killed.
    assert_eq!(web.cluster.stop(Signal::SIGKILL).unwrap(), None);
    web.cluster.start().unwrap();
    only_two(&web);
    assert!(web.endpoint(1).unwrap()["deadlineSeconds"].as_u64().unwrap() <= 60);
    for (pod, connection) in &mut kept {
        assert_eq!(connection.get("/").as_ref(), Ok(&*pod), "its connections go on over the kill");
    }
    // With its clients gone it is drained; with clients that stay it is cut.
    let (gone, mut stay): (Vec<_>, Vec<_>) = kept.into_iter().partition(|(pod, _)| pod == "web-1");
    let mut gone = gone.into_iter();
    let (_, mut one) = gone.next().expect("web-1 had a connection");
    drop(gone);
    let (code, text) = sluice(&web, &["drain", "10.244.0.1", "--timeout", "1s", "--watch"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("cut"), "{text}");
    assert_eq!(one.get("/"), Err(Failure::Reset));
    stay.iter_mut().for_each(|(pod, connection)| assert_eq!(connection.get("/").as_ref(), Ok(&*pod)));
    for target in ["10.244.0.1:8080", "10.244.0.1"] {
        assert_eq!(sluice(&web, &["undrain", target]).0, Some(0));
    }
    assert_eq!(sluice(&web, &["undrain", "10.244.0.1"]).0, Some(1), "it is no longer drained");
    let tally = run(web.outside(), &plan).unwrap();
    assert!(tally.answered.contains_key("web-1"), "{:?}", tally.answered);
    let (code, text) = sluice(&web, &["drain", "10.244.0.1", "--timeout", "30s", "--watch"]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(sluice(&web, &["drain", "10.244.0.9"]).0, Some(1), "nobody has that address");
}

#[test]
fn annotations_decide_about_retries_and_drains() {
    if !can_run_in_namespaces("annotations") {
        return;
    }
    let mut web = Web::new(1..=2);
    let generation = web.cluster.generation().unwrap();
    let annotations = json!({"sluice.dev/retry": "off", "sluice.dev/drain-timeout": "500ms"});
    web.write(&[(1, "ready"), (2, "ready")], annotations.clone());
    let generation = web.cluster.wait_for_table_after(generation).unwrap();
    let mut kept: Vec<(String, Connection)> = (0..8).map(|_| web.connect()).collect();
    // It leaves without having been terminating: it drains for as long as the Service says.
    web.write(&[(2, "ready")], annotations.clone());
    let generation = web.cluster.wait_for_table_after(generation).unwrap();
    let left: Vec<_> = kept.iter_mut().filter(|(pod, _)| pod == "web-1").collect();
    assert!(!left.is_empty());
    for (_, connection) in left {
        time_to_reset(connection);
    }
    web.write(&[(1, "ready"), (2, "ready")], annotations);
    web.cluster.wait_for_table_after(generation).unwrap();
    web.servers.remove(&1).unwrap();
    let plan = Plan { connections: Some(20), concurrency: 1, ..Plan::new(vec![Target::Http(web.frontend())]) };
    let tally = run(web.outside(), &plan).unwrap();
    assert!(tally.failures.contains_key(&Failure::Refused), "without retries the client learns it: {tally:?}");
    let ejected = web.endpoint(1).unwrap();
    assert!(ejected["ejectedSeconds"].as_u64().is_some(), "five refusals eject it: {ejected}");
    // It is told of a moment later.
    let deadline = Instant::now() + SOON;
    while web.cluster.metric("sluice_ejections_total{").unwrap() < 1.0 {
        assert!(Instant::now() < deadline, "{}", web.cluster.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn killed_and_replaced_daemons_lose_no_connection() {
    if !can_run_in_namespaces("kill -9 and take-over under load") {
        return;
    }
    let mut web = Web::new(1..=3);
    let (connections, rounds) = (size(60, 500), size(3, 20));
    let kept: Vec<(String, Connection)> = (0..connections).map(|_| web.connect()).collect();
    let stop = AtomicBool::new(false);
    let bytes = size(256, 4096) as u64 * (1 << 20);
    let frontend = web.frontend();
    let outside = web.outside().clone();
    std::thread::scope(|scope| {
        // Each thread keeps a share of the connections busy and notes the longest wait for an answer.
        let mut shares: Vec<Vec<(String, Connection)>> = (0..8).map(|_| Vec::new()).collect();
        kept.into_iter().enumerate().for_each(|(index, connection)| shares[index % 8].push(connection));
        let stop = &stop;
        let busy: Vec<_> = shares
            .into_iter()
            .map(|mut share| {
                scope.spawn(move || {
                    let mut longest = vec![Duration::ZERO; share.len()];
                    while !stop.load(Relaxed) {
                        for ((pod, connection), longest) in share.iter_mut().zip(&mut longest) {
                            let begun = Instant::now();
                            assert_eq!(connection.get("/").as_ref(), Ok(&*pod));
                            *longest = begun.elapsed().max(*longest);
                        }
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    longest
                })
            })
            .collect();
        let transfer = scope.spawn(move || {
            let upload = || {
                let mut connection =
                    Connection::open(frontend, SOON).map_err(|failure| anyhow::anyhow!("{failure}"))?;
                connection.upload(bytes).map_err(|failure| anyhow::anyhow!("{failure}"))
            };
            outside.run(upload).unwrap()
        });
        for round in 0..rounds {
            assert_eq!(web.cluster.stop(Signal::SIGKILL).unwrap(), None);
            web.cluster.start().unwrap();
            assert_eq!(web.cluster.take_over().unwrap(), Some(0), "round {round}");
        }
        assert_eq!(transfer.join().unwrap(), Pattern::digest(bytes).to_string());
        stop.store(true, Relaxed);
        let mut longest: Vec<Duration> = busy.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        longest.sort();
        println!(
            "{rounds} kills and {rounds} take-overs, {connections} connections: 0 lost; longest silence p50 {:?}, max {:?}",
            longest[longest.len() / 2],
            longest[longest.len() - 1]
        );
    });
    let log = web.cluster.log();
    assert!(log.contains("flows recovered"), "{log}");
    assert!(!log.lines().any(|line| line.contains("flows recovered") && !line.contains("dropped=0")), "{log}");
}

#[test]
fn a_flow_file_that_cannot_be_read_is_set_aside() {
    if !can_run_in_namespaces("a strange flow file") {
        return;
    }
    let cluster = Cluster::new().unwrap();
    std::fs::create_dir_all(cluster.state_dir()).unwrap();
    std::fs::write(cluster.state_dir().join("flows"), vec![7; 100_000]).unwrap();
    let mut web = Web { cluster, servers: BTreeMap::new() };
    web.add(1, 1);
    web.write(&[(1, "ready")], json!({}));
    web.cluster.start().unwrap();
    assert!(web.cluster.log().contains("set aside"), "{}", web.cluster.log());
    let kept = std::fs::read_dir(web.cluster.state_dir()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(kept.into_iter().any(|name| name.to_string_lossy().contains("aside")));
    let answer = web.outside().run(|| Ok(client::get(web.frontend(), "/", SOON))).unwrap();
    assert_eq!(answer.as_deref(), Ok("web-1"));
}
