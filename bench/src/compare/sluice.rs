//! The daemon `sluice run` with one Service in manifest files.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::lab::{CLUSTER_CIDR, CLUSTER_IP, Lab, NODE_PORT, POD_PORT};
use super::peer::Started;

const NODE: &str = "node-1";

/// Writes manifests and configuration.
pub(super) fn prepare(lab: &Lab, folder: &Path, program: &Path, workers: Option<usize>) -> Result<Started> {
    if !program.is_file() {
        return Ok(Started::Missing(format!("{} is not built (cargo build --release --bins)", program.display())));
    }
    let manifests = folder.join("manifests");
    fs::create_dir(&manifests)?;
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects(lab)});
    fs::write(manifests.join("web.json"), list.to_string()).context("cannot write manifests")?;
    let workers = workers.map(|workers| format!("workers: {workers}\n")).unwrap_or_default();
    let config = folder.join("config.yaml");
    fs::write(&config, format!("localControllers: false\n{workers}")).context("cannot write the configuration")?;
    let mut command = lab.topology.node.command(program);
    command.arg("run").arg("--manifests").arg(manifests).arg("--config").arg(config);
    command.args(["--node-name", NODE, "--state-dir"]).arg(folder.join("state"));
    Ok(Started::Process(command))
}

fn objects(lab: &Lab) -> Vec<Value> {
    let endpoints: Vec<Value> = lab
        .endpoints()
        .iter()
        .map(|endpoint| {
            json!({"addresses": [endpoint.ip().to_string()], "conditions": {"ready": true}, "nodeName": NODE})
        })
        .collect();
    vec![
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
            "spec": {"podCIDR": CLUSTER_CIDR, "podCIDRs": [CLUSTER_CIDR]},
            "status": {"addresses": [{"type": "InternalIP", "address": lab.node_address().to_string()}]},
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web"},
            "spec": {
                "type": "NodePort", "clusterIP": CLUSTER_IP.ip().to_string(),
                "clusterIPs": [CLUSTER_IP.ip().to_string()], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
                "ports": [{
                    "name": "http", "protocol": "TCP", "port": CLUSTER_IP.port(), "targetPort": POD_PORT,
                    "nodePort": NODE_PORT,
                }],
            },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "namespace": "default", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"},
            },
            "endpoints": endpoints,
            "ports": [{"name": "http", "protocol": "TCP", "port": POD_PORT}],
        }),
    ]
}
