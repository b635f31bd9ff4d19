//! Random flows in random worlds: the routing table against the rules said a second time, and packets against both.
//!
//! `SLUICE_FUZZ_FLOWS` says how many flows, `SLUICE_FUZZ_SEED` which ones.

mod lives;
mod packets;
mod shrink;
mod worlds;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use serde_json::{Value, json};
use sluice_control::problem::Origin;
use sluice_control::publish::Publisher;
use sluice_control::source::{Change, Update, manifest};
use sluice_control::trace::{Question, trace};
use sluice_dataplane::table::{RoutingTable, Slots};
use sluice_tests::naive::{Answer, Flow, Naive, World};

const FLOWS_IN_A_WORLD: u64 = 50;
/// One world in so many has its flows sent as packets too.
const PACKETS_IN: u64 = 5;

#[test]
fn random_flows_agree() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let flows: u64 = number("SLUICE_FUZZ_FLOWS").unwrap_or(100_000);
    let seed: u64 = number("SLUICE_FUZZ_SEED").unwrap_or(1);
    let (begun, worlds, next) = (Instant::now(), flows.div_ceil(FLOWS_IN_A_WORLD), AtomicU64::new(0));
    let run = || {
        let mut seen = BTreeMap::new();
        loop {
            let index = next.fetch_add(1, Relaxed);
            if index >= worlds {
                return seen;
            }
            let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index);
            world_agrees(seed, index.is_multiple_of(PACKETS_IN), &mut seen);
        }
    };
    let seen: Vec<BTreeMap<String, u64>> = std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let mut total = BTreeMap::<String, u64>::new();
    seen.into_iter().flatten().for_each(|(what, count)| *total.entry(what).or_default() += count);
    // Not by println: the test harness would keep it to itself.
    writeln!(std::io::stdout(), "{worlds} worlds from seed {seed}, {:?}: {total:?}", begun.elapsed()).unwrap();
    for what in ["drop", "forward", "forward, masqueraded", "pass", "reject"] {
        let count = total.get(what).copied().unwrap_or(0);
        assert!(count > flows / 20, "only {count} of {flows} flows end in {what}: the generator misses its aim");
    }
}

/// The rules that are said a second time are the rules: they pass the conformance cases.
#[test]
fn the_naive_rules_pass_the_cases() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let given = std::env::var_os("SLUICE_CASES").map(PathBuf::from);
    let folders = [here.join("tests/cases"), here.join("../../shared/cases")].into_iter().chain(given);
    let (mut passed, mut failures) = (0, Vec::new());
    for folder in folders.filter(|folder| folder.is_dir()) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(".json") && !name.starts_with("dns") {
                let file: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
                for case in file["cases"].as_array().unwrap() {
                    passed += case_passes(case, &mut failures);
                }
            }
        }
    }
    writeln!(std::io::stdout(), "naive rules: {passed} flows of the cases passed, {} failed", failures.len()).unwrap();
    assert!(failures.is_empty() && passed > 100, "{passed} passed\n{}", failures.join("\n"));
}

fn case_passes(case: &Value, failures: &mut Vec<String>) -> u64 {
    // What controllers fill in is not said a second time.
    if case["config"]["localControllers"] != false {
        return 0;
    }
    let world = World { config: case["config"].clone(), objects: array(&case["objects"]) };
    let (naive, mut passed) = (Naive::new(&world), 0);
    for value in array(&case["flows"]) {
        let text = |field: &str| value[field].as_str().unwrap_or_default().to_owned();
        let question = Question { from: text("from"), to: text("to"), proto: text("proto") }
            .flow()
            .expect("a case asks about a flow");
        let flow = Flow { client: question.client, to: question.destination, protocol: question.protocol.name() };
        let (answer, expect) = (naive.decide(&flow), &value["expect"]);
        let same = answer.outcome == expect["outcome"]
            && (answer.outcome != "forward"
                || (expect["endpoints"] == json!(answer.endpoints) && expect["masquerade"] == answer.masquerade));
        match same {
            true => passed += 1,
            false => failures.push(format!("{}: {flow:?}: expected {expect}, got {answer:?}", case["name"])),
        }
    }
    passed
}

