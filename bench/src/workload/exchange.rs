//! Requests and answers: one on each connection (`cps`), or one after another on kept ones (`rr`).
//!
//! A thread drives its connections by an epoll. A connection is registered once, for edges in both directions; a request
//! on a kept one costs a write and a read, and nothing is allocated for it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use socket2::{Domain, Protocol, Socket, Type};

use crate::client::Failure;
use crate::protocol::{HEAD, MAX_ANSWER, Request, is_answer};
use crate::workload::meter::{Live, Meter};
use crate::workload::schedule::Schedule;
use crate::workload::waiter::{EVENTS, Waiter};
use crate::workload::{Plan, Share, Times, Workload};

/// How often connections are looked at for answers that do not come.
const TICK: Duration = Duration::from_millis(50);
/// Rest of a connection after a failure, so that a target that refuses is not hammered.
const REST: Duration = Duration::from_millis(10);

pub(super) fn run(plan: &Plan, share: Share, times: Times, live: &Live) -> Result<Meter> {
    let waiter = Waiter::new()?;
    let mut driver = Driver {
        plan,
        times,
        live,
        waiter,
        schedule: Schedule::new(times.start, plan.rate, share.index, share.threads),
        slots: (0..share.connections).map(|_| Slot::new(times.start)).collect(),
        free: (0..share.connections).rev().collect(),
        resting: VecDeque::new(),
        next_target: share.index,
        number: 0,
        received: vec![0; MAX_ANSWER as usize].into(),
        meter: Meter::default(),
    };
    driver.run()?;
    Ok(driver.meter)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No request under way.
    Idle,
    /// Connecting; the request is sent when that is done.
    Connecting,
    /// The request is sent.
    Waiting,
}

struct Slot {
    socket: Option<Socket>,
    state: State,
    /// When the request was due.
    due: Instant,
    /// When it was begun: what the timeout counts from.
    begun: Instant,
    number: u64,
    received: usize,
}

impl Slot {
    fn new(now: Instant) -> Self {
        Self { socket: None, state: State::Idle, due: now, begun: now, number: 0, received: 0 }
    }
}

struct Driver<'a> {
    plan: &'a Plan,
    times: Times,
    live: &'a Live,
    waiter: Waiter,
    schedule: Schedule,
    slots: Vec<Slot>,
    /// Slots that can take a request.
    free: Vec<usize>,
    /// Slots that failed, and until when they rest.
    resting: VecDeque<(Instant, usize)>,
    next_target: usize,
    number: u64,
    received: Box<[u8]>,
    meter: Meter,
}

