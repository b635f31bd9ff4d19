//! An API server that dies, forgets and mumbles, while connections go on: none is lost, and the table is right soon after.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::json;
use sluice_bench::client::{Connection, Target};
use sluice_bench::load::{Load, Plan};
use sluice_tests::api_cluster::{ADDRESS, cluster, publish, service, slices, wait_for};
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::control_plane::{self, ControlPlane};
use sluice_tests::relay::{Manner, Relay};
use sluice_tests::stage::run;

const FIRST: &str = "10.244.0.1:8080";
const SECOND: &str = "10.244.0.2:8080";
/// ClusterIP of the Service that is there all along.
const WEB: u8 = 10;

/// Connections that are open all along, and some that come and go.
struct Traffic {
    kept: Vec<Connection>,
    passing: Load,
}

impl Traffic {
    fn start(cluster: &Cluster) -> Self {
        let to = SocketAddr::from(([10, 96, 0, WEB], 80));
        let open = || Connection::open(to, SOON).map_err(anyhow::Error::msg);
        let kept = (0..50).map(|_| cluster.topology.client.run(open).unwrap()).collect();
        let plan = Plan {
            concurrency: 2,
            pause: Duration::from_millis(10),
            timeout: SOON,
            ..Plan::new(vec![Target::Http(to)])
        };
        Self { kept, passing: Load::start(&cluster.topology.client, &plan).unwrap() }
    }

    fn check(&mut self, when: &str) {
        for connection in &mut self.kept {
            assert_eq!(connection.get("/").unwrap(), "web-1", "{when}");
        }
    }

    fn end(mut self) {
        self.check("at the end");
        let tally = self.passing.stop();
        assert_eq!(tally.failed(), 0, "{:?}", tally.failures);
        assert!(tally.answers() > 100, "{:?}", tally.answered);
    }
}

/// Ends and begins Services, and with `web` what its endpoints are. The ClusterIPs of what is gone and of what has come.
fn change(cluster: &Cluster, plane: &ControlPlane, round: u8) -> (u8, u8) {
    let (gone, come) = (20 + round, 21 + round);
    plane.delete(&service(&format!("s{gone}"), gone)).unwrap();
    publish(cluster, plane, &format!("s{come}"), come);
    let pods = if round.is_multiple_of(2) { 0..2 } else { 0..1 };
    for slice in slices(cluster, "web", pods) {
        plane.patch(&slice, &json!({"endpoints": slice["endpoints"]})).unwrap();
    }
    (gone, come)
}

/// How long it took from now until the table holds that change.
fn settle(cluster: &Cluster, round: u8, (gone, come): (u8, u8), what: &str) {
    let begun = Instant::now();
    wait_for(cluster, come, "forward", &[FIRST]);
    wait_for(cluster, gone, "drop", &[]);
    wait_for(cluster, WEB, "forward", if round.is_multiple_of(2) { &[FIRST, SECOND] } else { &[FIRST] });
    eprintln!("{what}: the table is right after {:?}", begun.elapsed());
}

/// Between the node and the API server nothing comes through, and nobody says so.
fn cut(plane: &ControlPlane, is_cut: bool) {
    let table = "table inet cut { chain in { type filter hook input priority 0; iifname != \"lo\" drop; }; }";
    let arguments = if is_cut { ["add", table] } else { ["delete", "table inet cut"] };
    run(plane.client().unwrap().namespace(), "nft", &arguments).unwrap();
}

/// `SLUICE_BIG=1`: for ten minutes.
#[test]
fn no_connection_is_lost_while_the_network_is_cut() {
    const WHAT: &str = "a network that is cut";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (mut cluster, plane) = cluster();
    publish(&cluster, &plane, "s20", 20);
    cluster.start().unwrap();
    let mut traffic = Traffic::start(&cluster);
    let length = Duration::from_secs(if std::env::var_os("SLUICE_BIG").is_some() { 600 } else { 5 });
    cut(&plane, true);
    let begun = Instant::now();
    let changed = change(&cluster, &plane, 0);
    while begun.elapsed() < length {
        std::thread::sleep(Duration::from_secs(1));
        traffic.check("while the network is cut");
    }
    cut(&plane, false);
    settle(&cluster, 0, changed, &format!("cut for {length:?}"));
    traffic.check("after the cut");
    let changed = change(&cluster, &plane, 1);
    settle(&cluster, 1, changed, "and once more");
    traffic.end();
}

#[test]
fn no_connection_is_lost_whatever_the_api_server_does() {
    const WHAT: &str = "an API server that dies, forgets and mumbles";
    if !can_run_in_namespaces(WHAT) || !control_plane::can_run(WHAT) {
        return;
    }
    let (mut cluster, mut plane) = cluster();
    let relay = Relay::start(&cluster.topology.node, format!("{ADDRESS}:6443").parse().unwrap()).unwrap();
    cluster.watch_api(plane.kubeconfig_through("proxy", relay.address).unwrap());
    publish(&cluster, &plane, "s20", 20);
    cluster.start().unwrap();
    let mut traffic = Traffic::start(&cluster);

    // Killed and started: the change comes with the first watch.
    plane.kill_api_server().unwrap();
    traffic.check("without an API server");
    std::thread::sleep(Duration::from_secs(5));
    plane.start_api_server().unwrap();
    let changed = change(&cluster, &plane, 0);
    settle(&cluster, 0, changed, "killed and started");
    traffic.check("after a restart");

    // Out of reach while much changes, and then it has forgotten what: 410, and an empty watch cache.
    relay.behave(Manner::Refusing);
    let changed = change(&cluster, &plane, 1);
    plane.compact().unwrap();
    plane.kill_api_server().unwrap();
    plane.start_api_server().unwrap();
    std::thread::sleep(Duration::from_secs(5));
    relay.behave(Manner::Faithful);
    settle(&cluster, 1, changed, "out of reach, compacted and started");
    assert!(cluster.log().contains("our version has expired"), "this was about 410\n{}", cluster.log());
    traffic.check("after a compaction");

    // Half answers: in the middle of a handshake, of a list, of an event.
    for bytes in [1, 500, 1000, 1500, 2000, 2500, 3000, 4000] {
        relay.behave(Manner::Truncating(bytes));
        std::thread::sleep(Duration::from_secs(1));
    }
    assert!(relay.truncated() > 10, "{}", relay.truncated());
    let changed = change(&cluster, &plane, 2);
    relay.behave(Manner::Faithful);
    settle(&cluster, 2, changed, "half answers");
    traffic.check("after half answers");

    // Late ones.
    relay.behave(Manner::Late(Duration::from_millis(200)));
    let changed = change(&cluster, &plane, 3);
    settle(&cluster, 3, changed, "late answers");
    relay.behave(Manner::Faithful);
    let changed = change(&cluster, &plane, 4);
    settle(&cluster, 4, changed, "prompt again");
    cluster.wait_for_problems("the API server is well", |problems| !problems.contains("cannot")).unwrap();
    traffic.end();
}
