//! Questions about names: datagrams from several sockets, so many open on each.
//!
//! A thread drives its sockets by an epoll. A question costs a write and a read, and nothing is allocated for it.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::meter::{Live, Meter};
use super::questions::Question;
use super::schedule::Schedule;
use super::waiter::{EVENTS, Waiter};
use super::{Outcome, Plan, Sample, Share, Times, Workload, drive};
use crate::client::Failure;
use crate::netns::NetNs;

/// How often it is looked for answers that do not come.
const TICK: Duration = Duration::from_millis(50);
/// Longest datagram that is read.
const LONGEST: usize = 4096;
/// Bytes of a message's head.
const HEAD: usize = 12;
/// Room for answers that wait.
const RECEIVE_BUFFER: usize = 1 << 21;

/// A load of questions.
#[derive(Clone, Debug)]
pub struct DnsPlan {
    /// Whom to ask, for how long, how often; connections are sockets.
    pub load: Plan,
    /// Questions that may be open at a time on each socket.
    pub open: usize,
    /// Asked in this order, again and again.
    pub questions: Vec<Question>,
}

/// Codes of answers, and what was wrong with some. Warm-up included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Codes {
    /// Answers by code.
    pub answers: [u64; 16],
    /// Answers that say that there is more than fits.
    pub truncated: u64,
    /// Answers with another code than is right.
    pub unexpected: u64,
    /// Answers to no open question: they came after their time, or twice.
    pub late: u64,
}

impl Codes {
    fn add(&mut self, other: &Self) {
        self.answers.iter_mut().zip(other.answers).for_each(|(sum, more)| *sum += more);
        self.truncated += other.truncated;
        self.unexpected += other.unexpected;
        self.late += other.late;
    }
}

/// Asks from inside `ns` (`None`: where the caller is) and waits for the end. Answers with another code than is right count
/// as answers, too.
///
/// # Errors
/// When the plan is none, or the system refuses sockets.
pub fn run(ns: Option<&NetNs>, plan: &DnsPlan, watch: impl FnMut(&Sample)) -> Result<(Outcome, Codes)> {
    plan.load.check()?;
    ensure!(plan.load.workload == Workload::Rr, "questions are requests");
    ensure!((1..=1 << 15).contains(&plan.open), "--open: use 1 to {}", 1 << 15);
    ensure!(!plan.questions.is_empty(), "no question");
    let threads = plan.load.threads.clamp(1, plan.load.connections);
    let codes = Mutex::new(Codes::default());
    let outcome = drive(ns, &plan.load, threads, watch, |load, share, times, live| {
        let (meter, own) = ask(plan, load, share, times, live)?;
        codes.lock().unwrap_or_else(PoisonError::into_inner).add(&own);
        Ok(meter)
    })?;
    Ok((outcome, codes.into_inner().unwrap_or_else(PoisonError::into_inner)))
}

/// A question that may be open.
struct Slot {
    is_open: bool,
    /// The upper part of its id: differs from that of the question before.
    round: u16,
    question: usize,
    /// When it was due.
    due: Instant,
    /// When it was sent: what the timeout counts from.
    sent: Instant,
}

struct Asker<'a> {
    plan: &'a DnsPlan,
    times: Times,
    live: &'a Live,
    schedule: Schedule,
    sockets: Vec<UdpSocket>,
    /// Those of all sockets, one socket's after another's.
    slots: Vec<Slot>,
    free: VecDeque<usize>,
    next: usize,
    out: [u8; 512],
    received: Box<[u8]>,
    meter: Meter,
    codes: Codes,
}

