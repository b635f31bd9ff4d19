//! HAProxy and nginx as plain TCP proxies on the node port.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::peer::Started;
use crate::lab::Lab;

const MISSING: &str = "not installed (scripts/setup-peers installs it)";
/// Where distributions keep nginx's stream module when it is not built in.
const STREAM_MODULES: [&str; 2] =
    ["/usr/lib/nginx/modules/ngx_stream_module.so", "/usr/lib64/nginx/modules/ngx_stream_module.so"];

/// HAProxy with a thread a core, its default.
pub(super) fn haproxy(lab: &Lab, folder: &Path) -> Result<Started> {
    let Some(program) = find_program("haproxy") else { return Ok(Started::Missing(MISSING.to_owned())) };
    let mut text = format!(
        "global\n    maxconn 4000\ndefaults\n    mode tcp\n    balance leastconn\n    timeout connect 5s\n    \
         timeout client 1h\n    timeout server 1h\nlisten web\n    bind {}\n",
        lab.node_port()
    );
    for (number, endpoint) in lab.endpoints().iter().enumerate() {
        writeln!(text, "    server web-{number} {endpoint}")?;
    }
    let file = folder.join("haproxy.cfg");
    fs::write(&file, text).context("cannot write HAProxy's configuration")?;
    let mut command = lab.topology.node.command(program);
    command.arg("-db").arg("-f").arg(file);
    Ok(Started::Process(command))
}

/// nginx with a worker a core.
pub(super) fn nginx(lab: &Lab, folder: &Path) -> Result<Started> {
    let Some(program) = find_program("nginx") else { return Ok(Started::Missing(MISSING.to_owned())) };
    let mut text = String::new();
    if let Some(module) = STREAM_MODULES.iter().find(|module| Path::new(module).exists()) {
        writeln!(text, "load_module {module};")?;
    }
    let folder_text = folder.display();
    write!(
        text,
        "daemon off;\nuser root;\nworker_processes auto;\npid {folder_text}/nginx.pid;\nerror_log stderr error;\n\
         events {{ worker_connections 8000; }}\nstream {{\n  upstream web {{\n    least_conn;\n"
    )?;
    for endpoint in lab.endpoints() {
        writeln!(text, "    server {endpoint};")?;
    }
    write!(text, "  }}\n  server {{ listen {} backlog=4096; proxy_pass web; }}\n}}\n", lab.node_port())?;
    let file = folder.join("nginx.conf");
    fs::write(&file, text).context("cannot write nginx's configuration")?;
    let mut command = lab.topology.node.command(program);
    command.arg("-p").arg(folder).arg("-c").arg(file).args(["-e", "stderr"]);
    Ok(Started::Process(command))
}

/// A program in the path, or where administrators' programs are.
pub(super) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|program| program.is_file())
}
