//! Killed, and superseded, under traffic: the packet path as a process of its own, the kernel's sockets at both ends.
#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "the tests measure time")]

mod lab;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lab::{Lab, PODS, VIPS};
use sluice_dataplane::flow::FlowFile;
use sluice_dataplane::packet_path::Shared;
use sluice_dataplane::table::EndpointSpec;
use xxhash_rust::xxh3::Xxh3;

const CONNECTIONS: usize = 100;

/// The packet path as a process: told on its standard input where flows lie and whom to serve; it says when it runs, and
/// ends when another process takes over. Run by the tests below only.
#[test]
#[ignore = "a process of the other tests"]
fn process() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let (path, endpoint) = line.trim().split_once(' ').unwrap();
    let tun = lab::open_tun();
    tun.persist().unwrap();
    let file = FlowFile { path: path.into(), owner: b"test".to_vec(), patience: Duration::from_secs(5) };
    let mut lab = Lab::over(Shared::open(lab::settings(), &file).unwrap());
    lab.serve(VIPS[0], &[EndpointSpec::ready(endpoint.parse().unwrap())]);
    lab.builder.synced();
    lab.start(tun);
    let recovery = lab.shared.recovery();
    // Whoever started us is gone, and so are we.
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
    println!("\nforwarding {} {} {}", recovery.flows, recovery.dropped, recovery.took_over);
    while lab.is_running() {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(lab.shared.is_superseded());
    println!("superseded");
    std::process::exit(0);
}

struct Process {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    _input: ChildStdin,
    flows: usize,
    dropped: usize,
    took_over: bool,
}

impl Process {
    fn start(file: &Path, endpoint: SocketAddr) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process", "--ignored", "--nocapture", "--test-threads=1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        writeln!(input, "{} {endpoint}", file.display()).unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut process = Self { child, output, _input: input, flows: 0, dropped: 0, took_over: false };
        let line = process.wait_for("forwarding ");
        let words: Vec<&str> = line.split(' ').collect();
        process.flows = words[0].parse().unwrap();
        process.dropped = words[1].parse().unwrap();
        process.took_over = words[2] == "true";
        process
    }

    fn wait_for(&mut self, start: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the process ended");
            if let Some(rest) = line.trim().strip_prefix(start) {
                return rest.to_owned();
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Connections that exchange data all the time, and one that receives without a pause.
struct Traffic {
    stop: Arc<AtomicBool>,
    echoes: Vec<JoinHandle<(u64, Duration)>>,
    bulk: JoinHandle<(u64, u64)>,
    sent: JoinHandle<(u64, u64)>,
}

impl Traffic {
    fn start(listener: TcpListener) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let target = lab::at(VIPS[0], 80);
        let receiving = TcpStream::connect(target).unwrap();
        let sending = listener.accept().unwrap().0;
        let stopped = Arc::clone(&stop);
        let sent = std::thread::spawn(move || send(sending, &stopped));
        let bulk = std::thread::spawn(move || receive(receiving));
        let echoes = (0..CONNECTIONS).map(|_| {
            let client = TcpStream::connect(target).unwrap();
            let server = listener.accept().unwrap().0;
            std::thread::spawn(move || std::io::copy(&mut server.try_clone().unwrap(), &mut (&server)));
            let stopped = Arc::clone(&stop);
            std::thread::spawn(move || echo(client, &stopped))
        });
        Self { echoes: echoes.collect(), stop, bulk, sent }
    }

    /// The longest silence of each echo connection.
    fn stop(self) -> Vec<Duration> {
        self.stop.store(true, Relaxed);
        let mut silences = Vec::new();
        for thread in self.echoes {
            let (count, silence) = thread.join().expect("a connection was lost");
            assert!(count > 0);
            silences.push(silence);
        }
        let (sent, received) = (self.sent.join().unwrap(), self.bulk.join().expect("the transfer was lost"));
        assert_eq!(sent, received, "bytes and their hash");
        eprintln!("{} MB transferred", sent.0 >> 20);
        silences.sort();
        silences
    }
}

fn echo(mut client: TcpStream, stop: &AtomicBool) -> (u64, Duration) {
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (mut count, mut longest) = (0u64, Duration::ZERO);
    while !stop.load(Relaxed) {
        let since = Instant::now();
        client.write_all(&count.to_le_bytes()).unwrap();
        let mut back = [0; 8];
        client.read_exact(&mut back).unwrap();
        assert_eq!(u64::from_le_bytes(back), count);
        longest = longest.max(since.elapsed());
        count += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    (count, longest)
}

fn send(mut stream: TcpStream, stop: &AtomicBool) -> (u64, u64) {
    let (mut hash, mut sent, mut block) = (Xxh3::new(), 0, vec![0u8; 65536]);
    while !stop.load(Relaxed) {
        block[..8].copy_from_slice(&u64::to_le_bytes(sent));
        stream.write_all(&block).unwrap();
        hash.update(&block);
        sent += block.len() as u64;
    }
    (sent, hash.digest())
}

fn receive(mut stream: TcpStream) -> (u64, u64) {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (mut hash, mut received, mut block) = (Xxh3::new(), 0, vec![0u8; 65536]);
    loop {
        match stream.read(&mut block).unwrap() {
            0 => return (received, hash.digest()),
            length => {
                hash.update(&block[..length]);
                received += length as u64;
            }
        }
    }
}

fn pause() {
    std::thread::sleep(Duration::from_millis(300));
}

fn figures(what: &str, silences: &[Duration]) {
    eprintln!("{what}: longest silence p50 {:?}, max {:?}", silences[silences.len() / 2], silences[silences.len() - 1]);
}

/// The next process under traffic, several times; nothing is lost, and the file tells it all flows.
fn under_traffic(what: &str, rounds: usize, mut next: impl FnMut(Process, &Path, SocketAddr) -> Process) {
    if !lab::enter() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("flows");
    let listener = TcpListener::bind(lab::at(PODS[0], 0)).unwrap();
    let endpoint = listener.local_addr().unwrap();
    let mut process = Process::start(&file, endpoint);
    lab::route_to_link();
    let traffic = Traffic::start(listener);
    for round in 0..rounds {
        pause();
        process = next(process, &file, endpoint);
        assert_eq!((process.flows, process.dropped), (CONNECTIONS + 1, 0), "round {round}");
    }
    pause();
    figures(what, &traffic.stop());
    process.kill();
}

#[test]
fn killed_under_traffic_nothing_is_lost() {
    under_traffic("kill -9, then start", 4, |process, file, endpoint| {
        process.kill();
        let next = Process::start(file, endpoint);
        assert!(!next.took_over);
        next
    });
}

#[test]
fn superseded_under_traffic_nothing_is_lost() {
    under_traffic("take-over", 4, |mut process, file, endpoint| {
        let next = Process::start(file, endpoint);
        assert!(next.took_over);
        process.wait_for("superseded");
        assert!(process.child.wait().unwrap().success());
        next
    });
}
