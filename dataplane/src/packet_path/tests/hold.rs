//! Clients that wait for a first endpoint.

use std::time::Duration;

use super::harness::{CLIENT, FRONTEND, Path, is_reset, socket};
use crate::net::Protocol;
use crate::packet_path::HeldTotals;

const HOLD: Duration = Duration::from_secs(10);

fn holding() -> Path {
    let mut path = Path::new(16);
    path.hold = Some(HOLD);
    path.serve(Protocol::Tcp, &[]);
    path
}

fn totals(path: &Path) -> HeldTotals {
    let slot = path.builder.port_slot(&crate::table::ServiceName::new("a", "b"), "", Protocol::Tcp).unwrap();
    path.shared.held(slot).unwrap_or_default()
}

#[test]
fn a_syn_waits_and_goes_to_the_first_endpoint_by_itself() {
    let mut path = holding();
    assert!(path.tcp(CLIENT, FRONTEND, "S").is_none());
    assert!(path.tcp(CLIENT, FRONTEND, "S").is_none(), "its repetition is the same client");
    assert_eq!(path.keep(), []);
    assert_eq!((totals(&path).waiting, totals(&path).held), (1, 1));
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    let sent = path.keep();
    assert_eq!(sent.len(), 1);
    let (from, to, tcp) = &sent[0];
    assert_eq!((*from, *to, tcp.syn, tcp.ack), (socket(CLIENT), socket("10.244.1.1:8080"), true, false));
    assert_eq!(totals(&path), HeldTotals { waiting: 0, held: 1, released: 1, expired: 0 });
    assert_eq!(path.connect(CLIENT, FRONTEND).1, socket("10.244.1.1:8080"), "the flow is there");
    assert_eq!(path.keep(), [], "once is enough");
}

#[test]
fn a_repeated_syn_may_find_the_endpoint_first() {
    let mut path = holding();
    assert!(path.tcp(CLIENT, FRONTEND, "S").is_none());
    path.serve(Protocol::Tcp, &["10.244.1.1:8080"]);
    assert_eq!(path.tcp(CLIENT, FRONTEND, "S").unwrap().1, socket("10.244.1.1:8080"));
    assert_eq!(path.keep(), []);
    assert_eq!(totals(&path), HeldTotals { waiting: 0, held: 1, released: 1, expired: 0 });
}

#[test]
fn who_waits_in_vain_is_refused() {
    let mut path = holding();
    assert!(path.tcp(CLIENT, FRONTEND, "S").is_none());
    path.now_ms += HOLD.as_millis() as u64 - 1;
    assert_eq!(path.keep(), []);
    path.now_ms += 1;
    let sent = path.keep();
    assert_eq!(sent.len(), 1);
    assert!(sent[0].2.rst && sent[0].1 == socket(CLIENT), "{sent:?}");
    assert_eq!(totals(&path), HeldTotals { waiting: 0, held: 1, released: 0, expired: 1 });
    // Coming again is waiting again.
    assert!(path.tcp(CLIENT, FRONTEND, "S").is_none());
    assert_eq!(totals(&path).waiting, 1);
}

#[test]
fn only_new_connections_wait_and_only_where_they_may() {
    let mut path = holding();
    assert!(is_reset(&path.tcp(CLIENT, FRONTEND, "A").unwrap().2), "no connection of ours");
    path.hold = None;
    path.serve(Protocol::Tcp, &[]);
    assert!(is_reset(&path.tcp(CLIENT, FRONTEND, "S").unwrap().2));
}

#[test]
fn room_is_bounded() {
    let mut path = holding();
    for client in 0..8192_u32 {
        let from = format!("10.244.{}.{}:4000", 10 + client / 200, 1 + client % 200);
        assert!(path.tcp(&from, FRONTEND, "S").is_none());
    }
    assert!(is_reset(&path.tcp(CLIENT, FRONTEND, "S").unwrap().2), "one too many is refused at once");
}