fn ask(plan: &DnsPlan, load: &Plan, share: Share, times: Times, live: &Live) -> Result<(Meter, Codes)> {
    let waiter = Waiter::new()?;
    let sockets: Vec<UdpSocket> = (0..share.connections)
        .map(|index| open_socket(load.targets[(share.index + index) % load.targets.len()]))
        .collect::<Result<_>>()?;
    for (index, socket) in sockets.iter().enumerate() {
        waiter.add(socket, EpollFlags::EPOLLIN, index).context("epoll")?;
    }
    let count = sockets.len() * plan.open;
    let slot = |_| Slot { is_open: false, round: 0, question: 0, due: times.start, sent: times.start };
    let mut asker = Asker {
        plan,
        times,
        live,
        schedule: Schedule::new(times.start, load.rate, share.index, share.threads),
        sockets,
        slots: (0..count).map(slot).collect(),
        // In turns between the sockets.
        free: (0..plan.open).flat_map(|at| (0..count / plan.open).map(move |socket| socket * plan.open + at)).collect(),
        // Threads ask different things at a time.
        next: share.index * plan.questions.len() / share.threads,
        out: [0; 512],
        received: vec![0; LONGEST].into(),
        meter: Meter::default(),
        codes: Codes::default(),
    };
    asker.run(&waiter)?;
    Ok((asker.meter, asker.codes))
}

fn open_socket(target: SocketAddr) -> Result<UdpSocket> {
    let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
    let socket = UdpSocket::bind(any).context("cannot open a socket")?;
    socket.connect(target).with_context(|| format!("cannot ask {target}"))?;
    socket.set_nonblocking(true)?;
    // As much as the kernel allows; less is no reason to end.
    let _ = socket2::SockRef::from(&socket).set_recv_buffer_size(RECEIVE_BUFFER);
    Ok(socket)
}

impl Asker<'_> {
    fn run(&mut self, waiter: &Waiter) -> Result<()> {
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
            self.ask_what_is_due(now);
            let due = self.schedule.next().filter(|_| !self.free.is_empty());
            for index in waiter.wait(&mut events, now, next_tick.min(self.times.end), due)? {
                self.receive(index);
            }
        }
        if self.plan.load.rate.is_some() {
            let waiting = self.slots.iter().filter(|slot| slot.is_open).count();
            self.meter.overdue = self.schedule.overdue(self.times.end) + waiting as u64;
        }
        Ok(())
    }

    fn ask_what_is_due(&mut self, now: Instant) {
        while let Some(slot) = self.free.front().copied() {
            let Some(due) = self.schedule.take(now) else { break };
            self.free.pop_front();
            if !self.send(slot, due, now) {
                break;
            }
        }
    }

    /// Asks the next question; whether it could be sent.
    fn send(&mut self, index: usize, due: Instant, now: Instant) -> bool {
        let question = &self.plan.questions[self.next];
        let slot = &mut self.slots[index];
        slot.round = slot.round.wrapping_add(1);
        (slot.is_open, slot.question, slot.due, slot.sent) = (true, self.next, due, now);
        self.next = if self.next + 1 == self.plan.questions.len() { 0 } else { self.next + 1 };
        let message = &mut self.out[..question.wire.len()];
        message.copy_from_slice(&question.wire);
        message[..2].copy_from_slice(&id(self.plan.open, index % self.plan.open, slot.round).to_be_bytes());
        match self.sockets[index / self.plan.open].send(message) {
            Ok(_) => true,
            // No room: as lost on the way, it is missed later.
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => {
                self.slots[index].is_open = false;
                self.free.push_back(index);
                self.meter.failed(error.into(), self.live);
                false
            }
        }
    }

    /// Takes all answers that wait at a socket, and asks on.
    fn receive(&mut self, socket: usize) {
        loop {
            let length = match self.sockets[socket].recv(&mut self.received) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Who refuses is not to be asked at once again: the question is missed later.
                    self.meter.failed(error.into(), self.live);
                    continue;
                }
            };
            let Some(index) = self.answered(socket, length) else { continue };
            let now = Instant::now();
            self.slots[index].is_open = false;
            self.meter.answered(self.times, self.slots[index].due, now, self.live);
            match self.schedule.take(now) {
                Some(due) if now < self.times.end => drop(self.send(index, due, now)),
                _ => self.free.push_back(index),
            }
        }
    }

    /// The open question that this is the answer of.
    fn answered(&mut self, socket: usize, length: usize) -> Option<usize> {
        let message = &self.received[..length];
        if length < HEAD || message[2] & 0x80 == 0 {
            self.meter.failed(Failure::Malformed, self.live);
            return None;
        }
        let given = u16::from_be_bytes([message[0], message[1]]);
        let at = usize::from(given) % self.plan.open.next_power_of_two();
        let index = socket * self.plan.open + at;
        let slot = self.slots.get(index).filter(|slot| at < self.plan.open && slot.is_open);
        let Some(slot) = slot.filter(|slot| id(self.plan.open, at, slot.round) == given) else {
            self.codes.late += 1;
            return None;
        };
        let code = message[3] & 0xf;
        self.codes.answers[usize::from(code)] += 1;
        self.codes.truncated += u64::from(message[2] & 0x02 != 0);
        let expected = self.plan.questions[slot.question].code;
        self.codes.unexpected += u64::from(expected.is_some_and(|expected| expected != code));
        Some(index)
    }

    fn look_for_timeouts(&mut self, now: Instant) {
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.is_open && now.saturating_duration_since(slot.sent) > self.plan.load.timeout {
                slot.is_open = false;
                self.free.push_back(index);
                self.meter.failed(Failure::Timeout, self.live);
            }
        }
    }
}

