//! What a thread of load waits with: an epoll of its sockets, and a timer for what is due sooner than epoll's milliseconds can say.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

const TIMER: u64 = u64::MAX;
/// Events that one call tells of.
pub(super) const EVENTS: usize = 128;

pub(super) struct Waiter {
    epoll: Epoll,
    timer: TimerFd,
}

impl Waiter {
    pub(super) fn new() -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll")?;
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).context("timer")?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, TIMER)).context("timer")?;
        Ok(Self { epoll, timer })
    }

    /// Tells from now on when what `flags` name begins on a socket: by this number.
    pub(super) fn add(&self, socket: impl AsFd, flags: EpollFlags, number: usize) -> io::Result<()> {
        Ok(self.epoll.add(socket, EpollEvent::new(flags | EpollFlags::EPOLLET, number as u64))?)
    }

    /// Waits for sockets until `wake`, or until `due` if that comes first; the numbers of those that have something to tell.
    pub(super) fn wait<'e>(
        &self,
        events: &'e mut [EpollEvent; EVENTS],
        now: Instant,
        wake: Instant,
        due: Option<Instant>,
    ) -> Result<impl Iterator<Item = usize> + use<'e>> {
        if let Some(due) = due.filter(|due| *due < wake) {
            // Epoll's own timeout counts in milliseconds.
            let wait = due.saturating_duration_since(now).max(Duration::from_nanos(1));
            let once = Expiration::OneShot(TimeSpec::from_duration(wait));
            self.timer.set(once, TimerSetTimeFlags::empty()).context("cannot set a timer")?;
        }
        let millis = wake.saturating_duration_since(now).as_millis() + 1;
        let timeout = EpollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX));
        let count = match self.epoll.wait(events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno).context("cannot wait for events"),
        };
        Ok(events[..count].iter().map(EpollEvent::data).filter(|number| *number != TIMER).map(|number| number as usize))
    }
}
