//! `sluice run`: the daemon.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use sluice_dataplane::table::Slots;
use tracing_subscriber::EnvFilter;

use super::report::Report;
use super::{WRONG, check, print};
use crate::config::{Config, ConfigError};
use crate::daemon;
use crate::host::Host;
use crate::kube_proxy;
use crate::publish::Publisher;
use crate::source::Source;
use crate::source::api::{self, Access};
use crate::source::folder::Folder;

/// Arguments of `sluice run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "kube-proxy's flags, and its file with --config, are taken too: see docs/migration.md.")]
pub struct Args {
    /// Configuration file (YAML); flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    source: SourceArgs,
    /// Read everything once, print what would be served, touch nothing; exit 1 when there are errors
    #[arg(long)]
    dry_run: bool,
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
    /// Take the key `dns` of this configuration file: for a --config that is kube-proxy's, which knows no names
    #[arg(long, value_name = "FILE")]
    dns_config: Option<PathBuf>,
    /// Let programs of this machine find the names: tells systemd-resolved, or says which line to put into resolv.conf
    #[arg(long)]
    dns_local: bool,
    /// Packet threads [default: one for each CPU, at most 8]
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Form of log lines, on standard error [default: text]
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,
    /// Least level that is logged: error, warn, info, debug, trace, or a filter such as `sluice_control::host=debug`
    /// [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    #[command(flatten)]
    kube_proxy: kube_proxy::Flags,
}

/// Where objects come from. Without either: the API server of the cluster whose Pod this is.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
struct SourceArgs {
    /// Folder or file of manifests, watched for changes
    #[arg(long, value_name = "DIR|FILE")]
    manifests: Option<PathBuf>,
    /// Kubeconfig of the API server to watch; without it and --manifests: the service account of the Pod this runs in
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
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
pub fn run(mut args: Args) -> Result<ExitCode> {
    let (config, wishes) = args.config.as_deref().map_or_else(|| Ok((Config::default(), None)), Config::read)?;
    let (mut config, flag_wishes) = args.kube_proxy.apply(config, wishes.is_some())?;
    let wishes = wishes.unwrap_or_default().or(flag_wishes);
    config.node_name = args.node_name.or(config.node_name);
    config.admin = args.admin.unwrap_or(config.admin);
    config.health = args.health.unwrap_or(config.health);
    config.state_dir = args.state_dir.unwrap_or(config.state_dir);
    config.leave_on_stop |= args.leave_on_stop;
    config.linger |= args.linger;
    config.workers = args.workers.or(config.workers);
    if let Some(path) = &args.dns_config {
        let dns = Config::read(path)?.0.dns;
        let reason = "dns: missing: this file is read for nothing else (--dns-config)";
        config.dns = Some(dns.ok_or_else(|| ConfigError::new(path.display().to_string(), reason))?);
    }
    if args.dns_local {
        config.dns.get_or_insert_default();
    }
    config.validate()?;
    if args.source.manifests.is_none() {
        args.source.kubeconfig = args.source.kubeconfig.or(wishes.kubeconfig);
    }
    let access = args.source.access()?;
    // With an API server the controllers are the cluster's.
    config.local_controllers &= access.is_none();
    // The client logs every failed attempt; we say what it means.
    let level = args.log_level.as_deref().or(wishes.log_level).unwrap_or("info");
    let filter =
        EnvFilter::try_new(format!("kube_client=off,{level}")).with_context(|| format!("--log-level {level:?}"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format.unwrap_or(if wishes.json_log { LogFormat::Json } else { LogFormat::Text }) {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
    if let Some(warning) = &wishes.warning {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let source = source(&config, access, args.source.manifests).await?;
        if args.dry_run {
            return dry_run(config, source).await;
        }
        daemon::run(config, source, args.dns_local).await?;
        Ok(ExitCode::SUCCESS)
    })
}

impl SourceArgs {
    /// The API server to watch; none: there are manifests.
    fn access(&self) -> Result<Option<Access>, ConfigError> {
        match (&self.manifests, &self.kubeconfig) {
            (Some(_), _) => Ok(None),
            (None, Some(kubeconfig)) => Ok(Some(Access::Kubeconfig(kubeconfig.clone()))),
            (None, None) => Access::in_cluster().map(Some).ok_or_else(|| {
                let reason = "this runs in no Pod of a cluster: say --manifests DIR|FILE or --kubeconfig FILE";
                ConfigError::new("source of objects", reason)
            }),
        }
    }
}

async fn source(config: &Config, access: Option<Access>, manifests: Option<PathBuf>) -> Result<Source> {
    let Some(access) = access else {
        return Ok(Source::Folder(Folder::new(&manifests.unwrap_or_default(), config.prune)));
    };
    // A file that cannot be used is better said now than again and again later.
    access.client().await.map_err(|error| ConfigError::new("access to the API server", format!("{error:#}")))?;
    let (node_name, service_proxy_name) = (config.node_name(), config.service_proxy_name.clone());
    let (node_patience, silence) = (api::NODE_PATIENCE, api::SILENCE);
    let names = config.dns.as_ref().map(|dns| dns.pods);
    Ok(Source::Api(api::Options { access, node_name, service_proxy_name, names, node_patience, silence }))
}

/// What the daemon would serve, as `sluice check` says it, of the first update alone.
async fn dry_run(config: Config, source: Source) -> Result<ExitCode> {
    let interfaces = Host::new()?.addresses().await?;
    let first = source.open()?.next_whole().await?;
    let state_dir = config.state_dir.clone();
    let mut publisher = Publisher::new(config, interfaces, Arc::new(Slots::new(1)));
    if let Some(local) = publisher.local_controllers() {
        local.load(&state_dir).with_context(|| format!("earlier allocations in {}", state_dir.display()))?;
    }
    publisher.first(first, std::iter::empty());
    let report = Report::new(&publisher);
    print(&check::text(&report, false))?;
    Ok(ExitCode::from(if report.errors > 0 { WRONG } else { 0 }))
}
