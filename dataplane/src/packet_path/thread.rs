//! The loops: one plain thread a queue, and one for the keeper.
#![expect(unsafe_code, reason = "a signal wakes a thread from its read")]

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::time::{ClockId, clock_gettime};

use crate::packet_path::drops::Drop as DropReason;
use crate::packet_path::keeper::Keeper;
use crate::packet_path::shared::Shared;
use crate::packet_path::steer;
use crate::packet_path::tun::{FRAME_LIMIT, Queue, Sender, Tun};
use crate::packet_path::wire::{ROOM, Wire};
use crate::packet_path::worker::{Action, Worker, count};

/// Interrupts a blocking read; ignored by everything that does not ask for it.
const WAKE: Signal = Signal::SIGURG;
/// Between two rounds of the keeper: how long an endpoint's end takes to reach its flows, at most.
const ROUND: Duration = Duration::from_millis(20);

/// Frames taken from a queue after its thread was told to stop: as many as a link holds by default.
const LAST_FRAMES: usize = 500;

/// Milliseconds of the monotonic clock, some behind: the coarse clock costs a few nanoseconds. Deadlines are in its terms.
#[expect(clippy::disallowed_methods, reason = "the one place where the packet path learns the time")]
pub fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).expect("Linux has this clock");
    now.tv_sec() as u64 * 1000 + now.tv_nsec() as u64 / 1_000_000
}

/// How the packet path is to end.
const RUN: u8 = 0;
const KEEP_LINK: u8 = 1;
const REMOVE_LINK: u8 = 2;

/// What the threads and their owner tell each other.
#[derive(Default)]
struct Course {
    end: AtomicU8,
    /// Packet threads are to end.
    stop: AtomicBool,
    /// A packet thread ended by itself.
    broken: AtomicBool,
}

/// The running packet path. Dropping it stops it and leaves a persistent link, as if the process had died.
pub struct PacketPath {
    course: Arc<Course>,
    keeper: Option<JoinHandle<()>>,
}

impl PacketPath {
    /// Starts a thread for each queue of `tun`, which must be as many as `shared` was made for. Fails with `PermissionDenied`
    /// without `CAP_NET_RAW`, where packets are to be sent on links.
    pub fn start(tun: Tun, shared: Arc<Shared>) -> io::Result<Self> {
        extern "C" fn woken(_: libc::c_int) {}
        let action = SigAction::new(SigHandler::Handler(woken), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, which is safe in a signal handler.
        unsafe { sigaction(WAKE, &action) }?;
        let course = Arc::new(Course::default());
        let queues = tun.into_queues();
        let first = queues.first().ok_or(io::ErrorKind::InvalidInput)?;
        let out = first.sender()?;
        if queues.len() > 1
            && let Err(error) = steer::by_processor(first)
        {
            tracing::info!(%error, "the kernel spreads packets over the queues by a table of its own");
        }
        let mut threads = Threads { course: Arc::clone(&course), threads: Vec::new() };
        for (number, queue) in queues.into_iter().enumerate() {
            let (worker, shared) = (Worker::new(Arc::clone(&shared), number), Arc::clone(&shared));
            let course = Arc::clone(&course);
            let wire = shared.settings.ways.clone().map(Wire::open).transpose()?;
            let body = move || run(queue, worker, wire.as_ref(), &shared, number, &course);
            threads.threads.push(std::thread::Builder::new().name(format!("packets-{number}")).spawn(body)?);
        }
        let body = move || keep(out, &shared, threads);
        let keeper = std::thread::Builder::new().name("keeper".to_owned()).spawn(body)?;
        Ok(Self { course, keeper: Some(keeper) })
    }

    /// Whether every thread still runs. They end by themselves only when the link is taken away, or when another process
    /// takes over ([`Shared::is_superseded`]).
    pub fn is_running(&self) -> bool {
        !self.course.broken.load(Relaxed) && self.keeper.as_ref().is_some_and(|keeper| !keeper.is_finished())
    }

    /// Stops all threads, closes the queues and removes the link.
    pub fn stop(mut self) {
        self.end(REMOVE_LINK);
    }

    fn end(&mut self, how: u8) {
        let Some(keeper) = self.keeper.take() else { return };
        self.course.end.store(how, Relaxed);
        keeper.thread().unpark();
        if keeper.join().is_err() {
            tracing::error!("the keeper panicked");
        }
    }
}

impl Drop for PacketPath {
    fn drop(&mut self) {
        self.end(KEEP_LINK);
    }
}

/// The packet threads, which are stopped when this is dropped.
struct Threads {
    course: Arc<Course>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.course.stop.store(true, Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            while !thread.is_finished() {
                // A signal that comes just before the read is lost, so it is repeated.
                // SAFETY: the thread is not joined yet, so its handle is valid.
                unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, WAKE as libc::c_int) };
                std::thread::sleep(Duration::from_micros(200));
            }
            if thread.join().is_err() {
                tracing::error!("a packet thread panicked");
            }
        }
    }
}

fn run(mut queue: Queue, mut worker: Worker, wire: Option<&Wire>, shared: &Shared, thread: usize, course: &Course) {
    let mut frame = vec![0; ROOM + FRAME_LIMIT];
    let mut pass = |queue: &mut Queue| {
        let end = ROOM + queue.read(&mut frame[ROOM..])?;
        let now_ms = now_ms();
        let sent = match worker.handle(&mut frame[ROOM..end], now_ms) {
            Action::Send => match wire.zip(worker.onward()) {
                Some((wire, to)) if wire.send(&mut frame[..end], to, now_ms) => {
                    count(&shared.on_links[thread].0, 1);
                    Ok(())
                }
                _ => queue.send(&frame[ROOM..end]),
            },
            Action::Answer(length) => queue.send(worker.answer(length)),
            Action::Discard => Ok(()),
        };
        if sent.is_err() {
            shared.drops[thread].count(DropReason::Write);
        }
        Ok::<(), io::Error>(())
    };
    while !course.stop.load(Relaxed) {
        match pass(&mut queue) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::error!(%error, thread, "the TUN link cannot be read any more");
                course.broken.store(true, Relaxed);
                return;
            }
        }
    }
    // What waits in the queue would be lost with it.
    if queue.stop_waiting().is_ok() {
        let _ = (0..LAST_FRAMES).try_for_each(|_| pass(&mut queue));
    }
}

fn keep(mut out: Sender, shared: &Arc<Shared>, threads: Threads) {
    let course = Arc::clone(&threads.course);
    let mut keeper = Keeper::new(Arc::clone(shared));
    let mut send = |frame: &[u8]| {
        if out.send(frame).is_err() {
            shared.drops[0].count(DropReason::Write);
        }
    };
    while course.end.load(Relaxed) == RUN && !shared.is_superseded() {
        if !keeper.round(now_ms(), &mut send) {
            std::thread::park_timeout(ROUND);
        }
    }
    drop(threads);
    if course.end.load(Relaxed) == REMOVE_LINK
        && !shared.is_superseded()
        && let Err(error) = out.forget_link()
    {
        tracing::error!(%error, "the TUN link cannot be removed");
    }
    if shared.is_superseded() {
        shared.release();
    }
}
