//! Endpoints that come, change and go under connections: nothing is lost that need not be, and what must end ends at once.
//!
//! `SLUICE_BIG=1` runs the full sizes and prints what it measured.
#![allow(clippy::unwrap_used)]

mod restart;

use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use sluice_bench::client::Failure;
use sluice_tests::can_run_in_namespaces;
use sluice_tests::cluster::SOON;
use sluice_tests::stage::{Stage, ready, run, segments};
use sluice_tests::talk::{Plan, Talk, Told};

/// What must end ends within this time of the change.
const AT_ONCE: Duration = Duration::from_secs(1);
/// Bound on what takes longer than a moment.
const PATIENCE: Duration = Duration::from_secs(20);
/// Pause of clients whose pace is of no interest.
const PAUSE: Duration = Duration::from_millis(100);

/// The first number, or with `SLUICE_BIG` the second.
fn size(small: usize, big: usize) -> usize {
    if std::env::var_os("SLUICE_BIG").is_some() { big } else { small }
}

/// Long-lived connections.
fn long(stage: &Stage, clients: usize) -> Plan {
    Plan { to: stage.to(), clients, pause: PAUSE, questions: None, again: false }
}

/// Connections of two questions each, one after the other.
fn short(stage: &Stage, clients: usize) -> Plan {
    Plan { questions: Some(2), again: true, pause: Duration::from_millis(size(20, 100) as u64), ..long(stage, clients) }
}

/// Long-lived connections from outside, whose address is replaced; all have been answered.
fn start_long(stage: &Stage, clients: usize) -> Talk {
    let talk = Talk::start(&stage.cluster.topology.client, long(stage, clients)).unwrap();
    talk.wait_for(SOON, |told| told.opened == clients as u64).unwrap();
    talk
}

fn assert_unharmed(told: &Told, what: &str) {
    assert_eq!(told.failed, [], "{what}");
    assert!(told.ended.is_empty(), "{what}: {:?}", told.ended);
    assert_eq!(told.wrong, 0, "{what}");
}

/// Replaces all endpoints of a Service, one after the other. With `early` their servers stop listening while the slice still
/// says that they are ready.
fn roll(early: bool) {
    let what = if early { "a rolling update with servers that stop early" } else { "a rolling update" };
    if !can_run_in_namespaces(what) {
        return;
    }
    let (clients, pods) = (size(12, 200), size(3, 5) as u8);
    let grace = Duration::from_millis(size(800, 3000) as u64);
    let mut stage = Stage::new(1..=pods, "").unwrap();
    let opening = Talk::start(&stage.client.ns, short(&stage, clients)).unwrap();
    let plan = Plan { again: true, ..long(&stage, clients) };
    let staying = Talk::start(&stage.cluster.topology.client, plan).unwrap();
    staying.wait_for(SOON, |told| told.opened == clients as u64).unwrap();
    let mut endpoints: Vec<_> = (1..=pods).map(ready).collect();
    let mut gone = Vec::new();
    for old in 1..=pods {
        let new = pods + old;
        stage.add(new).unwrap();
        endpoints.push(ready(new));
        stage.change(&endpoints).unwrap();
        if early {
            stage.close(old).unwrap();
            thread::sleep(Duration::from_millis(300));
        }
        endpoints[0] = endpoints[0].clone().terminating();
        stage.change(&endpoints).unwrap();
        thread::sleep(grace);
        endpoints.remove(0);
        let written = stage.change(&endpoints).unwrap();
        thread::sleep(AT_ONCE);
        let resets = stage.talkers[&old].listener.resets();
        gone.push((u64::from(old), written, resets));
        stage.remove(old).unwrap();
    }
    let (opening, staying) = (opening.stop(), staying.stop());
    let retries = stage.cluster.metric("sluice_connect_retries_total{").unwrap();
    assert_unharmed(&opening, "those that open all the time");
    assert_eq!((&staying.failed[..], staying.wrong), (&[][..], 0), "those that stay");
    let mut slowest = Duration::ZERO;
    for end in &staying.ended {
        assert_eq!(end.how, Failure::Reset);
        let (_, written, _) =
            gone.iter().find(|(number, ..)| *number == end.by).expect("only who is gone ends connections");
        assert!(end.at > *written, "{end:?} before the grace period ended");
        slowest = slowest.max(end.at - *written);
    }
    for (number, written, resets) in &gone {
        let cut = staying.ended.iter().filter(|end| end.by == *number).count();
        assert_eq!(resets.len(), cut, "Pod {number}: both ends are reset");
        for reset in resets {
            assert!(reset > written);
            slowest = slowest.max(*reset - *written);
        }
    }
    assert!(staying.ended.len() >= clients, "everybody's endpoint was replaced: {}", staying.ended.len());
    assert!(slowest < AT_ONCE, "{slowest:?} from the change to the reset");
    assert_eq!(retries > 0.0, early, "{retries} retries");
    println!(
        "{what}: {} opens of {clients} clients, 0 failed; {} of {clients} long-lived reset at the end of the grace period, \
         both ends after {slowest:?} at most; 0 before; {} answers; {retries} retries",
        opening.opened,
        staying.ended.len(),
        staying.answers,
    );
}

