//! Loads against a server of ours on loopback.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use super::*;
use crate::plain_server::PlainServer;

fn server() -> (PlainServer, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let server = PlainServer::start(listener, 2).unwrap();
    let address = server.address();
    (server, address)
}

fn short(workload: Workload, target: SocketAddr) -> Plan {
    Plan {
        connections: 4,
        threads: 2,
        warmup: Duration::from_millis(50),
        duration: Duration::from_millis(300),
        timeout: Duration::from_secs(2),
        ..Plan::new(workload, vec![target])
    }
}

#[test]
fn every_workload_gets_answers() {
    let (_server, target) = server();
    for workload in [Workload::Cps, Workload::Rr, Workload::Bulk] {
        for (upload, answer_size) in [(false, 16), (true, MAX_ANSWER)] {
            let plan = Plan { upload, answer_size, ..short(workload, target) };
            let mut seen = 0;
            let outcome = run(None, &plan, |_| seen += 1).unwrap();
            assert_eq!(outcome.failures, BTreeMap::new(), "{workload:?}");
            assert!(outcome.rate > 0.0 && seen > 1, "{workload:?}: {outcome:?}");
            assert_eq!(outcome.latency.len(), outcome.answered);
            assert_eq!(outcome.bytes > 0, workload == Workload::Bulk);
        }
    }
}

#[test]
fn an_open_loop_keeps_its_rate() {
    let (_server, target) = server();
    for workload in [Workload::Cps, Workload::Rr] {
        let outcome = run(None, &Plan { rate: Some(200.0), ..short(workload, target) }, |_| {}).unwrap();
        // 60 are due in 0.3 s; a busy machine may answer the first or last of them outside.
        assert!((40..=70).contains(&outcome.answered), "{workload:?}: {}", outcome.answered);
    }
}

#[test]
fn waiting_for_a_stalled_server_counts_as_latency() {
    // Answers one connection after 200 ms, and what came meanwhile at once.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let target = listener.local_addr().unwrap();
    let stalling = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        thread::sleep(Duration::from_millis(200));
        let mut head = [0; HEAD];
        while stream.read_exact(&mut head).is_ok() {
            let Some(crate::protocol::Request::Answer { size, number }) = crate::protocol::Request::decode(&head)
            else {
                return;
            };
            stream.write_all(&crate::protocol::answer_head(size, number)).unwrap();
        }
    });
    let plan = Plan {
        connections: 1,
        threads: 1,
        warmup: Duration::ZERO,
        duration: Duration::from_millis(400),
        rate: Some(100.0),
        answer_size: HEAD as u32,
        ..short(Workload::Rr, target)
    };
    let outcome = run(None, &plan, |_| {}).unwrap();
    stalling.join().unwrap();
    // About 20 of some 40 requests were due while the server slept, so half of all waited, and not only the one sent.
    assert!(outcome.latency_us(75.0) > 10_000.0, "{}", outcome.latency_us(75.0));
}

#[test]
fn failures_are_counted_by_kind() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let closed = listener.local_addr().unwrap();
    drop(listener);
    for workload in [Workload::Cps, Workload::Rr, Workload::Bulk] {
        let outcome = run(None, &short(workload, closed), |_| {}).unwrap();
        assert_eq!(outcome.failures.keys().collect::<Vec<_>>(), ["refused"], "{workload:?}");
        assert_eq!(outcome.answered, 0);
    }
}

#[test]
fn plans_that_mean_nothing_are_refused() {
    let target = (Ipv4Addr::LOCALHOST, 1).into();
    let wrong = [
        Plan { targets: Vec::new(), ..short(Workload::Rr, target) },
        Plan { connections: 0, ..short(Workload::Rr, target) },
        Plan { rate: Some(0.0), ..short(Workload::Rr, target) },
        Plan { rate: Some(1.0), ..short(Workload::Bulk, target) },
        Plan { answer_size: 3, ..short(Workload::Rr, target) },
    ];
    for plan in wrong {
        assert!(run(None, &plan, |_| {}).is_err(), "{plan:?}");
    }
}
