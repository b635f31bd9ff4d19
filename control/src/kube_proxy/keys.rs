//! Every key and flag of kube-proxy, and what becomes of it here.

use serde_json::Value;

use super::draft::Draft;

/// A key of `KubeProxyConfiguration`, a flag, or both.
pub struct Key {
    /// Path in the file; empty: there is only the flag. What is below it belongs to it.
    pub path: &'static str,
    /// Name of the flag; empty: there is only the key.
    pub flag: &'static str,
    /// What becomes of it.
    pub fate: Fate,
    /// For people: what it is here, or why it is nothing.
    pub says: &'static str,
}

/// What becomes of a key.
#[derive(Clone, Copy)]
pub enum Fate {
    /// It sets something. Fails for values that cannot be served.
    Mapped(fn(&mut Draft, &Value) -> Result<(), String>),
    /// It has no counterpart; one warning names all of these.
    Ignored,
    /// It would be a mistake to go on without it.
    Refused,
}

impl Fate {
    /// A word for the table in `docs/migration.md`.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Mapped(_) => "mapped",
            Self::Ignored => "ignored",
            Self::Refused => "refused",
        }
    }
}

const fn mapped(
    path: &'static str,
    flag: &'static str,
    set: fn(&mut Draft, &Value) -> Result<(), String>,
    says: &'static str,
) -> Key {
    Key { path, flag, fate: Fate::Mapped(set), says }
}

const fn ignored(path: &'static str, flag: &'static str, says: &'static str) -> Key {
    Key { path, flag, fate: Fate::Ignored, says }
}

const fn refused(path: &'static str, flag: &'static str, says: &'static str) -> Key {
    Key { path, flag, fate: Fate::Refused, says }
}

const NO_CONNTRACK: &str = "flows are not in conntrack's table; the kernel's setting stays as it is";
const NO_LISTS: &str = "a change is applied at once, and the host is looked at every 5 s";
const NO_IPVS: &str = "there is no IPVS";
const LINUX: &str = "of Windows";
const FEW_REQUESTS: &str = "four watches need no limit";
const LOG: &str = "log lines are written at once, to standard error";

