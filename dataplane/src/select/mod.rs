//! Endpoint selection: which of the allowed endpoints a new flow gets. Called once a flow, never for a packet of one.

mod affinity;
mod least_connections;
mod random;
mod round_robin;

pub use affinity::Affinity;

use crate::table::{Balancing, Endpoint, PortSlot, Slots};

/// Selects the position of an endpoint in a list that is not empty.
pub fn select(
    balancing: Balancing,
    port: PortSlot,
    list: &[Endpoint],
    slots: &Slots,
    rng: &mut fastrand::Rng,
) -> usize {
    match balancing {
        Balancing::LeastConnections => least_connections::select(list, slots, rng),
        Balancing::RoundRobin => round_robin::select(port, list, slots),
        Balancing::Random => random::select(list, rng),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::table::EndpointSlot;

    fn endpoints(count: u32) -> Vec<Endpoint> {
        let address = |slot: u32| SocketAddr::from(([10, 0, 0, slot as u8], 80));
        (0..count).map(|slot| Endpoint { address: address(slot), slot: EndpointSlot(slot) }).collect()
    }

    /// Opens flows one after the other and never closes one.
    fn counts(balancing: Balancing, list: &[Endpoint], flows: u32) -> Vec<u32> {
        let (slots, mut rng) = (Slots::new(1), fastrand::Rng::with_seed(7));
        let mut counts = vec![0; list.len()];
        for _ in 0..flows {
            let chosen = select(balancing, PortSlot(0), list, &slots, &mut rng);
            slots.flow_opened(list[chosen].slot);
            counts[chosen] += 1;
        }
        counts
    }

    #[test]
    fn every_algorithm_is_fair() {
        let list = endpoints(5);
        for (balancing, tolerance) in
            [(Balancing::LeastConnections, 10), (Balancing::RoundRobin, 1), (Balancing::Random, 200)]
        {
            for count in counts(balancing, &list, 10_000) {
                assert!(count.abs_diff(2_000) <= tolerance, "{balancing:?} gave {count} of 10000 to one of five");
            }
        }
        assert_eq!(counts(Balancing::LeastConnections, &endpoints(1), 3), [3]);
    }

    #[test]
    fn least_connections_avoids_the_busy_one() {
        let (list, slots, mut rng) = (endpoints(2), Slots::new(1), fastrand::Rng::with_seed(7));
        (0..10).for_each(|_| slots.flow_opened(list[0].slot));
        assert!((0..100).all(|_| select(Balancing::LeastConnections, PortSlot(0), &list, &slots, &mut rng) == 1));
    }
}
