//! The zone and the wire, without sockets. What each name answers is shown by the conformance cases.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};

use super::*;
use crate::table::ServiceName;

/// A zone as the configuration makes it where it says nothing else.
pub(crate) fn spec() -> ZoneSpec {
    ZoneSpec {
        zones: vec!["cluster.local".to_owned()],
        ttl: Duration::from_secs(5),
        pods: PodNames::Insecure,
        namespaces: Vec::new(),
        ignore_empty_service: false,
        fall_through: Vec::new(),
        listen: vec!["169.254.20.10".parse().unwrap()],
    }
}

fn headless(name: &str, endpoints: u8) -> NamedService {
    let ports: Arc<[NamedPort]> =
        vec![NamedPort { name: "http".into(), protocol: "tcp".into(), number: Some(80) }].into();
    let endpoint = |number| NamedEndpoint {
        label: format!("{name}-{number}").into(),
        address: [10, 0, 0, number].into(),
        ports: Arc::clone(&ports),
    };
    let (stands, endpoints) = (Stands::Endpoints { instead: Vec::new() }, (1..=endpoints).map(endpoint).collect());
    NamedService { name: ServiceName::new("ns", name), stands, endpoints }
}

fn zone(services: &[NamedService]) -> Arc<Zone> {
    let mut builder = ZoneBuilder::new(spec());
    services.iter().cloned().for_each(|service| builder.set(service));
    builder.synced();
    builder.build(1).unwrap()
}

fn question(name: &str, kind: RecordType) -> Question {
    Question { name: Name::from_ascii(name).unwrap(), kind }
}

fn answer(zone: &Zone, name: &str, kind: RecordType) -> Answer {
    match zone.resolve(&question(name, kind), &mut Rng::with_seed(1)) {
        Resolution::Answer(answer) | Resolution::Complete { otherwise: answer, .. } => answer,
        Resolution::Forward => Answer { code: ResponseCode::Refused, ..Answer::default() },
    }
}

fn message(name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(size) = edns {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        message.set_edns(edns);
    }
    message.to_vec().unwrap()
}

fn ask(zone: &Zone, bytes: &[u8], by: Transport) -> (Message, usize) {
    let request = read(bytes).unwrap();
    let Resolution::Answer(answer) = zone.resolve(&request.question, &mut Rng::with_seed(2)) else {
        panic!("the zone answers");
    };
    let mut out = Vec::new();
    encode(&request, &answer, by, false, &mut out);
    (Message::from_vec(&out).unwrap(), out.len())
}

#[test]
fn before_the_first_sync_what_is_missing_is_not_denied() {
    let mut builder = ZoneBuilder::new(spec());
    builder.set(headless("db", 1));
    let early = builder.build(1).unwrap();
    assert_eq!(answer(&early, "db.ns.svc.cluster.local.", RecordType::A).answers.len(), 1);
    let missing = answer(&early, "other.ns.svc.cluster.local.", RecordType::A);
    assert_eq!((missing.code, missing.authority.len()), (ResponseCode::ServFail, 1));
    builder.synced();
    let later = builder.build(2).unwrap();
    assert_eq!(answer(&later, "other.ns.svc.cluster.local.", RecordType::A).code, ResponseCode::NXDomain);
}

#[test]
fn only_what_differs_makes_another_zone() {
    let mut builder = ZoneBuilder::new(spec());
    builder.set(headless("db", 2));
    assert_eq!(builder.build(1).unwrap().serial(), 1);
    builder.set(headless("db", 2));
    builder.set_namespace("ns", true);
    assert!(builder.build(2).is_none(), "nothing has changed");
    builder.set(headless("db", 1));
    assert_eq!(builder.build(3).unwrap().serial(), 3);
    builder.remove(&ServiceName::new("ns", "db"));
    let zone = builder.build(4).unwrap();
    let apex = |zone: &Zone| answer(zone, "ns.svc.cluster.local.", RecordType::A).code;
    assert_eq!((zone.len(), apex(&zone)), (0, ResponseCode::NoError), "the namespace is declared");
    builder.set_namespace("ns", false);
    builder.synced();
    assert_eq!(apex(&builder.build(5).unwrap()), ResponseCode::NXDomain);
}

