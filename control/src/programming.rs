//! When changes of endpoints were triggered: where the latency of network programming is measured from.

use jiff::Timestamp;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sluice_dataplane::net::Family;
use sluice_dataplane::table::ServiceName;

use crate::object::{Kind, Object, service_of};
use crate::source::Change;
use crate::store::Store;

/// Annotation of the moment in which a Pod or Service changed so that the slice had to.
pub const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// The trigger of each change of endpoints, by kube-proxy's rules: only those after `since`, the start of the process;
/// none for a slice whose endpoints and ports stay as `store` has them; none for a Service of which a slice is deleted.
#[must_use]
pub fn triggers(store: &Store, changes: &[Change], since: Timestamp) -> Vec<(Family, Timestamp)> {
    let mut triggers: Vec<(Option<ServiceName>, Family, Timestamp)> = Vec::new();
    for change in changes {
        match change {
            Change::Apply(object @ Object::EndpointSlice(slice), _) => {
                let Some(trigger) = trigger(slice).filter(|trigger| *trigger > since) else { continue };
                let is_same = |held: &EndpointSlice| held.endpoints == slice.endpoints && held.ports == slice.ports;
                if !store.slice(&object.key()).is_some_and(|held| is_same(&held.object)) {
                    let family = Family::BOTH.into_iter().find(|family| family.to_string() == slice.address_type);
                    triggers.extend(family.map(|family| (service_of(slice), family, trigger)));
                }
            }
            Change::Delete(key) if key.kind == Kind::EndpointSlice => {
                let service = store.slice(key).and_then(|held| service_of(&held.object));
                triggers.retain(|(of, ..)| *of != service);
            }
            Change::Apply(..) | Change::Delete(_) => {}
        }
    }
    triggers.into_iter().map(|(_, family, trigger)| (family, trigger)).collect()
}

/// When the change that a slice tells of was triggered.
pub(crate) fn trigger(slice: &EndpointSlice) -> Option<Timestamp> {
    slice.metadata.annotations.as_ref()?.get(TRIGGER_TIME)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::object::Key;
    use crate::problem::Origin;

    fn apply(name: &str, address: &str, trigger: &str) -> Change {
        let family = if address.contains(':') { "IPv6" } else { "IPv4" };
        let slice = json!({"metadata": {"namespace": "n", "name": name, "annotations": {TRIGGER_TIME: trigger},
            "labels": {"kubernetes.io/service-name": "web"}}, "addressType": family, "endpoints": [{"addresses": [address]}]});
        Change::Apply(Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap())), Origin::Api)
    }

    fn delete(name: &str) -> Change {
        Change::Delete(Key {
            service: Some("web".into()),
            ..Key::new(Kind::EndpointSlice, ServiceName::new("n", name))
        })
    }

    #[test]
    fn only_changes_of_endpoints_after_the_start_count() {
        let mut store = Store::default();
        store.apply([apply("held", "10.0.0.1", "2026-01-01T00:00:05Z"), apply("old", "10.0.0.2", "")]);
        let since: Timestamp = "2026-01-01T00:00:10Z".parse().unwrap();
        let (early, late) = ("2026-01-01T00:00:10Z", "2026-01-01T00:00:12.5Z");
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        for (changes, want) in [
            (vec![apply("new", "10.0.0.1", late)], vec![(Family::V4, at(late))]),
            (vec![apply("new", "fd00::1", late)], vec![(Family::V6, at(late))]),
            (vec![apply("new", "10.0.0.1", early)], vec![]),
            (vec![apply("new", "10.0.0.1", "soon")], vec![]),
            (vec![apply("held", "10.0.0.1", late)], vec![]),
            (vec![apply("held", "10.0.0.9", late)], vec![(Family::V4, at(late))]),
            (vec![apply("held", "10.0.0.9", late), delete("old")], vec![]),
            (vec![delete("old"), apply("held", "10.0.0.9", late)], vec![(Family::V4, at(late))]),
        ] {
            assert_eq!(triggers(&store, &changes, since), want, "{changes:?}");
        }
    }
}
