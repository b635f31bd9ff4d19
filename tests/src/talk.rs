//! Connections that are talked on: who answers, how long an answer takes at most, and how and when they end, at both ends.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use sluice_bench::client::Failure;
use sluice_bench::netns::NetNs;
use sluice_bench::serve::listen_tcp;

/// How long a client waits for anything before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// Room for a thread that does next to nothing.
const STACK: usize = 128 * 1024;
/// Between two looks of a listener for connections.
const LOOK: Duration = Duration::from_millis(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a server knows.
#[derive(Default)]
struct Heard {
    bytes: u64,
    resets: Vec<Instant>,
    streams: Vec<TcpStream>,
}

/// A server that answers each number with its own and the same. Dropping it closes everything.
pub struct Listener {
    heard: Arc<Mutex<Heard>>,
    stop: Arc<AtomicBool>,
    accepts: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens on this port of every address of `ns`.
    pub fn start(ns: &NetNs, number: u64, port: u16) -> Result<Self> {
        let listener = ns.run(|| listen_tcp(port))?;
        listener.set_nonblocking(true)?;
        let (heard, stop) = (Arc::<Mutex<Heard>>::default(), Arc::<AtomicBool>::default());
        let (shared, told) = (Arc::clone(&heard), Arc::clone(&stop));
        let accepts = thread::Builder::new().spawn(move || accept(&listener, number, &shared, &told))?;
        Ok(Self { heard, stop, accepts: Some(accepts) })
    }

    /// Takes no new connections, but those that the kernel has taken; the others go on.
    pub fn close(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(accepts) = self.accepts.take() {
            // A panic there has been printed, and its clients got no answers.
            drop(accepts.join());
        }
    }

    /// Bytes that came so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        lock(&self.heard).bytes
    }

    /// When connections were reset.
    #[must_use]
    pub fn resets(&self) -> Vec<Instant> {
        lock(&self.heard).resets.clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
        for stream in &lock(&self.heard).streams {
            // Those that have ended say so.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept(listener: &TcpListener, number: u64, heard: &Arc<Mutex<Heard>>, stop: &AtomicBool) {
    loop {
        let Ok((stream, _)) = listener.accept() else {
            if stop.load(Relaxed) {
                return;
            }
            thread::sleep(LOOK);
            continue;
        };
        // What a listener hands out may be non-blocking as it is itself; and a client may be gone already.
        let ready = stream.set_nonblocking(false).and_then(|()| stream.set_nodelay(true));
        let Ok(copy) = ready.and_then(|()| stream.try_clone()) else { continue };
        lock(heard).streams.push(copy);
        let heard = Arc::clone(heard);
        let answer = move || answer(stream, number, &heard);
        thread::Builder::new().stack_size(STACK).spawn(answer).expect("there is room for a thread");
    }
}

fn answer(mut stream: TcpStream, number: u64, heard: &Mutex<Heard>) {
    let mut question = [0; 8];
    let ended = loop {
        if let Err(error) = stream.read_exact(&mut question) {
            break error;
        }
        lock(heard).bytes += 8;
        let answer = [number.to_be_bytes(), question].concat();
        if let Err(error) = stream.write_all(&answer) {
            break error;
        }
    };
    let mut heard = lock(heard);
    if ended.kind() == ErrorKind::ConnectionReset {
        heard.resets.push(Instant::now());
    }
    let own = stream.local_addr().ok().zip(stream.peer_addr().ok());
    // Descriptors of what is over are given back.
    heard.streams.retain(|other| {
        let other = other.local_addr().ok().zip(other.peer_addr().ok());
        other.is_some() && other != own
    });
}

/// What clients do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Whom they dial.
    pub to: SocketAddr,
    /// How many there are.
    pub clients: usize,
    /// Pause between two questions, in which a reset is noticed.
    pub pause: Duration,
    /// Questions on a connection; then it is closed and another opened. None: as long as it lasts.
    pub questions: Option<u64>,
    /// Whether another is opened after one that was ended by others.
    pub again: bool,
}

/// How a connection was ended by others.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// When the client noticed.
    pub at: Instant,
    /// Who had answered.
    pub by: u64,
    /// How.
    pub how: Failure,
}

/// What clients saw.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Connections that were opened and answered.
    pub opened: u64,
    /// Opens that failed: no connection, or no first answer.
    pub failed: Vec<(Instant, Failure)>,
    /// Connections that others ended.
    pub ended: Vec<End>,
    /// Wrong answers: of another server than before, or to another question.
    pub wrong: u64,
    /// Answers in all.
    pub answers: u64,
    /// Each client's longest wait for an answer.
    pub longest: Vec<Duration>,
    /// Who answered first on each connection, in the order of opening.
    pub by: Vec<u64>,
}

