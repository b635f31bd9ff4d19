//! What is counted while a load runs, without allocation, and what it adds up to.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use serde::Serialize;

use crate::client::Failure;
use crate::workload::{Outcome, Plan, Sample, Times, Workload};

const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// An empty histogram of nanoseconds, up to a minute.
#[must_use]
pub fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(64, 60_000_000_000, 3).expect("the bounds and the precision are valid")
}

/// Microseconds of processor time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cpu {
    /// In the program itself.
    pub user_us: f64,
    /// In the kernel on its behalf.
    pub system_us: f64,
}

impl Cpu {
    /// What this process has used until now.
    #[must_use]
    pub fn of_process() -> Self {
        Self::of(UsageWho::RUSAGE_SELF)
    }

    fn of_thread() -> Self {
        Self::of(UsageWho::RUSAGE_THREAD)
    }

    fn of(who: UsageWho) -> Self {
        let micros = |time: TimeVal| time.tv_sec() as f64 * 1e6 + time.tv_usec() as f64;
        // It fails only for a wrong argument.
        getrusage(who).map_or_else(
            |_| Self::default(),
            |usage| Self { user_us: micros(usage.user_time()), system_us: micros(usage.system_time()) },
        )
    }

    /// What was used since an earlier moment.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self { user_us: self.user_us - earlier.user_us, system_us: self.system_us - earlier.system_us }
    }

    /// A part of it for each of `count`.
    #[must_use]
    pub fn each(self, count: f64) -> Self {
        if count > 0.0 {
            Self { user_us: self.user_us / count, system_us: self.system_us / count }
        } else {
            Self::default()
        }
    }
}

/// What others may see of a running thread; a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Live {
    answered: AtomicU64,
    bytes: AtomicU64,
    failures: AtomicU64,
    latency_ns: AtomicU64,
}

impl Live {
    fn read(lives: &[Self]) -> [u64; 4] {
        let sum = |of: fn(&Self) -> &AtomicU64| lives.iter().map(|live| of(live).load(Relaxed)).sum();
        [sum(|l| &l.answered), sum(|l| &l.bytes), sum(|l| &l.failures), sum(|l| &l.latency_ns)]
    }
}

/// One writer only, so there is no need for a locked addition.
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(count), Relaxed);
}

/// One thread's counts.
#[derive(Debug)]
pub(super) struct Meter {
    answered: u64,
    bytes: u64,
    /// Of the whole run, warm-up included: what processor time is divided by.
    answered_ever: u64,
    bytes_ever: u64,
    failures: BTreeMap<Failure, u64>,
    pub(super) overdue: u64,
    latency: Histogram<u64>,
    cpu: Cpu,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            answered: 0,
            bytes: 0,
            answered_ever: 0,
            bytes_ever: 0,
            failures: BTreeMap::new(),
            overdue: 0,
            latency: new_histogram(),
            cpu: Cpu::default(),
        }
    }
}

impl Meter {
    /// An answer that came `now` to a request that was due then.
    pub(super) fn answered(&mut self, times: Times, due: Instant, now: Instant, live: &Live) {
        let latency = now.saturating_duration_since(due).as_nanos().try_into().unwrap_or(u64::MAX);
        self.answered_ever += 1;
        if now >= times.begin && now < times.end {
            self.answered += 1;
            self.latency.saturating_record(latency);
        }
        add(&live.answered, 1);
        add(&live.latency_ns, latency);
    }

    /// Bytes that came `now`.
    pub(super) fn bytes(&mut self, times: Times, count: u64, now: Instant, live: &Live) {
        self.bytes_ever += count;
        if now >= times.begin && now < times.end {
            self.bytes += count;
        }
        add(&live.bytes, count);
    }

    /// A failure.
    pub(super) fn failed(&mut self, failure: Failure, live: &Live) {
        *self.failures.entry(failure).or_default() += 1;
        add(&live.failures, 1);
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.answered += other.answered;
        self.bytes += other.bytes;
        self.answered_ever += other.answered_ever;
        self.bytes_ever += other.bytes_ever;
        for (failure, count) in &other.failures {
            *self.failures.entry(*failure).or_default() += count;
        }
        self.overdue += other.overdue;
        self.latency.add(&other.latency).expect("all meters have the same bounds");
        self.cpu.user_us += other.cpu.user_us;
        self.cpu.system_us += other.cpu.system_us;
    }

    pub(super) fn outcome(self, plan: &Plan, samples: Vec<Sample>) -> Outcome {
        let seconds = plan.duration.as_secs_f64();
        let (rate, total) = match plan.workload {
            Workload::Bulk => (self.bytes as f64 * 8e-9 / seconds, self.bytes_ever as f64 / 1e6),
            Workload::Cps | Workload::Rr => (self.answered as f64 / seconds, self.answered_ever as f64),
        };
        Outcome {
            rate,
            answered: self.answered,
            bytes: self.bytes,
            failures: self.failures.iter().map(|(failure, count)| (failure.to_string(), *count)).collect(),
            overdue: self.overdue,
            latency: self.latency,
            total,
            cpu: self.cpu.each(total),
            samples,
        }
    }
}

/// Runs a thread's part and notes what processor time it took.
pub(super) fn with_cpu(work: impl FnOnce() -> Result<Meter>) -> Result<Meter> {
    let before = Cpu::of_thread();
    let mut meter = work()?;
    meter.cpu = Cpu::of_thread().since(before);
    Ok(meter)
}

/// Watches a load until its end, or until `all_ended`.
pub(super) fn sample(
    lives: &[Live],
    plan: &Plan,
    times: Times,
    watch: &mut dyn FnMut(&Sample),
    all_ended: impl Fn() -> bool,
) -> Vec<Sample> {
    let mut samples = Vec::new();
    let (mut last, mut last_at) = (Live::read(lives), times.start);
    loop {
        thread::sleep(SAMPLE_INTERVAL.min(times.end.saturating_duration_since(Instant::now())));
        let (now, at) = (Live::read(lives), Instant::now());
        let seconds = at.saturating_duration_since(last_at).as_secs_f64();
        if seconds > 0.01 {
            let [answered, bytes, failures, latency] = std::array::from_fn(|i| now[i].wrapping_sub(last[i]));
            let count = match plan.workload {
                Workload::Bulk => bytes as f64 * 8e-9,
                Workload::Cps | Workload::Rr => answered as f64,
            };
            let sample = Sample {
                at: at.saturating_duration_since(times.start).as_secs_f64(),
                measured: last_at >= times.begin,
                rate: count / seconds,
                failures,
                mean_us: if answered > 0 { latency as f64 / answered as f64 / 1000.0 } else { 0.0 },
            };
            watch(&sample);
            samples.push(sample);
        }
        (last, last_at) = (now, at);
        if at >= times.end || all_ended() {
            return samples;
        }
    }
}
