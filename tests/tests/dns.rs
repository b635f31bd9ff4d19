//! Names by real packets: every case against the real daemon, by datagram and over connections.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::net::SocketAddr;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::{Cluster, SOON};
use sluice_tests::dns::{By, Case, as_json, ask, cases, difference};

/// Where the daemon answers when a case does not say.
const LISTEN: &str = "169.254.20.10:53";

#[test]
fn every_case_by_datagram_and_over_a_connection() {
    if !can_run_in_namespaces("names by packets") {
        return;
    }
    let cases = cases();
    let (mut passed, mut failures) = (0, Vec::new());
    for case in &cases {
        let (good, bad) = run(case);
        passed += good;
        failures.extend(bad);
    }
    writeln!(std::io::stdout(), "{} cases by packets: {passed} passed, {} failed", cases.len(), failures.len())
        .unwrap();
    assert!(failures.is_empty(), "{passed} passed, {} failed\n{}", failures.len(), failures.join("\n"));
}

fn run(case: &Case) -> (usize, Vec<String>) {
    let mut cluster = Cluster::new().unwrap();
    let mut config = case.case["config"].clone();
    // Nobody is there to be asked, as when the answers were given.
    config["dns"]["upstreams"] = json!([]);
    if config["dns"]["listen"].is_null() {
        config["dns"]["listen"] = json!([LISTEN]);
    }
    let server: SocketAddr = config["dns"]["listen"][0].as_str().unwrap().parse().unwrap();
    cluster.configure(&config.to_string()).unwrap();
    case.write_objects(&cluster.manifests()).unwrap();
    cluster.start().unwrap();
    let (mut passed, mut failures) = (0, Vec::new());
    cluster
        .topology
        .node
        .run(|| {
            for query in case.queries() {
                for by in [By::Datagram, By::Connection] {
                    match difference_by(server, by, query) {
                        None => passed += 1,
                        Some(difference) => failures.push(format!("{}: {by:?}: {difference}", case.name())),
                    }
                }
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(cluster.stop(Signal::SIGTERM).unwrap(), Some(0), "{}", cluster.log());
    (passed, failures)
}

fn difference_by(server: SocketAddr, by: By, query: &Value) -> Option<String> {
    let (name, kind) = (query["qname"].as_str().unwrap(), query["qtype"].as_str().unwrap());
    let answer = match ask(server, by, name, kind, Some(1232), SOON) {
        Ok(answer) => answer,
        Err(error) => return Some(format!("{name} {kind}: {error:#}")),
    };
    assert!(answer.authoritative, "{name} {kind}: the zone is ours");
    let mut answer = as_json(&answer);
    let mut query = query.clone();
    if by == By::Datagram {
        // What is only there to save a question may be left out of a datagram.
        let count = |value: &Value| value["additional"].as_array().unwrap().len();
        if count(&answer) < count(&query["expect"]) {
            (query["expect"]["additional"], answer["additional"]) = (json!([]), json!([]));
        }
    }
    difference(&query, &answer)
}
