//! What the next process finds.

use std::fs::{self, OpenOptions};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::super::{Settings, Shared};
use super::harness::{CLIENT, FRONTEND, NODE, Path, is_reset, memory, segment, settings, socket, udp};
use crate::flow::{FlowFile, FlowFileError, Found, Recovery};
use crate::net::Protocol;
use crate::table::{Condition, EndpointSpec, Uid};

const PODS: [&str; 3] = ["10.244.1.1:8080", "10.244.1.2:8080", "10.244.1.3:8080"];
const OUTSIDE: &str = "8.8.8.8:999";

struct Place {
    file: FlowFile,
    _directory: tempfile::TempDir,
}

fn place() -> Place {
    let directory = memory();
    let file =
        FlowFile { path: directory.path().join("flows"), owner: b"boot, namespace".to_vec(), patience: Duration::ZERO };
    Place { file, _directory: directory }
}

impl Place {
    /// The next process, with no table yet.
    fn start(&self) -> Path {
        Path::over(Shared::open(settings(64), &self.file).unwrap())
    }

    fn aside(&self) -> PathBuf {
        self.file.path.with_extension("aside")
    }
}

fn pods(uids: &[u64]) -> Vec<EndpointSpec> {
    let named = PODS.iter().zip(uids).filter(|(_, uid)| **uid != 0);
    named.map(|(address, uid)| EndpointSpec { uid: Uid(*uid), ..EndpointSpec::ready(socket(address)) }).collect()
}

fn connect_all(path: &mut Path, ports: std::ops::RangeInclusive<u16>) {
    for port in ports {
        path.connect(&format!("10.244.0.9:{port}"), FRONTEND);
    }
}

/// Live flows by endpoint.
fn actives(path: &Path) -> Vec<(SocketAddr, u32)> {
    let endpoints = path.builder.endpoints();
    let mut all: Vec<_> =
        endpoints.map(|(name, slot)| (name.address, path.shared.slots.active(slot))).filter(|(_, n)| *n > 0).collect();
    all.sort();
    all
}

#[test]
fn flows_go_on_before_and_after_the_first_table() {
    let place = place();
    let mut path = place.start();
    assert_eq!(*path.shared.recovery(), Recovery::default());
    path.serve_all(Protocol::Tcp, pods(&[1, 2, 3]));
    let flows: Vec<_> = [CLIENT, "10.244.0.9:2", OUTSIDE].map(|from| (from, path.connect(from, FRONTEND))).into();
    let (before, now_ms) = (actives(&path), path.now_ms);
    drop(path);

    let mut path = place.start();
    path.now_ms = now_ms;
    assert_eq!(*path.shared.recovery(), Recovery { found: Found::Ours, took_over: false, flows: 3, dropped: 0 });
    for (from, (seen, pod)) in &flows {
        let (source, destination, ..) = path.tcp(from, FRONTEND, "A").unwrap();
        assert_eq!((source, destination), (*seen, *pod));
        let (source, destination, ..) = path.send(segment(*pod, *seen, "A", 5, 5)).unwrap();
        assert_eq!((source, destination), (socket(FRONTEND), socket(from)));
    }
    assert!(path.tcp("10.244.0.9:3", FRONTEND, "S").is_none(), "new ones wait");
    assert!(path.shared.drops().contains(&("no_table", 1)));
    // The same Pods in another order have their slots again.
    let mut specs = pods(&[1, 2, 3]);
    specs.reverse();
    path.serve_all(Protocol::Tcp, specs);
    path.builder.synced();
    assert_eq!(path.keep(), []);
    assert_eq!(actives(&path), before);
    assert_ne!(path.connect("8.8.8.8:1000", FRONTEND), flows[2].1, "a port that a flow has is not given away");
    for _ in 0..2 {
        path.builder.release_idle();
    }
    assert_eq!(actives(&path).iter().map(|(_, active)| active).sum::<u32>(), 4);
}