/// The id of a question: its place among its socket's, and the round above that.
fn id(open: usize, at: usize, round: u16) -> u16 {
    let places = open.next_power_of_two() as u16;
    at as u16 | round.wrapping_mul(places)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;

    /// Answers with the question itself and this code, but for every `lost`th.
    fn server(code: u8, lost: u32, stop: &AtomicBool, socket: &UdpSocket) {
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let (mut message, mut count) = ([0; 512], 0);
        while !stop.load(Relaxed) {
            let Ok((length, from)) = socket.recv_from(&mut message) else { continue };
            count += 1;
            if count % lost != 0 {
                message[2] |= 0x80;
                message[3] |= code;
                socket.send_to(&message[..length], from).unwrap();
                // The second of two is no answer.
                if count % 100 == 1 {
                    socket.send_to(&message[..length], from).unwrap();
                }
            }
        }
    }

    fn load(code: u8, lost: u32, rate: Option<f64>) -> (Outcome, Codes) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let targets = vec![socket.local_addr().unwrap()];
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| server(code, lost, &stop, &socket));
            let load = Plan {
                connections: 3,
                threads: 2,
                warmup: Duration::ZERO,
                duration: Duration::from_millis(300),
                timeout: Duration::from_millis(60),
                rate,
                ..Plan::new(Workload::Rr, targets)
            };
            let kind = hickory_proto::rr::RecordType::A;
            let question = Question::new("example.org", kind, None, Some(hickory_proto::op::ResponseCode::NoError));
            let plan = DnsPlan { load, open: 5, questions: vec![question.unwrap()] };
            let result = run(None, &plan, |_| {});
            stop.store(true, Relaxed);
            result.unwrap()
        })
    }

    #[test]
    fn answers_are_told_apart_from_what_is_none() {
        let (outcome, codes) = load(0, u32::MAX, None);
        assert!(outcome.answered > 100 && outcome.failed() == 0, "{outcome:?}");
        assert!(codes.answers[0] >= outcome.answered && codes.unexpected == 0 && codes.late > 0, "{codes:?}");
        let (outcome, codes) = load(3, 50, None);
        assert!(outcome.failures.contains_key("timeout") && outcome.failures.len() == 1, "{outcome:?}");
        assert!(codes.answers[3] > 0 && codes.unexpected == codes.answers[3], "{codes:?}");
    }

    #[test]
    fn questions_are_asked_when_they_are_due() {
        let (outcome, _) = load(0, u32::MAX, Some(200.0));
        assert!(outcome.answered <= 60, "{outcome:?}");
    }

    #[test]
    fn ids_of_a_place_differ_from_round_to_round() {
        for open in [1, 5, 8, 1 << 15] {
            let at = open - 1;
            assert_ne!(id(open, at, 1), id(open, at, 2), "{open}");
            assert_eq!(usize::from(id(open, at, 7)) % open.next_power_of_two(), at, "{open}");
        }
    }
}
