//! Random lives of random Services against a naive model: whether a flow goes on, and where, and where new ones may go.

use std::net::SocketAddr;

use super::super::Shared;
use super::harness::{FRONTEND, Path, is_reset, memory, segment, settings, socket, tcp};
use crate::flow::FlowFile;
use crate::net::Protocol;
use crate::table::{Condition, EndpointSpec, Uid};

const SEQUENCES: u64 = 1_000;
const STEPS: usize = 40;
/// The drain timeout of the harness.
const DRAIN_MS: u64 = 60_000;

/// One holder of an address, until it is gone.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Life {
    Present(Condition),
    /// Its deadline, once the clock was read.
    Left(Option<u64>),
    Gone,
}

struct Model {
    /// Every life there ever was, with its address and uid.
    lives: Vec<(SocketAddr, u64, Life)>,
    /// Client port and life of every connection.
    flows: Vec<(u16, usize)>,
    next_uid: u64,
}

impl Model {
    fn holder(&self, address: SocketAddr) -> Option<usize> {
        self.lives.iter().rposition(|(at, _, life)| *at == address && matches!(life, Life::Present(_)))
    }

    fn leave(&mut self, life: usize) {
        let state = &mut self.lives[life].2;
        *state = match *state {
            Life::Present(Condition::Terminating { .. }) => Life::Gone,
            Life::Present(_) => Life::Left(None),
            other => other,
        };
    }

    /// Somebody has the address: the same as ever, as long as it is not gone. Whoever had it before has it no more; nor has
    /// it who was away and cannot say who it is.
    fn arrive(&mut self, address: SocketAddr, uid: u64, condition: Condition) {
        for (at, who, life) in &mut self.lives {
            if *at == address && (*who != uid || !uid_of(uid).is_own()) && matches!(life, Life::Left(_)) {
                *life = Life::Gone;
            }
        }
        let known = self.lives.iter().position(|(at, who, life)| *at == address && *who == uid && *life != Life::Gone);
        match known {
            Some(life) => self.lives[life].2 = Life::Present(condition),
            None => self.lives.push((address, uid, Life::Present(condition))),
        }
    }

    fn keep(&mut self, now_ms: u64) {
        for (.., life) in &mut self.lives {
            *life = match *life {
                Life::Left(None) => Life::Left(Some(now_ms + DRAIN_MS)),
                Life::Left(Some(deadline)) if deadline <= now_ms => Life::Gone,
                other => other,
            };
        }
    }

    fn specs(&self) -> Vec<EndpointSpec> {
        let present = self.lives.iter().filter_map(|(address, uid, life)| match life {
            Life::Present(condition) => {
                Some(EndpointSpec { uid: uid_of(*uid), condition: *condition, ..EndpointSpec::ready(*address) })
            }
            Life::Left(_) | Life::Gone => None,
        });
        present.collect()
    }
}

/// One in three is known by its slice only.
fn uid_of(number: u64) -> Uid {
    if number.is_multiple_of(3) { Uid::of_slice(&number.to_string()) } else { Uid(number) }
}

fn condition(rng: &mut fastrand::Rng) -> Condition {
    match rng.u8(..6) {
        0..=2 => Condition::Ready,
        3 => Condition::NotReady { serving: rng.bool() },
        _ => Condition::Terminating { serving: rng.bool() },
    }
}

/// One change of the slices, as the model and as the packet path see it.
fn change(model: &mut Model, rng: &mut fastrand::Rng, addresses: &[SocketAddr]) {
    let address = addresses[rng.usize(..addresses.len())];
    let condition = condition(rng);
    match (model.holder(address), rng.u8(..4)) {
        (Some(life), 0) => model.leave(life),
        // Another Pod has the address from one moment to the next.
        (Some(life), 1) => {
            model.leave(life);
            model.next_uid += 1;
            model.arrive(address, model.next_uid, condition);
        }
        (Some(life), _) => model.lives[life].2 = Life::Present(condition),
        (None, 0) => {
            model.next_uid += 1;
            model.arrive(address, model.next_uid, condition);
        }
        // Whoever had it last is back.
        (None, _) => {
            let last = model.lives.iter().rev().find(|(at, ..)| *at == address).map(|(_, uid, _)| *uid);
            let uid = last.unwrap_or_else(|| {
                model.next_uid += 1;
                model.next_uid
            });
            model.arrive(address, uid, condition);
        }
    }
}

