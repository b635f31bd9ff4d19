//! `sluice trace`: what happens to a new connection, and by which rule. Asks manifests, or a running daemon.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use sluice_dataplane::decide::NewFlow;
use sluice_dataplane::table::RoutingTable;

use super::{USAGE, get, offline, print, read_config};
use crate::trace::{Question, Traced, trace};

/// Arguments of `sluice trace`.
#[derive(Debug, clap::Args)]
#[command(after_help = "The exit code is 0 whatever happens to the connection.")]
pub struct Args {
    /// Client; its port decides nothing
    #[arg(long, value_name = "IP[:PORT]", required_unless_present = "flows")]
    from: Option<String>,
    /// What the client dials
    #[arg(long, value_name = "IP:PORT", required_unless_present = "flows")]
    to: Option<String>,
    /// tcp, udp or sctp
    #[arg(long, default_value = "tcp", value_name = "PROTOCOL")]
    proto: String,
    /// Many connections: a file (or - for standard input) of lines such as {"from":"10.0.0.1","to":"10.96.0.1:80","proto":"tcp"};
    /// answers with a line of JSON for each
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "to", "proto", "admin"])]
    flows: Option<PathBuf>,
    /// Configuration file (YAML)
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    config: Option<PathBuf>,
    /// Name of the Node that is asked about [default: nodeName of the configuration, or the only Node there is]
    #[arg(long, value_name = "NAME", conflicts_with = "admin")]
    node_name: Option<String>,
    /// Ask this file or folder of manifests; nothing of this host counts
    #[arg(long, value_name = "DIR|FILE", conflicts_with = "admin", required_unless_present = "admin")]
    manifests: Option<PathBuf>,
    /// Ask the daemon with this admin address
    #[arg(long, value_name = "ADDR:PORT")]
    admin: Option<SocketAddr>,
    /// Form of the answer [default: text]
    #[arg(short, long, value_enum)]
    output: Option<Output>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// One line of JSON.
    Json,
}

/// Runs `sluice trace`.
///
/// # Errors
/// When the configuration, the file of flows or the daemon cannot be read.
pub fn run(args: Args) -> Result<ExitCode> {
    if let Some(flows) = &args.flows {
        let table = load(&args)?;
        return batch(&table, flows);
    }
    let question = Question {
        from: args.from.clone().unwrap_or_default(),
        to: args.to.clone().unwrap_or_default(),
        proto: args.proto.clone(),
    };
    let flow = match question.flow() {
        Ok(flow) => flow,
        Err(reason) => return Ok(usage(&reason)),
    };
    let traced = match args.admin {
        Some(admin) => ask(admin, &flow)?,
        None => trace(&*load(&args)?, &flow),
    };
    let text = match args.output {
        Some(Output::Json) => serde_json::to_string(&traced)?,
        None => traced.to_string(),
    };
    print(&(text + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn usage(reason: &str) -> ExitCode {
    eprintln!("sluice: {reason}");
    ExitCode::from(USAGE)
}

/// The table of the manifests. What is wrong with them is said on standard error, and changes nothing else.
fn load(args: &Args) -> Result<Arc<RoutingTable>> {
    let mut config = read_config(args.config.as_deref())?;
    config.node_name = args.node_name.clone().or(config.node_name);
    Ok(offline::load_and_say(config, args.manifests.as_deref())?.table())
}

/// Answers every line of a file of flows with a line of JSON.
fn batch(table: &RoutingTable, flows: &Path) -> Result<ExitCode> {
    let reading = || format!("cannot read {}", flows.display());
    let input: Box<dyn Read> = if flows == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(File::open(flows).with_context(reading)?)
    };
    let mut answers = String::new();
    for (index, line) in BufReader::new(input).lines().enumerate() {
        let line = line.with_context(reading)?;
        if line.trim().is_empty() {
            continue;
        }
        let question = serde_json::from_str::<Question>(&line).map_err(|error| error.to_string());
        match question.and_then(|question| question.flow()) {
            Ok(flow) => answers += &(serde_json::to_string(&trace(table, &flow))? + "\n"),
            Err(reason) => return Ok(usage(&format!("{}, line {}: {reason}", flows.display(), index + 1))),
        }
    }
    print(&answers)?;
    Ok(ExitCode::SUCCESS)
}

/// Asks a daemon, which answers from the table that packets meet.
fn ask(admin: SocketAddr, flow: &NewFlow) -> Result<Traced> {
    let NewFlow { client, destination, protocol } = flow;
    let path = format!("/api/v1/trace?from={client}&to={destination}&proto={protocol}");
    let text = get::ask(admin, &path)?;
    serde_json::from_str(&text).context("the daemon's answer is not understood")
}
