//! Addresses as Kubernetes reads them: leading zeros are allowed, IPv4 in IPv6 is IPv4.

use std::borrow::Cow;
use std::net::IpAddr;

use ipnet::IpNet;

/// Reads an address. Leading zeros of IPv4 parts mean nothing (they are not octal), as in Go before 1.17.
#[must_use]
pub fn parse(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| without_leading_zeros(text).parse().ok()).map(|address: IpAddr| address.to_canonical())
}

/// Reads a range. Blanks around it and bits below the prefix mean nothing.
#[must_use]
pub fn parse_range(text: &str) -> Option<IpNet> {
    let (address, prefix) = text.trim().split_once('/')?;
    let is_number = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix = if is_number { prefix.parse().ok()? } else { return None };
    let address = address.parse().ok().or_else(|| without_leading_zeros(address).parse().ok())?;
    IpNet::new(address, prefix).ok().map(|range| range.trunc())
}

/// Whether no packet from elsewhere can have this destination: no frontend and no endpoint may be here.
#[must_use]
pub fn is_unroutable(address: IpAddr) -> bool {
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_broadcast
}

/// Whether the address means something on one link only. The API allows it for neither endpoints nor external addresses.
#[must_use]
pub fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// The text with leading zeros of its dotted part removed; IPv6 groups may have them anyway.
fn without_leading_zeros(text: &str) -> Cow<'_, str> {
    let dotted = text.rfind(':').map_or(0, |colon| colon + 1);
    let (head, dotted) = text.split_at(dotted);
    if !dotted.contains('.') {
        return Cow::Borrowed(text);
    }
    let part = |part: &str| {
        let rest = part.trim_start_matches('0');
        if rest.is_empty() && !part.is_empty() { "0".to_owned() } else { rest.to_owned() }
    };
    Cow::Owned(head.to_owned() + &dotted.split('.').map(part).collect::<Vec<_>>().join("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_leniently_and_made_canonical() {
        for (text, address) in [
            ("10.0.0.1", Some("10.0.0.1")),
            ("010.00.000.08", Some("10.0.0.8")),
            ("FD00::00A", Some("fd00::a")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("::ffff:10.0.0.01", Some("10.0.0.1")),
            ("10.0.0", None),
            ("10.0.0.", None),
            ("10..0.1", None),
            ("10.0.0.256", None),
            ("10.0.0.0x1", None),
            ("", None),
            ("None", None),
            ("fd00::1%eth0", None),
        ] {
            assert_eq!(parse(text), address.map(|address| address.parse().unwrap()), "{text:?}");
        }
    }

    #[test]
    fn ranges_are_read_leniently_and_made_canonical() {
        for (text, range) in [
            ("10.0.0.0/8", Some("10.0.0.0/8")),
            (" 203.0.113.000/025 ", Some("203.0.113.0/25")),
            ("10.1.2.3/8", Some("10.0.0.0/8")),
            ("FD00::1/64", Some("fd00::/64")),
            ("10.0.0.1", None),
            ("10.0.0.0/33", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0/", None),
            ("", None),
        ] {
            assert_eq!(parse_range(text), range.map(|range| range.parse().unwrap()), "{text:?}");
        }
    }
}