fn client(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 244, 0, 9], port))
}

fn open(model: &mut Model, path: &mut Path, port: u16) -> bool {
    let ready: Vec<usize> =
        (0..model.lives.len()).filter(|life| model.lives[*life].2 == Life::Present(Condition::Ready)).collect();
    let sent = path.send(tcp(client(port), socket(FRONTEND), "S"));
    if ready.is_empty() {
        assert!(sent.is_none_or(|(_, _, packet, _)| is_reset(&packet)), "nobody is ready");
        return false;
    }
    let (_, to, ..) = sent.expect("somebody is ready");
    let life = ready.into_iter().find(|life| model.lives[*life].0 == to);
    let life = life.unwrap_or_else(|| panic!("{to} is not ready: {:?}", model.lives));
    path.send(segment(to, client(port), "SA", 1_000, 1_001)).unwrap();
    path.send(segment(client(port), socket(FRONTEND), "A", 1_001, 1_001)).unwrap();
    model.flows.push((port, life));
    true
}

fn speak(model: &Model, path: &mut Path, flow: usize) {
    let (port, life) = model.flows[flow];
    let (address, _, state) = model.lives[life];
    let (_, to, packet, _) = path.send(segment(client(port), socket(FRONTEND), "A", 1_001, 1_001)).unwrap();
    if state == Life::Gone {
        assert!(is_reset(&packet), "a byte of a flow that is over went to {to}");
        assert_eq!(to, client(port));
        return;
    }
    assert_eq!(to, address, "a flow moved");
    assert!(!is_reset(&packet));
    let (from, to, packet, _) = path.send(segment(address, client(port), "A", 1_001, 1_001)).unwrap();
    assert_eq!((from, to), (socket(FRONTEND), client(port)));
    assert!(!is_reset(&packet));
}

/// What happened in a sequence, so that we know that it was worth it.
#[derive(Default)]
struct Tally {
    opened: usize,
    spoken: usize,
    spoken_to_gone: usize,
    restarts: usize,
}

fn sequence(seed: u64, tally: &mut Tally) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let directory = seed.is_multiple_of(4).then(memory);
    let file = directory.as_ref().map(|directory| FlowFile {
        path: directory.path().join("flows"),
        owner: Vec::new(),
        patience: Default::default(),
    });
    let start = || match &file {
        Some(file) => Path::over(Shared::open(settings(64), file).unwrap()),
        None => Path::new(64),
    };
    let mut path = start();
    let addresses: Vec<SocketAddr> =
        (1..=rng.u8(1..=4)).map(|host| SocketAddr::from(([10, 244, 1, host], 8080))).collect();
    let mut model = Model { lives: Vec::new(), flows: Vec::new(), next_uid: 0 };
    path.serve_all(Protocol::Tcp, Vec::new());
    for step in 0..STEPS {
        match rng.u8(..10) {
            0..=2 => {
                change(&mut model, &mut rng, &addresses);
                path.serve_all(Protocol::Tcp, model.specs());
            }
            3..=4 => {
                path.now_ms += rng.u64(..25_000);
                path.keep();
                model.keep(path.now_ms);
                path.builder.release_idle();
            }
            5 if file.is_some() => {
                let now_ms = path.now_ms;
                drop(path);
                if rng.bool() {
                    // Nobody was there to see it.
                    change(&mut model, &mut rng, &addresses);
                }
                path = start();
                path.now_ms = now_ms;
                path.serve_all(Protocol::Tcp, model.specs());
                path.builder.synced();
                tally.restarts += 1;
            }
            5..=6 => tally.opened += usize::from(open(&mut model, &mut path, 1_000 + step as u16)),
            _ if !model.flows.is_empty() => {
                let flow = rng.usize(..model.flows.len());
                speak(&model, &mut path, flow);
                tally.spoken += 1;
                tally.spoken_to_gone += usize::from(model.lives[model.flows[flow].1].2 == Life::Gone);
            }
            _ => {}
        }
    }
    (0..model.flows.len()).for_each(|flow| speak(&model, &mut path, flow));
}

#[test]
fn random_lives() {
    let mut tally = Tally::default();
    for seed in 0..SEQUENCES {
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| sequence(seed, &mut tally))).is_err() {
            panic!("sequence {seed}");
        }
    }
    assert!(tally.opened > 1_000 && tally.spoken > 5_000 && tally.spoken_to_gone > 500 && tally.restarts > 500);
}
