//! The fallback to terminating endpoints that still serve, where none is ready (KEP-1669).

use sluice_dataplane::table::EndpointList;

use super::endpoints::Merged;

/// The draining endpoints of `endpoints`. `place`: " on this node", or nothing.
pub(super) fn fallback<'m, 'c: 'm, 's: 'c>(
    endpoints: impl Iterator<Item = &'m Merged<'c, 's>>,
    place: &str,
) -> EndpointList {
    let addresses: Vec<_> =
        endpoints.filter(|endpoint| endpoint.of.drains()).map(|endpoint| endpoint.address).collect();
    let (plural, verb) = if addresses.len() == 1 { ("", "serves") } else { ("s", "serve") };
    let why = format!("none ready{place}: {} terminating endpoint{plural} still {verb}", addresses.len());
    EndpointList { addresses, why: why.into() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::resolve::testing::{port, service, slice_of, text};

    #[test]
    fn draining_endpoints_serve_only_where_none_is_ready() {
        let local = json!({"internalTrafficPolicy": "Local", "type": "NodePort",
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}]});
        for (endpoints, cluster, here) in [
            (&["10.0.0.1 unready terminating", "10.0.0.2"][..], &["10.0.0.2:8080"][..], &[][..]),
            // Locally they do even when others are ready elsewhere.
            (&["10.0.0.1 here unready terminating", "10.0.0.2"], &["10.0.0.2:8080"], &["10.0.0.1:8080"]),
            (&["10.0.0.1 here unready terminating", "10.0.0.2 here"], &["10.0.0.2:8080"], &["10.0.0.2:8080"]),
            (
                &["10.0.0.1 here unready terminating", "10.0.0.2 unready terminating"],
                &["10.0.0.1:8080", "10.0.0.2:8080"],
                &["10.0.0.1:8080"],
            ),
            (&["10.0.0.1 here unready terminating unserving", "10.0.0.2 here unready"], &[], &[]),
            // Ready counts, even while terminating or not serving: publishNotReadyAddresses makes it so.
            (
                &["10.0.0.1 here terminating unserving", "10.0.0.2 here"],
                &["10.0.0.1:8080", "10.0.0.2:8080"],
                &["10.0.0.1:8080", "10.0.0.2:8080"],
            ),
        ] {
            let port = port(&service(local.clone()), &[slice_of(endpoints)]);
            let lists = (text(&port.cluster.addresses), text(&port.local.addresses));
            assert_eq!(lists, (text(cluster), text(here)), "{endpoints:?}");
            assert_eq!(port.has_any_endpoint, !cluster.is_empty(), "{endpoints:?}");
        }
    }

    #[test]
    fn the_reason_says_that_they_drain() {
        let web = service(json!({"internalTrafficPolicy": "Local", "externalIPs": ["198.51.100.1"]}));
        let port = port(&web, &[slice_of(&["10.0.0.1 here unready terminating", "10.0.0.2 unready terminating"])]);
        assert_eq!(&*port.cluster.why, "none ready: 2 terminating endpoints still serve");
        assert_eq!(&*port.local.why, "none ready on this node: 1 terminating endpoint still serves");
    }
}
