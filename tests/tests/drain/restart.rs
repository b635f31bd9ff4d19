//! Crashes, restarts and upgrades of the daemon under connections, and what it makes of the flow file it finds.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice_bench::client::{Connection, Failure};
use sluice_bench::pattern::Pattern;
use sluice_bench::serve::PodServer;
use sluice_tests::cluster::SOON;
use sluice_tests::stage::{ENDPOINT, Stage, Talker, addresses, ready, segments};
use sluice_tests::talk::Talk;
use sluice_tests::{can_run_in_namespaces, manifests};

use super::{PATIENCE, assert_unharmed, short, size, start_long};

/// Does something to the daemon, with this in its configuration, again and again under connections and a transfer.
fn disturb(what: &str, config: &str, disturb: impl Fn(&mut Stage)) {
    if !can_run_in_namespaces(what) {
        return;
    }
    let (times, clients) = (size(3, 20), size(40, 500));
    let mut stage = Stage::new([1, 2, 3], &format!("serviceCIDRs: [10.96.0.0/16]\n{config}")).unwrap();
    let pod = stage.cluster.topology.add_pod("bulk", &addresses(100)).unwrap();
    let _server = PodServer::start(&pod.ns, "bulk", &[ENDPOINT], &[]).unwrap();
    let objects = [vec![manifests::service("bulk", 20)], manifests::slices_of("bulk", &[ready(100)])].concat();
    let generation = stage.cluster.generation().unwrap();
    stage.cluster.write("bulk.json", &objects).unwrap();
    stage.cluster.wait_for_table_after(generation).unwrap();

    let staying = start_long(&stage, clients);
    let stop = Arc::new(AtomicBool::new(false));
    let transfer = {
        let (ns, stop) = (stage.client.ns.clone(), Arc::clone(&stop));
        thread::spawn(move || {
            ns.enter().unwrap();
            let step = size(4, 64) as u64 * 1024 * 1024;
            let digest = Pattern::digest(step);
            let mut connection =
                Connection::open(SocketAddr::new("10.96.0.20".parse().unwrap(), 80), PATIENCE).unwrap();
            let mut sum = 0;
            while !stop.load(Relaxed) {
                assert_eq!(connection.download(step).unwrap(), digest);
                sum += step;
            }
            sum
        })
    };
    for _ in 0..times {
        thread::sleep(Duration::from_millis(300));
        disturb(&mut stage);
    }
    let answers = staying.so_far().answers;
    staying.wait_for(PATIENCE, |told| told.answers > answers + 3 * clients as u64).unwrap();
    stop.store(true, Relaxed);
    let transferred = transfer.join().unwrap();
    let told = staying.stop();
    assert_unharmed(&told, what);
    assert!(transferred > 0);
    println!(
        "{what}, {times} times under {clients} connections and a transfer: 0 lost, {} MiB intact; longest silence of a \
         connection p50 {:?}, max {:?}; {} answers",
        transferred >> 20,
        told.wait_at(0.5),
        told.wait_at(1.0),
        told.answers,
    );
}

#[test]
fn killed_daemons_lose_no_connection() {
    disturb("kill -9", "", |stage| {
        stage.cluster.stop(Signal::SIGKILL).unwrap();
        stage.cluster.start().unwrap();
    });
}

#[test]
fn upgrades_lose_no_connection() {
    disturb("take-over", "", |stage| assert_eq!(stage.cluster.take_over().unwrap(), Some(0)));
}

#[test]
fn restarts_lose_no_connection_where_a_stop_leaves_all() {
    disturb("restart", "leaveOnStop: true\n", |stage| {
        assert_eq!(stage.cluster.stop(Signal::SIGTERM).unwrap(), Some(0));
        stage.cluster.start().unwrap();
    });
}