#[test]
fn reverse_names_go_with_their_endpoints() {
    let mut builder = ZoneBuilder::new(spec());
    builder.set(headless("db", 2));
    builder.set(headless("copy", 1));
    let names = |zone: &Zone| {
        let answer = answer(zone, "1.0.0.10.in-addr.arpa.", RecordType::PTR);
        let mut names: Vec<String> = answer.answers.iter().map(|record| record.data.to_string()).collect();
        names.sort();
        names
    };
    let both = ["copy-1.copy.ns.svc.cluster.local.", "db-1.db.ns.svc.cluster.local."];
    assert_eq!(names(&builder.build(1).unwrap()), both);
    builder.remove(&ServiceName::new("ns", "copy"));
    assert_eq!(names(&builder.build(2).unwrap()), both[1..]);
    builder.set(headless("db", 0));
    let none = builder.build(3).unwrap();
    assert_eq!(answer(&none, "1.0.0.10.in-addr.arpa.", RecordType::PTR).code, ResponseCode::Refused, "not ours");
}

#[test]
fn every_order_is_as_likely_as_any_other() {
    let zone = zone(&[headless("db", 4)]);
    let mut rng = Rng::with_seed(3);
    let mut first = [[0_u32; 4]; 4];
    for _ in 0..40_000 {
        let Resolution::Answer(answer) = zone.resolve(&question("db.ns.svc.cluster.local.", RecordType::A), &mut rng)
        else {
            panic!("the zone answers");
        };
        for (place, record) in answer.answers.iter().enumerate() {
            let RData::A(address) = &record.data else { panic!("addresses only") };
            first[place][usize::from(address.0.octets()[3]) - 1] += 1;
        }
    }
    // 10,000 expected; the standard deviation is 87.
    assert!(first.iter().flatten().all(|count| (9_500..10_500).contains(count)), "{first:?}");
}

#[test]
fn what_does_not_fit_a_datagram_is_asked_for_again_over_a_connection() {
    let zone = zone(&[headless("db", 200)]);
    let name = "db.ns.svc.cluster.local.";
    for (edns, limit) in [(None, 512), (Some(100), 512), (Some(800), 800), (Some(4096), 1232)] {
        let (answer, size) = ask(&zone, &message(name, RecordType::A, edns), Transport::Udp);
        assert!(answer.truncation && size <= limit && size > limit - 32, "{edns:?}: {size}");
        assert_eq!(answer.edns.is_some(), edns.is_some());
    }
    let (answer, size) = ask(&zone, &message(name, RecordType::A, None), Transport::Tcp);
    assert_eq!((answer.truncation, answer.answers.len()), (false, 200));
    assert_eq!(size, 12 + name.len() + 1 + 4 + 200 * 16, "the owner is written once");
    // Additional records may be missing without a word, the answer's own may not.
    let (answer, _) = ask(&zone, &message("db-1.db.ns.svc.cluster.local.", RecordType::SRV, None), Transport::Udp);
    assert_eq!((answer.truncation, answer.answers.len(), answer.additionals.len()), (false, 1, 1));
    let (answer, size) = ask(&zone, &message(name, RecordType::SRV, None), Transport::Udp);
    assert!(answer.truncation && size <= 512 && answer.additionals.is_empty());
    let (answer, _) = ask(&zone, &message(name, RecordType::SRV, None), Transport::Tcp);
    assert_eq!((answer.answers.len(), answer.additionals.len()), (200, 200));
}

#[test]
fn letters_are_echoed() {
    let zone = zone(&[headless("db", 1)]);
    let (answer, _) = ask(&zone, &message("DB.nS.sVc.CLUSTER.locaL.", RecordType::SRV, None), Transport::Tcp);
    assert_eq!(answer.queries[0].name().to_string(), "DB.nS.sVc.CLUSTER.locaL.");
    assert_eq!(answer.answers[0].name.to_string(), "DB.nS.sVc.CLUSTER.locaL.");
    assert!(answer.answers[0].data.to_string().ends_with(" db-1.db.ns.svc.CLUSTER.locaL."), "{}", answer.answers[0]);
}

#[test]
fn what_is_no_question_is_refused_shortly_or_not_at_all() {
    let code = |bytes: &[u8]| match read(bytes) {
        Ok(_) => panic!("it is refused"),
        Err(Refusal::Silence) => None,
        Err(Refusal::Answer(answer, code)) => {
            assert!(answer.len() <= bytes.len() + 11, "not larger than what was asked");
            assert_eq!(Message::from_vec(&answer).unwrap().response_code.low(), code.low());
            Some(code)
        }
    };
    let good = message("a.example.", RecordType::A, None);
    let changed = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    assert_eq!(code(&good[..11]), None, "no header");
    assert_eq!(code(&changed(2, 0x80)), None, "an answer");
    assert_eq!(code(&changed(2, 0x28)), Some(ResponseCode::NotImp), "an update");
    assert_eq!(code(&changed(5, 0)), Some(ResponseCode::ServFail), "no question");
    assert_eq!(code(&changed(5, 2)), Some(ResponseCode::FormErr), "two questions");
    assert_eq!(code(&changed(12, 0xc0)), Some(ResponseCode::FormErr), "a compressed name");
    assert_eq!(code(&changed(11, 1)), Some(ResponseCode::FormErr), "a record is missing");
    let mut chaos = Message::new(7, MessageType::Query, OpCode::Query);
    let mut query = Query::query(Name::from_ascii("version.bind.").unwrap(), RecordType::TXT);
    query.set_query_class(DNSClass::CH);
    chaos.add_query(query);
    assert_eq!(code(&chaos.to_vec().unwrap()), Some(ResponseCode::Refused));
    let mut edns = message("a.example.", RecordType::A, Some(1232));
    let version = edns.len() - 5;
    edns[version] = 1;
    assert_eq!(code(&edns), Some(ResponseCode::BADVERS));
}

