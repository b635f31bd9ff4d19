//! The life of an endpoint: what its slices, its operator and the clock make of it. Pure: time is an argument.
//!
//! Whether an endpoint gets *new* flows is for the endpoint lists to say; this is about the flows it has. They go on while
//! it is there in whatever condition. One that was terminating and leaves is gone at once; one that leaves otherwise
//! drains until a deadline, and may come back before it. Gone is for good: who has the address next is another endpoint.

use std::time::Duration;

use serde::Serialize;

/// What the slices say of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Condition {
    /// `ready`.
    Ready,
    /// Neither ready nor terminating.
    NotReady {
        /// `serving`.
        serving: bool,
    },
    /// `terminating`.
    Terminating {
        /// `serving`.
        serving: bool,
    },
}

/// How long an endpoint that leaves its slices without having been terminating keeps its flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum DrainTimeout {
    /// This long.
    After(Duration),
    /// Until they end by themselves.
    Never,
}

impl Default for DrainTimeout {
    fn default() -> Self {
        Self::After(Duration::from_secs(600))
    }
}

/// When the flows of an endpoint that drains are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Deadline {
    /// This many milliseconds after the next look at the clock.
    In(u64),
    /// At this time of the packet path's clock, in milliseconds.
    At(u64),
    /// Not at all.
    Never,
}

impl From<DrainTimeout> for Deadline {
    fn from(timeout: DrainTimeout) -> Self {
        match timeout {
            DrainTimeout::After(timeout) => Self::In((timeout.as_millis() as u64).min(MOST_MS)),
            DrainTimeout::Never => Self::Never,
        }
    }
}

/// Where an endpoint is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Life {
    /// In its slices. With a deadline when an operator drains it.
    Present {
        /// What the slices say.
        condition: Condition,
        /// When an operator wants its flows cut.
        drain: Option<Deadline>,
    },
    /// Left its slices without having been terminating.
    Left {
        /// When its flows are cut.
        deadline: Deadline,
    },
    /// No more: its flows are ended.
    Gone(Cause),
}

/// Why an endpoint is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Cause {
    /// It was terminating and left its slices.
    Terminated,
    /// Its drain deadline passed.
    Deadline,
}

impl Life {
    /// After the slices, and the operator, spoke of it.
    #[must_use]
    pub fn seen(self, condition: Condition, drain: Option<Deadline>) -> Self {
        match (self, drain) {
            (Self::Gone(_), _) => self,
            // A relative deadline began with its first sight.
            (Self::Present { drain: Some(since @ Deadline::At(_)), .. }, Some(Deadline::In(_))) => {
                Self::Present { condition, drain: Some(since) }
            }
            (Self::Present { .. } | Self::Left { .. }, _) => Self::Present { condition, drain },
        }
    }

    /// After it left the slices.
    #[must_use]
    pub fn left(self, timeout: DrainTimeout) -> Self {
        match self {
            Self::Present { condition: Condition::Terminating { .. }, .. } => Self::Gone(Cause::Terminated),
            Self::Present { drain: Some(deadline), .. } => Self::Left { deadline },
            Self::Present { drain: None, .. } => Self::Left { deadline: timeout.into() },
            Self::Left { .. } | Self::Gone(_) => self,
        }
    }

    /// As time goes by.
    #[must_use]
    pub fn tick(self, now_ms: u64) -> Self {
        let after = |deadline| match deadline {
            Deadline::In(more) => Some(Deadline::At(now_ms.saturating_add(more).min(MOST_MS))),
            Deadline::At(at) if at <= now_ms => None,
            Deadline::At(_) | Deadline::Never => Some(deadline),
        };
        let cut = Self::Gone(Cause::Deadline);
        match self {
            Self::Present { condition, drain: Some(deadline) } => {
                after(deadline).map_or(cut, |deadline| Self::Present { condition, drain: Some(deadline) })
            }
            Self::Left { deadline } => after(deadline).map_or(cut, |deadline| Self::Left { deadline }),
            Self::Present { drain: None, .. } | Self::Gone(_) => self,
        }
    }

    /// When its flows are cut, if it drains with a deadline.
    pub fn deadline(self) -> Option<Deadline> {
        match self {
            Self::Present { drain, .. } => drain,
            Self::Left { deadline } => Some(deadline),
            Self::Gone(_) => None,
        }
    }

    /// Whether it may have flows but is meant to get no new ones, but for a fallback to terminating endpoints.
    pub fn drains(self) -> bool {
        !matches!(self, Self::Present { condition: Condition::Ready, drain: None } | Self::Gone(_))
    }

    /// Whether UDP flows stay. They leave an endpoint that does not serve, as with kube-proxy.
    pub fn keeps_datagrams(self) -> bool {
        match self {
            Self::Present { condition, .. } => match condition {
                Condition::Ready => true,
                Condition::NotReady { serving } | Condition::Terminating { serving } => serving,
            },
            Self::Left { .. } | Self::Gone(_) => false,
        }
    }

    /// Name in `get endpoints`, metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Present { drain: Some(_), .. } | Self::Left { .. } => "draining",
            Self::Present { condition: Condition::Ready, .. } => "ready",
            Self::Present { condition: Condition::NotReady { .. }, .. } => "not-ready",
            Self::Present { condition: Condition::Terminating { .. }, .. } => "terminating",
            Self::Gone(_) => "gone",
        }
    }
}

/// The last time a packed life can hold: some nine million years.
const MOST_MS: u64 = (1 << 58) - 1;
const READY: u64 = 1;
const LEFT: u64 = 6;
const GONE: u64 = 7;