#[test]
fn what_happened_meanwhile_is_made_up_for() {
    // The second and third Pod were there, and which flows are left when they are not, or when another has the address.
    for (third, uids, resets) in [
        (Condition::Ready, [1, 2, 0], 0),
        (Condition::Ready, [1, 2, 4], 2),
        (Condition::Terminating { serving: true }, [1, 2, 0], 2),
        (Condition::Terminating { serving: true }, [1, 2, 4], 2),
    ] {
        let place = place();
        let mut path = place.start();
        path.serve_all(Protocol::Tcp, pods(&[0, 0, 3]));
        path.connect(CLIENT, FRONTEND);
        let mut specs = pods(&[1, 2, 3]);
        specs[2].condition = third;
        path.serve_all(Protocol::Tcp, specs);
        let now_ms = path.now_ms;
        drop(path);
        let mut path = place.start();
        path.now_ms = now_ms;
        path.serve_all(Protocol::Tcp, pods(&uids));
        path.builder.synced();
        assert_eq!(path.keep().len(), resets, "{third:?} {uids:?}");
        let first_pods_byte = path.tcp(CLIENT, FRONTEND, "A").unwrap();
        assert_eq!(is_reset(&first_pods_byte.2), resets > 0);
        path.now_ms += 60_001;
        assert_eq!(path.keep().len(), 2 - resets, "the drain timeout was known");
    }
}

/// Who had an address when the process ended, whether it had left by then, and who has it at the next start.
#[test]
fn an_address_that_changed_hands_meanwhile_inherits_nothing() {
    let (pod, other, slice) = (Uid::of("pod"), Uid::of("other"), Uid::of_slice("slice"));
    for (before, had_left, now, goes_on) in [
        (pod, false, Some(pod), true),
        (pod, true, Some(pod), true),
        (pod, true, None, true),
        (pod, false, Some(other), false),
        (pod, true, Some(other), false),
        (pod, false, Some(slice), false),
        (slice, false, Some(slice), true),
        (slice, true, Some(slice), false),
        (slice, false, Some(Uid::of_slice("another")), false),
        (slice, true, Some(pod), false),
        (Uid::default(), false, Some(Uid::default()), true),
        (Uid::default(), true, Some(Uid::default()), false),
    ] {
        let what = format!("{before:?} {had_left} {now:?}");
        let place = place();
        let mut path = place.start();
        let endpoint = |uid| EndpointSpec { uid, ..EndpointSpec::ready(socket(PODS[0])) };
        path.serve_all(Protocol::Tcp, vec![endpoint(before)]);
        path.connect(CLIENT, FRONTEND);
        if had_left {
            path.serve_all(Protocol::Tcp, pods(&[0, 2]));
            path.keep();
        }
        let now_ms = path.now_ms;
        drop(path);
        let mut path = place.start();
        path.now_ms = now_ms;
        path.serve_all(Protocol::Tcp, now.map(endpoint).into_iter().chain(pods(&[0, 2])).collect());
        path.builder.synced();
        let (_, to, packet, _) = path.tcp(CLIENT, FRONTEND, "A").unwrap();
        assert_eq!((to == socket(PODS[0]), is_reset(&packet)), (goes_on, !goes_on), "{what}");
        assert_eq!(path.keep().len(), if goes_on { 0 } else { 2 }, "{what}: both ends learn it");
    }
}

#[test]
fn deadlines_ejections_and_affinities_go_on() {
    let place = place();
    let mut path = place.start();
    path.affinity = Some(Duration::from_secs(3600));
    path.serve_all(Protocol::Tcp, pods(&[1, 2, 3]));
    path.keep();
    let sticky: Vec<SocketAddr> =
        (0..8u8).map(|client| path.connect(&format!("10.244.0.{client}:7"), FRONTEND).1).collect();
    let slot = path.builder.endpoints().find(|(name, _)| name.address == socket(PODS[2])).unwrap().1;
    (0..5).for_each(|_| path.shared.slots.open_failed(slot, 5, path.now_ms));
    path.serve_all(Protocol::Tcp, pods(&[1, 0, 3]));
    path.keep();
    let now_ms = path.now_ms + 20_000;
    drop(path);

    let mut path = place.start();
    path.now_ms = now_ms;
    path.affinity = Some(Duration::from_secs(3600));
    path.serve_all(Protocol::Tcp, pods(&[1, 0, 3]));
    path.builder.synced();
    assert_eq!(path.shared.slots.ejected_until(slot), Some(now_ms + 10_000));
    for (client, pod) in sticky.iter().enumerate().filter(|(_, pod)| **pod != socket(PODS[1])) {
        assert_eq!(path.connect(&format!("10.244.0.{client}:8"), FRONTEND).1, *pod);
    }
    let of_second = sticky.iter().filter(|pod| **pod == socket(PODS[1])).count();
    path.now_ms = now_ms + 39_999;
    assert_eq!(path.keep().len(), 0);
    path.now_ms = now_ms + 40_000;
    assert_eq!(path.keep().len(), 2 * of_second);
    assert!(of_second > 0, "the seed gives each some");
}

