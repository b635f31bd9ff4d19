//! What the watches tell, put together: the objects held, what differs from the last update, and when all lists are in.

use std::collections::{BTreeMap, BTreeSet};

use ahash::AHashMap;

use super::failure::Failure;
use sluice_dataplane::table::ServiceName;

use crate::object::{Key, Kind, Object};
use crate::problem::{Origin, Problem};
use crate::source::{Change, Update};

/// The kinds whose lists the first update waits for.
const AWAITED: [Kind; 4] = [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCIDR];

/// What a watch tells of its kind.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) kind: Kind,
    pub(super) what: What,
}

#[derive(Clone, Debug)]
pub(super) enum What {
    /// All objects there are.
    Listed(Vec<Object>),
    /// One is new or has changed.
    Applied(Object),
    /// One is gone.
    Deleted(Key),
    /// The server knows no such kind.
    Unknown,
    /// Changes come in from now on.
    Following,
    /// They do not, and why.
    Failed(Failure, &'static str),
}

/// What the first update waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaits {
    Lists,
    Node,
    Nothing,
}

/// Pure: no clock, no I/O.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    /// By name, which is unique to the server whatever labels say.
    held: BTreeMap<Kind, AHashMap<ServiceName, Object>>,
    /// Kinds that the server has answered about.
    answered: BTreeSet<Kind>,
    /// Kinds that the first update waits for, besides those it always does.
    more_awaited: BTreeSet<Kind>,
    goes_without_node: bool,
    is_synced: bool,
    changes: Vec<Change>,
    problems: BTreeMap<Kind, Problem>,
    /// The problems of the last update.
    told: BTreeMap<Kind, Problem>,
}

impl Assembly {
    /// Takes in an event. What does not differ from what is held is no change.
    pub(super) fn take(&mut self, event: Event) {
        let kind = event.kind;
        match event.what {
            What::Listed(objects) => {
                let listed = objects.into_iter().map(|object| (object.key().name, object));
                let listed: AHashMap<ServiceName, Object> = listed.collect();
                let held = self.held.entry(kind).or_default();
                // What vanished first: its addresses may be somebody else's by now.
                let gone: Vec<ServiceName> = held.keys().filter(|name| !listed.contains_key(*name)).cloned().collect();
                gone.iter().for_each(|name| self.delete(kind, name));
                listed.into_values().for_each(|object| self.apply(kind, object));
                self.answered.insert(kind);
            }
            What::Applied(object) => self.apply(kind, object),
            What::Deleted(key) => self.delete(kind, &key.name),
            What::Unknown => {
                self.answered.insert(kind);
                self.problems.remove(&kind);
            }
            What::Following => drop(self.problems.remove(&kind)),
            What::Failed(failure, resource) => {
                // Services can be served without these, and old roles do not allow them.
                let is_spared = matches!(kind, Kind::Node | Kind::ServiceCIDR | Kind::Namespace | Kind::Pod);
                if failure.code == Some(403) && is_spared {
                    self.answered.insert(kind);
                    // Who may not see the Node waits for it in vain.
                    self.goes_without_node |= kind == Kind::Node;
                }
                let problem = Problem::error("", failure.words(resource)).from(&Origin::Api);
                self.problems.insert(kind, problem);
            }
        }
    }

    /// What the first update waits for.
    pub(super) fn awaits(&self) -> Awaits {
        if self.is_synced {
            Awaits::Nothing
        } else if !AWAITED.iter().chain(&self.more_awaited).all(|kind| self.answered.contains(kind)) {
            Awaits::Lists
        } else if self.goes_without_node || self.has_node() {
            Awaits::Nothing
        } else {
            Awaits::Node
        }
    }

    /// The first update waits for this kind too.
    pub(super) fn await_too(&mut self, kind: Kind) {
        self.more_awaited.insert(kind);
    }

    /// The Node has not come in time.
    pub(super) fn go_without_node(&mut self) {
        self.goes_without_node = true;
    }