impl Driver<'_> {
    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut next_tick = self.times.start + TICK;
        loop {
            let now = Instant::now();
            if now >= self.times.end {
                break;
            }
            if now >= next_tick {
                self.look_for_timeouts(now);
                next_tick = now + TICK;
            }
            while self.resting.front().is_some_and(|(until, _)| *until <= now) {
                self.free.extend(self.resting.pop_front().map(|(_, slot)| slot));
            }
            self.begin_what_is_due(now);
            let wake = next_tick.min(self.times.end);
            let wake = self.resting.front().map_or(wake, |(until, _)| wake.min(*until));
            let due = self.schedule.next().filter(|_| !self.free.is_empty());
            for index in self.waiter.wait(&mut events, now, wake, due)? {
                self.advance(index);
            }
        }
        if matches!(self.schedule, Schedule::Open { .. }) {
            let waiting = self.slots.iter().filter(|slot| slot.state != State::Idle).count();
            self.meter.overdue = self.schedule.overdue(self.times.end) + waiting as u64;
        }
        Ok(())
    }

    fn begin_what_is_due(&mut self, now: Instant) {
        while let Some(slot) = self.free.last().copied() {
            let Some(due) = self.schedule.take(now) else { break };
            self.free.pop();
            self.begin(slot, due, now);
        }
    }

    fn begin(&mut self, index: usize, due: Instant, now: Instant) {
        self.number += 1;
        let slot = &mut self.slots[index];
        (slot.due, slot.begun, slot.number, slot.received) = (due, now, self.number, 0);
        if slot.socket.is_none() {
            slot.state = State::Connecting;
            let (Plan { targets, sources, .. }, number) = (self.plan, self.next_target);
            let target = targets[number % targets.len()];
            // Each target from each source.
            let source = (!sources.is_empty()).then(|| sources[number / targets.len() % sources.len()]);
            self.next_target += 1;
            match connect(&self.waiter, target, source, index) {
                Ok(socket) => slot.socket = Some(socket),
                Err(error) => self.fail(index, error.into(), now),
            }
        } else if let Err(failure) = self.send(index) {
            self.fail(index, failure, now);
        }
    }

    fn send(&mut self, index: usize) -> Result<(), Failure> {
        let slot = &mut self.slots[index];
        let Some(mut socket) = slot.socket.as_ref() else { return Err(Failure::Closed) };
        let request = Request::Answer { size: self.plan.answer_size, number: slot.number };
        match socket.write(&request.encode()) {
            Ok(HEAD) => {
                slot.state = State::Waiting;
                Ok(())
            }
            Ok(_) => Err(Failure::Malformed),
            // A failed connect says so here; one that is under way asks to come again.
            Err(error) if slot.state == State::Connecting && is_under_way(&error) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn advance(&mut self, index: usize) {
        let result = match self.slots[index].state {
            State::Connecting => self.send(index).map(|()| false),
            State::Waiting => self.receive(index),
            // An edge that says only that there is room to write, or that an idle connection was closed: the next
            // request on it will find out.
            State::Idle => return,
        };
        match result {
            Ok(false) => {}
            Ok(true) => {
                let now = Instant::now();
                let slot = &mut self.slots[index];
                self.meter.answered(self.times, slot.due, now, self.live);
                slot.state = State::Idle;
                if self.plan.workload == Workload::Cps {
                    slot.socket = None;
                }
                match self.schedule.take(now) {
                    Some(due) if now < self.times.end => self.begin(index, due, now),
                    _ => self.free.push(index),
                }
            }
            Err(failure) => self.fail(index, failure, Instant::now()),
        }
    }

    /// Reads what came; whether the answer is whole.
    fn receive(&mut self, index: usize) -> Result<bool, Failure> {
        let slot = &mut self.slots[index];
        let Some(mut socket) = slot.socket.as_ref() else { return Err(Failure::Closed) };
        let size = self.plan.answer_size as usize;
        loop {
            let received = match socket.read(&mut self.received[..size - slot.received]) {
                Ok(0) => return Err(Failure::Closed),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            if slot.received == 0 && !is_answer(&self.received[..received], self.plan.answer_size, slot.number) {
                return Err(Failure::Malformed);
            }
            slot.received += received;
            if slot.received == size {
                return Ok(true);
            }
        }
    }

    fn fail(&mut self, index: usize, failure: Failure, now: Instant) {
        self.meter.failed(failure, self.live);
        let slot = &mut self.slots[index];
        slot.socket = None;
        slot.state = State::Idle;
        self.resting.push_back((now + REST, index));
    }

    fn look_for_timeouts(&mut self, now: Instant) {
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if slot.state != State::Idle && now.saturating_duration_since(slot.begun) > self.plan.timeout {
                self.fail(index, Failure::Timeout, now);
            }
        }
    }
}

fn connect(waiter: &Waiter, target: SocketAddr, source: Option<IpAddr>, number: usize) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if let Some(source) = source {
        // The port is chosen as without: when it is known to what target.
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    match socket.connect(&target.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {}
        Err(error) => return Err(error),
    }
    waiter.add(&socket, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT, number)?;
    Ok(socket)
}

fn is_under_way(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected)
}
