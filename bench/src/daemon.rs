//! The real daemon on the node of a lab, with manifests that can be rewritten.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;
use sluice_bench::client::Failure;
use sluice_bench::workload;

use crate::lab::{Lab, Mode};
use crate::manifests::{self, Endpoint, NODE, Others, SERVICE_CIDR, WEB};
use crate::process::{Process, Usage};

/// Where the daemon answers about itself, inside the node.
const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);
/// Bound on reading everything and serving it.
const PATIENCE: Duration = Duration::from_secs(120);
/// File of its configuration.
const CONFIG: &str = "config.yaml";
/// How long an answer is waited for that may not be able to come yet.
pub(crate) const PROBE: Duration = Duration::from_millis(50);

/// The program beside this one, or another.
pub(crate) fn program(wanted: Option<&Path>) -> Result<PathBuf> {
    match wanted {
        Some(path) => Ok(path.to_owned()),
        None => Ok(std::env::current_exe().context("where is this program")?.with_file_name("sluice")),
    }
}

/// What `packetPath` the daemon has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PacketPath {
    #[default]
    Kernel,
    Links,
    Offload,
}

impl PacketPath {
    pub(crate) const ALL: [Self; 3] = [Self::Kernel, Self::Links, Self::Offload];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Links => "links",
            Self::Offload => "offload",
        }
    }
}

/// A daemon to be started.
pub(crate) struct Program {
    pub(crate) file: PathBuf,
    /// Packet threads, if not as many as cores.
    pub(crate) workers: Option<usize>,
    pub(crate) packet_path: PacketPath,
}

impl Program {
    /// The program beside this one, or another.
    pub(crate) fn new(wanted: Option<&Path>, packet_path: PacketPath) -> Result<Self> {
        Ok(Self { file: program(wanted)?, workers: None, packet_path })
    }
}

/// Why there is no such program.
pub(crate) fn not_built(program: &Path) -> Option<String> {
    (!program.is_file()).then(|| format!("{} is not built (cargo build --release --bins)", program.display()))
}

/// Writes manifests of the Service that is dialled, with these endpoints, and of others; and the configuration. What runs
/// the daemon with them.
pub(crate) fn prepare(
    lab: &Lab,
    folder: &Path,
    program: &Program,
    others: Option<&Others>,
    endpoints: &[Endpoint],
) -> Result<Command> {
    let files = manifests_in(folder);
    fs::create_dir(&files)?;
    for (name, file) in others.into_iter().flat_map(Others::files) {
        write(&files, &name, &file)?;
    }
    write(&files, "web.json", &manifests::list(&[manifests::node(lab), manifests::web()]))?;
    write(&files, "web-1.json", &manifests::slice(WEB, endpoints))?;
    let workers = program.workers.map(|workers| format!("workers: {workers}\n")).unwrap_or_default();
    let config = folder.join(CONFIG);
    let packet_path = program.packet_path.name();
    let text = format!("localControllers: false\nserviceCIDRs: [{SERVICE_CIDR}]\npacketPath: {packet_path}\n{workers}");
    fs::write(&config, text).context("cannot write the configuration")?;
    let mut command = lab.topology.node.command(&program.file);
    command.arg("run").arg("--manifests").arg(files).arg("--config").arg(config);
    command.args(["--node-name", NODE, "--state-dir"]).arg(folder.join("state"));
    Ok(command)
}

/// Adds a file to what [`prepare`] wrote.
pub(crate) fn add(folder: &Path, name: &str, object: &Value) -> Result<()> {
    write(&manifests_in(folder), name, object)
}

fn manifests_in(folder: &Path) -> PathBuf {
    folder.join("manifests")
}

/// Puts a file in place at once, as `mv` does.
fn write(folder: &Path, name: &str, object: &Value) -> Result<()> {
    let draft = folder.join(format!(".{name}"));
    let written = fs::write(&draft, object.to_string()).and_then(|()| fs::rename(&draft, folder.join(name)));
    written.with_context(|| format!("cannot write {name}"))
}

/// A daemon that serves. Dropping it ends it.
pub(crate) struct Daemon {
    process: Process,
    files: PathBuf,
    /// From its start to the first answer through it.
    pub(crate) ready_after: Duration,
}

impl Daemon {
    /// Starts it with the Pods of the lab and waits until the client of this mode gets an answer.
    pub(crate) fn start(lab: &Lab, program: &Program, others: Option<&Others>, mode: Mode) -> Result<Self> {
        let endpoints = manifests::ready(lab.endpoints().iter().map(SocketAddr::ip));
        let (ns, target) = (lab.client(mode), lab.service(mode));
        Self::start_with(lab, program, others, &endpoints, || workload::probe(Some(ns), target, PROBE))
    }

    /// Starts it with these endpoints and waits until `ask` gets an answer.
    pub(crate) fn start_with(
        lab: &Lab,
        program: &Program,
        others: Option<&Others>,
        endpoints: &[Endpoint],
        mut ask: impl FnMut() -> Result<Result<(), Failure>>,
    ) -> Result<Self> {
        if let Some(why) = not_built(&program.file) {
            bail!(why);
        }
        let folder = tempfile::tempdir().context("a folder for manifests")?;
        let files = manifests_in(folder.path());
        let command = prepare(lab, folder.path(), program, others, endpoints)?;
        let begun = Instant::now();
        let mut daemon = Self { process: Process::start(command, folder)?, files, ready_after: Duration::ZERO };
        while let Err(failure) = ask()? {
            if let Some(status) = daemon.process.ended()? {
                bail!("sluice ended: {status}\n{}", daemon.log());
            }
            ensure!(begun.elapsed() < PATIENCE, "sluice does not serve: {failure}\n{}", daemon.log());
            thread::sleep(Duration::from_millis(2));
        }
        daemon.ready_after = begun.elapsed();
        Ok(daemon)
    }

    /// Writes a file of manifests anew.
    pub(crate) fn write(&self, name: &str, object: &Value) -> Result<()> {
        write(&self.files, name, object)
    }

    /// Gives the Service that is dialled other endpoints.
    pub(crate) fn set_endpoints(&self, endpoints: &[Endpoint]) -> Result<()> {
        self.write("web-1.json", &manifests::slice(WEB, endpoints))
    }

    /// Number of the routing table in force: how often it has changed.
    pub(crate) fn generation(&self, lab: &Lab) -> Result<u64> {
        Ok(metric(lab, "sluice_table_generation")? as u64)
    }

    /// The process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it uses.
    pub(crate) fn usage(&self) -> Usage {
        self.process.usage()
    }

    /// What it has written.
    pub(crate) fn log(&self) -> String {
        self.process.log()
    }
}

/// A figure without labels that the daemon in this lab tells.
pub(crate) fn metric(lab: &Lab, name: &str) -> Result<f64> {
    let page = lab.topology.node.run(|| {
        // It forwards packets a moment before it can be asked.
        let deadline = Instant::now() + PATIENCE;
        let mut stream = loop {
            match TcpStream::connect_timeout(&ADMIN, PATIENCE) {
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
                connected => break connected.context("cannot reach the daemon")?,
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: sluice\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page).context("the daemon's metrics")?;
        Ok(page)
    })?;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.with_context(|| format!("no {name} among the daemon's metrics"))?.trim().parse().context("a metric")
}