#[test]
fn a_rolling_update_loses_nothing() {
    roll(false);
}

#[test]
fn servers_that_stop_before_their_slice_says_so_cost_nobody_a_connection() {
    roll(true);
}

#[test]
fn clients_of_a_pod_that_is_cut_off_learn_it_with_the_slices() {
    if !can_run_in_namespaces("a Pod that is cut off") {
        return;
    }
    let stage = Stage::new([1, 2], "").unwrap();
    let staying = start_long(&stage, size(10, 100));
    let (lost, other): (Vec<u64>, Vec<u64>) = staying.so_far().by.iter().partition(|by| **by == 1);
    assert!(!lost.is_empty() && !other.is_empty());
    // Nothing comes back any more, not even an error.
    run(&stage.talkers[&1].pod.ns, "ip", &["link", "set", "eth0", "down"]).unwrap();
    // While nobody says so, new connections are moved; those that are there hang.
    let opening = Talk::start(&stage.client.ns, short(&stage, 4)).unwrap();
    opening.wait_for(SOON, |told| told.opened >= 20).unwrap();
    let opened = opening.stop();
    assert_unharmed(&opened, "new connections");
    assert!(opened.by.iter().all(|by| *by == 2));
    assert!(stage.cluster.metric("sluice_connect_retries_total{").unwrap() >= 1.0);
    let failures = stage.cluster.metric("sluice_connect_failures_total{").unwrap();
    assert!(failures >= 1.0, "{failures}");
    stage.change(&[ready(1).terminating(), ready(2)]).unwrap();
    assert!(staying.so_far().ended.is_empty());
    let written = stage.change(&[ready(2)]).unwrap();
    staying.wait_for(SOON, |told| told.ended.len() == lost.len()).unwrap();
    let told = staying.stop();
    let slowest = told.ended.iter().map(|end| end.at - written).max().unwrap();
    assert!(told.ended.iter().all(|end| end.by == 1 && end.how == Failure::Reset), "{:?}", told.ended);
    assert!(slowest < AT_ONCE, "{slowest:?}");
    println!("a Pod cut off: {} clients reset within {slowest:?} of the change", lost.len());
}