#[test]
fn an_old_masquerade_address_stays_for_old_flows() {
    let place = place();
    let mut path = place.start();
    path.serve_all(Protocol::Tcp, pods(&[1, 0, 0]));
    let (seen, _) = path.connect(OUTSIDE, FRONTEND);
    drop(path);
    let moved = Settings { masquerade_addresses: vec!["192.168.0.77".parse::<IpAddr>().unwrap()], ..settings(64) };
    let mut path = Path::over(Shared::open(moved, &place.file).unwrap());
    path.serve_all(Protocol::Tcp, pods(&[1, 0, 0]));
    assert_eq!(path.tcp(OUTSIDE, FRONTEND, "A").unwrap().0, seen);
    assert_eq!(seen.ip().to_string(), NODE);
    assert_eq!(path.connect("8.8.8.8:1000", FRONTEND).0.ip().to_string(), "192.168.0.77");
}

#[test]
fn the_table_may_grow_between_processes_and_never_shrinks_below_its_flows() {
    let place = place();
    let mut path = place.start();
    path.serve_all(Protocol::Tcp, pods(&[1, 0, 0]));
    connect_all(&mut path, 1..=10);
    drop(path);
    for (wanted, capacity) in [(1_000, 1_000), (5, 10)] {
        let shared = Shared::open(settings(wanted), &place.file).unwrap();
        assert_eq!((shared.flow_capacity(), shared.flow_count()), (capacity, 10));
    }
}

#[test]
fn what_is_not_whole_is_dropped_and_counted() {
    let place = place();
    let mut path = place.start();
    path.serve_all(Protocol::Tcp, pods(&[1, 0, 0]));
    connect_all(&mut path, 1..=20);
    drop(path);
    let file = OpenOptions::new().read(true).write(true).open(&place.file.path).unwrap();
    let records = file.metadata().unwrap().len() - 64 * 112;
    // A byte of what never changes in each of ten records: addresses, ports, slots, kind.
    for (record, at) in (0..10).zip([1, 8, 20, 30, 40, 55, 60, 64, 70, 74]) {
        let (mut byte, at) = ([0], records + record * 112 + at);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }
    let mut path = place.start();
    assert_eq!(*path.shared.recovery(), Recovery { found: Found::Ours, took_over: false, flows: 10, dropped: 10 });
    path.serve_all(Protocol::Tcp, pods(&[1, 0, 0]));
    connect_all(&mut path, 21..=74);
    assert_eq!(path.shared.flow_count(), 64, "their records are free");
}

/// Whatever bytes are in the records and the directory: no panic, no flow that was not there.
#[test]
fn garbage_in_the_file_makes_no_flows() {
    let (place, mut rng) = (place(), fastrand::Rng::with_seed(5));
    drop(place.start());
    let file = OpenOptions::new().read(true).write(true).open(&place.file.path).unwrap();
    let length = file.metadata().unwrap().len();
    let mut noise = vec![0; 64 * 112];
    for _ in 0..50 {
        rng.fill(&mut noise);
        file.write_all_at(&noise, length - 64 * 112).unwrap();
        file.write_all_at(&64u32.to_le_bytes(), 48).unwrap();
        let shared = Shared::open(settings(64), &place.file).unwrap();
        assert_eq!((&shared.recovery().found, shared.flow_count()), (&Found::Ours, 0));
    }
}

#[test]
fn a_file_that_is_not_ours_is_set_aside() {
    type Spoil = fn(&mut Place);
    let cases: [(&str, Spoil); 4] = [
        ("it has another version", |place| overwrite(place, 8, &[9])),
        ("it belongs to another boot or network namespace", |place| place.file.owner = b"another".to_vec()),
        ("it is no flow file", |place| overwrite(place, 0, b"garbage!")),
        ("it contradicts itself", |place| {
            OpenOptions::new().write(true).open(&place.file.path).unwrap().set_len(1 << 20).unwrap();
        }),
    ];
    for (reason, spoil) in cases {
        let mut place = place();
        let mut path = place.start();
        path.serve_all(Protocol::Tcp, pods(&[1, 0, 0]));
        path.connect(CLIENT, FRONTEND);
        drop(path);
        spoil(&mut place);
        let path = place.start();
        let found = Found::Unusable { reason, kept: place.aside() };
        assert_eq!(*path.shared.recovery(), Recovery { found, ..Recovery::default() });
        assert_eq!(path.shared.flow_count(), 0);
        assert!(fs::exists(place.aside()).unwrap());
        drop(path);
        assert_eq!(place.start().shared.recovery().found, Found::Ours, "the new one is good");
    }
}