    /// What differs from the last update, when anything does. Until the first with objects may be made, only problems.
    pub(super) fn update(&mut self) -> Option<Update> {
        let is_whole = !self.is_synced && self.awaits() == Awaits::Nothing;
        if is_whole {
            self.is_synced = true;
            let objects = self.held.values().flat_map(|held| held.values());
            self.changes = objects.map(|object| Change::Apply(object.clone(), Origin::Api)).collect();
        } else if self.changes.is_empty() && self.problems == self.told {
            return None;
        }
        self.told = self.problems.clone();
        Some(Update {
            is_whole,
            is_behind: [Kind::Service, Kind::EndpointSlice].iter().any(|kind| self.problems.contains_key(kind)),
            changes: std::mem::take(&mut self.changes),
            problems: self.problems.values().cloned().collect(),
            skipped: BTreeMap::new(),
        })
    }

    fn has_node(&self) -> bool {
        let has_address = |object: &Object| match object {
            Object::Node(node) => {
                node.status.iter().flat_map(|status| &status.addresses).any(|addresses| !addresses.is_empty())
            }
            _ => false,
        };
        self.held.get(&Kind::Node).is_some_and(|nodes| nodes.values().any(has_address))
    }

    fn apply(&mut self, kind: Kind, object: Object) {
        let held = self.held.entry(kind).or_default();
        let key = object.key();
        if held.get(&key.name) == Some(&object) {
            return;
        }
        // A slice may become another Service's.
        let old = held.insert(key.name.clone(), object.clone()).map(|old| old.key());
        if let Some(old) = old.filter(|old| *old != key) {
            self.change(Change::Delete(old));
        }
        self.change(Change::Apply(object, Origin::Api));
    }

    fn delete(&mut self, kind: Kind, name: &ServiceName) {
        if let Some(object) = self.held.entry(kind).or_default().remove(name) {
            self.change(Change::Delete(object.key()));
        }
    }