#[test]
fn a_pod_without_a_route_costs_new_connections_nothing() {
    if !can_run_in_namespaces("a Pod without a route") {
        return;
    }
    let stage = Stage::new([1, 2], "").unwrap();
    // The node itself says at once that it cannot be reached.
    run(&stage.cluster.topology.node, "ip", &["link", "delete", &stage.talkers[&1].pod.node_link]).unwrap();
    let opening = Talk::start(&stage.cluster.topology.client, short(&stage, 4)).unwrap();
    opening.wait_for(SOON, |told| told.opened >= 20).unwrap();
    let told = opening.stop();
    assert_unharmed(&told, "new connections");
    let unreachable = "sluice_connect_failures_total{namespace=\"default\",service=\"web\",port=\"http\",protocol=\"TCP\",\
                       reason=\"unreachable\"}";
    assert!(stage.cluster.metric(unreachable).unwrap() >= 1.0, "{}", stage.cluster.metric(unreachable).unwrap());
}

#[test]
fn who_has_an_address_next_gets_nothing_of_old_connections() {
    if !can_run_in_namespaces("an address that is used again") {
        return;
    }
    let mut stage = Stage::new([1, 2], "").unwrap();
    // Clients that do not hear a RST go on sending.
    let deaf = "table inet deaf { chain in { type filter hook input priority 0; tcp flags & rst == rst drop; }; }";
    run(&stage.cluster.topology.client, "nft", &["add", deaf]).unwrap();
    let staying = start_long(&stage, 20);
    let of_first = staying.so_far().by.iter().filter(|by| **by == 1).count();
    assert!(of_first > 0);
    // It leaves without having been terminating: its connections may go on for ten minutes.
    stage.change(&[ready(2)]).unwrap();
    let draining = stage.endpoint(1).unwrap().unwrap();
    assert_eq!((&draining["state"], &draining["active"]), (&json!("draining"), &json!(of_first)));
    assert!(draining["deadlineSeconds"].as_u64().is_some_and(|seconds| (590..=600).contains(&seconds)), "{draining}");
    assert!(staying.so_far().ended.is_empty());
    stage.change(&[ready(1).with_uid("another"), ready(2)]).unwrap();
    stage.remove(1).unwrap();
    stage.add(1).unwrap();
    let ns = stage.talkers[&1].pod.ns.clone();
    thread::sleep(Duration::from_secs(2));
    assert_eq!((segments(&ns).unwrap(), stage.talkers[&1].listener.received()), (0, 0), "not one packet came");
    let opening = Talk::start(&stage.client.ns, short(&stage, 4)).unwrap();
    opening.wait_for(SOON, |told| told.by.contains(&1)).unwrap();
    assert_unharmed(&opening.stop(), "new connections to the new Pod");
    assert!(segments(&ns).unwrap() > 0);
    run(&stage.cluster.topology.client, "nft", &["delete", "table", "inet", "deaf"]).unwrap();
    staying.wait_for(PATIENCE, |told| told.ended.len() == of_first).unwrap();
    assert!(staying.stop().ended.iter().all(|end| end.by == 1));
}

