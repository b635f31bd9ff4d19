//! The daemon's life: set-up and clean removal, bad input, refusals with the right exit code, what it tells of itself.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;
use serde_json::Value;
use sluice_bench::client::{self, Target, ask};
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::{can_run_in_namespaces, manifests};

fn answers(cluster: &Cluster) -> bool {
    let target = Target::Http(cluster.web(true)[0]);
    cluster.topology.client.run(|| Ok(ask(target, SOON).result.is_ok())).unwrap()
}

#[test]
fn a_clean_stop_leaves_the_host_as_it_was_and_a_crash_is_repaired() {
    if !can_run_in_namespaces("host set-up and removal") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.add_pod(1).unwrap();
    cluster.publish_web(0..1).unwrap();
    // Something of somebody else's, to be left alone.
    cluster.output("nft", &["add", "table", "inet", "theirs"]).unwrap();
    cluster.output("ip", &["rule", "add", "pref", "77", "to", "203.0.113.1", "lookup", "main"]).unwrap();
    let before = cluster.host_state().unwrap();
    cluster.start().unwrap();
    assert!(answers(&cluster));
    let during = cluster.host_state().unwrap();
    assert_eq!(cluster.stop(Signal::SIGKILL).unwrap(), None);
    cluster.start().unwrap();
    assert!(answers(&cluster));
    assert_eq!(masked(&cluster.host_state().unwrap()), masked(&during), "set up once, not twice");
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
    assert_eq!(cluster.host_state().unwrap(), before);
    cluster.start().unwrap();
    assert_eq!(cluster.stop(Signal::SIGKILL).unwrap(), None);
    cluster.sluice(&["cleanup"]).unwrap();
    assert_eq!(cluster.host_state().unwrap(), before, "cleanup removes what a crash left");
}

