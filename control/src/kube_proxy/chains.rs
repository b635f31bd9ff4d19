//! Which iptables chains are kube-proxy's: from what `iptables-save` prints to a script that removes them and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Chains that the kernel's own chains jump to.
const ENTRIES: &[&str] = &[
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-NODE-PORT",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
];
/// The others of a fixed name. `KUBE-FIREWALL`, `KUBE-KUBELET-CANARY` and `KUBE-IPTABLES-HINT` are the kubelet's.
const NAMED: &[&str] = &["KUBE-MARK-MASQ", "KUBE-MARK-DROP", "KUBE-LOAD-BALANCER", "KUBE-PROXY-CANARY"];
/// Those of Services and endpoints: a hash follows.
const PREFIXES: &[&str] = &["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-XLB-", "KUBE-FW-", "KUBE-SEP-"];
/// What marks a packet, and who heeds the mark.
const MARKS: (&str, &str) = ("KUBE-MARK-MASQ", "KUBE-POSTROUTING");

/// What is to be removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Removal {
    /// For `iptables-restore --noflush`, which does it in one step a table. Empty: nothing.
    pub(super) script: String,
    /// Number of chains, by table.
    pub(super) chains: BTreeMap<String, usize>,
    /// Chains that somebody else's rules jump to: they stay, and those they need.
    pub(super) in_use: BTreeSet<String>,
}

/// Of everything that `iptables-save` prints.
pub(super) fn removal(saved: &str) -> Removal {
    let mut removal = Removal::default();
    for table in saved.split("\n*").map(|text| text.strip_prefix('*').unwrap_or(text)) {
        if let Some((name, lines)) = table.split_once('\n') {
            removal.add_table(name.trim(), lines);
        }
    }
    removal
}

impl Removal {
    fn add_table(&mut self, name: &str, lines: &str) {
        let chains = lines.lines().filter_map(|line| line.strip_prefix(':')?.split_whitespace().next());
        let chains: BTreeSet<&str> = chains.filter(|chain| is_kube_proxys(chain)).collect();
        let rules: Vec<(&str, &str, &str)> = lines.lines().filter_map(rule).collect();
        let jumps = rules.iter().filter(|(_, target, _)| chains.contains(target));
        let of_others = |chain: &str, target: &str| {
            let is_entry = is_kernels(chain) && ENTRIES.contains(&target);
            !is_entry && !chains.contains(chain)
        };
        let mut in_use: BTreeSet<&str> =
            jumps.clone().filter(|(chain, target, _)| of_others(chain, target)).map(|(_, target, _)| *target).collect();
        loop {
            let needed = jumps.clone().filter(|(chain, ..)| in_use.contains(chain)).map(|(_, target, _)| *target);
            let heeds = (in_use.contains(MARKS.0) && chains.contains(MARKS.1)).then_some(MARKS.1);
            let more: BTreeSet<&str> = needed.chain(heeds).filter(|chain| !in_use.contains(chain)).collect();
            if more.is_empty() {
                break;
            }
            in_use.extend(more);
        }
        let removed: Vec<&str> = chains.difference(&in_use).copied().collect();
        self.in_use.extend(in_use.iter().map(|chain| (*chain).to_owned()));
        if removed.is_empty() {
            return;
        }
        let _ = writeln!(self.script, "*{name}");
        for chain in &removed {
            let _ = writeln!(self.script, ":{chain} - [0:0]");
        }
        for (chain, target, line) in &rules {
            if !chains.contains(chain) && removed.contains(target) {
                let _ = writeln!(self.script, "{}", line.replacen("-A", "-D", 1));
            }
        }
        for chain in &removed {
            let _ = writeln!(self.script, "-X {chain}");
        }
        self.script.push_str("COMMIT\n");
        self.chains.insert(name.to_owned(), removed.len());
    }
}

/// Chain, where it jumps to, and the whole line.
fn rule(line: &str) -> Option<(&str, &str, &str)> {
    let chain = line.strip_prefix("-A ")?.split(' ').next()?;
    let target = line.rsplit_once(" -j ").or_else(|| line.rsplit_once(" -g ")).map_or("", |(_, target)| target);
    Some((chain, target.split(' ').next().unwrap_or_default(), line))
}

