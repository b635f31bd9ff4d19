//! What do many connections cost on which nothing happens: memory and processor time.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::json;
use sluice_bench::client::Failure;
use sluice_bench::netns::NetNs;
use sluice_bench::protocol::{HEAD, Request, is_answer};
use sluice_bench::workload::cores;

use super::{CommonArgs, Failures, add, count, named, raise_file_limit, sum};
use crate::cli::{parse_duration, resolve};
use crate::daemon::Daemon;
use crate::lab::{Lab, Mode};
use crate::process::Usage;
use crate::progress::number;

/// Files that this process has besides its connections' two ends.
const OTHER_FILES: u64 = 200;

#[derive(Debug, Args)]
pub(crate) struct IdleArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Whom to dial, HOST:PORT, with `sluice-bench serve` behind it; several are dialled in turn, and one client address has
    /// some 28,000 ports for each. Default: the daemon, in namespaces of its own (needs root).
    #[arg(long)]
    target: Vec<String>,
    /// Processes whose memory and processor time are looked at (with --target).
    #[arg(long, requires = "target")]
    pid: Vec<u32>,
    /// Connections.
    #[arg(long, default_value_t = 10_000)]
    connections: usize,
    /// How long they are idle.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// Bound on connecting and on each answer.
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    timeout: Duration,
}

/// Measures; whether there were no errors.
pub(crate) fn run(arguments: &IdleArgs) -> Result<bool> {
    let files = raise_file_limit()?;
    let is_own = arguments.target.is_empty();
    let needed = arguments.connections as u64 * if is_own { 2 } else { 1 } + OTHER_FILES;
    ensure!(arguments.connections > 0, "--connections: use at least 1");
    ensure!(files >= needed, "--connections: needs {needed} open files, and the limit is {files} (ulimit -Hn)");
    let mut pids = arguments.pid.clone();
    let own = if is_own {
        let lab = Lab::new(3)?;
        let daemon = Daemon::start(&lab, &arguments.common.program()?, None, Mode::Preserve)?;
        pids.push(daemon.id());
        Some((daemon, lab))
    } else {
        None
    };
    let (ns, targets) = match &own {
        Some((_, lab)) => (Some(lab.client(Mode::Preserve)), vec![lab.service(Mode::Preserve)]),
        None => (None, arguments.target.iter().map(|target| resolve(target)).collect::<Result<_>>()?),
    };
    let before = State::now(&pids)?;
    let (kept, mut failures) = open(ns, &targets, arguments)?;
    let opened = State::now(&pids)?;
    thread::sleep(arguments.duration);
    let idle = State::now(&pids)?;
    add(&mut failures, &ask_all(&kept));
    let report = Report { before, opened, idle, connections: kept.len(), failures };
    if arguments.common.json {
        println!("{}", report.to_json(!pids.is_empty()));
    } else {
        report.print(!pids.is_empty());
    }
    Ok(sum(&report.failures) == 0)
}

/// Opens all connections, with an answer on each, from as many threads as there are cores.
fn open(ns: Option<&NetNs>, targets: &[SocketAddr], arguments: &IdleArgs) -> Result<(Vec<TcpStream>, Failures)> {
    let threads = cores();
    let all = Mutex::new((Vec::with_capacity(arguments.connections), Failures::new()));
    let part = |index: usize| -> Result<()> {
        if let Some(ns) = ns {
            ns.enter()?;
        }
        let (mut kept, mut failures) = (Vec::new(), Failures::new());
        for number in (index..arguments.connections).step_by(threads) {
            match connect(targets[number % targets.len()], arguments.timeout) {
                Ok(stream) => kept.push(stream),
                Err(failure) => count(&mut failures, failure),
            }
        }
        let mut all = all.lock().expect("nobody panics with it");
        all.0.append(&mut kept);
        add(&mut all.1, &failures);
        Ok(())
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|index| scope.spawn(move || part(index))).collect();
        running
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok(all.into_inner().expect("nobody panics with it"))
}

fn connect(target: SocketAddr, timeout: Duration) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect_timeout(&target, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    ask(&stream, 1)?;
    Ok(stream)
}

fn ask(mut stream: &TcpStream, number: u64) -> Result<(), Failure> {
    stream.write_all(&Request::Answer { size: HEAD as u32, number }.encode())?;
    let mut answer = [0; HEAD];
    stream.read_exact(&mut answer)?;
    if is_answer(&answer, HEAD as u32, number) { Ok(()) } else { Err(Failure::Malformed) }
}

/// Whether all of them still work.
fn ask_all(kept: &[TcpStream]) -> Failures {
    let mut failures = Failures::new();
    for failure in kept.iter().filter_map(|stream| ask(stream, 2).err()) {
        count(&mut failures, failure);
    }
    failures
}

/// What is used at a moment.
struct State {
    at: Instant,
    program: Usage,
    /// Of the whole machine, in bytes: with the sockets of both ends where both are here.
    available: u64,
}

impl State {
    fn now(pids: &[u32]) -> Result<Self> {
        let program = pids.iter().fold(Usage::default(), |sum, pid| {
            let usage = Usage::of(*pid);
            Usage { cpu_us: sum.cpu_us + usage.cpu_us, memory: sum.memory + usage.memory }
        });
        ensure!(pids.is_empty() || program.memory > 0, "--pid: no such process");
        let meminfo = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
        let kilobytes: u64 =
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).context("no MemAvailable")?;
        Ok(Self { at: Instant::now(), program, available: kilobytes * 1024 })
    }
}

struct Report {
    before: State,
    opened: State,
    idle: State,
    connections: usize,
    failures: Failures,
}

impl Report {
    fn each(&self, more: u64, less: u64) -> f64 {
        more.saturating_sub(less) as f64 / self.connections.max(1) as f64
    }

    fn program_bytes(&self) -> f64 {
        self.each(self.idle.program.memory, self.before.program.memory)
    }

    fn machine_bytes(&self) -> f64 {
        self.each(self.before.available, self.idle.available)
    }

    /// Part of one core.
    fn cpu(&self) -> f64 {
        let lasted = self.idle.at.saturating_duration_since(self.opened.at).as_secs_f64() * 1e6;
        (self.idle.program.cpu_us - self.opened.program.cpu_us) / lasted.max(1.0)
    }

    fn rate(&self) -> f64 {
        let lasted = self.opened.at.saturating_duration_since(self.before.at).as_secs_f64();
        self.connections as f64 / lasted.max(1e-9)
    }

    fn to_json(&self, has_program: bool) -> serde_json::Value {
        let program = json!({
            "residentBytesBefore": self.before.program.memory, "residentBytes": self.idle.program.memory,
            "bytesPerConnection": self.program_bytes(), "coresWhileIdle": self.cpu(),
        });
        json!({
            "workload": "idle", "connections": self.connections, "openedPerSecond": self.rate(),
            "program": has_program.then_some(program), "machineBytesPerConnection": self.machine_bytes(),
            "failures": self.failures,
        })
    }

    fn print(&self, has_program: bool) {
        println!("{} connections open, {} a second while they were opened", self.connections, number(self.rate()));
        if has_program {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            println!(
                "program: {:.1} MiB before, {:.1} MiB with them: {:.0} bytes a connection; {:.2} % of a core while idle",
                mib(self.before.program.memory),
                mib(self.idle.program.memory),
                self.program_bytes(),
                self.cpu() * 100.0
            );
        }
        println!("machine: {:.0} bytes a connection, sockets included", self.machine_bytes());
        println!("errors: {}", named(&self.failures));
    }
}
