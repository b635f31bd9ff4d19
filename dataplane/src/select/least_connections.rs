//! Power of two choices: of two endpoints at random, the one with fewer live flows (Mitzenmacher 2001) for its weight.

use super::Selection;
use crate::table::{Endpoint, FULL_WEIGHT};

pub(super) fn select(list: &[Endpoint], selection: &Selection, rng: &mut fastrand::Rng) -> usize {
    let first = rng.usize(..list.len());
    if list.len() == 1 {
        return first;
    }
    // The second choice is among the others.
    let second = (first + rng.usize(1..list.len())) % list.len();
    if is_busier(&list[first], &list[second], selection, rng) { second } else { first }
}

fn is_busier(one: &Endpoint, other: &Endpoint, selection: &Selection, rng: &mut fastrand::Rng) -> bool {
    match (selection.withholds(one), selection.withholds(other)) {
        (true, false) => return true,
        (false, true) => return false,
        (true, true) | (false, false) => {}
    }
    let slots = selection.slots;
    let weights = [one, other].map(|it| slots.weight(it.slot, selection.slow_start_ms, selection.now_ms));
    // With the flow to come, so that a weight says something about an endpoint without flows too.
    let loads = [one, other].map(|it| u64::from(slots.active(it.slot)) + 1);
    let is_busier = loads[1] * weights[0] < loads[0] * weights[1];
    if weights[0] == weights[1] {
        return is_busier;
    }
    // Where nothing but its weight speaks against the newer one, it has as much of the half that it will have. Flows that are
    // short and few would all go to the others.
    let new = usize::from(weights[1] < weights[0]);
    let loses = is_busier == (new == 0);
    if loses && loads[new] <= loads[1 - new] && rng.u64(..2 * FULL_WEIGHT) < weights[new] {
        return new == 1;
    }
    is_busier
}
