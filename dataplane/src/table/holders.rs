//! Who has an address: flows of whoever had it before end when another has it.
//!
//! A Pod's uid says who has the address, for every Service. Where an endpoint does not say whose it is, its place in its
//! Service port counts: another uid there, or one that was away, is another endpoint.

use std::net::{IpAddr, Ipv6Addr};

use ahash::AHashMap;

use super::identity::{EndpointName, Identity as _, mapped};
use super::{EndpointSlot, Life, Slots, Uid};

/// What is known of addresses.
#[derive(Default)]
pub(super) struct Holders {
    /// Who had an address last, of those that say who they are. As many entries as Pods have addresses.
    /// IPv4 ones as IPv6 has them: 24 bytes an entry instead of 32.
    known: AHashMap<Ipv6Addr, Uid>,
    /// Endpoints that may drain, by address; of the last process, all that have flows.
    left: AHashMap<IpAddr, Vec<EndpointSlot>>,
}

impl Holders {
    /// Before an endpoint is given a slot: whoever had its address and drains has it no more. Not one more packet of his may
    /// go there.
    pub(super) fn arrives(&mut self, name: &EndpointName, slots: &Slots) {
        let ip = name.address.ip();
        if name.uid.is_own() {
            self.known.insert(mapped(ip), name.uid);
        }
        for slot in self.left.get(&ip).into_iter().flatten().filter(|slot| supersedes(name, **slot, slots)) {
            slots.end_left(*slot);
        }
    }

    /// After an endpoint left. `is_replaced`: another has its place in its Service port.
    pub(super) fn leaves(&mut self, name: &EndpointName, slot: EndpointSlot, is_replaced: bool, slots: &Slots) {
        let ip = name.address.ip();
        let is_anothers = name.uid.is_own() && self.known.get(&mapped(ip)).is_some_and(|holder| *holder != name.uid);
        if is_replaced || is_anothers {
            slots.end_left(slot);
        } else {
            self.note(ip, slot);
        }
    }

    /// Remembers an endpoint that may drain.
    pub(super) fn note(&mut self, ip: IpAddr, slot: EndpointSlot) {
        let left = self.left.entry(ip).or_default();
        if !left.contains(&slot) {
            left.push(slot);
        }
    }

    /// Forgets endpoints that do not drain. Called before a freed slot is another's.
    pub(super) fn prune(&mut self, slots: &Slots) {
        self.left.retain(|_, left| {
            left.retain(|slot| matches!(slots.life(*slot), Some(Life::Left { .. })));
            !left.is_empty()
        });
    }
}

/// Whether an endpoint that had this slot, if it left, is another than who has its address now.
fn supersedes(now: &EndpointName, slot: EndpointSlot, slots: &Slots) -> bool {
    let uid = slots.uid(slot);
    if uid.is_own() && now.uid.is_own() {
        return uid != now.uid;
    }
    // Names of the last process are not known, but what they would be: the same Service port, address and port.
    EndpointName { uid, ..now.clone() }.identity() == slots.identity(slot)
}