#[test]
fn what_somebody_else_takes_away_is_put_back_and_counted() {
    if !can_run_in_namespaces("repairs of the host") {
        return;
    }
    let mut cluster = Cluster::with_web(1).unwrap();
    let repairs = |what: &str| cluster.metric(&format!("sluice_host_repairs_total{{object=\"{what}\"}}")).unwrap();
    let during = cluster.host_state().unwrap();
    for (done, command) in [
        "delete table inet sluice",
        "flush chain inet sluice marked",
        "add chain inet sluice more",
        "flush set inet sluice reserved_ports",
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(repairs("nftables table"), done as f64, "before {command}");
        cluster.output("nft", &[command]).unwrap();
        let deadline = std::time::Instant::now() + SOON;
        while repairs("nftables table") <= done as f64 {
            assert!(std::time::Instant::now() < deadline, "{command}: {}", cluster.log());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert_eq!(masked(&cluster.host_state().unwrap()), masked(&during), "{command}");
        assert!(answers(&cluster));
    }
    assert!(cluster.log().contains("put right what somebody else changed"));
    // What it noted there, the daemon knows without it.
    cluster.output("nft", &["delete table inet sluice"]).unwrap();
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
    let path = "/proc/sys/net/ipv4/ip_local_reserved_ports";
    assert_eq!(cluster.topology.node.run(|| Ok(std::fs::read_to_string(path)?)).unwrap().trim(), "");
}

#[test]
fn an_address_that_goes_loses_its_route() {
    if !can_run_in_namespaces("routes of addresses that come and go") {
        return;
    }
    let cluster = Cluster::with_web(1).unwrap();
    let pods = [(cluster.pods[0].pod.name.clone(), cluster.pods[0].pod.addresses.clone())];
    let slices = manifests::slices("web", &pods);
    let mut without = manifests::service("web", 10);
    without["status"] = serde_json::json!({});
    let with = manifests::service("web", 10);
    for (service, there) in [(&with, true), (&without, false), (&with, true)] {
        cluster.write("web.json", &[vec![service.clone()], slices.clone()].concat()).unwrap();
        let deadline = std::time::Instant::now() + SOON;
        for (family, address) in [("-4", "172.31.0.10"), ("-6", "fd00:31::a")] {
            let has = || {
                let routes = cluster.output("ip", &[family, "route", "show", "table", "5392"]).unwrap();
                routes.lines().any(|line| line.split(' ').any(|word| word == address))
            };
            while has() != there {
                assert!(std::time::Instant::now() < deadline, "{address} is to have a route: {there}");
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    }
    assert!(answers(&cluster));
}

/// Without what differs from link to link of one name, and from moment to moment: its index and its operational state.
fn masked(state: &str) -> String {
    let line = |line: &str| match line.split_once(": sluice0:") {
        Some((_, rest)) => format!("sluice0:{}", rest.replace(" state UNKNOWN ", " state UP ")),
        None => line.to_owned(),
    };
    state.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_second_daemon_is_refused_unless_it_takes_over() {
    if !can_run_in_namespaces("two daemons") {
        return;
    }
    let mut cluster = Cluster::with_web(1).unwrap();
    let output = cluster.run_command("other-state").args(["--admin", "127.0.0.1:10399"]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("another"), "{error}");
    assert!(answers(&cluster), "the first one is untouched");

    // The state directory of one namespace is nothing to a daemon of another.
    let elsewhere = Cluster::new().unwrap();
    let mut command = elsewhere.topology.node.command(sluice_tests::sluice_binary());
    command.arg("run").arg("--manifests").arg(elsewhere.manifests()).arg("--state-dir").arg(cluster.state_dir());
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("another"), "{error}");

    // With the same state directory the newer one takes over, and its connections go on.
    let connect =
        || client::Connection::open(cluster.web(true)[0], SOON).map_err(|failure| anyhow::anyhow!("{failure}"));
    let mut connection = cluster.topology.client.run(connect).unwrap();
    assert_eq!(connection.get("/").unwrap(), "web-1");
    let old = cluster.take_over().unwrap();
    assert_eq!(old, Some(0), "the old one ends by itself\n{}", cluster.log());
    assert_eq!(connection.get("/").unwrap(), "web-1");
    assert!(answers(&cluster));
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
}

#[test]
fn a_daemon_that_lingers_ends_when_told_and_harms_nothing() {
    if !can_run_in_namespaces("--linger") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.add_pod(1).unwrap();
    cluster.publish_web(0..1).unwrap();
    cluster.arguments(&["--linger"]);
    cluster.start().unwrap();
    let mut old = cluster.take_over_from_lingering().unwrap();
    assert!(answers(&cluster));
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(old.try_wait().unwrap(), None, "it waits\n{}", cluster.log());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(old.wait().unwrap().code(), Some(0), "{}", cluster.log());
    assert!(answers(&cluster), "the host's set-up is the newer one's");
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
}

/// What systemd is told by a unit of `Type=notify`.
#[test]
fn a_supervisor_is_told_when_it_serves_and_when_it_stops() {
    if !can_run_in_namespaces("sd_notify") {
        return;
    }
    let mut cluster = Cluster::new().unwrap();
    cluster.add_pod(1).unwrap();
    cluster.publish_web(0..1).unwrap();
    let path = cluster.manifests().with_file_name("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    let told = || {
        let mut text = [0; 512];
        let length = socket.recv(&mut text).expect("something is told in time");
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    cluster.environment("NOTIFY_SOCKET", &path);
    cluster.start().unwrap();
    assert!(told().contains("READY=1"));
    assert!(answers(&cluster), "it serves, and does not only run");
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0));
    assert!(told().contains("STOPPING=1"));
}

#[test]
fn a_bad_file_is_named_and_changes_nothing() {
    if !can_run_in_namespaces("bad manifests in a running daemon") {
        return;
    }
    let cluster = Cluster::with_web(1).unwrap();
    let whole = std::fs::read_to_string(cluster.manifests().join("web.json")).unwrap();
    let rows = [
        (whole[..whole.len() / 2].to_owned(), ""),
        (whole.replace("\"port\":80,", "\"port\":\"eighty\","), "spec.ports[0].port"),
        ("kind: [".to_owned(), ""),
    ];
    for (text, field) in rows {
        cluster.write_text("web.json", &text).unwrap();
        let problem = |problems: &Value| {
            let text = problems.to_string();
            (text.contains("web.json") && text.contains(field)).then_some(())
        };
        wait_for(&cluster, "/api/v1/problems", problem);
        assert!(answers(&cluster), "the last good objects stay in force after {text:.40}");
    }
    std::fs::remove_file(cluster.manifests().join("web.json")).unwrap();
    wait_for(&cluster, "/api/v1/problems", |problems| problems.to_string().contains("web.json").then_some(()));
    assert!(answers(&cluster), "a deleted file is reported, its objects stay");
    cluster.write_text("web.json", &whole).unwrap();
    wait_for(&cluster, "/api/v1/problems", |problems| (!problems.to_string().contains("web.json")).then_some(()));
    assert!(answers(&cluster));
}

fn wait_for(cluster: &Cluster, path: &str, accept: impl Fn(&Value) -> Option<()>) {
    let deadline = std::time::Instant::now() + SOON;
    loop {
        let answer: Value = serde_json::from_str(&cluster.admin(path).unwrap()).unwrap();
        if accept(&answer).is_some() {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{path}: {answer}\n{}", cluster.log());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn the_daemon_tells_what_it_does() {
    if !can_run_in_namespaces("admin API") {
        return;
    }
    let cluster = Cluster::with_web(2).unwrap();
    for _ in 0..20 {
        assert!(answers(&cluster));
    }
    for what in ["services", "endpoints", "frontends", "flows"] {
        let table = cluster.sluice(&["get", what]).unwrap();
        assert!(table.contains("web") || what == "flows", "{what}: {table}");
        let json: Value = serde_json::from_str(&cluster.sluice(&["get", what, "-o", "json"]).unwrap()).unwrap();
        assert!(json.is_array() || json.is_object(), "{what}: {json}");
        cluster.sluice(&["get", what, "-o", "wide"]).unwrap();
        cluster.sluice(&["get", what, "-o", "yaml"]).unwrap();
    }
    let trace = ["trace", "--from", "10.244.0.7", "--to", "10.96.0.10:80", "--admin", "127.0.0.1:10249", "-o", "json"];
    let answer: Value = serde_json::from_str(&cluster.sluice(&trace).unwrap()).unwrap();
    assert_eq!(answer["outcome"], "forward");
    assert_eq!(answer["service"], "default/web");
    assert_eq!(answer["endpoints"], serde_json::json!(["10.244.0.1:8080", "10.244.0.2:8080"]));
    assert_eq!(answer["masquerade"], false);
    assert_eq!(cluster.metric("sluice_flows_opened_total{").unwrap(), 20.0);
    for health in ["/healthz", "/livez"] {
        assert!(cluster.admin(health).is_ok(), "{health}");
    }
    let output =
        cluster.topology.client.command(sluice_tests::sluice_binary()).args(["get", "flows"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "no daemon there");
}
