//! Names for programs of this machine: systemd-resolved is told, where it runs; no file is ever edited.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::config::{Config, Dns};
use crate::host::LINK;

/// Where systemd-resolved keeps what it makes, while it runs.
const RESOLVED: &str = "/run/systemd/resolve/stub-resolv.conf";

/// Tells systemd-resolved that names of the zones are asked for here; it forgets with the link. Without it, says what the
/// user can do.
pub fn announce(config: &Config) {
    let Some(dns) = &config.dns else { return };
    match Path::new(RESOLVED).exists().then(|| tell(dns)) {
        Some(Ok(())) => {
            tracing::info!(zones = dns.zones.join(" "), "systemd-resolved asks here for names of these zones")
        }
        Some(Err(reason)) => tracing::warn!(reason, "systemd-resolved was not told; {}", advice(dns)),
        None => tracing::info!("{}", advice(dns)),
    }
}

/// What to put where, so that names are found.
fn advice(dns: &Dns) -> String {
    match dns.listen.iter().find(|address| address.port() == 53) {
        Some(address) => {
            format!(
                "to find the names, put this line before the others in /etc/resolv.conf: nameserver {}",
                address.ip()
            )
        }
        None => "resolv.conf knows no ports: to find the names, listen at port 53 (dns.listen)".to_owned(),
    }
}

/// The commands that tell systemd-resolved.
fn commands(dns: &Dns) -> [Vec<String>; 2] {
    let words = |command: &str, more: Vec<String>| [vec![command.to_owned(), LINK.to_owned()], more].concat();
    let server = |address: &SocketAddr| match address.port() {
        53 => address.ip().to_string(),
        _ => address.to_string(),
    };
    // Only for these: all other names go where they went.
    let zones = dns.zones.iter().map(|zone| format!("~{}", zone.trim_end_matches('.'))).collect();
    [words("dns", dns.listen.iter().map(server).collect()), words("domain", zones)]
}

fn tell(dns: &Dns) -> Result<(), String> {
    for arguments in commands(dns) {
        let output = Command::new("resolvectl").args(&arguments).stdin(Stdio::null()).output();
        let output = output.map_err(|error| format!("resolvectl: {error}"))?;
        if !output.status.success() {
            return Err(format!("resolvectl: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolved_is_told_of_our_zones_only() {
        let dns = Dns {
            listen: vec!["169.254.20.10:53".parse().unwrap(), "[fd00::1]:5353".parse().unwrap()],
            ..Dns::default()
        };
        let [servers, zones] = commands(&dns);
        assert_eq!(servers, ["dns", "sluice0", "169.254.20.10", "[fd00::1]:5353"]);
        assert_eq!(zones, ["domain", "sluice0", "~cluster.local"]);
        assert!(advice(&dns).ends_with(": nameserver 169.254.20.10"));
        let elsewhere = Dns { listen: vec!["127.0.0.1:5353".parse().unwrap()], ..Dns::default() };
        assert!(advice(&elsewhere).contains("port 53"));
    }
}
