//! Endpoint selection: which of the allowed endpoints a new flow gets. Called once a flow, never for a packet of one.

mod affinity;
mod least_connections;
mod random;
mod round_robin;

pub use affinity::Affinity;
pub(crate) use affinity::{AFFINITIES, AffinityEntry};

use crate::table::{Balancing, Endpoint, EndpointSlot, PortSlot, Slots};

/// What selection goes by, besides the list.
#[derive(Clone, Copy)]
pub struct Selection<'s> {
    /// Live flows, ejections and ages of endpoints.
    pub slots: &'s Slots,
    /// The time, in milliseconds of the packet path's clock.
    pub now_ms: u64,
    /// How long an endpoint is new under least-connections; 0 = never.
    pub slow_start_ms: u64,
    /// Endpoints that are out of the question.
    pub avoid: &'s [EndpointSlot],
}

impl Selection<'_> {
    fn avoids(&self, endpoint: &Endpoint) -> bool {
        self.avoid.contains(&endpoint.slot)
    }

    /// Whether an endpoint is not to be chosen as long as there are others.
    fn withholds(&self, endpoint: &Endpoint) -> bool {
        self.avoids(endpoint) || self.slots.is_ejected(endpoint.slot, self.now_ms)
    }

    /// Any endpoint that is not avoided, at random. At most half of a list counts as ejected: the first ones.
    fn any(&self, list: &[Endpoint], rng: &mut fastrand::Rng) -> Option<usize> {
        let allowed = || {
            let mut ejected = 0;
            list.iter().enumerate().filter(move |(_, endpoint)| {
                let is_ejected = self.slots.is_ejected(endpoint.slot, self.now_ms);
                ejected += usize::from(is_ejected);
                !self.avoids(endpoint) && (!is_ejected || ejected > list.len() / 2)
            })
        };
        // Ejections may end or begin while we count.
        let count = allowed().count();
        let nth = if count == 0 { return None } else { rng.usize(..count) };
        allowed().nth(nth).or_else(|| allowed().next()).map(|(at, _)| at)
    }
}

