//! What was asked and how it went: counters, one set for each thread that counts.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use super::message::Transport;
use crate::net::Family;

/// Types with a counter of their own; all others share one.
const TYPES: [RecordType; 12] = [
    RecordType::A,
    RecordType::AAAA,
    RecordType::SRV,
    RecordType::PTR,
    RecordType::CNAME,
    RecordType::TXT,
    RecordType::SOA,
    RecordType::NS,
    RecordType::MX,
    RecordType::HTTPS,
    RecordType::SVCB,
    RecordType::ANY,
];
/// Codes with a counter of their own; all others share one.
const CODES: [(ResponseCode, &str); 7] = [
    (ResponseCode::NoError, "NOERROR"),
    (ResponseCode::NXDomain, "NXDOMAIN"),
    (ResponseCode::ServFail, "SERVFAIL"),
    (ResponseCode::Refused, "REFUSED"),
    (ResponseCode::FormErr, "FORMERR"),
    (ResponseCode::NotImp, "NOTIMP"),
    (ResponseCode::BADVERS, "BADVERS"),
];
/// Bounds of durations in microseconds: 250 µs, doubled fifteen times.
pub const DURATIONS: usize = 16;
/// Bounds of sizes in bytes.
pub const SIZES: [u64; 12] = [100, 200, 300, 400, 511, 1023, 2047, 4095, 8291, 16_000, 32_000, 64_000];

/// Where an answer is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The zone.
    Zone,
    /// An earlier answer of an upstream.
    Cache,
    /// An upstream.
    Upstream,
    /// Nobody was asked.
    Refused,
}

impl Source {
    const ALL: [Self; 4] = [Self::Zone, Self::Cache, Self::Upstream, Self::Refused];

    /// Name as metric label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zone => "zone",
            Self::Cache => "cache",
            Self::Upstream => "upstream",
            Self::Refused => "none",
        }
    }
}

/// A histogram: how many were at most each bound and more than the one before, how many were more, and their sum.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// By bound, and one more for what exceeds all.
    pub counts: Vec<u64>,
    /// Sum of all.
    pub sum: u64,
}

/// Totals of all threads.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Questions by transport, family and type.
    pub requests: Vec<(Transport, Family, &'static str, u64)>,
    /// Answers by code and source.
    pub responses: Vec<(&'static str, Source, u64)>,
    /// Time to the answer in microseconds, by source.
    pub durations: Vec<(Source, Histogram)>,
    /// Sizes of questions by transport.
    pub request_sizes: Vec<(Transport, Histogram)>,
    /// Sizes of answers by transport.
    pub response_sizes: Vec<(Transport, Histogram)>,
    /// Questions for signatures.
    pub dnssec_requests: u64,
}

/// Counters of one thread.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Counters {
    requests: [[[AtomicU64; TYPES.len() + 1]; 2]; 2],
    responses: [[AtomicU64; CODES.len() + 1]; 4],
    durations: [[AtomicU64; DURATIONS + 2]; 4],
    request_sizes: [[AtomicU64; SIZES.len() + 2]; 2],
    response_sizes: [[AtomicU64; SIZES.len() + 2]; 2],
    dnssec_requests: AtomicU64,
}

impl Counters {
    pub(super) fn asked(&self, by: Transport, from: &SocketAddr, kind: RecordType, size: usize, dnssec: bool) {
        let at = TYPES.iter().position(|known| *known == kind).unwrap_or(TYPES.len());
        add(&self.requests[by as usize][usize::from(from.is_ipv6())][at], 1);
        observe(&self.request_sizes[by as usize], SIZES, size as u64);
        add(&self.dnssec_requests, u64::from(dnssec));
    }

    pub(super) fn answered(&self, by: Transport, source: Source, code: ResponseCode, size: usize, took: Duration) {
        let at = CODES.iter().position(|(known, _)| *known == code).unwrap_or(CODES.len());
        add(&self.responses[source as usize][at], 1);
        observe(&self.response_sizes[by as usize], SIZES, size as u64);
        let bounds: [u64; DURATIONS] = std::array::from_fn(|power| 250 << power);
        observe(&self.durations[source as usize], bounds, took.as_micros() as u64);
    }
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Relaxed);
}

fn observe<const N: usize>(counters: &[AtomicU64], bounds: [u64; N], value: u64) {
    add(&counters[bounds.iter().position(|bound| value <= *bound).unwrap_or(N)], 1);
    add(&counters[N + 1], value);
}

/// Sums over threads. Combinations that never came are left out.
pub(super) fn totals<'c>(all: impl Iterator<Item = &'c Counters> + Clone) -> Totals {
    let sum = |read: &dyn Fn(&Counters) -> &AtomicU64| all.clone().map(|it| read(it).load(Relaxed)).sum::<u64>();
    let histogram = |read: &dyn Fn(&Counters) -> &[AtomicU64], bounds: usize| Histogram {
        counts: (0..=bounds).map(|at| sum(&|it| &read(it)[at])).collect(),
        sum: sum(&|it| &read(it)[bounds + 1]),
    };
    let mut totals = Totals { dnssec_requests: sum(&|it| &it.dnssec_requests), ..Totals::default() };
    for by in [Transport::Udp, Transport::Tcp] {
        totals.request_sizes.push((by, histogram(&|it| &it.request_sizes[by as usize], SIZES.len())));
        totals.response_sizes.push((by, histogram(&|it| &it.response_sizes[by as usize], SIZES.len())));
        for family in Family::BOTH {
            for at in 0..=TYPES.len() {
                let count = sum(&|it| &it.requests[by as usize][family as usize][at]);
                if count > 0 {
                    let name = TYPES.get(at).map_or("other", |kind| (*kind).into());
                    totals.requests.push((by, family, name, count));
                }
            }
        }
    }
    for source in Source::ALL {
        totals.durations.push((source, histogram(&|it| &it.durations[source as usize], DURATIONS)));
        for at in 0..=CODES.len() {
            let count = sum(&|it| &it.responses[source as usize][at]);
            if count > 0 {
                totals.responses.push((CODES.get(at).map_or("other", |(_, name)| name), source, count));
            }
        }
    }
    totals
}
