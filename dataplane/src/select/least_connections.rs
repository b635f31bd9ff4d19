//! Power of two choices: of two endpoints at random, the one with fewer live flows (Mitzenmacher 2001) for its weight.

use super::Selection;
use crate::table::Endpoint;

pub(super) fn select(list: &[Endpoint], selection: &Selection, rng: &mut fastrand::Rng) -> usize {
    let first = rng.usize(..list.len());
    if list.len() == 1 {
        return first;
    }
    // The second choice is among the others.
    let second = (first + rng.usize(1..list.len())) % list.len();
    if is_busier(&list[first], &list[second], selection) { second } else { first }
}

fn is_busier(one: &Endpoint, other: &Endpoint, selection: &Selection) -> bool {
    match (selection.withholds(one), selection.withholds(other)) {
        (true, false) => return true,
        (false, true) => return false,
        (true, true) | (false, false) => {}
    }
    let slots = selection.slots;
    let weight = |endpoint: &Endpoint| slots.weight(endpoint.slot, selection.slow_start_ms, selection.now_ms);
    // With the flow to come, so that a weight says something about an endpoint without flows too.
    let load = |endpoint: &Endpoint| u64::from(slots.active(endpoint.slot)) + 1;
    load(other) * weight(one) < load(one) * weight(other)
}