#[test]
fn drained_by_hand() {
    if !can_run_in_namespaces("sluice drain") {
        return;
    }
    let mut stage = Stage::new([1, 2], "").unwrap();
    let staying = start_long(&stage, 10);
    let of_first = staying.so_far().by.iter().filter(|by| **by == 1).count();
    // Without end, through a crash.
    let (code, text) = stage.cluster.sluice_exit(&["drain", "10.244.0.1", "--timeout", "90s"]).unwrap();
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains(&format!("{of_first} flows are left")), "{text}");
    for _ in 0..2 {
        let shown = stage.endpoint(1).unwrap().unwrap();
        assert_eq!((&shown["state"], &shown["active"]), (&json!("draining"), &json!(of_first)));
        assert!(shown["deadlineSeconds"].as_u64().is_some_and(|seconds| (60..=90).contains(&seconds)), "{shown}");
        assert!(stage.cluster.sluice(&["get", "endpoints"]).unwrap().contains("draining"));
        assert_eq!(stage.cluster.metric("sluice_flows_draining{").unwrap(), of_first as f64);
        let opening = Talk::start(&stage.client.ns, short(&stage, 4)).unwrap();
        opening.wait_for(SOON, |told| told.opened >= 20).unwrap();
        let told = opening.stop();
        assert_unharmed(&told, "new connections");
        assert!(told.by.iter().all(|by| *by == 2));
        stage.cluster.stop(Signal::SIGKILL).unwrap();
        stage.cluster.start().unwrap();
    }
    let undrain = |code: i32| {
        let found = stage.cluster.sluice_exit(&["undrain", "10.244.0.1"]).unwrap();
        assert_eq!(found.0, Some(code), "{}", found.1);
    };
    undrain(0);
    undrain(1);
    let answered_by_first = || {
        let opening = Talk::start(&stage.client.ns, short(&stage, 4)).unwrap();
        opening.wait_for(SOON, |told| told.by.contains(&1)).unwrap();
        assert_unharmed(&opening.stop(), "new connections");
    };
    answered_by_first();

    // Cut at its deadline, which the exit code says: also when that is before the first look.
    for (timeout, patience) in [("2s", Duration::from_secs(2)), ("1ms", Duration::ZERO)] {
        let staying = start_long(&stage, 10);
        let of_first = staying.so_far().by.iter().filter(|by| **by == 1).count();
        assert!(of_first > 0);
        let begun = Instant::now();
        let (code, text) = stage.cluster.sluice_exit(&["drain", "10.244.0.1", "--timeout", timeout, "-w"]).unwrap();
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("cut"), "{text}");
        staying.wait_for(SOON, |told| told.ended.len() == of_first).unwrap();
        let told = staying.stop();
        let waits = told.ended.iter().map(|end| end.at - begun);
        assert!(waits.clone().all(|wait| wait >= patience && wait < patience + AT_ONCE), "{:?}", Vec::from_iter(waits));
        undrain(0);
        answered_by_first();
    }
    drop(staying);

    // Drained: the last one ends by itself while somebody watches.
    let staying = start_long(&stage, 10);
    let ends = thread::spawn(move || {
        thread::sleep(Duration::from_millis(700));
        staying.stop()
    });
    let (code, text) = stage.cluster.sluice_exit(&["drain", "10.244.0.1:8080", "--timeout", "60s", "--watch"]).unwrap();
    assert_eq!(code, Some(0), "{text}");
    assert!(text.ends_with("drained\n"), "{text}");
    assert_unharmed(&ends.join().unwrap(), "those that end by themselves");
    let (code, text) = stage.cluster.sluice_exit(&["drain", "10.244.0.77"]).unwrap();
    assert_eq!(code, Some(1), "no such endpoint: {text}");
    assert_eq!(stage.cluster.sluice_exit(&["drain", "web-1"]).unwrap().0, Some(2));
    assert_eq!(stage.cluster.sluice_exit(&["drain", "10.244.0.1", "--timeout", "soon"]).unwrap().0, Some(2));
}

#[test]
fn an_endpoint_that_becomes_ready_starts_slowly() {
    if !can_run_in_namespaces("slow start") {
        return;
    }
    let mut stage = Stage::new([1, 2, 3], "slowStart: 4s\n").unwrap();
    stage.add(4).unwrap();
    thread::sleep(Duration::from_millis(4200));
    let settled = start_long(&stage, 30);
    stage.change(&[1, 2, 3, 4].map(ready)).unwrap();
    // By the number of connections alone it would get nearly all of these.
    let early = start_long(&stage, 20).so_far();
    thread::sleep(Duration::from_millis(4200));
    let late = start_long(&stage, 40).so_far();
    let of_new = |told: &Told| told.by.iter().filter(|by| **by == 4).count();
    let (early, late) = (of_new(&early), of_new(&late));
    assert!(early <= 5, "{early} of the first 20");
    assert!(late >= 8, "{late} of 40 when it had started");
    assert_unharmed(&settled.stop(), "those that were there");
    println!("slow start: the new endpoint gets {early} of the first 20 connections, {late} of 40 afterwards");
}