    /// Before the first update only what is held counts.
    fn change(&mut self, change: Change) {
        if self.is_synced {
            self.changes.push(change);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn service(name: &str, address: &str) -> Object {
        let object = json!({"metadata": {"namespace": "n", "name": name}, "spec": {"clusterIP": address}});
        Object::Service(Arc::new(serde_json::from_value(object).unwrap()))
    }

    fn node(address: Option<&str>) -> Object {
        let addresses: Vec<_> = address.iter().map(|it| json!({"type": "InternalIP", "address": it})).collect();
        let object = json!({"metadata": {"name": "me"}, "status": {"addresses": addresses}});
        Object::Node(Arc::new(serde_json::from_value(object).unwrap()))
    }

    fn failed(code: Option<u16>) -> What {
        What::Failed(Failure { verb: "list", reason: "no".to_owned(), code, retry_after: None }, "things")
    }

    fn take(assembly: &mut Assembly, kind: Kind, what: What) -> Option<Update> {
        assembly.take(Event { kind, what });
        assembly.update()
    }

    /// Changes as `+name` and `-name`.
    fn words(update: Option<Update>) -> Vec<String> {
        let word = |change: &Change| match change {
            Change::Apply(object, origin) => {
                assert_eq!(*origin, Origin::Api);
                format!("+{}", object.key().name.name)
            }
            Change::Delete(key) => format!("-{}", key.name.name),
        };
        let mut words: Vec<String> = update.iter().flat_map(|update| &update.changes).map(word).collect();
        words.sort();
        words
    }

    fn synced() -> Assembly {
        let mut assembly = Assembly::default();
        take(&mut assembly, Kind::Service, What::Listed(vec![service("a", "10.0.0.1"), service("b", "10.0.0.2")]));
        take(&mut assembly, Kind::EndpointSlice, What::Listed(Vec::new()));
        take(&mut assembly, Kind::ServiceCIDR, What::Unknown);
        let first = take(&mut assembly, Kind::Node, What::Listed(vec![node(Some("10.9.9.9"))]));
        assert_eq!(words(first), ["+a", "+b", "+me"]);
        assembly
    }

    #[test]
    fn a_new_list_deletes_what_vanished_and_leaves_alone_what_stayed() {
        let mut assembly = synced();
        let list = vec![service("a", "10.0.0.1"), service("c", "10.0.0.3")];
        assert_eq!(words(take(&mut assembly, Kind::Service, What::Listed(list.clone()))), ["+c", "-b"]);
        assert!(take(&mut assembly, Kind::Service, What::Listed(list)).is_none());
        assert_eq!(words(take(&mut assembly, Kind::Service, What::Applied(service("a", "10.0.0.9")))), ["+a"]);
        assert!(take(&mut assembly, Kind::Service, What::Applied(service("a", "10.0.0.9"))).is_none());
        assert_eq!(words(take(&mut assembly, Kind::Service, What::Deleted(service("a", "").key()))), ["-a"]);
        assert!(take(&mut assembly, Kind::Service, What::Deleted(service("a", "").key())).is_none());
    }

    #[test]
    fn the_first_update_waits_for_every_list_and_holds_what_is_there_then() {
        let mut assembly = Assembly::default();
        assert!(take(&mut assembly, Kind::Service, What::Listed(vec![service("a", ""), service("b", "")])).is_none());
        assert!(take(&mut assembly, Kind::Service, What::Deleted(service("b", "").key())).is_none());
        assert!(take(&mut assembly, Kind::Node, What::Listed(vec![node(Some("10.9.9.9"))])).is_none());
        for (kind, code, is_behind) in [(Kind::ServiceCIDR, 500, false), (Kind::EndpointSlice, 403, true)] {
            let update = take(&mut assembly, kind, failed(Some(code))).unwrap();
            let told = (update.is_whole, update.is_behind, update.changes.len());
            assert_eq!(told, (false, is_behind, 0), "nothing works without slices, and only that is told");
        }
        assert!(take(&mut assembly, Kind::EndpointSlice, What::Listed(Vec::new())).is_none());
        assert_eq!(assembly.awaits(), Awaits::Lists);
        let first = take(&mut assembly, Kind::ServiceCIDR, failed(Some(403)));
        assert!(first.as_ref().is_some_and(|first| first.is_whole && first.problems.len() == 2), "{first:?}");
        assert_eq!(words(first), ["+a", "+me"]);
    }

    #[test]
    fn the_own_node_is_waited_for_until_patience_ends() {
        let mut assembly = Assembly::default();
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::ServiceCIDR] {
            assert!(take(&mut assembly, kind, What::Listed(Vec::new())).is_none());
        }
        assert!(take(&mut assembly, Kind::Node, What::Listed(Vec::new())).is_none());
        assert!(
            take(&mut assembly, Kind::Node, What::Applied(node(None))).is_none(),
            "without an address it is no help"
        );
        assert_eq!(assembly.awaits(), Awaits::Node);
        assembly.go_without_node();
        assert_eq!(words(assembly.update()), ["+me"]);
        assert_eq!(words(take(&mut assembly, Kind::Node, What::Applied(node(Some("10.9.9.9"))))), ["+me"]);
    }

    #[test]
    fn a_node_that_may_not_be_seen_is_not_waited_for() {
        let mut assembly = Assembly::default();
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::ServiceCIDR] {
            assert!(take(&mut assembly, kind, What::Listed(Vec::new())).is_none());
        }
        let first = take(&mut assembly, Kind::Node, failed(Some(403))).unwrap();
        assert!(first.is_whole && !first.is_behind && first.problems.len() == 1, "{first:?}");
    }

    #[test]
    fn a_failure_is_a_problem_until_changes_come_in_again_and_costs_no_object() {
        let mut assembly = synced();
        let update = take(&mut assembly, Kind::Service, failed(None)).unwrap();
        assert!(update.changes.is_empty() && update.is_behind && !update.is_whole);
        assert_eq!(update.problems[0].to_string(), "the Kubernetes API: cannot list things: no");
        assert!(take(&mut assembly, Kind::Service, failed(None)).is_none(), "told once");
        let list = vec![service("a", "10.0.0.1"), service("b", "10.0.0.2")];
        assert!(take(&mut assembly, Kind::Service, What::Listed(list)).is_none(), "a list alone follows nothing");
        assert!(take(&mut assembly, Kind::Service, What::Following).is_some_and(|update| !update.is_behind));
        assert!(take(&mut assembly, Kind::ServiceCIDR, What::Unknown).is_none());
    }
}
