//! Power of two choices: of two endpoints at random, the one with fewer live flows (Mitzenmacher 2001).

use crate::table::{Endpoint, Slots};

pub(super) fn select(list: &[Endpoint], slots: &Slots, rng: &mut fastrand::Rng) -> usize {
    let first = rng.usize(..list.len());
    if list.len() == 1 {
        return first;
    }
    // The second choice is among the others.
    let second = (first + rng.usize(1..list.len())) % list.len();
    if slots.active(list[second].slot) < slots.active(list[first].slot) { second } else { first }
}
