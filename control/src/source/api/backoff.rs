//! How long to wait before asking again: longer each time, never the same for all nodes.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(200);
/// Nobody is there, or what he says is cut off: an attempt costs nobody much, and who comes back is to be met soon.
const BROKEN_LIMIT: Duration = Duration::from_secs(1);
/// The server answers, but not as wanted.
const REFUSED_LIMIT: Duration = Duration::from_secs(30);
/// Most that a server's own word is heeded.
const WORD_LIMIT: Duration = Duration::from_secs(60);

/// Delays between attempts.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    broken: u32,
    refused: u32,
}

impl Backoff {
    /// It went well.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// The next delay. `refused`: a server is there and said no; `word`: the delay it asks for; `chance`: from 0 to 1.
    pub(super) fn next(&mut self, refused: bool, word: Option<Duration>, chance: f64) -> Duration {
        // Who answers is reached: what was before, however long, says nothing of how he will answer.
        let (attempts, limit) = if refused {
            self.broken = 0;
            (&mut self.refused, REFUSED_LIMIT)
        } else {
            (&mut self.broken, BROKEN_LIMIT)
        };
        let delay = FIRST.saturating_mul(1 << (*attempts).min(16)).min(limit);
        *attempts = attempts.saturating_add(1);
        let word = word.unwrap_or_default().min(WORD_LIMIT);
        word + delay.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_outage_does_not_slow_down_what_follows_it() {
        let mut backoff = Backoff::default();
        for _ in 0..1000 {
            backoff.next(false, None, 1.0);
        }
        assert_eq!(backoff.next(true, None, 1.0), FIRST);
    }

    #[test]
    fn delays_grow_to_a_limit_and_start_anew_after_success() {
        let mut backoff = Backoff::default();
        let delays: Vec<u128> = (0..10).map(|_| backoff.next(true, None, 1.0).as_millis()).collect();
        assert_eq!(delays, [200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]);
        let delays: Vec<u128> = (0..6).map(|_| backoff.next(false, None, 1.0).as_millis()).collect();
        assert_eq!(delays, [200, 400, 800, 1000, 1000, 1000]);
        assert_eq!(backoff.next(false, None, 0.0), BROKEN_LIMIT / 2);
        backoff.reset();
        assert_eq!(backoff.next(true, Some(Duration::from_secs(5)), 1.0), Duration::from_millis(5200));
        assert_eq!(backoff.next(true, Some(Duration::MAX), 1.0), Duration::from_millis(60_400));
    }
}