#[test]
fn transfers_are_refused() {
    let zone = zone(&[]);
    for kind in [RecordType::AXFR, RecordType::IXFR] {
        assert_eq!(answer(&zone, "cluster.local.", kind).code, ResponseCode::Refused);
    }
}

#[test]
fn aliases_that_lead_in_a_circle_or_too_far_are_none() {
    let alias = |name: &str, target: &str| NamedService {
        name: ServiceName::new("ns", name),
        stands: Stands::Name(target.to_owned()),
        endpoints: Vec::new(),
    };
    let long: Vec<NamedService> =
        (0..20).map(|n| alias(&format!("n{n}"), &format!("n{}.ns.svc.cluster.local", n + 1))).collect();
    let mut services = vec![
        alias("a", "b.ns.svc.cluster.local"),
        alias("b", "a.ns.svc.cluster.local"),
        alias("self", "self.ns.svc.cluster.local"),
        alias("below", "x.below.ns.svc.cluster.local"),
        alias("good", "db.ns.svc.cluster.local"),
        alias("out", "example.org"),
        headless("db", 1),
        alias("n20", "db.ns.svc.cluster.local"),
    ];
    services.extend(long);
    let zone = zone(&services);
    let count = |name: &str| answer(&zone, &format!("{name}.ns.svc.cluster.local."), RecordType::A).answers.len();
    for name in ["a", "b", "self", "below", "n0"] {
        assert_eq!(count(name), 0, "{name}");
    }
    assert_eq!((count("good"), count("n12")), (2, 10));
    let out = zone.resolve(&question("out.ns.svc.cluster.local.", RecordType::A), &mut Rng::with_seed(1));
    let Resolution::Complete { aliases, target, .. } = out else { panic!("{out:?}") };
    assert_eq!((aliases.len(), target.to_string()), (1, "example.org.".to_owned()));
}

#[test]
fn a_virtual_service_answers_its_own_address_and_its_pods_theirs() {
    let mut service = headless("db", 2);
    service.stands = Stands::Endpoints { instead: vec!["240.241.0.7".parse().unwrap()] };
    let zone = zone(&[service]);
    let texts = |name: &str, kind| -> Vec<String> {
        let answer = answer(&zone, name, kind);
        answer.answers.iter().map(|record| record.data.to_string()).collect()
    };
    assert_eq!(texts("db.ns.svc.cluster.local.", RecordType::A), ["240.241.0.7"]);
    assert_eq!(texts("db-2.db.ns.svc.cluster.local.", RecordType::A), ["10.0.0.2"]);
    assert_eq!(texts("_http._tcp.db.ns.svc.cluster.local.", RecordType::SRV).len(), 2);
}

/// What is answered quickly is what would be answered anyway, but for the order of addresses.
fn same_quickly(zone: &Zone, bytes: &[u8], rng: &mut Rng) -> bool {
    let by = if rng.bool() { Transport::Udp } else { Transport::Tcp };
    let (mut quick, mut slow) = (Vec::new(), Vec::new());
    if zone.quick(bytes, by, true, rng, &mut quick).is_none() {
        return false;
    }
    let request = read(bytes).unwrap();
    let Resolution::Answer(answer) = zone.resolve(&request.question, rng) else { panic!("{request:?}") };
    encode(&request, &answer, by, true, &mut slow);
    let parse = |bytes: &[u8]| {
        let mut message = Message::from_vec(bytes).unwrap();
        message.answers.sort_by_key(|record| record.data.to_string());
        message
    };
    assert_eq!((parse(&quick), quick.len()), (parse(&slow), slow.len()), "{request:?}");
    true
}

