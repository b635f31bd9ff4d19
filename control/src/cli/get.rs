//! `sluice get`: what a running daemon serves, as a table or as data.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::de::DeserializeOwned;
use ureq::Body;
use ureq::http::Response;

use super::print;
use crate::admin::views::{EndpointView, FlowEntry, FrontendView, List, ServiceView};
use crate::host::Lacking;

/// Pause between two looks of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(10);

/// Arguments of `sluice get`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to show
    #[arg(value_enum)]
    what: What,
    /// Only this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// Show it again whenever it has changed, until interrupted
    #[arg(short, long)]
    watch: bool,
    /// Form of the answer [default: a table]
    #[arg(short, long, value_enum)]
    output: Option<Output>,
    /// Admin address of the daemon
    #[arg(long, default_value = "127.0.0.1:10249", value_name = "ADDR:PORT")]
    admin: SocketAddr,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Service ports with their addresses and counters
    #[value(alias = "service", alias = "svc")]
    Services,
    /// Endpoints with their flows
    #[value(alias = "endpoint", alias = "ep")]
    Endpoints,
    /// What clients can dial
    #[value(alias = "frontend", alias = "fe")]
    Frontends,
    /// Connections and conversations
    #[value(alias = "flow")]
    Flows,
}

/// Form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table with more columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Shows what was asked for.
pub fn run(args: Args) -> Result<ExitCode> {
    let mut last = None;
    loop {
        let text = match args.what {
            What::Services => show::<ServiceView>("services", &args),
            What::Endpoints => show::<EndpointView>("endpoints", &args),
            What::Frontends => show::<FrontendView>("frontends", &args),
            What::Flows => show::<FlowEntry>("flows", &args),
        }?;
        if last.as_ref() != Some(&text) {
            print(&text)?;
            last = Some(text);
        }
        if !args.watch {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

/// Asks the daemon. That none answers is the environment's fault.
pub fn ask(admin: SocketAddr, path: &str) -> Result<String> {
    let url = format!("http://{admin}{path}");
    read(admin, &url, agent().get(&url).call())
}

/// Asks the daemon, with these parameters.
pub fn ask_with<'a>(
    admin: SocketAddr,
    path: &str,
    parameters: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<String> {
    let url = format!("http://{admin}{path}");
    read(admin, &url, agent().get(&url).query_pairs(parameters).call())
}

/// Has the daemon do something.
pub fn post(admin: SocketAddr, path: &str, body: &impl serde::Serialize) -> Result<String> {
    let url = format!("http://{admin}{path}");
    read(admin, &url, agent().post(&url).send_json(body))
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).proxy(None).build().into()
}

fn read(admin: SocketAddr, url: &str, answer: Result<Response<Body>, ureq::Error>) -> Result<String> {
    let mut answer = answer.map_err(|error| {
        Lacking(format!("no daemon answers on {admin}: {error}: is `sluice run` there? see --admin"))
    })?;
    // The limit is against a peer that never ends, not against large clusters.
    answer
        .body_mut()
        .with_config()
        .limit(1 << 32)
        .read_to_string()
        .with_context(|| format!("no whole answer from {url}"))
}

fn show<T: Row + DeserializeOwned + serde::Serialize>(path: &str, args: &Args) -> Result<String> {
    let text = ask(args.admin, &format!("/api/v1/{path}"))?;
    let mut list: List<T> = serde_json::from_str(&text).context("the daemon's answer is not understood")?;
    if let Some(namespace) = &args.namespace {
        list.items.retain(|item| item.namespace() == namespace);
    }
    render(&list, args.output)
}

/// A list in the form that was asked for.
pub fn render<T: Row + serde::Serialize>(list: &List<T>, output: Option<Output>) -> Result<String> {
    Ok(match output {
        Some(Output::Json) => serde_json::to_string_pretty(list)? + "\n",
        Some(Output::Yaml) => serde_saphyr::to_string(list)?,
        None | Some(Output::Wide) => {
            let wide = output.is_some();
            table(T::header(wide), list.items.iter().map(|item| item.cells(wide)))
        }
    })
}

/// A table as kubectl prints them: no lines, columns apart by three spaces.
#[must_use]
pub fn table(header: Vec<&'static str>, rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// One line of a table.
pub trait Row {
    /// Names of the columns.
    fn header(wide: bool) -> Vec<&'static str>;
    /// The columns.
    fn cells(&self, wide: bool) -> Vec<String>;
    /// Namespace.
    fn namespace(&self) -> &str;
}

fn some<T: ToString>(values: &[T]) -> String {
    let texts: Vec<String> = values.iter().map(ToString::to_string).collect();
    if texts.is_empty() { "-".to_owned() } else { texts.join(",") }
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

impl Row for ServiceView {
    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec![
            "NAMESPACE",
            "NAME",
            "PORT",
            "CLUSTER-IP",
            "EXTERNAL-IP",
            "NODE-PORT",
            "ENDPOINTS",
            "ACTIVE",
            "OPENED",
            "REJECTED",
        ];
        if wide {
            header.extend(["DROPPED", "BYTES-IN", "BYTES-OUT", "LOCAL", "MADE-UP"]);
        }
        header
    }

    fn cells(&self, wide: bool) -> Vec<String> {
        let name = if self.port_name.is_empty() { String::new() } else { format!("{}:", self.port_name) };
        let mut cells = vec![
            self.namespace.clone(),
            self.name.clone(),
            format!("{name}{}/{}", self.port, self.protocol),
            some(&self.cluster_ips),
            some(&self.external_ips),
            self.node_port.map_or("-".to_owned(), |port| port.to_string()),
            self.endpoints.to_string(),
            self.active.to_string(),
            self.opened.to_string(),
            self.rejected.to_string(),
        ];
        if wide {
            cells.extend([self.dropped, self.bytes_in, self.bytes_out].map(|count| count.to_string()));
            cells.extend([self.local_endpoints.to_string(), some(&self.made_up)]);
        }
        cells
    }

    fn namespace(&self) -> &str {
        &self.namespace
    }
}

impl Row for EndpointView {
    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec!["NAMESPACE", "SERVICE", "PORT", "ENDPOINT", "STATE", "NEW-FLOWS", "ACTIVE", "OPENED"];
        if wide {
            header.extend(["BYTES-IN", "BYTES-OUT", "PACKETS-IN", "PACKETS-OUT"]);
        }
        header
    }

    fn cells(&self, wide: bool) -> Vec<String> {
        let gets = match (self.cluster, self.local) {
            (true, true) => "yes",
            (true, false) => "cluster",
            (false, true) => "local",
            (false, false) => "no",
        };
        let name = if self.port_name.is_empty() { String::new() } else { format!("{}/", self.port_name) };
        let state = match (self.ejected_seconds, self.deadline_seconds) {
            (Some(seconds), _) => format!("ejected {seconds}s"),
            (None, Some(seconds)) => format!("{} {seconds}s", self.state),
            (None, None) => self.state.clone(),
        };
        let mut cells = vec![
            self.namespace.clone(),
            self.service.clone(),
            format!("{name}{}", self.protocol),
            self.address.to_string(),
            state,
            gets.to_owned(),
            self.active.to_string(),
            self.opened.to_string(),
        ];
        if wide {
            let counts = [self.bytes_in, self.bytes_out, self.packets_in, self.packets_out];
            cells.extend(counts.map(|count| count.to_string()));
        }
        cells
    }

    fn namespace(&self) -> &str {
        &self.namespace
    }
}

impl Row for FrontendView {
    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec!["NAMESPACE", "SERVICE", "PORT-NAME", "KIND", "ADDRESS", "PORT", "POLICY", "ENDPOINTS"];
        if wide {
            header.extend(["WHY", "ENDPOINT-LIST"]);
        }
        header
    }

    fn cells(&self, wide: bool) -> Vec<String> {
        let mut cells = vec![
            self.namespace.clone(),
            self.service.clone(),
            or_dash(&self.port_name),
            self.kind.clone(),
            some(&self.addresses),
            format!("{}/{}", self.port, self.protocol),
            self.policy.clone(),
            self.endpoints.len().to_string(),
        ];
        if wide {
            cells.extend([or_dash(&self.why), some(&self.endpoints)]);
        }
        cells
    }

    fn namespace(&self) -> &str {
        &self.namespace
    }
}

impl Row for FlowEntry {
    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec!["PROTOCOL", "CLIENT", "FRONTEND", "ENDPOINT", "SERVICE", "STATE", "AGE", "IDLE"];
        if wide {
            header.extend(["SEEN-AS", "KIND", "BYTES-IN", "BYTES-OUT"]);
        }
        header
    }

    fn cells(&self, wide: bool) -> Vec<String> {
        let service =
            if self.service.is_empty() { "-".to_owned() } else { format!("{}/{}", self.namespace, self.service) };
        let mut cells = vec![
            self.protocol.clone(),
            self.client.to_string(),
            self.frontend.to_string(),
            self.endpoint.to_string(),
            service,
            self.state.clone(),
            format!("{}s", self.age_seconds),
            format!("{}s", self.idle_ms / 1000),
        ];
        if wide {
            let seen = self.masquerade.map_or("-".to_owned(), |address| address.to_string());
            cells.extend([seen, self.kind.clone(), self.bytes_in.to_string(), self.bytes_out.to_string()]);
        }
        cells
    }

    fn namespace(&self) -> &str {
        &self.namespace
    }
}
