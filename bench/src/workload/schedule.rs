//! When is the next request due.

use std::time::{Duration, Instant};

/// The moments at which one thread's requests are due.
#[derive(Debug)]
pub(super) enum Schedule {
    /// As soon as there is a connection for it.
    Closed,
    /// At fixed moments; request `next` is due `next` intervals after `first`.
    Open { first: Instant, interval: f64, next: u64 },
}

impl Schedule {
    /// A thread's part of `rate` requests a second: every `threads`th one, from the `index`th.
    pub(super) fn new(start: Instant, rate: Option<f64>, index: usize, threads: usize) -> Self {
        match rate {
            None => Self::Closed,
            Some(rate) => Self::Open {
                first: start + Duration::from_secs_f64(index as f64 / rate),
                interval: threads as f64 / rate,
                next: 0,
            },
        }
    }

    /// Takes the next request if it is due: the moment from which its latency counts.
    pub(super) fn take(&mut self, now: Instant) -> Option<Instant> {
        match self {
            Self::Closed => Some(now),
            Self::Open { first, interval, next } => {
                let due = due(*first, *interval, *next);
                (due <= now).then(|| {
                    *next += 1;
                    due
                })
            }
        }
    }

    /// When the next request is due; `None` in a closed loop.
    pub(super) fn next(&self) -> Option<Instant> {
        match self {
            Self::Closed => None,
            Self::Open { first, interval, next } => Some(due(*first, *interval, *next)),
        }
    }

    /// Requests that are due and were not taken.
    pub(super) fn overdue(&self, now: Instant) -> u64 {
        match self {
            Self::Closed => 0,
            Self::Open { first, interval, next } => {
                let all =
                    now.checked_duration_since(*first).map_or(0, |late| (late.as_secs_f64() / interval) as u64 + 1);
                all.saturating_sub(*next)
            }
        }
    }
}

fn due(first: Instant, interval: f64, number: u64) -> Instant {
    first + Duration::from_secs_f64(interval * number as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_the_moments() {
        let start = Instant::now();
        let at = |micros: u64| start + Duration::from_micros(micros);
        let mut threads: Vec<Schedule> = (0..2).map(|index| Schedule::new(start, Some(1000.0), index, 2)).collect();
        assert_eq!(threads[0].take(start), Some(start));
        assert_eq!(threads[0].take(at(1999)), None);
        assert_eq!(threads[1].take(at(1000)), Some(at(1000)));
        // A late thread takes all that was due, each with its own moment.
        assert_eq!(threads[1].overdue(at(5500)), 2);
        assert_eq!(threads[1].take(at(5500)), Some(at(3000)));
        assert_eq!(threads[1].take(at(5500)), Some(at(5000)));
        assert_eq!(threads[1].next(), Some(at(7000)));
        assert_eq!(Schedule::new(start, None, 0, 2).take(start), Some(start));
    }
}