#[test]
fn an_endpoint_that_takes_no_connection_is_ejected() {
    if !can_run_in_namespaces("ejection") {
        return;
    }
    let mut stage = Stage::new([1, 2, 3], "ejectAfter: 3\n").unwrap();
    stage.close(2).unwrap();
    let opening = Talk::start(&stage.client.ns, short(&stage, 6)).unwrap();
    let ejected = stage.wait_for_endpoint(2, "ejected", |endpoint| !endpoint["ejectedSeconds"].is_null()).unwrap();
    assert!(ejected["ejectedSeconds"].as_u64().is_some_and(|seconds| seconds <= 30), "{ejected}");
    assert!(stage.cluster.sluice(&["get", "endpoints"]).unwrap().contains("ejected"));
    let before = stage.cluster.metric("sluice_connect_failures_total{").unwrap();
    let opened = opening.so_far().opened;
    opening.wait_for(SOON, |told| told.opened > opened + 50).unwrap();
    assert_eq!(stage.cluster.metric("sluice_connect_failures_total{").unwrap(), before, "it is left alone");
    let told = opening.stop();
    assert_unharmed(&told, "new connections");
    assert!(stage.cluster.metric("sluice_ejections_total{").unwrap() >= 1.0);
    let states = stage.cluster.sluice(&["get", "metrics"]).or_else(|_| stage.cluster.admin("/metrics")).unwrap();
    let line = states.lines().find(|it| it.starts_with("sluice_endpoint_states{") && it.contains("state=\"ejected\""));
    assert!(line.is_some_and(|line| line.ends_with(" 1")), "{line:?}");
    assert!(stage.cluster.log().contains("endpoint ejected"));
    // It is still known after a crash.
    stage.cluster.stop(Signal::SIGKILL).unwrap();
    stage.cluster.start().unwrap();
    assert!(!stage.endpoint(2).unwrap().unwrap()["ejectedSeconds"].is_null());
}

#[test]
fn a_service_says_how_long_its_endpoints_drain_and_whether_opens_are_retried() {
    if !can_run_in_namespaces("annotations of draining") {
        return;
    }
    let mut stage = Stage::new([1, 2], "").unwrap();
    stage.annotations = json!({"sluice.dev/drain-timeout": "1s", "sluice.dev/retry": "off"});
    stage.change(&[1, 2].map(ready)).unwrap();
    let staying = start_long(&stage, 10);
    let of_first = staying.so_far().by.iter().filter(|by| **by == 1).count();
    assert!(of_first > 0);
    let written = stage.change(&[ready(2)]).unwrap();
    staying.wait_for(SOON, |told| told.ended.len() == of_first).unwrap();
    let told = staying.stop();
    let wait = |at: Instant| at - written;
    let at_deadline = |at: Instant| wait(at) >= Duration::from_secs(1) && wait(at) < Duration::from_secs(1) + AT_ONCE;
    assert!(told.ended.iter().all(|end| end.by == 1 && at_deadline(end.at)), "{:?}", told.ended);
    let resets = stage.talkers[&1].listener.resets();
    assert_eq!(resets.len(), of_first);
    assert!(resets.into_iter().all(at_deadline));
    assert_eq!(stage.cluster.metric("sluice_flows_ended_total{reason=\"drain_deadline\"}").unwrap(), of_first as f64);

    stage.close(2).unwrap();
    let opening = Talk::start(&stage.client.ns, short(&stage, 2)).unwrap();
    opening.wait_for(SOON, |told| told.failed.len() > 3).unwrap();
    drop(opening);
    stage.change(&[1, 2].map(ready)).unwrap();
    let opening = Talk::start(&stage.client.ns, short(&stage, 4)).unwrap();
    opening.wait_for(SOON, |told| !told.failed.is_empty()).unwrap();
    let told = opening.stop();
    assert!(told.failed.iter().all(|(_, failure)| *failure == Failure::Refused), "{:?}", told.failed);
    assert_eq!(stage.cluster.metric("sluice_connect_retries_total{").unwrap(), 0.0);
}
