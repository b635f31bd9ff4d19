//! From the bytes of a question to those of its answer, whichever way they came. Asks upstream where the zone does not know.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use fastrand::Rng;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::Name;

use super::answer::{Answer, Question, Record, Resolution};
use super::message::{Refusal, Transport, encode, read};
use super::stats::{Counters, Source, Totals, totals};
use super::zone::Zone;

/// Who is asked for names that are not ours.
pub trait Upstream: Send + Sync {
    /// Asks, and tells what comes of it: once, now or later, on any thread.
    fn ask(&self, question: &Question, then: Box<dyn FnOnce(Result<Told, Failure>) + Send>);
}

/// What an upstream says.
#[derive(Clone, Debug)]
pub struct Told {
    /// The answer. Its records have owners.
    pub answer: Answer,
    /// Whether it was asked just now.
    pub source: Source,
}

/// Why an upstream says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Too much is being asked already, or nobody can be asked.
    Refused,
    /// No server answers.
    Silent,
}

/// Sends an answer to who asked.
pub(super) type Reply = Box<dyn FnOnce(&[u8]) + Send>;

/// What all threads of a responder share.
pub struct Answerer {
    zone: ArcSwap<Zone>,
    upstream: Option<Arc<dyn Upstream>>,
    /// One for each thread, and one for what upstreams answer.
    counters: Box<[Counters]>,
}

impl Answerer {
    /// For so many threads, before anything is known.
    #[must_use]
    pub fn new(zone: Arc<Zone>, upstream: Option<Arc<dyn Upstream>>, threads: usize) -> Arc<Self> {
        let counters = (0..=threads).map(|_| Counters::default()).collect();
        Arc::new(Self { zone: ArcSwap::new(zone), upstream, counters })
    }

    /// Swaps the zone: the next question sees it.
    pub fn publish(&self, zone: Arc<Zone>) {
        self.zone.store(zone);
    }

    /// The zone in force.
    #[must_use]
    pub fn zone(&self) -> Arc<Zone> {
        self.zone.load_full()
    }

    /// What was asked so far, and how it went.
    #[must_use]
    pub fn totals(&self) -> Totals {
        totals(self.counters.iter())
    }

    /// Resolves a question as clients' are, for who wants no bytes.
    pub fn resolve(&self, question: &Question, rng: &mut Rng, then: Box<dyn FnOnce(Answer) + Send>) {
        match self.zone.load().resolve(question, rng) {
            Resolution::Answer(answer) => then(answer),
            Resolution::Forward => self.forward(question, Box::new(move |told| then(forwarded(told).0))),
            Resolution::Complete { aliases, target, otherwise } => {
                let next = Question { name: target, kind: question.kind };
                let target = next.name.clone();
                self.forward(&next, Box::new(move |told| then(complete(aliases, target, otherwise, told).0)));
            }
        }
    }

    /// Answers a datagram from the zone alone. When the zone does not know, or there is something wrong with the question,
    /// nothing is counted and nothing is in `out`: it is for [`Self::handle`].
    #[expect(clippy::disallowed_methods, reason = "how long clients wait is measured where they wait")]
    pub(crate) fn answer_now(
        &self,
        message: &[u8],
        from: &SocketAddr,
        (thread, rng): (usize, &mut Rng),
        out: &mut Vec<u8>,
    ) -> bool {
        let begun = Instant::now();
        if self.answer_quickly(message, (Transport::Udp, from), (thread, rng), begun, out) {
            return true;
        }
        let Ok(request) = read(message) else { return false };
        let Resolution::Answer(answer) = self.zone.load().resolve(&request.question, rng) else { return false };
        let by = Transport::Udp;
        encode(&request, &answer, by, self.upstream.is_some(), out);
        let counters = &self.counters[thread];
        counters.asked(by, from, request.question.kind, message.len(), request.dnssec_ok());
        counters.answered(by, Source::Zone, answer.code, out.len(), begun.elapsed());
        true
    }