/// All of them, in the order of kube-proxy's types.
#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    ignored("featureGates", "feature-gates", "gates are those of kube-proxy's own code"),
    mapped("clientConnection.kubeconfig", "", Draft::kubeconfig, "`--kubeconfig`, unless that is given; empty: the Pod's service account"),
    ignored("clientConnection.acceptContentTypes", "", "requests are JSON"),
    ignored("clientConnection.contentType", "kube-api-content-type", "requests are JSON"),
    ignored("clientConnection.qps", "kube-api-qps", FEW_REQUESTS),
    ignored("clientConnection.burst", "kube-api-burst", FEW_REQUESTS),
    refused("", "master", "write the address into the kubeconfig"),
    mapped("logging.format", "logging-format", Draft::log_format, "`--log-format`, unless that is given"),
    mapped("logging.verbosity", "v", Draft::verbosity, "`--log-level`, unless that is given: 0–3 info, 4–5 debug, from 6 trace"),
    ignored("logging.vmodule", "vmodule", "`--log-level` takes filters"),
    ignored("logging.flushFrequency", "log-flush-frequency", LOG),
    ignored("logging.options.text.splitStream", "log-text-split-stream", LOG),
    ignored("logging.options.text.infoBufferSize", "log-text-info-buffer-size", LOG),
    ignored("logging.options.json.splitStream", "log-json-split-stream", LOG),
    ignored("logging.options.json.infoBufferSize", "log-json-info-buffer-size", LOG),
    ignored("", "logtostderr", LOG),
    ignored("", "alsologtostderr", LOG),
    mapped("hostnameOverride", "hostname-override", Draft::hostname_override, "`nodeName`"),
    mapped("bindAddress", "bind-address", Draft::bind_address, "an unspecified address: the family of the next two's defaults; any other is ignored, the Node's addresses count"),
    mapped("healthzBindAddress", "healthz-bind-address", Draft::healthz, "`health`; without a port 10256"),
    mapped("", "healthz-port", Draft::healthz_port, "the port of `health`; 0 is refused, it cannot be switched off"),
    mapped("metricsBindAddress", "metrics-bind-address", Draft::metrics, "`admin`; without a port 10249. The admin API is there too, see above"),
    mapped("", "metrics-port", Draft::metrics_port, "the port of `admin`; 0 is refused, it cannot be switched off"),
    ignored("bindAddressHardFail", "bind-address-hard-fail", "a port that cannot be had always ends the start"),
    ignored("enableProfiling", "profiling", "there is no profiling by HTTP"),
    ignored("showHiddenMetricsForVersion", "show-hidden-metrics-for-version", "no metric is hidden"),
    mapped("mode", "proxy-mode", Draft::mode, "`iptables` (also when unset in a file), `ipvs`: the default of `nodePortAddresses` is `[all, localhost]`; `nftables`: `[primary]`; `kernelspace` is refused"),
    ignored("iptables.masqueradeBit", "iptables-masquerade-bit", "the mark is 0x51ce in the upper half"),
    mapped("iptables.masqueradeAll", "masquerade-all", Draft::masquerade_all, "`masqueradeAll`, in modes iptables and ipvs; the flag in all"),
    mapped("iptables.localhostNodePorts", "iptables-localhost-nodeports", Draft::localhost_node_ports, "in mode iptables: `localhost` in `nodePortAddresses`, where they hold 127.0.0.0/8"),
    ignored("iptables.syncPeriod", "iptables-sync-period", NO_LISTS),
    ignored("iptables.minSyncPeriod", "iptables-min-sync-period", NO_LISTS),
    ignored("ipvs.syncPeriod", "ipvs-sync-period", NO_LISTS),
    ignored("ipvs.minSyncPeriod", "ipvs-min-sync-period", NO_LISTS),
    mapped("ipvs.scheduler", "ipvs-scheduler", Draft::scheduler, "`balancing`, in mode ipvs: `rr`, `wrr` (and unset) round-robin; `lc`, `wlc`, `sed`, `nq` least-connections; others are refused"),
    ignored("ipvs.excludeCIDRs", "ipvs-exclude-cidrs", NO_IPVS),
    ignored("ipvs.strictARP", "ipvs-strict-arp", "no Service address is on a link, so nobody answers for one"),
    ignored("ipvs.tcpTimeout", "ipvs-tcp-timeout", NO_IPVS),
    ignored("ipvs.tcpFinTimeout", "ipvs-tcpfin-timeout", NO_IPVS),
    ignored("ipvs.udpTimeout", "ipvs-udp-timeout", NO_IPVS),
    ignored("nftables.masqueradeBit", "", "the mark is 0x51ce in the upper half"),
    mapped("nftables.masqueradeAll", "", Draft::masquerade_all_nftables, "`masqueradeAll`, in mode nftables"),
    ignored("nftables.syncPeriod", "", NO_LISTS),
    ignored("nftables.minSyncPeriod", "", NO_LISTS),
    ignored("winkernel", "", LINUX),
    ignored("windowsRunAsService", "", LINUX),
    mapped("detectLocalMode", "detect-local-mode", Draft::detect_local_mode, "`ClusterCIDR`: the next but one; `NodeCIDR`: the Node's `podCIDRs`; `BridgeInterface` and `InterfaceNamePrefix` are refused: Pods are told by their addresses"),
    ignored("detectLocal.bridgeInterface", "pod-bridge-interface", "Pods are told by their addresses"),
    ignored("detectLocal.interfaceNamePrefix", "pod-interface-name-prefix", "Pods are told by their addresses"),
    mapped("clusterCIDR", "cluster-cidr", Draft::cluster_cidr, "`clusterCIDRs`; empty in a file with mode `ClusterCIDR`: no address is a Pod's, as there"),
    mapped("nodePortAddresses", "nodeport-addresses", Draft::node_port_addresses, "`nodePortAddresses`"),
    ignored("oomScoreAdj", "oom-score-adj", "the kubelet and systemd set it"),
    ignored("conntrack.maxPerCore", "conntrack-max-per-core", NO_CONNTRACK),
    ignored("conntrack.min", "conntrack-min", NO_CONNTRACK),
    ignored("conntrack.tcpEstablishedTimeout", "conntrack-tcp-timeout-established", NO_CONNTRACK),
    ignored("conntrack.tcpCloseWaitTimeout", "conntrack-tcp-timeout-close-wait", NO_CONNTRACK),
    ignored("conntrack.tcpBeLiberal", "conntrack-tcp-be-liberal", NO_CONNTRACK),
    ignored("conntrack.udpTimeout", "conntrack-udp-timeout", NO_CONNTRACK),
    ignored("conntrack.udpStreamTimeout", "conntrack-udp-timeout-stream", NO_CONNTRACK),
    ignored("configSyncPeriod", "config-sync-period", "watches are never listed anew without need"),
    ignored("portRange", "", "kube-proxy ignores it too"),
    refused("", "cleanup", "run `sluice cleanup`, or `sluice cleanup --kube-proxy`"),
    refused("", "init-only", "nothing has to be done beforehand; leave the init container out"),
    refused("", "write-config-to", "nothing is written; `docs/configuration.md` has the defaults"),
];

/// The row of a key of a file, or of the map it is in.
pub(super) fn of_path(path: &str) -> Option<&'static Key> {
    let holds = |key: &&Key| {
        let rest = path.strip_prefix(key.path).filter(|_| !key.path.is_empty());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    KEYS.iter().find(holds)
}

/// The row of a flag.
pub(super) fn of_flag(flag: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.flag == flag)
}

/// Whether a path is one of maps that hold keys.
pub(super) fn is_section(path: &str) -> bool {
    KEYS.iter().any(|key| key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}