fn array(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn world_agrees(seed: u64, with_packets: bool, seen: &mut BTreeMap<String, u64>) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let world = worlds::world(&mut rng);
    let naive = Naive::new(&world);
    let mut path = with_packets.then(packets::Path::new);
    let slots = path.as_ref().map_or_else(|| Arc::new(Slots::new(1)), |path| Arc::clone(&path.shared().slots));
    let table = table(&world, slots).unwrap_or_else(|| panic!("seed {seed} makes unreadable objects: {world:#?}"));
    if let Some(path) = &path {
        path.publish(Arc::clone(&table));
    }
    for _ in 0..FLOWS_IN_A_WORLD {
        let flow = worlds::flow(&mut rng, &world);
        let answer = naive.decide(&flow);
        if answer != traced(&table, &flow) {
            panic!("{}", disagreement(seed, world, &flow));
        }
        if let Some(difference) = path.as_mut().and_then(|path| path.open(&flow, &answer).err()) {
            panic!("seed {seed}: {flow:?} should be {answer:?}, but the packet was {difference}\n{}", shown(&world));
        }
        let masqueraded = if answer.masquerade { ", masqueraded" } else { "" };
        *seen.entry(format!("{}{masqueraded}", answer.outcome)).or_default() += 1;
        if path.is_some() {
            *seen.entry("by packet too".to_owned()).or_default() += 1;
        }
    }
}

/// The table of a world; none when its objects cannot be read.
fn table(world: &World, slots: Arc<Slots>) -> Option<Arc<RoutingTable>> {
    let config = serde_json::from_value(world.config.clone()).ok()?;
    let text: String = world.objects.iter().map(Value::to_string).collect();
    let manifest = manifest::parse(&text);
    if !manifest.problems.is_empty() {
        return None;
    }
    let origin = Origin::File { path: Path::new("world.json").into(), document: 1 };
    let changes = manifest.objects.into_iter().map(|(object, _)| Change::Apply(object, origin.clone())).collect();
    let mut publisher = Publisher::new(config, Vec::new(), slots);
    publisher.update(Update { changes, ..Update::default() });
    Some(publisher.table())
}

fn traced(table: &RoutingTable, flow: &Flow) -> Answer {
    let protocol = flow.protocol.parse().expect("a protocol");
    let flow = sluice_dataplane::decide::NewFlow { client: flow.client, destination: flow.to, protocol };
    let traced = trace(table, &flow);
    let outcome = match traced.outcome {
        sluice_dataplane::decide::Outcome::Forward => "forward",
        sluice_dataplane::decide::Outcome::Reject => "reject",
        sluice_dataplane::decide::Outcome::Drop => "drop",
        sluice_dataplane::decide::Outcome::Pass => "pass",
    };
    Answer { outcome, endpoints: traced.endpoints, masquerade: traced.masquerade }
}

/// The smallest world in which the answers differ, with both.
fn disagreement(seed: u64, world: World, flow: &Flow) -> String {
    let answers = |world: &World| {
        let table = table(world, Arc::new(Slots::new(1)))?;
        Some((Naive::new(world).decide(flow), traced(&table, flow)))
    };
    let world = shrink::shrink(world, |world| answers(world).is_some_and(|(naive, real)| naive != real));
    let (naive, real) = answers(&world).expect("it is readable, or it would not be the smallest");
    format!("seed {seed}: {flow:?}\n{}\nby the rules: {naive:?}\nby the table: {real:?}", shown(&world))
}

fn shown(world: &World) -> String {
    let mut text = world.config.to_string();
    world.objects.iter().for_each(|object| write!(text, "\n{object}").expect("a String takes all"));
    text
}
