//! A name's labels in lower case, on the stack: what lookups go by.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::rr::Name;

/// Longest name (RFC 1035 §2.3.4).
const LONGEST: usize = 255;

/// Labels of a name, lower case, without the root.
pub(super) struct Labels {
    bytes: [u8; LONGEST],
    ends: [u8; LONGEST / 2 + 1],
    count: usize,
}

impl Labels {
    /// Of a name.
    pub(super) fn new(name: &Name) -> Self {
        let mut labels = Self { bytes: [0; LONGEST], ends: [0; LONGEST / 2 + 1], count: 0 };
        let mut end = 0;
        for label in name.iter() {
            let Some(place) = labels.bytes.get_mut(end..end + label.len()) else { break };
            place.copy_from_slice(label);
            place.make_ascii_lowercase();
            end += label.len();
            let Some(last) = labels.ends.get_mut(labels.count) else { break };
            *last = end as u8;
            labels.count += 1;
        }
        labels
    }

    /// Of a name as messages have it, without pointers. Nothing when it is too long.
    pub(super) fn of_wire(name: &[u8]) -> Option<Self> {
        if name.len() > LONGEST {
            return None;
        }
        let mut labels = Self { bytes: [0; LONGEST], ends: [0; LONGEST / 2 + 1], count: 0 };
        let (mut at, mut end) = (0, 0);
        while let Some(length @ 1..) = name.get(at).map(|length| usize::from(*length)) {
            let label = name.get(at + 1..at + 1 + length)?;
            let place = labels.bytes.get_mut(end..end + length)?;
            place.copy_from_slice(label);
            place.make_ascii_lowercase();
            (at, end) = (at + 1 + length, end + length);
            *labels.ends.get_mut(labels.count)? = end as u8;
            labels.count += 1;
        }
        Some(labels)
    }

    /// Where label `index` begins in a name as messages have it.
    pub(super) fn offset(&self, index: usize) -> usize {
        let before = index.checked_sub(1).map_or(0, |last| usize::from(self.ends[last]));
        before + index
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Label `index`, the leftmost is 0.
    pub(super) fn get(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { usize::from(self.ends[index - 1]) };
        &self.bytes[start..usize::from(self.ends[index])]
    }

    /// How many labels stand before this zone, when the name is in it.
    pub(super) fn before(&self, zone: &[Box<[u8]>]) -> Option<usize> {
        let left = self.count.checked_sub(zone.len())?;
        let same = (0..zone.len()).all(|index| *self.get(left + index) == *zone[index]);
        same.then_some(left)
    }

    /// The address of a whole reverse name.
    pub(super) fn reverse_address(&self) -> Option<IpAddr> {
        let is = |count: usize, kind: &[u8]| {
            self.count == count && self.get(count - 2) == kind && self.get(count - 1) == b"arpa"
        };
        if is(6, b"in-addr") {
            let mut octets = [0; 4];
            for (index, octet) in octets.iter_mut().enumerate() {
                let label = self.get(3 - index);
                let is_number =
                    label.iter().all(u8::is_ascii_digit) && (label.len() == 1 || label.first() != Some(&b'0'));
                *octet = std::str::from_utf8(label).ok().filter(|_| is_number)?.parse().ok()?;
            }
            return Some(IpAddr::V4(Ipv4Addr::from(octets)));
        }
        if is(34, b"ip6") {
            let mut value = 0;
            for index in (0..32).rev() {
                let &[digit] = self.get(index) else { return None };
                value = value << 4 | u128::from(char::from(digit).to_digit(16)?);
            }
            return Some(IpAddr::V6(Ipv6Addr::from(value)));
        }
        None
    }

    /// Whether it lies in the tree of reverse names.
    pub(super) fn is_reverse(&self) -> bool {
        self.count >= 2
            && self.get(self.count - 1) == b"arpa"
            && matches!(self.get(self.count - 2), b"in-addr" | b"ip6")
    }
}

/// Labels of a configured name, lower case.
pub(super) fn of_text(name: &str) -> Box<[Box<[u8]>]> {
    let labels = name.split('.').filter(|label| !label.is_empty());
    labels.map(|label| label.to_ascii_lowercase().into_bytes().into_boxed_slice()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reverse_names_are_whole_and_canonical() {
        for (name, address) in [
            ("4.3.2.1.in-addr.arpa.", Some("1.2.3.4")),
            ("4.3.2.1.IN-addr.ARPA.", Some("1.2.3.4")),
            ("04.3.2.1.in-addr.arpa.", None),
            ("256.3.2.1.in-addr.arpa.", None),
            ("3.2.1.in-addr.arpa.", None),
            ("5.4.3.2.1.in-addr.arpa.", None),
            ("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.D.f.ip6.arpa.", Some("fd00::1")),
            ("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.g.f.ip6.arpa.", None),
            ("0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.", None),
        ] {
            let labels = Labels::new(&Name::from_ascii(name).unwrap());
            assert_eq!(labels.reverse_address(), address.map(|it| it.parse().unwrap()), "{name}");
            assert!(labels.is_reverse());
        }
    }

    #[test]
    fn a_name_is_in_a_zone_by_whole_labels() {
        let zone = of_text("Cluster.local.");
        for (name, left) in [
            ("cluster.local.", Some(0)),
            ("a.b.CLUSTER.local.", Some(2)),
            ("local.", None),
            ("xcluster.local.", None),
            (".", None),
        ] {
            assert_eq!(Labels::new(&Name::from_ascii(name).unwrap()).before(&zone), left, "{name}");
        }
        assert_eq!(Labels::new(&Name::root()).before(&of_text(".")), Some(0));
    }

    #[test]
    fn the_longest_names_fit() {
        let name = Name::from_ascii(format!("{}a.", "a.".repeat(126))).unwrap();
        assert_eq!(Labels::new(&name).len(), 127);
    }
}
