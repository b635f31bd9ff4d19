//! Uniformly random, as kube-proxy does it.

use crate::table::Endpoint;

pub(super) fn select(list: &[Endpoint], rng: &mut fastrand::Rng) -> usize {
    rng.usize(..list.len())
}