fn overwrite(place: &Place, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(&place.file.path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

#[test]
fn a_second_process_takes_over_and_the_first_writes_no_more() {
    let mut place = place();
    let mut old = place.start();
    old.serve_all(Protocol::Tcp, pods(&[1, 0, 0]));
    let (seen, pod) = old.connect(CLIENT, FRONTEND);
    place.file.patience = Duration::from_secs(20);
    let mut new = std::thread::scope(|scope| {
        let opening = scope.spawn(|| Shared::open(settings(64), &place.file).unwrap());
        while !old.shared.is_superseded() {
            std::thread::yield_now();
        }
        old.shared.release();
        Path::over(opening.join().unwrap())
    });
    assert!(new.shared.recovery().took_over);
    assert_eq!(new.tcp(CLIENT, FRONTEND, "A").unwrap().1, pod);
    new.serve_all(Protocol::Tcp, pods(&[1, 0, 0]));
    new.builder.synced();
    assert!(!new.shared.is_superseded());
    // The old one's control side does not know yet.
    old.serve_all(
        Protocol::Tcp,
        vec![EndpointSpec { condition: Condition::Terminating { serving: true }, ..pods(&[1])[0] }],
    );
    old.serve_all(Protocol::Tcp, pods(&[9, 9, 9]));
    for _ in 0..3 {
        old.builder.release_idle();
        old.keep();
    }
    assert_eq!(new.keep(), []);
    assert_eq!(new.send(segment(pod, seen, "A", 5, 5)).unwrap().1, socket(CLIENT));
    assert_eq!(new.connect("10.244.0.9:2", FRONTEND).1, pod);
}

#[test]
fn who_does_not_let_go_keeps_it() {
    let place = place();
    let path = place.start();
    assert!(matches!(Shared::open(settings(64), &place.file), Err(FlowFileError::Held { .. })));
    assert!(path.shared.is_superseded(), "it was asked");
}

#[test]
fn the_file_of_another_namespace_is_refused_while_it_is_used() {
    let mut place = place();
    let path = place.start();
    place.file.owner = b"another".to_vec();
    let refused = Shared::open(settings(64), &place.file);
    assert!(matches!(refused, Err(FlowFileError::OfAnother { .. })));
    assert!(!path.shared.is_superseded());
    assert!(Arc::strong_count(&path.shared) > 0);
}

#[test]
fn flows_of_a_service_that_is_gone_go_on_while_they_drain() {
    let place = place();
    let mut path = place.start();
    path.serve_all(Protocol::Tcp, pods(&[1, 0, 0]));
    let (_, pod) = path.connect(CLIENT, FRONTEND);
    let name = path.builder.services().next().unwrap().name.clone();
    let port = path.builder.port_slot(&name, "", Protocol::Tcp);
    path.builder.remove(&name);
    (0..3).for_each(|_| path.builder.release_idle());
    assert_eq!(path.builder.port_slot(&name, "", Protocol::Tcp), port, "its flows count there");
    let now_ms = path.now_ms;
    drop(path);
    for _ in 0..2 {
        let mut path = place.start();
        path.now_ms = now_ms;
        path.builder.synced();
        (0..3).for_each(|_| path.builder.release_idle());
        assert_eq!(path.keep(), []);
        assert_eq!(path.tcp(CLIENT, FRONTEND, "A").unwrap().1, pod);
    }
}

#[test]
fn datagrams_go_on_too() {
    let place = place();
    let mut path = place.start();
    path.serve_all(Protocol::Udp, pods(&[1, 2, 3]));
    let pod = path.send(udp(CLIENT, FRONTEND)).unwrap().1;
    drop(path);
    let mut path = place.start();
    assert_eq!(path.send(udp(CLIENT, FRONTEND)).unwrap().1, pod);
    path.serve_all(Protocol::Udp, pods(&[1, 2, 3]));
    assert_eq!(path.send(udp(CLIENT, FRONTEND)).unwrap().1, pod);
}
