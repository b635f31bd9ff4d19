//! The kernel's own way: what kube-proxy's nftables mode renders for one Service with a cluster IP and a node port.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};

use super::peer::Started;
use super::proxy::find_program;
use crate::lab::{CLUSTER_CIDR, CLUSTER_IP, Lab, NODE_PORT};

/// Loads the rules into the node's namespace, with which they go.
pub(super) fn load(lab: &Lab) -> Result<Started> {
    let Some(program) = find_program("nft") else {
        return Ok(Started::Missing("nft is not installed (scripts/setup installs it)".to_owned()));
    };
    let mut child = lab
        .topology
        .node
        .command(program)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start nft")?;
    let mut input = child.stdin.take().context("nft has no standard input")?;
    input.write_all(rules(lab)?.as_bytes()).context("cannot write to nft")?;
    drop(input);
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
    Ok(Started::Kernel)
}

fn rules(lab: &Lab) -> Result<String> {
    let (ip, port) = (CLUSTER_IP.ip(), CLUSTER_IP.port());
    let node = lab.node_address();
    let endpoints = lab.endpoints();
    let mut chains = String::new();
    let mut choices = String::new();
    for (number, endpoint) in endpoints.iter().enumerate() {
        write!(choices, "{}{number} : goto endpoint-{number}", if number > 0 { ", " } else { "" })?;
        write!(
            chains,
            "chain endpoint-{number} {{\n ip saddr {} jump mark-for-masquerade\n meta l4proto tcp dnat to {endpoint}\n}}\n",
            endpoint.ip()
        )?;
    }
    let count = endpoints.len();
    Ok(format!(
        "table ip kube-proxy {{
set cluster-ips {{ type ipv4_addr; elements = {{ {ip} }} }}
set nodeport-ips {{ type ipv4_addr; elements = {{ {node} }} }}
map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
map service-nodeports {{ type inet_proto . inet_service : verdict; }}
chain cluster-ips-check {{ ip daddr @cluster-ips reject; }}
chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}
chain masquerading {{
 meta mark and 0x4000 == 0x0 return
 meta mark set meta mark xor 0x4000
 masquerade fully-random
}}
{chains}
chain service-web {{
 ip daddr {ip} tcp dport {port} ip saddr != {CLUSTER_CIDR} jump mark-for-masquerade
 numgen random mod {count} vmap {{ {choices} }}
}}
chain external-web {{
 jump mark-for-masquerade
 goto service-web
}}
chain services {{
 ip daddr . meta l4proto . th dport vmap @service-ips
 ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}}
chain filter-prerouting {{ type filter hook prerouting priority -110; ct state new jump firewall-check; }}
chain filter-input {{
 type filter hook input priority -110;
 ct state new jump nodeport-endpoints-check
 ct state new jump service-endpoints-check
}}
chain filter-forward {{
 type filter hook forward priority -110;
 ct state new jump service-endpoints-check
 ct state new jump cluster-ips-check
}}
chain filter-output {{
 type filter hook output priority -110;
 ct state new jump service-endpoints-check
 ct state new jump firewall-check
}}
chain filter-output-post-dnat {{ type filter hook output priority -90; ct state new jump cluster-ips-check; }}
chain nat-prerouting {{ type nat hook prerouting priority -100; jump services; }}
chain nat-output {{ type nat hook output priority -100; jump services; }}
chain nat-postrouting {{ type nat hook postrouting priority 100; jump masquerading; }}
}}
add element ip kube-proxy service-ips {{ {ip} . tcp . {port} : goto service-web }}
add element ip kube-proxy service-nodeports {{ tcp . {NODE_PORT} : goto external-web }}
"
    ))
}
