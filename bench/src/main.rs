//! `sluice-bench`: load for data planes, and comparisons of peers.

mod cli;
mod compare;
mod daemon;
mod lab;
mod manifests;
mod names;
mod process;
mod progress;
mod scenario;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use sluice_bench::plain_server::PlainServer;
use sluice_bench::serve::listen_tcp;
use sluice_bench::workload::{self, Plan, Workload};

use cli::{Cli, Command, CommonArgs};

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("sluice-bench: {error:#}");
            ExitCode::from(if error.is::<lab::Lacking>() { 3 } else { 2 })
        }
    }
}

/// Whether all went without errors.
fn run(command: Command) -> Result<bool> {
    match command {
        Command::Cps(arguments) => load(&arguments.plan(Workload::Cps)?, &arguments.common),
        Command::Rr(arguments) => load(&arguments.plan(Workload::Rr)?, &arguments.common),
        Command::Bulk(arguments) => load(&arguments.plan()?, &arguments.common),
        Command::Serve(arguments) => {
            let server = PlainServer::start(listen_tcp(arguments.port)?, arguments.threads)?;
            eprintln!("serving on {}", server.address());
            server.wait();
            Ok(true)
        }
        Command::Dns(arguments) => names::run(&arguments),
        Command::Idle(arguments) => scenario::idle::run(&arguments),
        Command::Churn(arguments) => scenario::churn::run(&arguments),
        Command::Drain(arguments) => scenario::drain::run(&arguments),
        Command::Scale(arguments) => scenario::scale::run(&arguments),
        Command::Compare(arguments) => compare::run(&arguments),
        Command::DnsCompare(arguments) => compare::dns::run(&arguments),
        Command::Hop(arguments) => compare::hop(&arguments).map(|()| true),
    }
}

fn load(plan: &Plan, arguments: &CommonArgs) -> Result<bool> {
    let mut line = progress::Line::new();
    let outcome = workload::run(None, plan, |sample| line.sample("", plan.workload, sample))?;
    line.clear();
    if let Some(path) = &arguments.html {
        let page = compare::html::load_page(plan, &outcome);
        std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if arguments.json {
        println!("{}", progress::to_json(plan, &outcome));
    } else {
        progress::print(plan, &outcome);
    }
    Ok(outcome.failed() == 0)
}
