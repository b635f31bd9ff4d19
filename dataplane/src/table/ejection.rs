//! Passive ejection: an endpoint on which opens fail one after the other gets no new flows for a while; and slow start: one
//! that has just entered its list counts as busier than it is.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::event::LifeChange;
use super::slots::{EndpointSlot, Slots};

/// The first ejection's length; the n-th takes n times as long.
const STEP: Duration = Duration::from_secs(30);
/// The longest ejection.
const MOST: Duration = Duration::from_secs(300);
/// Weight of an endpoint that is not new.
pub(crate) const FULL_WEIGHT: u64 = 1000;
/// Weight of one that is brand new.
const LEAST_WEIGHT: u64 = FULL_WEIGHT / 10;

/// How long the `n`-th ejection in a row lasts, the first being 1.
fn interval(n: u16) -> Duration {
    (STEP * u32::from(n)).min(MOST)
}

/// The weight of an endpoint that entered its list `age_ms` ago: it grows in a straight line over the slow start.
fn weight(age_ms: u64, slow_start_ms: u64) -> u64 {
    if age_ms >= slow_start_ms {
        return FULL_WEIGHT;
    }
    LEAST_WEIGHT.max(FULL_WEIGHT * age_ms / slow_start_ms)
}

impl Slots {
    /// Until when an endpoint gets no new flows, in milliseconds of the packet path's clock; may be over.
    pub fn ejected_until(&self, slot: EndpointSlot) -> Option<u64> {
        Some(self.entry(slot).ejected_until.load(Relaxed)).filter(|until| *until != 0)
    }

    /// Whether an endpoint is ejected now.
    pub fn is_ejected(&self, slot: EndpointSlot, now_ms: u64) -> bool {
        self.entry(slot).ejected_until.load(Relaxed) > now_ms
    }

    /// An open failed. The endpoint is ejected when it was the `limit`-th in a row; with 0 never.
    pub(crate) fn open_failed(&self, slot: EndpointSlot, limit: u16, now_ms: u64) {
        if self.has_answered(slot) {
            self.open_succeeded(slot);
        }
        let entry = self.entry(slot);
        if limit == 0 || self.is_ejected(slot, now_ms) || entry.failures.fetch_add(1, Relaxed) + 1 < limit {
            return;
        }
        entry.failures.store(0, Relaxed);
        let ejections = entry.ejections.load(Relaxed).saturating_add(1);
        entry.ejections.store(ejections, Relaxed);
        let interval = interval(ejections);
        entry.ejected_until.store(now_ms + interval.as_millis() as u64, Relaxed);
        self.tell(slot, LifeChange::Ejected { interval });
    }

    /// Whether the kernel saw the endpoint accept a connection since this was last asked.
    pub(super) fn has_answered(&self, slot: EndpointSlot) -> bool {
        self.carried(slot).is_some_and(|carried| carried.answered.swap(0, Relaxed) != 0)
    }

    /// An open succeeded: what failed before is forgotten.
    pub(crate) fn open_succeeded(&self, slot: EndpointSlot) {
        let entry = self.entry(slot);
        // Mostly nothing failed, and then nothing is written.
        if entry.failures.load(Relaxed) != 0 || entry.ejections.load(Relaxed) != 0 {
            entry.failures.store(0, Relaxed);
            entry.ejections.store(0, Relaxed);
            entry.ejected_until.store(0, Relaxed);
        }
    }

    /// What share of new flows an endpoint is fit for, in thousandths.
    pub(crate) fn weight(&self, slot: EndpointSlot, slow_start_ms: u64, now_ms: u64) -> u64 {
        let age = match self.entry(slot).entered.load(Relaxed) {
            0 => 0,
            entered => now_ms.saturating_sub(entered),
        };
        weight(age, slow_start_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_grow_to_a_limit() {
        let rows = [(1, 30), (2, 60), (9, 270), (10, 300), (11, 300), (u16::MAX, 300)];
        for (n, seconds) in rows {
            assert_eq!(interval(n).as_secs(), seconds, "ejection {n}");
        }
    }

    #[test]
    fn weights_grow_with_age() {
        for (age, slow_start, expected) in
            [(0, 10_000, 100), (999, 10_000, 100), (5_000, 10_000, 500), (10_000, 10_000, 1000), (0, 0, 1000)]
        {
            assert_eq!(weight(age, slow_start), expected, "{age} of {slow_start}");
        }
    }

    #[test]
    fn only_failures_in_a_row_eject() {
        let (slots, slot) = (Slots::new(1), EndpointSlot(1));
        for _ in 0..3 {
            (0..4).for_each(|_| slots.open_failed(slot, 5, 1_000));
            slots.open_succeeded(slot);
        }
        assert_eq!(slots.ejected_until(slot), None);
        (0..5).for_each(|_| slots.open_failed(slot, 5, 1_000));
        assert_eq!(slots.ejected_until(slot), Some(31_000));
        (0..50).for_each(|_| slots.open_failed(slot, 5, 30_999));
        assert_eq!(slots.ejected_until(slot), Some(31_000), "late failures do not prolong it");
        assert!(!slots.is_ejected(slot, 31_000));
        (0..5).for_each(|_| slots.open_failed(slot, 5, 40_000));
        assert_eq!(slots.ejected_until(slot), Some(100_000), "the second in a row takes longer");
        slots.open_succeeded(slot);
        assert!(!slots.is_ejected(slot, 40_000));
        (0..99).for_each(|_| slots.open_failed(slot, 0, 50_000));
        assert!(!slots.is_ejected(slot, 50_000), "off");
    }
}
