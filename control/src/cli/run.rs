//! `sluice run`: the daemon.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

use crate::config::Config;
use crate::daemon;

/// Arguments of `sluice run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration file (YAML); flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder or file of manifests, watched for changes
    #[arg(long, value_name = "DIR|FILE")]
    manifests: PathBuf,
    /// Name of the Node this runs on [default: the host name]
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Where metrics and the admin API listen [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDR:PORT")]
    admin: Option<SocketAddr>,
    /// Where /healthz and /livez listen [default: 0.0.0.0:10256]
    #[arg(long, value_name = "ADDR:PORT")]
    health: Option<SocketAddr>,
    /// Where flows, drains and allocations are kept [default: /run/sluice]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// At a clean stop leave everything as after a crash, for a start soon after
    #[arg(long)]
    leave_on_stop: bool,
    /// After handing over to another daemon wait for SIGTERM instead of ending, as in a DaemonSet
    #[arg(long)]
    linger: bool,
    /// Packet threads [default: one for each CPU, at most 8]
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Form of log lines, on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Least level that is logged: error, warn, info, debug, trace, or a filter such as `sluice_control::host=debug`
    #[arg(long, default_value = "info")]
    log_level: String,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Runs the daemon until SIGTERM or SIGINT.
pub fn run(args: Args) -> Result<ExitCode> {
    let mut config = args.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read)?;
    config.node_name = args.node_name.or(config.node_name);
    config.admin = args.admin.unwrap_or(config.admin);
    config.health = args.health.unwrap_or(config.health);
    config.state_dir = args.state_dir.unwrap_or(config.state_dir);
    config.leave_on_stop |= args.leave_on_stop;
    config.linger |= args.linger;
    config.workers = args.workers.or(config.workers);
    config.validate()?;
    let filter = EnvFilter::try_new(&args.log_level).with_context(|| format!("--log-level {:?}", args.log_level))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(daemon::run(config, &args.manifests))?;
    Ok(ExitCode::SUCCESS)
}
