//! Random lives of endpoints in random worlds under live connections: none moves, none goes on to another Pod, none begins
//! where the rules forbid it.
//!
//! 1,000 sequences; ten times as many with `SLUICE_BIG=1`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use fastrand::Rng;
use serde_json::{Value, json};
use sluice_control::problem::Origin;
use sluice_control::publish::Publisher;
use sluice_control::source::{Change, Update, manifest};
use sluice_dataplane::packet_path::Keeper;
use sluice_tests::naive::{Naive, World};

use super::packets::{self, Sent};
use super::worlds;

const STEPS: usize = 40;
/// `drain.timeout` where nobody says otherwise.
const DRAIN_MS: u64 = 600_000;

/// Where the Pod that has an address is in its life, as written in the documents.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Life {
    Present {
        terminating: bool,
    },
    /// Until then; not known before the keeper has come round.
    Left(Option<u64>),
    Gone,
}

/// A Pod: its address, its number among those that had it, its life.
type Pods = BTreeMap<(IpAddr, u64), Life>;

struct Sequence {
    rng: Rng,
    world: World,
    publisher: Publisher,
    path: packets::Path,
    keeper: Keeper,
    pods: Pods,
    /// The last Pod of each address.
    last: BTreeMap<IpAddr, u64>,
    /// Entries of slices that were taken out: slice, entry.
    out: Vec<(usize, Value)>,
    flows: Vec<(Sent, u64)>,
    tally: BTreeMap<&'static str, u64>,
}

#[test]
fn live_flows_stay_where_they_are_or_end() {
    let sequences = if std::env::var_os("SLUICE_BIG").is_some() { 10_000 } else { 1_000 };
    let (total, next) = (Mutex::new(BTreeMap::<&str, u64>::new()), AtomicU64::new(0));
    let run = || {
        loop {
            let seed = next.fetch_add(1, Relaxed);
            if seed >= sequences {
                return;
            }
            let run = || Sequence::new(seed).run();
            let tally = std::panic::catch_unwind(run).unwrap_or_else(|_| panic!("sequence {seed}"));
            let mut total = total.lock().unwrap();
            tally.into_iter().for_each(|(what, count)| *total.entry(what).or_default() += count);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(run))));
    let total = total.into_inner().unwrap();
    writeln!(std::io::stdout(), "{sequences} sequences of lives: {total:?}").unwrap();
    for what in ["opened", "spoken, there", "spoken, drains", "spoken, gone", "refused or dropped", "another Pod"] {
        assert!(total.get(what).is_some_and(|count| *count > sequences / 4), "{what}: {total:?}");
    }
}

/// The address of an entry, when it is a Pod's.
fn pod_of(entry: &Value) -> Option<IpAddr> {
    let text = entry["addresses"][0].as_str()?;
    let is_pod = text.starts_with("10.244.") || text.starts_with("fd00:24");
    text.parse().ok().filter(|_| is_pod)
}

fn entries(object: &mut Value) -> impl Iterator<Item = &mut Value> {
    object.get_mut("endpoints").and_then(Value::as_array_mut).into_iter().flatten()
}

fn conditions(rng: &mut Rng) -> (Value, bool) {
    let serving = rng.bool();
    match rng.u8(..6) {
        0..3 => (json!({"ready": true, "serving": true, "terminating": false}), false),
        3 => (json!({"ready": false, "serving": serving, "terminating": false}), false),
        _ => (json!({"ready": false, "serving": serving, "terminating": true}), true),
    }
}

