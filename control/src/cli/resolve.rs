//! `sluice resolve`: what a name is answered with. Asks manifests, or a running daemon.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use fastrand::Rng;
use jiff::Timestamp;
use sluice_dataplane::dns::{Answer, Question, Resolution, Zone};

use super::{USAGE, get, offline, print, read_config};
use crate::dns::{Resolved, questions};

/// Where Services are named, unless the configuration says otherwise.
const DEFAULT_ZONE: &str = "cluster.local";

/// Arguments of `sluice resolve`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The exit code is 0 whatever the name is answered with. With --manifests no server is asked: a name \
                        outside the zone is refused, and an alias that leads there has no addresses."
)]
pub struct Args {
    /// Name that is asked for; with --from one that is searched for
    #[arg(value_name = "NAME")]
    name: String,
    /// Type of records
    #[arg(value_name = "TYPE", default_value = "A")]
    kind: String,
    /// Ask as a Pod of this namespace does, through its search path
    #[arg(long, value_name = "NS")]
    from: Option<String>,
    /// Configuration file (YAML)
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    config: Option<PathBuf>,
    /// Ask this file or folder of manifests
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

/// Runs `sluice resolve`.
///
/// # Errors
/// When the configuration, the manifests or the daemon cannot be read.
pub fn run(args: Args) -> Result<ExitCode> {
    if let Err(reason) = asked(&args, DEFAULT_ZONE) {
        eprintln!("sluice: {reason}");
        return Ok(ExitCode::from(USAGE));
    }
    let resolved = match args.admin {
        Some(admin) => ask(admin, &args)?,
        None => offline(&args)?,
    };
    let text = match args.output {
        Some(Output::Json) => serde_json::to_string(&resolved)?,
        None => resolved.to_string(),
    };
    print(&(text + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// The questions that are asked, in a cluster with this zone.
fn asked(args: &Args, zone: &str) -> Result<Vec<Question>, String> {
    questions(&args.name, &args.kind, args.from.as_deref(), zone)
}

/// What the manifests alone say.
fn offline(args: &Args) -> Result<Resolved> {
    let mut config = read_config(args.config.as_deref())?;
    let dns = config.dns.get_or_insert_default().clone();
    let mut publisher = offline::load_and_say(config, args.manifests.as_deref())?;
    let zone = publisher.zone(Timestamp::now()).context("names are not answered")?;
    let primary = dns.zones.first().map_or(DEFAULT_ZONE, String::as_str).trim_end_matches('.');
    let questions = asked(args, primary).map_err(anyhow::Error::msg)?;
    Ok(search(&zone, &questions))
}

/// The first answer that is one, or else the first of all.
fn search(zone: &Zone, questions: &[Question]) -> Resolved {
    let mut rng = Rng::new();
    let mut answers = questions.iter().map(|question| (question, alone(zone, question, &mut rng)));
    let first = answers.next();
    let found = first.iter().cloned().chain(answers).find(|(_, answer)| !answer.answers.is_empty());
    let (question, answer) = found.or(first).expect("there is at least the name itself");
    Resolved::new(question, &answer)
}

/// What is answered when nobody else can be asked.
fn alone(zone: &Zone, question: &Question, rng: &mut Rng) -> Answer {
    use hickory_resolver::proto::op::ResponseCode;
    match zone.resolve(question, rng) {
        Resolution::Answer(answer) | Resolution::Complete { otherwise: answer, .. } => answer,
        Resolution::Forward => Answer { code: ResponseCode::Refused, ..Answer::default() },
    }
}

/// Asks a daemon, which answers as clients are answered.
fn ask(admin: SocketAddr, args: &Args) -> Result<Resolved> {
    let from = args.from.as_deref().map(|namespace| ("from", namespace));
    let parameters = [("name", &*args.name), ("type", &*args.kind)].into_iter().chain(from);
    let text = get::ask_with(admin, "/api/v1/resolve", parameters)?;
    serde_json::from_str(&text).context("the daemon's answer is not understood")
}
