//! `sluice check`: whether manifests, or the objects of a cluster, are right, and what would be routed.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;

use super::report::{PortReport, Report, ServiceReport};
use super::{offline, read_config};
use crate::problem::{Origin, Problem, Severity};
use crate::source::api::Access;

/// Validate manifests, or the objects of a cluster, and say what would be routed; exit 1 when there are errors.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A manifest, or a folder of them
    #[arg(required_unless_present = "kubeconfig", conflicts_with = "kubeconfig")]
    path: Option<PathBuf>,
    /// Check what the API server of this kubeconfig has, and say what is odd besides: Services that select nothing, hints that
    /// do not count
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// See them as the Node of this name does
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Output; `wide` adds families, endpoint addresses and files
    #[arg(short, long, value_name = "FORMAT")]
    output: Option<Format>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Json,
    Yaml,
    Wide,
}

/// Checks, and prints what it found.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if let Some(path) = &args.path
        && let Err(error) = std::fs::metadata(path)
    {
        let is_missing = error.kind() == std::io::ErrorKind::NotFound;
        eprintln!("sluice check: {}: {error}", path.display());
        return Ok(ExitCode::from(if is_missing { 2 } else { 3 }));
    }
    let mut config = match read_config(args.config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("sluice check: {error}");
            return Ok(ExitCode::from(2));
        }
    };
    if args.node_name.is_some() {
        config.node_name = args.node_name;
    }
    let report = match (args.path, args.kubeconfig) {
        (Some(path), _) => Report::new(&offline::load(config, &path)),
        (None, kubeconfig) => {
            let publisher = offline::load_cluster(config, Access::Kubeconfig(kubeconfig.unwrap_or_default()))?;
            Report::new(&publisher).with_advice(publisher.advice())
        }
    };
    let text = match args.output {
        Some(Format::Json) => serde_json::to_string_pretty(&report)? + "\n",
        Some(Format::Yaml) => serde_saphyr::to_string(&report)?,
        Some(Format::Wide) => text(&report, true),
        None => text(&report, false),
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error.into()),
        Ok(()) | Err(_) => {}
    }
    Ok(ExitCode::from(u8::from(report.errors > 0)))
}

/// For people.
pub(super) fn text(report: &Report, is_wide: bool) -> String {
    let mut text = String::new();
    if !report.services.is_empty() {
        text += &table(report, is_wide).trim_fmt();
        text.push('\n');
        if report.services.iter().any(|service| !service.made_up.is_empty()) {
            text += "* made up, as the controllers of a cluster would\n";
        }
        text.push('\n');
    }
    let mut file = None;
    for problem in in_order_of_files(&report.problems) {
        let path = path_of(problem);
        if file != Some(path) {
            let _ = writeln!(text, "{}", path.map_or_else(|| elsewhere(problem), |path| path.display().to_string()));
            file = Some(path);
        }
        let _ = writeln!(text, "  {}", line(problem));
    }
    if !report.problems.is_empty() {
        text.push('\n');
    }
    if !report.skipped.is_empty() {
        let kinds: Vec<String> = report.skipped.iter().map(|(kind, count)| format!("{kind} ({count})")).collect();
        let _ = writeln!(text, "not used: {}", kinds.join(", "));
    }
    let _ = writeln!(text, "{}", report.summary());
    text
}

fn table(report: &Report, is_wide: bool) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    let mut header = vec!["SERVICE", "TYPE", "PORT", "FRONTENDS", "READY"];
    if is_wide {
        header.extend(["FAMILY", "ENDPOINTS", "FROM"]);
    }
    table.set_header(header);
    for service in &report.services {
        let none = PortReport::default();
        let ports = if service.ports.is_empty() { std::slice::from_ref(&none) } else { &service.ports };
        for (index, port) in ports.iter().enumerate() {
            let first = |text: &str| if index == 0 { text.to_owned() } else { String::new() };
            let mut row = vec![first(&service.service), first(&service.kind), port.title(), frontends(service, port)];
            let star = if service.is_made_up("endpoints") { "*" } else { "" };
            row.push(
                port.endpoints
                    .as_ref()
                    .map_or("-".to_owned(), |count| format!("{}/{}{star}", count.ready, count.total)),
            );
            if is_wide {
                row.push(port.family.map(|family| family.to_string()).unwrap_or_default());
                row.push(
                    port.endpoints.iter().flat_map(|count| &count.addresses).cloned().collect::<Vec<_>>().join(" "),
                );
                row.push(first(&service.origin.to_string()));
            }
            table.add_row(row);
        }
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

fn frontends(service: &ServiceReport, port: &PortReport) -> String {
    let texts = port.frontends.iter().map(|frontend| {
        let is_made_up = service.is_made_up(frontend.field);
        format!("{}{}", frontend.address, if is_made_up { "*" } else { "" })
    });
    let texts: Vec<String> = texts.collect();
    if texts.is_empty() { service.note.clone().unwrap_or_else(|| "-".to_owned()) } else { texts.join(" ") }
}

/// Files first, in order of paths and documents; errors before warnings in each.
fn in_order_of_files(problems: &[Problem]) -> Vec<&Problem> {
    let mut problems: Vec<&Problem> = problems.iter().collect();
    problems
        .sort_by_key(|problem| (path_of(problem).is_none(), path_of(problem), problem.severity, document_of(problem)));
    problems
}

/// The heading of problems of no file.
fn elsewhere(problem: &Problem) -> String {
    match &problem.origin {
        Some(Origin::Api) => "in the cluster".to_owned(),
        Some(Origin::File { .. } | Origin::LocalController) | None => "in no file".to_owned(),
    }
}

fn path_of(problem: &Problem) -> Option<&std::path::Path> {
    match &problem.origin {
        Some(Origin::File { path, .. }) => Some(path),
        Some(Origin::LocalController | Origin::Api) | None => None,
    }
}

fn document_of(problem: &Problem) -> usize {
    match &problem.origin {
        Some(Origin::File { document, .. }) => *document,
        Some(Origin::LocalController | Origin::Api) | None => 0,
    }
}

/// A problem below the name of its file.
fn line(problem: &Problem) -> String {
    let severity = match problem.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
    };
    let mut parts = vec![severity.to_owned()];
    if document_of(problem) > 0 {
        parts.push(format!("document {}", document_of(problem)));
    }
    parts.extend(problem.object.clone());
    parts.extend(Some(problem.field.clone()).filter(|field| !field.is_empty()));
    parts.push(problem.message.replace('\n', " "));
    parts.join(": ")
}