impl Sequence {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut world = worlds::world(&mut rng);
        let mut pods = Pods::new();
        // All slices say the same of a Pod.
        let mut said = BTreeMap::new();
        for entry in world.objects.iter_mut().flat_map(entries) {
            let Some(ip) = pod_of(entry) else { continue };
            let (conditions, terminating) = said.entry(ip).or_insert_with(|| conditions(&mut rng));
            entry["conditions"] = conditions.clone();
            entry["targetRef"] = json!({"kind": "Pod", "uid": format!("{ip}#0")});
            pods.insert((ip, 0), Life::Present { terminating: *terminating });
        }
        let path = packets::Path::new();
        let config = serde_json::from_value(world.config.clone()).expect("a readable configuration");
        let publisher = Publisher::new(config, Vec::new(), path.shared().slots.clone());
        let last = pods.keys().copied().collect();
        let keeper = Keeper::new(path.shared().clone());
        let (out, flows, tally) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut sequence = Self { rng, world, publisher, path, keeper, pods, last, out, flows, tally };
        let update = sequence.update(0..sequence.world.objects.len());
        let table = sequence.publisher.first(update, std::iter::empty());
        sequence.path.publish(table);
        sequence
    }

    fn run(mut self) -> BTreeMap<&'static str, u64> {
        for _ in 0..STEPS {
            match self.rng.u8(..10) {
                0..3 => self.change(),
                3 => self.wait(),
                4..7 => self.open(),
                _ if !self.flows.is_empty() => {
                    let flow = self.rng.usize(..self.flows.len());
                    self.speak(flow);
                }
                _ => {}
            }
        }
        (0..self.flows.len()).rev().for_each(|flow| self.speak(flow));
        self.tally
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn update(&self, objects: impl IntoIterator<Item = usize>) -> Update {
        let text: String = objects.into_iter().map(|object| self.world.objects[object].to_string()).collect();
        let origin = Origin::File { path: Path::new("world.json").into(), document: 1 };
        let objects = manifest::parse(&text).objects.into_iter();
        let changes = objects.map(|(object, _)| Change::Apply(object, origin.clone())).collect();
        Update { changes, ..Update::default() }
    }

    /// Something happens to a Pod, and all slices say so at once.
    fn change(&mut self) {
        let Some((ip, number)) = self.rng.choice(self.last.iter()).map(|(ip, number)| (*ip, *number)) else { return };
        let life = self.pods[&(ip, number)];
        let (conditions, terminating) = conditions(&mut self.rng);
        let after_leaving = match life {
            Life::Present { terminating: true } => Life::Gone,
            Life::Present { terminating: false } => Life::Left(None),
            other => other,
        };
        let is_another = self.rng.u8(..3) == 0 || life == Life::Gone;
        let mut touched = BTreeSet::new();
        match life {
            Life::Present { .. } if self.rng.bool() && !is_another => {
                self.pods.insert((ip, number), after_leaving);
                self.count("left");
                for object in 0..self.world.objects.len() {
                    let Some(list) = self.world.objects[object]["endpoints"].as_array_mut() else { continue };
                    let (out, stay) = std::mem::take(list).into_iter().partition(|entry| pod_of(entry) == Some(ip));
                    *list = stay;
                    let out: Vec<Value> = out;
                    touched.extend((!out.is_empty()).then_some(object));
                    self.out.extend(out.into_iter().map(|entry| (object, entry)));
                }
            }
            _ => {
                let (back, out) = std::mem::take(&mut self.out).into_iter().partition(|(_, it)| pod_of(it) == Some(ip));
                self.out = out;
                let back: Vec<(usize, Value)> = back;
                for (object, entry) in back {
                    self.world.objects[object]["endpoints"].as_array_mut().expect("it had some").push(entry);
                }
                let number = number + u64::from(is_another);
                if is_another {
                    self.pods.insert((ip, number - 1), Life::Gone);
                    self.last.insert(ip, number);
                    self.count("another Pod");
                }
                self.pods.insert((ip, number), Life::Present { terminating });
                for (index, object) in self.world.objects.iter_mut().enumerate() {
                    for entry in entries(object).filter(|it| pod_of(it) == Some(ip)) {
                        entry["conditions"] = conditions.clone();
                        entry["targetRef"]["uid"] = json!(format!("{ip}#{number}"));
                        touched.insert(index);
                    }
                }
            }
        }
        let update = self.update(touched);
        if let Some(table) = self.publisher.update(update) {
            self.path.publish(table);
        }
    }

    fn wait(&mut self) {
        self.path.now_ms += self.rng.u64(..DRAIN_MS / 2);
        let now_ms = self.path.now_ms;
        while self.keeper.round(now_ms, &mut |_| {}) {}
        self.publisher.release_idle();
        for life in self.pods.values_mut() {
            *life = match *life {
                Life::Left(None) => Life::Left(Some(now_ms + DRAIN_MS)),
                Life::Left(Some(at)) if at <= now_ms => Life::Gone,
                other => other,
            };
        }
    }

    fn open(&mut self) {
        let naive = Naive::new(&self.world);
        // Most random flows are refused; those that are not are worth a look around.
        let mut found = None;
        for _ in 0..8 {
            let flow = worlds::flow(&mut self.rng, &self.world);
            let answer = naive.decide(&flow);
            let is_wanted = flow.protocol == "TCP" && answer.outcome == "forward";
            found = Some((flow, answer));
            if is_wanted {
                break;
            }
        }
        let Some((flow, answer)) = found else { return };
        match self.path.open(&flow, &answer) {
            Err(difference) => panic!("{flow:?} should be {answer:?}, but the packet was {difference}"),
            Ok(Some(sent)) if flow.protocol == "TCP" => {
                let answered = self.path.segment(sent.endpoint, sent.seen, true);
                assert_eq!(answered, Some((sent.to, sent.from)), "{sent:?}");
                let number = self.last.get(&sent.endpoint.ip()).copied().unwrap_or(0);
                self.flows.push((sent, number));
                self.count("opened");
                self.speak(self.flows.len() - 1);
            }
            Ok(Some(_)) => {}
            Ok(None) => self.count("refused or dropped"),
        }
    }

    fn speak(&mut self, flow: usize) {
        let (sent, number) = self.flows[flow];
        // What is no Pod's never changes here.
        let life = self.pods.get(&(sent.endpoint.ip(), number)).copied();
        let went = self.path.segment(sent.from, sent.to, false);
        if life == Some(Life::Gone) {
            assert_eq!(went, None, "a byte of a flow that is over was sent on: {sent:?}");
            self.flows.swap_remove(flow);
            return self.count("spoken, gone");
        }
        assert_eq!(went, Some((sent.seen, sent.endpoint)), "{sent:?} {life:?}");
        assert_eq!(self.path.segment(sent.endpoint, sent.seen, false), Some((sent.to, sent.from)), "{sent:?}");
        self.count(if matches!(life, Some(Life::Left(_))) { "spoken, drains" } else { "spoken, there" });
    }
}