/// Selects the position of an endpoint in a list; nothing when the list is empty or everything in it is to be avoided.
pub fn select(
    balancing: Balancing,
    port: PortSlot,
    list: &[Endpoint],
    selection: &Selection,
    rng: &mut fastrand::Rng,
) -> Option<usize> {
    if list.is_empty() {
        return None;
    }
    let chosen = match balancing {
        Balancing::LeastConnections => least_connections::select(list, selection, rng),
        Balancing::RoundRobin => round_robin::select(port, list, selection.slots),
        Balancing::Random => random::select(list, rng),
    };
    if selection.withholds(&list[chosen]) { selection.any(list, rng) } else { Some(chosen) }
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

    fn at(slots: &Slots, now_ms: u64) -> Selection<'_> {
        Selection { slots, now_ms, slow_start_ms: 10_000, avoid: &[] }
    }

    /// Opens flows one after the other and never closes one.
    fn counts(balancing: Balancing, list: &[Endpoint], slots: &Slots, flows: u32) -> Vec<u32> {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut counts = vec![0; list.len()];
        for _ in 0..flows {
            let chosen = select(balancing, PortSlot(0), list, &at(slots, 1_000), &mut rng).unwrap();
            slots.flow_opened(list[chosen].slot);
            counts[chosen] += 1;
        }
        counts
    }

    const ALL: [Balancing; 3] = [Balancing::LeastConnections, Balancing::RoundRobin, Balancing::Random];

    #[test]
    fn every_algorithm_is_fair() {
        for (balancing, tolerance) in ALL.into_iter().zip([10, 1, 200]) {
            for count in counts(balancing, &endpoints(5), &Slots::new(1), 10_000) {
                assert!(count.abs_diff(2_000) <= tolerance, "{balancing:?} gave {count} of 10000 to one of five");
            }
        }
        assert_eq!(counts(Balancing::LeastConnections, &endpoints(1), &Slots::new(1), 3), [3]);
    }

    #[test]
    fn least_connections_avoids_the_busy_one() {
        let (list, slots, mut rng) = (endpoints(2), Slots::new(1), fastrand::Rng::with_seed(7));
        (0..10).for_each(|_| slots.flow_opened(list[0].slot));
        let mut one = || select(Balancing::LeastConnections, PortSlot(0), &list, &at(&slots, 0), &mut rng);
        assert!((0..100).all(|_| one() == Some(1)));
    }

    /// Four endpoints have 100 flows each; a fifth enters. At half its slow start it has at most half as many.
    #[test]
    fn a_new_endpoint_is_not_flooded() {
        let (list, slots, mut rng) = (endpoints(5), Slots::new(1), fastrand::Rng::with_seed(7));
        list.iter().for_each(|endpoint| slots.enter(endpoint.slot));
        slots.tick(1);
        (0..400).for_each(|flow| slots.flow_opened(list[flow % 4].slot));
        slots.enter(list[4].slot);
        slots.tick(100_000);
        let until = |now_ms, rng: &mut fastrand::Rng| {
            (0..1_000).for_each(|_| {
                let chosen = select(Balancing::LeastConnections, PortSlot(0), &list, &at(&slots, now_ms), rng).unwrap();
                slots.flow_opened(list[chosen].slot);
            });
            slots.active(list[4].slot)
        };
        let (young, half, grown) = (until(100_000, &mut rng), until(105_000, &mut rng), until(110_000, &mut rng));
        assert!((20..=45).contains(&young), "a tenth of 340, not {young}");
        assert!((200..=310).contains(&half), "half of 520, not {half}");
        assert!((550..=680).contains(&grown), "as many as the others, not {grown}");
    }

    /// Five endpoints without flows that stay, one of them new: its share grows with its weight, from a tenth to all of a fifth.
    #[test]
    fn a_new_endpoint_gets_its_share_of_flows_that_end_at_once() {
        for (age_ms, share) in [(0, 60..=140), (5_000, 350..=650), (10_000, 900..=1_100)] {
            let (list, slots, mut rng) = (endpoints(5), Slots::new(1), fastrand::Rng::with_seed(7));
            list[..4].iter().for_each(|endpoint| slots.enter(endpoint.slot));
            slots.tick(1);
            slots.enter(list[4].slot);
            slots.tick(100_000);
            let selection = at(&slots, 100_000 + age_ms);
            let mut one = || select(Balancing::LeastConnections, PortSlot(0), &list, &selection, &mut rng);
            let new = (0..5_000).filter(|_| one() == Some(4)).count();
            assert!(share.contains(&new), "{new} of 5000 after {age_ms} ms");
        }
    }

    #[test]
    fn at_most_half_of_a_list_is_ejected() {
        for (ejected, unused) in [(0, 0), (1, 1), (2, 2), (3, 2), (5, 2)] {
            for balancing in ALL {
                let (list, slots) = (endpoints(5), Slots::new(1));
                list[..ejected].iter().for_each(|endpoint| slots.open_failed(endpoint.slot, 1, 0));
                let counts = counts(balancing, &list, &slots, 1_000);
                let none = counts.iter().filter(|count| **count == 0).count();
                assert_eq!(none, unused, "{balancing:?} with {ejected} of 5 ejected: {counts:?}");
            }
        }
        let (list, slots) = (endpoints(1), Slots::new(1));
        slots.open_failed(list[0].slot, 1, 0);
        assert_eq!(counts(Balancing::Random, &list, &slots, 1), [1], "the only one");
    }

    #[test]
    fn what_is_to_be_avoided_is_never_chosen() {
        let (list, slots, mut rng) = (endpoints(3), Slots::new(1), fastrand::Rng::with_seed(7));
        let (first, all) = ([list[0].slot, list[2].slot], [0, 1, 2].map(EndpointSlot));
        for balancing in ALL {
            let mut one = |avoid| {
                let selection = Selection { avoid, ..at(&slots, 0) };
                select(balancing, PortSlot(0), &list, &selection, &mut rng)
            };
            assert!((0..100).all(|_| one(&first) == Some(1)), "{balancing:?}");
            assert_eq!(one(&all), None);
        }
    }
}
