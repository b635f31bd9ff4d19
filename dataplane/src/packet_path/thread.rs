//! The loop: one plain thread a queue, and one that sweeps expired flows.
#![expect(unsafe_code, reason = "a signal wakes a thread from its read")]

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::time::{ClockId, clock_gettime};

use crate::packet_path::drops::Drop as DropReason;
use crate::packet_path::shared::Shared;
use crate::packet_path::tun::{FRAME_LIMIT, Queue, Tun};
use crate::packet_path::worker::{Action, Worker};

/// Interrupts a blocking read; ignored by everything that does not ask for it.
const WAKE: Signal = Signal::SIGURG;
/// A flow is looked at by the sweep once in this many rounds.
const SWEEP_ROUNDS: usize = 4;
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Records swept under one hold of the flow table's lock.
const SWEEP_STEP: usize = 256;

/// Milliseconds of the monotonic clock, some behind: the coarse clock costs a few nanoseconds.
#[expect(clippy::disallowed_methods, reason = "the one place where the packet path learns the time")]
pub(super) fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).expect("Linux has this clock");
    now.tv_sec() as u64 * 1000 + now.tv_nsec() as u64 / 1_000_000
}

/// The running packet path.
pub struct PacketPath {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl PacketPath {
    /// Starts a thread for each queue of `tun`, which must be as many as `shared` was made for.
    pub fn start(tun: Tun, shared: Arc<Shared>) -> io::Result<Self> {
        extern "C" fn woken(_: libc::c_int) {}
        let action = SigAction::new(SigHandler::Handler(woken), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, which is safe in a signal handler.
        unsafe { sigaction(WAKE, &action) }?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut path = Self { stop, threads: Vec::new() };
        for (number, queue) in tun.into_queues().into_iter().enumerate() {
            let (worker, stop) = (Worker::new(Arc::clone(&shared), number), Arc::clone(&path.stop));
            let drops = Arc::clone(&shared);
            path.spawn(format!("packets-{number}"), move || run(queue, worker, &drops, number, &stop))?;
        }
        let stop = Arc::clone(&path.stop);
        path.spawn("sweep".to_owned(), move || sweep(&shared, &stop))?;
        Ok(path)
    }

    /// Whether every thread still runs. They end by themselves only when the link is taken away.
    pub fn is_running(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Stops all threads and closes the queues.
    pub fn stop(mut self) {
        self.stop_threads();
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(std::thread::Builder::new().name(name).spawn(body)?);
        Ok(())
    }

    fn stop_threads(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            while !thread.is_finished() {
                // A signal that comes just before the read is lost, so it is repeated.
                // SAFETY: the thread is not joined yet, so its handle is valid.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), WAKE as libc::c_int) };
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.join().is_err() {
                tracing::error!("a packet thread panicked");
            }
        }
    }
}

impl Drop for PacketPath {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

fn run(mut queue: Queue, mut worker: Worker, shared: &Shared, thread: usize, stop: &AtomicBool) {
    let mut frame = vec![0; FRAME_LIMIT];
    while !stop.load(Relaxed) {
        let length = match queue.read(&mut frame) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, thread, "the TUN link cannot be read any more");
                return;
            }
        };
        let sent = match worker.handle(&mut frame[..length], now_ms()) {
            Action::Send => queue.send(&frame[..length]),
            Action::Answer(length) => queue.send(worker.answer(length)),
            Action::Discard => Ok(()),
        };
        if sent.is_err() {
            shared.drops[thread].count(DropReason::Write);
        }
    }
}

fn sweep(shared: &Shared, stop: &AtomicBool) {
    while !stop.load(Relaxed) {
        std::thread::park_timeout(SWEEP_INTERVAL);
        let mut left = shared.flows.used().div_ceil(SWEEP_ROUNDS);
        while left > 0 && !stop.load(Relaxed) {
            let step = left.min(SWEEP_STEP);
            shared.flows.sweep(now_ms(), step);
            left -= step;
        }
        shared.affinity.sweep(now_ms());
    }
}
