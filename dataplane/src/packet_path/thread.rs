//! The loops: one plain thread a queue, and one for the keeper.
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
use crate::packet_path::keeper::Keeper;
use crate::packet_path::shared::Shared;
use crate::packet_path::tun::{FRAME_LIMIT, Queue, Sender, Tun};
use crate::packet_path::worker::{Action, Worker};

/// Interrupts a blocking read; ignored by everything that does not ask for it.
const WAKE: Signal = Signal::SIGURG;
/// Between two rounds of the keeper: how long an endpoint's end takes to reach its flows, at most.
const ROUND: Duration = Duration::from_millis(20);

/// Milliseconds of the monotonic clock, some behind: the coarse clock costs a few nanoseconds. Deadlines are in its terms.
#[expect(clippy::disallowed_methods, reason = "the one place where the packet path learns the time")]
pub fn now_ms() -> u64 {
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
        let queues = tun.into_queues();
        let out = queues.first().map(Queue::sender).transpose()?;
        for (number, queue) in queues.into_iter().enumerate() {
            let (worker, stop) = (Worker::new(Arc::clone(&shared), number), Arc::clone(&path.stop));
            let drops = Arc::clone(&shared);
            path.spawn(format!("packets-{number}"), move || run(queue, worker, &drops, number, &stop))?;
        }
        let stop = Arc::clone(&path.stop);
        if let Some(out) = out {
            path.spawn("keeper".to_owned(), move || keep(out, shared, &stop))?;
        }
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

fn keep(mut out: Sender, shared: Arc<Shared>, stop: &AtomicBool) {
    let mut keeper = Keeper::new(Arc::clone(&shared));
    let mut send = |frame: &[u8]| {
        if out.send(frame).is_err() {
            shared.drops[0].count(DropReason::Write);
        }
    };
    while !stop.load(Relaxed) {
        if !keeper.round(now_ms(), &mut send) {
            std::thread::park_timeout(ROUND);
        }
    }
}
