//! Each endpoint in turn, over all packet threads.

use crate::table::{Endpoint, PortSlot, Slots};

pub(super) fn select(port: PortSlot, list: &[Endpoint], slots: &Slots) -> usize {
    slots.next_turn(port) as usize % list.len()
}
