//! What endpoints live through, told in the log and in metrics.

use ahash::{AHashMap, AHashSet};
use sluice_dataplane::table::{EndpointName, EndpointSlot, LifeChange, LifeEvent};

use crate::admin::metrics;
use crate::state::State;

/// Tells what happened since the last call.
pub fn tell(state: &State) {
    let events = state.shared.slots.take_events();
    if events.is_empty() {
        return;
    }
    let wanted: AHashSet<EndpointSlot> = events.iter().map(|event| event.slot).collect();
    let names: AHashMap<EndpointSlot, EndpointName> = {
        let publisher = state.publisher();
        let meant = publisher.builder().endpoints().filter(|(_, slot)| wanted.contains(slot));
        meant.map(|(name, slot)| (slot, name.clone())).collect()
    };
    for event in events {
        if let Some(name) = names.get(&event.slot) {
            tell_one(name, event);
        }
    }
}

/// Forgets what happened so far: the endpoints of the first table are no news.
pub fn forget(state: &State) {
    state.shared.slots.take_events();
}

fn tell_one(name: &EndpointName, LifeEvent { change, flows, .. }: LifeEvent) {
    let EndpointName { port, address, .. } = name;
    let (service, protocol, reason) = (&port.service, port.protocol, change.reason());
    let port_name = &*port.port;
    match change {
        LifeChange::Became(_) => {
            tracing::info!(%service, port = port_name, %protocol, endpoint = %address, flows, "endpoint: {reason}");
        }
        LifeChange::Ejected { interval } => {
            metrics::ejected(port);
            tracing::warn!(
                %service, port = port_name, %protocol, endpoint = %address, seconds = interval.as_secs(),
                "endpoint ejected: it did not take new flows"
            );
        }
        LifeChange::Drained { after } => {
            metrics::drained(port, after);
            tracing::info!(
                %service, port = port_name, %protocol, endpoint = %address, seconds = after.as_secs_f64(),
                "endpoint drained: its last flow has ended"
            );
        }
    }
}