#[test]
fn quick_answers_are_the_same() {
    let mut virtual_one = headless("virtual", 2);
    virtual_one.stands =
        Stands::Endpoints { instead: vec!["240.241.0.7".parse().unwrap(), "fd00::7".parse().unwrap()] };
    let services = [headless("db", 8), headless("none", 0), virtual_one, headless("big", 255)];
    let mut rng = Rng::with_seed(5);
    let zones = [zone(&services), Arc::new(Zone::unknown(spec()))];
    for (name, is_quick) in [
        ("db.ns.svc.cluster.local.", true),
        ("DB.ns.SVC.Cluster.local.", true),
        ("virtual.ns.svc.cluster.local.", true),
        ("virtual-1.virtual.ns.svc.cluster.local.", true),
        ("_http._tcp.db.ns.svc.cluster.local.", true),
        ("none.ns.svc.cluster.local.", true),
        ("missing.ns.svc.Cluster.local.", true),
        ("a.b.c.d.e.f.cluster.local.", true),
        ("ns.svc.cluster.local.", true),
        ("cluster.local.", true),
        ("ns.dns.cluster.local.", false),
        ("10-0-0-1.ns.pod.cluster.local.", false),
        ("example.org.", false),
    ] {
        for kind in [RecordType::A, RecordType::AAAA] {
            for edns in [None, Some(512), Some(4096)] {
                let asked = message(name, kind, edns);
                assert_eq!(same_quickly(&zones[0], &asked, &mut rng), is_quick, "{name} {kind}");
                same_quickly(&zones[1], &asked, &mut rng);
            }
        }
        assert!(!same_quickly(&zones[0], &message(name, RecordType::SRV, None), &mut rng), "{name}");
    }
    let too_long = message("big.ns.svc.cluster.local.", RecordType::A, Some(4096));
    assert_eq!(zones[0].quick(&too_long, Transport::Udp, true, &mut rng, &mut Vec::new()), None);
}

/// Questions with a bit, a byte or a length changed, cut or grown: nothing panics, and no answer exceeds its bound.
fn fuzz(rounds: u64, seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let zone = zone(&[headless("db", 200), headless("small", 2)]);
    let names = [
        "db.ns.svc.cluster.local.",
        "_http._tcp.small.ns.svc.cluster.local.",
        "small-1.small.ns.svc.cluster.local.",
        "10-0-0-1.ns.pod.cluster.local.",
        "1.0.0.10.in-addr.arpa.",
        "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.",
        "cluster.local.",
        "a.b.c.d.e.f.g.",
    ];
    let kinds = [
        RecordType::A,
        RecordType::AAAA,
        RecordType::SRV,
        RecordType::PTR,
        RecordType::ANY,
        RecordType::NS,
        RecordType::SOA,
    ];
    let seeds: Vec<Vec<u8>> = names
        .iter()
        .flat_map(|name| kinds.iter().flat_map(move |kind| [None, Some(4096)].map(|edns| message(name, *kind, edns))))
        .collect();
    let (mut out, mut answered) = (Vec::new(), 0_u64);
    for _ in 0..rounds {
        let mut bytes = seeds[rng.usize(..seeds.len())].clone();
        for _ in 0..rng.usize(0..4) {
            let at = rng.usize(..bytes.len());
            match rng.u8(..6) {
                0 => bytes[at] ^= 1 << rng.u8(..8),
                1 => bytes[at] = rng.u8(..),
                2 => bytes.truncate(at.max(1)),
                3 => bytes.insert(at, rng.u8(..)),
                4 => drop(bytes.remove(at)),
                _ => bytes.extend((0..rng.usize(..40)).map(|_| rng.u8(..))),
            }
            if bytes.is_empty() {
                bytes.push(0);
            }
        }
        same_quickly(&zone, &bytes, &mut rng);
        match read(&bytes) {
            Ok(request) => {
                answered += 1;
                let by = if rng.bool() { Transport::Udp } else { Transport::Tcp };
                if let Resolution::Answer(answer) = zone.resolve(&request.question, &mut rng) {
                    encode(&request, &answer, by, rng.bool(), &mut out);
                    assert!(out.len() <= usize::from(request.limit(by)), "{} bytes", out.len());
                    // What a spoofed source gets at most.
                    let most = if request.has_edns() { usize::from(LARGEST_DATAGRAM) } else { 512 };
                    assert!(by == Transport::Tcp || out.len() <= most, "{} bytes", out.len());
                    assert_eq!(out[..2], bytes[..2], "the client's number");
                    assert!(read(&out) == Err(Refusal::Silence), "no answer is taken for a question");
                }
            }
            Err(Refusal::Silence) => {}
            Err(Refusal::Answer(answer, _)) => assert!(answer.len() <= bytes.len() + 11),
        }
    }
    assert!(answered > rounds / 4, "{answered} of {rounds} were still questions");
}

#[test]
fn mutated_questions_do_no_harm() {
    fuzz(30_000, 7);
}

#[test]
#[ignore = "takes minutes; run it by hand, optimised"]
fn ten_million_mutated_questions_do_no_harm() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    fuzz(10_000_000, seed);
}