fn is_kernels(chain: &str) -> bool {
    matches!(chain, "PREROUTING" | "INPUT" | "FORWARD" | "OUTPUT" | "POSTROUTING")
}

fn is_kube_proxys(chain: &str) -> bool {
    ENTRIES.contains(&chain) || NAMED.contains(&chain) || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// Whether an ipset is kube-proxy's: those of mode ipvs, of either family.
pub(super) fn is_kube_proxys_set(name: &str) -> bool {
    const SETS: &[&str] = &[
        "LOOP-BACK",
        "CLUSTER-IP",
        "EXTERNAL-IP",
        "EXTERNAL-IP-LOCAL",
        "LOAD-BALANCER",
        "LOAD-BALANCER-LOCAL",
        "LOAD-BALANCER-FW",
        "LOAD-BALANCER-SOURCE-IP",
        "LOAD-BALANCER-SOURCE-CIDR",
        "NODE-PORT-TCP",
        "NODE-PORT-LOCAL-TCP",
        "NODE-PORT-UDP",
        "NODE-PORT-LOCAL-UDP",
        "NODE-PORT-SCTP-HASH",
        "NODE-PORT-LOCAL-SCTP-HASH",
        "HEALTH-CHECK-NODE-PORT",
        "IPVS-IPS",
    ];
    let name = name.strip_prefix("KUBE-6-").or_else(|| name.strip_prefix("KUBE-"));
    name.is_some_and(|name| SETS.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "# Generated by iptables-nft-save\n*mangle\n:PREROUTING ACCEPT [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n\
        :KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n\
        :KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-ROUTER-X - [0:0]\n:MINE - [0:0]\n\
        -A PREROUTING -m comment --comment \"kubernetes service portals -j KUBE-FORWARD\" -j KUBE-SERVICES\n\
        -A PREROUTING -p tcp -j MINE\n-A POSTROUTING -j KUBE-POSTROUTING\n-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-X\n\
        -A KUBE-SVC-X ! -s 10.0.0.0/8 -j KUBE-MARK-MASQ\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
        -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n-A MINE -j RETURN\nCOMMIT\n";

    #[test]
    fn exactly_kube_proxys_chains_and_the_jumps_to_them_go() {
        let removal = removal(SAVED);
        let script = "*mangle\n:KUBE-PROXY-CANARY - [0:0]\n-X KUBE-PROXY-CANARY\nCOMMIT\n*nat\n:KUBE-MARK-MASQ - [0:0]\n\
            :KUBE-POSTROUTING - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n\
            -D PREROUTING -m comment --comment \"kubernetes service portals -j KUBE-FORWARD\" -j KUBE-SERVICES\n\
            -D POSTROUTING -j KUBE-POSTROUTING\n-X KUBE-MARK-MASQ\n-X KUBE-POSTROUTING\n-X KUBE-SERVICES\n-X KUBE-SVC-X\nCOMMIT\n";
        assert_eq!(removal.script, script);
        assert_eq!(removal.chains, [("mangle".to_owned(), 1), ("nat".to_owned(), 4)].into());
        assert!(removal.in_use.is_empty());
    }

    #[test]
    fn what_others_jump_to_stays_with_what_it_needs() {
        let saved = SAVED.replace("-A MINE -j RETURN", "-A MINE -j KUBE-MARK-MASQ");
        let removal = removal(&saved);
        assert_eq!(removal.in_use, [MARKS.0.to_owned(), MARKS.1.to_owned()].into());
        assert!(removal.script.contains("-X KUBE-SERVICES\n") && removal.script.contains("-X KUBE-SVC-X\n"));
        assert!(!removal.script.contains(MARKS.1) && !removal.script.contains(MARKS.0), "{}", removal.script);
    }

    #[test]
    fn nothing_of_kube_proxys_is_nothing_to_do() {
        assert_eq!(removal(""), Removal::default());
        assert_eq!(removal("*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\nCOMMIT\n"), Removal::default());
    }

    #[test]
    fn only_sets_of_these_names_are_its() {
        for (name, is) in
            [("KUBE-CLUSTER-IP", true), ("KUBE-6-LOOP-BACK", true), ("KUBE-DST-X", false), ("MINE", false)]
        {
            assert_eq!(is_kube_proxys_set(name), is, "{name}");
        }
    }
}
