//! The fallback to terminating endpoints that still serve, where none is ready (KEP-1669).

use sluice_dataplane::table::EndpointList;

use super::endpoints::Merged;

/// The draining endpoints of `endpoints`, when there are any. `place`: " on this node", or nothing.
pub(super) fn fallback<'m, 'c: 'm, 's: 'c>(
    endpoints: impl Iterator<Item = &'m Merged<'c, 's>>,
    place: &str,
) -> Option<EndpointList> {
    let addresses: Vec<_> =
        endpoints.filter(|endpoint| endpoint.of.drains()).map(|endpoint| endpoint.address).collect();
    let why = match addresses.len() {
        0 => return None,
        1 => format!("none ready{place}: 1 terminating endpoint still serves"),
        count => format!("none ready{place}: {count} terminating endpoints still serve"),
    };
    Some(EndpointList { addresses, why })
}