/// As `maxSurge: 1` does it: the new Pod starts beside the old one, which is told to end when the new one is ready.
#[test]
fn rolling_updates_as_of_a_daemon_set_lose_no_connection() {
    disturb("rolling update of a DaemonSet", "linger: true\nleaveOnStop: true\n", |stage| {
        let mut old = stage.cluster.take_over_from_lingering().unwrap();
        assert!(stage.cluster.admin("/healthz").is_ok() && old.try_wait().unwrap().is_none(), "the old one waits");
        kill(Pid::from_raw(old.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        assert_eq!(old.wait().unwrap().code(), Some(0));
    });
}

#[test]
fn a_flow_file_of_another_version_is_set_aside() {
    if !can_run_in_namespaces("a flow file of another version") {
        return;
    }
    let mut stage = Stage::new([1], "").unwrap();
    let staying = start_long(&stage, 1);
    stage.cluster.stop(Signal::SIGKILL).unwrap();
    let path = stage.cluster.state_dir().join("flows");
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    // Its version stands behind eight bytes that say what it is.
    file.write_all_at(&9999_u32.to_le_bytes(), 8).unwrap();
    let head = |path: &std::path::Path| {
        let mut head = [0; 4096];
        fs::File::open(path).unwrap().read_exact_at(&mut head, 0).unwrap();
        head
    };
    let theirs = head(&path);
    stage.cluster.start().unwrap();
    assert!(head(&path.with_extension("aside")) == theirs, "kept as it was");
    let log = stage.cluster.log();
    assert!(log.contains("set aside") && log.contains("another version"), "{log}");
    // What is not known cannot go on, and says so; what is new is served.
    staying.wait_for(SOON, |told| told.ended.len() == 1).unwrap();
    assert_eq!(staying.stop().ended[0].how, Failure::Reset);
    assert_unharmed(&start_long(&stage, 4).stop(), "new connections");
}

#[test]
fn a_start_tells_nothing_of_endpoints_that_had_no_flows() {
    if !can_run_in_namespaces("the log of a start") {
        return;
    }
    let mut stage = Stage::new([1, 2, 3], "").unwrap();
    stage.change(&[ready(1).terminating(), ready(2), ready(3)]).unwrap();
    stage.change(&[ready(1).terminating(), ready(2)]).unwrap();
    for _ in 0..2 {
        stage.cluster.stop(Signal::SIGKILL).unwrap();
        let before = stage.cluster.log().len();
        stage.cluster.start().unwrap();
        thread::sleep(Duration::from_millis(400));
        let log = stage.cluster.log().split_off(before);
        assert!(!log.contains("endpoint"), "{log}");
    }
    assert!(!stage.cluster.log().contains("drained"), "{}", stage.cluster.log());
}

/// Nobody runs while an address changes hands: the next process ends what was for the one before.
#[test]
fn an_address_that_changes_hands_while_the_daemon_is_down_inherits_nothing() {
    if !can_run_in_namespaces("an address that is used again while nobody sees it") {
        return;
    }
    // Clients of Pod 1 are established or draining when the daemon is killed, of Pod 2 established. Pod 3 stays.
    for drains in [false, true] {
        let mut stage = Stage::new([1, 2, 3], "").unwrap();
        let staying = start_long(&stage, 24);
        let by = staying.so_far().by;
        let of = |number: u64| by.iter().filter(|by| **by == number).count();
        assert!(of(1) > 0 && of(2) > 0 && of(3) > 0, "{by:?}");
        if drains {
            stage.change(&[ready(2), ready(3)]).unwrap();
            assert_eq!(stage.endpoint(1).unwrap().unwrap()["state"], "draining");
        }
        stage.cluster.stop(Signal::SIGKILL).unwrap();
        // What the Pods' clients send meanwhile waits, or is sent again, and must not be for who comes now.
        for number in [1, 2] {
            stage.remove(number).unwrap();
            stage.add(number).unwrap();
        }
        stage.publish(&[ready(1).with_uid("other-1"), ready(2).with_uid("other-2"), ready(3)]).unwrap();
        stage.cluster.start().unwrap();
        let lost = of(1) + of(2);
        staying.wait_for(SOON, |told| told.ended.len() == lost).unwrap();
        let told = staying.stop();
        // Where the kernel carries connections, it brings a Pod's own farewell too.
        let is_over = |how| matches!(how, Failure::Reset | Failure::Closed);
        assert!(told.ended.iter().all(|end| end.by != 3 && is_over(end.how)), "{:?}", told.ended);
        assert_eq!((&told.failed[..], told.wrong), (&[][..], 0));
        let heard = |number: u8| {
            let Talker { pod, listener } = &stage.talkers[&number];
            (segments(&pod.ns).unwrap(), listener.received())
        };
        // The daemon tells the endpoint's end too, which is the one thing that comes: a RST for each.
        for (number, resets) in [(1, of(1)), (2, of(2))] {
            let (segments, bytes) = heard(number);
            assert!(segments <= resets as u64 && bytes == 0, "{segments} segments, {bytes} bytes, {resets} resets");
        }
        let opening = Talk::start(&stage.client.ns, short(&stage, 4)).unwrap();
        opening.wait_for(SOON, |told| told.by.contains(&1) && told.by.contains(&2)).unwrap();
        assert_unharmed(&opening.stop(), "new connections to the new Pods");
        println!(
            "Pods replaced while the daemon was down (draining: {drains}): {lost} connections reset, 0 bytes to the new ones"
        );
    }
}