impl Told {
    /// The longest wait for an answer at this share of clients, from 0 to 1.
    #[must_use]
    pub fn wait_at(&self, share: f64) -> Duration {
        let mut sorted = self.longest.clone();
        sorted.sort_unstable();
        let last = sorted.len().saturating_sub(1);
        sorted.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
    }
}

/// Clients that are talking. Dropping them ends them.
pub struct Talk {
    stop: Arc<AtomicBool>,
    told: Arc<Mutex<Told>>,
    threads: Vec<JoinHandle<()>>,
}

impl Talk {
    /// Starts clients inside `ns`.
    pub fn start(ns: &NetNs, plan: Plan) -> Result<Self> {
        let (stop, told) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Told>>::default());
        let mut talk = Self { stop, told, threads: Vec::new() };
        for client in 0..plan.clients {
            let (ns, stop, told) = (ns.clone(), Arc::clone(&talk.stop), Arc::clone(&talk.told));
            let run = move || match ns.enter() {
                Ok(()) => run_client(&plan, client, &stop, &told),
                Err(error) => eprintln!("client {client}: {error:#}"),
            };
            talk.threads.push(thread::Builder::new().stack_size(STACK).spawn(run).context("no thread for a client")?);
        }
        Ok(talk)
    }

    /// What they saw so far. The longest waits come with the end of each client.
    #[must_use]
    pub fn so_far(&self) -> Told {
        lock(&self.told).clone()
    }

    /// Waits until `accept` holds for what they saw.
    pub fn wait_for(&self, patience: Duration, accept: impl Fn(&Told) -> bool) -> Result<()> {
        let deadline = Instant::now() + patience;
        while !accept(&lock(&self.told)) {
            anyhow::ensure!(Instant::now() < deadline, "waited in vain: {:?}", self.so_far());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends them and says what they saw.
    #[must_use]
    pub fn stop(mut self) -> Told {
        self.end();
        let told = lock(&self.told);
        told.clone()
    }

    fn end(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            // A panic there has been printed; what is missing shows in the counts.
            drop(thread.join());
        }
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.end();
    }
}

fn run_client(plan: &Plan, client: usize, stop: &AtomicBool, told: &Mutex<Told>) {
    let mut longest = Duration::ZERO;
    let mut number = (client as u64) << 32;
    while !stop.load(Relaxed) {
        match open(plan, &mut number) {
            Ok((stream, by)) => {
                {
                    let mut told = lock(told);
                    (told.opened, told.answers) = (told.opened + 1, told.answers + 1);
                    told.by.push(by);
                }
                let end = keep_talking(plan, stream, by, &mut number, &mut longest, stop, told);
                if let Some(how) = end {
                    lock(told).ended.push(End { at: Instant::now(), by, how });
                    if !plan.again {
                        break;
                    }
                }
            }
            Err(failure) => {
                lock(told).failed.push((Instant::now(), failure));
                thread::sleep(plan.pause);
            }
        }
    }
    lock(told).longest.push(longest);
}

fn open(plan: &Plan, number: &mut u64) -> Result<(TcpStream, u64), Failure> {
    let mut stream = TcpStream::connect_timeout(&plan.to, PATIENCE)?;
    stream.set_nodelay(true)?;
    let (by, same) = ask(&mut stream, number)?;
    if same { Ok((stream, by)) } else { Err(Failure::Malformed) }
}

/// Asks the next question: who answers, and whether that question.
fn ask(stream: &mut TcpStream, number: &mut u64) -> Result<(u64, bool), Failure> {
    *number += 1;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&number.to_be_bytes())?;
    let (mut by, mut same) = ([0; 8], [0; 8]);
    stream.read_exact(&mut by)?;
    stream.read_exact(&mut same)?;
    Ok((u64::from_be_bytes(by), u64::from_be_bytes(same) == *number))
}

/// Talks until told to stop, the plan is done (nothing), or others end it.
fn keep_talking(
    plan: &Plan,
    mut stream: TcpStream,
    by: u64,
    number: &mut u64,
    longest: &mut Duration,
    stop: &AtomicBool,
    told: &Mutex<Told>,
) -> Option<Failure> {
    let mut questions = 1;
    while !stop.load(Relaxed) {
        // In the pause nothing comes but an end.
        let quiet = stream.set_read_timeout(Some(plan.pause)).and_then(|()| stream.read(&mut [0; 1]));
        match quiet {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Some(error.into()),
            Ok(0) => return Some(Failure::Closed),
            Ok(_) => return Some(Failure::Malformed),
        }
        if plan.questions.is_some_and(|most| questions >= most) {
            return None;
        }
        let begun = Instant::now();
        let answer = ask(&mut stream, number);
        match answer {
            Ok((now, same)) => {
                *longest = (*longest).max(begun.elapsed());
                let mut told = lock(told);
                told.answers += 1;
                told.wrong += u64::from(now != by || !same);
            }
            Err(failure) => return Some(failure),
        }
        questions += 1;
    }
    None
}
