//! The packet path against the kernel's own sockets: a namespace with a TUN link, clients and endpoints in it.
#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "the tests measure time")]

mod lab;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use lab::{Lab, PODS, VIPS, at, connect, endpoint};
use sluice_dataplane::net::Protocol;
use sluice_dataplane::table::{EndpointSpec, ServiceName};

/// Reads until the end, which must be a reset, and says how long after `since` it came.
fn reset_after(stream: &mut TcpStream, since: Instant) -> Duration {
    let error = loop {
        match stream.read(&mut [0; 65536]) {
            Ok(0) => panic!("an orderly end"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    since.elapsed()
}

#[test]
fn both_ends_learn_at_once_that_an_endpoint_is_gone() {
    let Some(mut lab) = Lab::new() else { return };
    for (vip, pod) in VIPS.into_iter().zip(PODS) {
        let listener = TcpListener::bind(at(pod, 0)).unwrap();
        let endpoint = endpoint(listener.local_addr().unwrap());
        lab.serve(vip, &[endpoint]);
        // Who has ever sent something: nobody, the client, the endpoint, both; and one that sends without a pause.
        let (mut ends, mut busy) = (Vec::new(), Vec::new());
        for case in 0..5 {
            let (mut client, mut server) = (connect(vip), listener.accept().unwrap().0);
            server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            if case == 1 || case == 3 {
                client.write_all(b"question").unwrap();
                server.read_exact(&mut [0; 8]).unwrap();
            }
            if case == 2 || case == 3 {
                server.write_all(b"answer").unwrap();
                client.read_exact(&mut [0; 6]).unwrap();
            }
            if case == 4 {
                // Its error is told once, to whoever asks first.
                let mut sender = server.try_clone().unwrap();
                busy.push(std::thread::spawn(move || {
                    loop {
                        if let Err(error) = sender.write_all(&[7; 100_000]) {
                            break (error.kind(), Instant::now());
                        }
                    }
                }));
                client.read_exact(&mut [0; 1_000_000]).unwrap();
            }
            ends.push((client, (case != 4).then_some(server)));
        }
        std::thread::sleep(Duration::from_millis(300));
        let since = lab.end(vip, endpoint);
        let mut slowest = Duration::ZERO;
        for (client, server) in &mut ends {
            slowest = slowest.max(reset_after(client, since));
            if let Some(server) = server {
                slowest = slowest.max(reset_after(server, since));
            }
        }
        for thread in busy {
            let (error, at) = thread.join().unwrap();
            assert_eq!(error, ErrorKind::ConnectionReset);
            slowest = slowest.max(at - since);
        }
        assert!(slowest < Duration::from_secs(1), "{slowest:?}");
        eprintln!("{vip}: all reset within {slowest:?}");
    }
    // Packet threads answer at once; the keeper, who counts, comes round some milliseconds later.
    let since = Instant::now();
    while lab.shared.ended().terminated < 10 && since.elapsed() < Duration::from_secs(1) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(lab.shared.ended().terminated, 10);
}

#[test]
fn a_client_that_waits_for_an_answer_learns_it_too() {
    let Some(mut lab) = Lab::new() else { return };
    let endpoint = endpoint("10.244.9.9:80".parse().unwrap());
    lab.serve(VIPS[0], &[endpoint]);
    let target = at(VIPS[0], 80);
    let client = std::thread::spawn(move || TcpStream::connect_timeout(&target, Duration::from_secs(5)));
    std::thread::sleep(Duration::from_millis(100));
    let since = lab.end(VIPS[0], endpoint);
    let error = client.join().unwrap().expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
}

/// Two of three endpoints do not take connections; the third does. Nobody notices, but for the one that must be waited for.
#[test]
fn new_connections_find_the_endpoint_that_takes_them() {
    let Some(mut lab) = Lab::new() else { return };
    let listener = TcpListener::bind(at(PODS[0], 0)).unwrap();
    let good = EndpointSpec::ready(listener.local_addr().unwrap());
    // A client waits a second before it sends its SYN again.
    let cases = [("10.244.1.1:9", 0, 900), ("10.244.8.8:80", 1, 900), ("10.244.9.9:80", 2, 2_900)];
    for (bad, failure, most_ms) in cases {
        lab.serve(VIPS[0], &[EndpointSpec::ready(bad.parse().unwrap()), good]);
        let slot = lab.builder.port_slot(&ServiceName::new("ns", VIPS[0]), "", Protocol::Tcp).unwrap();
        let before = lab.shared.slots.port_totals(slot);
        for _ in 0..2 {
            let since = Instant::now();
            let mut client = connect(VIPS[0]);
            let took = since.elapsed();
            assert!(took < Duration::from_millis(most_ms), "{bad}: {took:?}");
            client.write_all(b"question").unwrap();
            listener.accept().unwrap().0.read_exact(&mut [0; 8]).unwrap();
        }
        let totals = lab.shared.slots.port_totals(slot);
        let moved = totals.retried - before.retried;
        assert!((1..=2).contains(&moved), "{bad}: {moved}");
        assert_eq!(totals.failed[failure], moved, "{bad}");
    }
}