    /// Handles a message. The answer is in `out` when there is one now; one that comes later goes to what `later` makes.
    #[expect(clippy::disallowed_methods, reason = "how long clients wait is measured where they wait")]
    pub(super) fn handle(
        self: &Arc<Self>,
        message: &[u8],
        (by, from): (Transport, &SocketAddr),
        (thread, rng): (usize, &mut Rng),
        out: &mut Vec<u8>,
        later: impl FnOnce() -> Reply,
    ) -> bool {
        let begun = Instant::now();
        if self.answer_quickly(message, (by, from), (thread, rng), begun, out) {
            return true;
        }
        let counters = &self.counters[thread];
        let request = match read(message) {
            Ok(request) => request,
            Err(Refusal::Silence) => return false,
            Err(Refusal::Answer(bytes, code)) => {
                out.clear();
                out.extend_from_slice(&bytes);
                counters.answered(by, Source::Refused, code, out.len(), begun.elapsed());
                return true;
            }
        };
        counters.asked(by, from, request.question.kind, message.len(), request.dnssec_ok());
        let (next, finish): (Question, Finish) = match self.zone.load().resolve(&request.question, rng) {
            Resolution::Answer(answer) => {
                encode(&request, &answer, by, self.upstream.is_some(), out);
                counters.answered(by, Source::Zone, answer.code, out.len(), begun.elapsed());
                return true;
            }
            Resolution::Forward => (request.question.clone(), Box::new(forwarded)),
            Resolution::Complete { aliases, target, otherwise } => {
                let next = Question { name: target.clone(), kind: request.question.kind };
                (next, Box::new(|told| complete(aliases, target, otherwise, told)))
            }
        };
        let (this, reply) = (Arc::clone(self), later());
        let then = move |told| {
            let (answer, source) = finish(told);
            let mut out = Vec::new();
            encode(&request, &answer, by, this.upstream.is_some(), &mut out);
            let counters = &this.counters[this.counters.len() - 1];
            counters.answered(by, source, answer.code, out.len(), begun.elapsed());
            reply(&out);
        };
        self.forward(&next, Box::new(then));
        false
    }

    fn answer_quickly(
        &self,
        message: &[u8],
        (by, from): (Transport, &SocketAddr),
        (thread, rng): (usize, &mut Rng),
        begun: Instant,
        out: &mut Vec<u8>,
    ) -> bool {
        let Some(quick) = self.zone.load().quick(message, by, self.upstream.is_some(), rng, out) else { return false };
        let counters = &self.counters[thread];
        counters.asked(by, from, quick.kind, message.len(), quick.dnssec_ok);
        counters.answered(by, Source::Zone, quick.code, out.len(), begun.elapsed());
        true
    }

    fn forward(&self, question: &Question, then: Box<dyn FnOnce(Result<Told, Failure>) + Send>) {
        match &self.upstream {
            Some(upstream) => upstream.ask(question, then),
            None => then(Err(Failure::Refused)),
        }
    }
}

/// Makes an answer of what an upstream says.
type Finish = Box<dyn FnOnce(Result<Told, Failure>) -> (Answer, Source) + Send>;

/// The answer to a question that was passed on.
fn forwarded(told: Result<Told, Failure>) -> (Answer, Source) {
    let failed = |code, source| (Answer { code, ..Answer::default() }, source);
    match told {
        Ok(told) => (told.answer, told.source),
        Err(Failure::Refused) => failed(ResponseCode::Refused, Source::Refused),
        Err(Failure::Silent) => failed(ResponseCode::ServFail, Source::Upstream),
    }
}

/// The answer to a question whose aliases lead out of the zone: with what is there, or without anything.
fn complete(
    mut aliases: Vec<Record>,
    target: Name,
    otherwise: Answer,
    told: Result<Told, Failure>,
) -> (Answer, Source) {
    match told {
        Ok(told) if matches!(told.answer.code, ResponseCode::NoError | ResponseCode::NXDomain) => {
            let owned = |record: Record| Record { owner: record.owner.or_else(|| Some(target.clone())), ..record };
            aliases.extend(told.answer.answers.into_iter().map(owned));
            let truncated = told.answer.truncated;
            (Answer { authoritative: true, truncated, answers: aliases, ..Answer::default() }, told.source)
        }
        Ok(told) => (otherwise, told.source),
        Err(Failure::Refused) => (otherwise, Source::Refused),
        Err(Failure::Silent) => (otherwise, Source::Upstream),
    }
}