/// As one word: phase (4 bits), kind of deadline (2), milliseconds (58). Zero is an endpoint that nobody spoke of.
impl Life {
    pub(super) fn pack(self) -> u64 {
        let due = |deadline| match deadline {
            None => 0,
            Some(Deadline::In(ms)) => 1 << 4 | ms.min(MOST_MS) << 6,
            Some(Deadline::At(ms)) => 2 << 4 | ms.min(MOST_MS) << 6,
            Some(Deadline::Never) => 3 << 4,
        };
        match self {
            Self::Present { condition, drain } => {
                let phase = match condition {
                    Condition::Ready => READY,
                    Condition::NotReady { serving } => 2 + u64::from(serving),
                    Condition::Terminating { serving } => 4 + u64::from(serving),
                };
                phase | due(drain)
            }
            Self::Left { deadline } => LEFT | due(Some(deadline)),
            Self::Gone(Cause::Terminated) => GONE,
            Self::Gone(Cause::Deadline) => GONE + 1,
        }
    }

    pub(super) fn unpack(word: u64) -> Option<Self> {
        let ms = word >> 6;
        let due = match word >> 4 & 3 {
            0 => None,
            1 => Some(Deadline::In(ms)),
            2 => Some(Deadline::At(ms)),
            _ => Some(Deadline::Never),
        };
        let present = |condition| Some(Self::Present { condition, drain: due });
        match word & 15 {
            READY => present(Condition::Ready),
            phase @ 2..=3 => present(Condition::NotReady { serving: phase == 3 }),
            phase @ 4..=5 => present(Condition::Terminating { serving: phase == 5 }),
            LEFT => Some(Self::Left { deadline: due.unwrap_or(Deadline::Never) }),
            GONE => Some(Self::Gone(Cause::Terminated)),
            phase if phase == GONE + 1 => Some(Self::Gone(Cause::Deadline)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY: Life = present(Condition::Ready, None);
    const TERMINATING: Condition = Condition::Terminating { serving: true };
    const STOPPED: Condition = Condition::Terminating { serving: false };
    const UNREADY: Condition = Condition::NotReady { serving: false };

    const fn present(condition: Condition, drain: Option<Deadline>) -> Life {
        Life::Present { condition, drain }
    }

    enum Event {
        Seen(Condition),
        Drained(Deadline),
        Left,
        Tick(u64),
    }
    use Event::{Drained, Left, Seen, Tick};

    /// What happens to an endpoint that was ready, with a drain timeout of 1000 ms.
    #[test]
    fn lives() {
        let left = |deadline| Life::Left { deadline };
        let rows: [(&str, &[Event], Life); 14] = [
            ("nothing", &[Tick(9)], READY),
            ("not ready and back", &[Seen(UNREADY), Tick(9), Seen(Condition::Ready)], READY),
            ("terminating", &[Seen(TERMINATING), Tick(1 << 40)], present(TERMINATING, None)),
            ("terminating to the end", &[Seen(TERMINATING), Seen(STOPPED), Left], Life::Gone(Cause::Terminated)),
            ("never after that", &[Seen(STOPPED), Left, Seen(Condition::Ready)], Life::Gone(Cause::Terminated)),
            ("left", &[Left], left(Deadline::In(1000))),
            ("left, clock read", &[Left, Tick(50), Tick(60)], left(Deadline::At(1050))),
            ("left, last moment", &[Left, Tick(50), Tick(1049)], left(Deadline::At(1050))),
            ("left, too late", &[Left, Tick(50), Tick(1050)], Life::Gone(Cause::Deadline)),
            ("left unready", &[Seen(UNREADY), Left, Tick(0), Tick(1000)], Life::Gone(Cause::Deadline)),
            ("back in time", &[Left, Tick(50), Tick(1049), Seen(Condition::Ready), Tick(9999)], READY),
            ("drained by hand", &[Drained(Deadline::At(70)), Tick(69), Seen(Condition::Ready), Tick(99)], READY),
            ("drained by hand, cut", &[Drained(Deadline::At(70)), Tick(70)], Life::Gone(Cause::Deadline)),
            ("drained and left", &[Drained(Deadline::Never), Left, Tick(1 << 40)], left(Deadline::Never)),
        ];
        for (name, events, end) in rows {
            let mut life = READY;
            for event in events {
                life = match event {
                    Seen(condition) => life.seen(*condition, None),
                    Drained(deadline) => life.seen(Condition::Ready, Some(*deadline)),
                    Left => life.left(DrainTimeout::After(Duration::from_secs(1))),
                    Tick(now_ms) => life.tick(*now_ms),
                };
                assert_eq!(Life::unpack(life.pack()), Some(life), "{name}: packed");
            }
            assert_eq!(life, end, "{name}");
        }
        assert_eq!(READY.left(DrainTimeout::Never).tick(1 << 50), left(Deadline::Never));
        assert_eq!(Life::unpack(0), None);
    }

    #[test]
    fn a_drain_by_hand_is_not_prolonged_by_the_next_change_of_the_slices() {
        let drained = READY.seen(Condition::Ready, Some(Deadline::In(100))).tick(10);
        let again = drained.seen(UNREADY, Some(Deadline::In(100))).tick(60);
        assert_eq!(again, present(UNREADY, Some(Deadline::At(110))));
        assert_eq!(again.seen(UNREADY, Some(Deadline::At(500))).deadline(), Some(Deadline::At(500)));
    }

    #[test]
    fn datagrams_stay_with_endpoints_that_serve() {
        let rows = [
            (READY, true),
            (present(TERMINATING, None), true),
            (present(STOPPED, None), false),
            (present(UNREADY, None), false),
            (READY.left(DrainTimeout::Never), false),
            (Life::Gone(Cause::Deadline), false),
        ];
        for (life, keeps) in rows {
            assert_eq!(life.keeps_datagrams(), keeps, "{life:?}");
        }
    }
}
