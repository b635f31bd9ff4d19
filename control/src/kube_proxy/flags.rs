//! kube-proxy's flags on our command line: as in a DaemonSet that once ran kube-proxy.

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::Value;

use super::keys::{self, Fate};
use super::{Draft, KEYS, Wishes};
use crate::config::{Config, ConfigError};

/// Flags that kube-proxy heeds even beside `--config`.
const BESIDE_A_FILE: &[&str] = &["hostname-override", "v", "vmodule", "logging-format"];

/// kube-proxy's flags that were given, with their values, in the order of [`KEYS`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags(Vec<(&'static str, String)>);

impl Flags {
    /// The configuration with what the flags ask for. `is_kube_proxys`: it is from kube-proxy's own file, beside which
    /// kube-proxy heeds few flags.
    pub fn apply(&self, config: Config, is_kube_proxys: bool) -> Result<(Config, Wishes), ConfigError> {
        let mut draft = Draft::default();
        let mut ignored = Vec::new();
        for (flag, value) in &self.0 {
            let fail = |reason: String| ConfigError::new(format!("--{flag}"), reason);
            let key = keys::of_flag(flag).expect("only flags of the table are parsed");
            let is_heeded = !is_kube_proxys || BESIDE_A_FILE.contains(flag);
            match key.fate {
                Fate::Refused => return Err(fail(key.says.to_owned())),
                Fate::Mapped(set) if is_heeded => set(&mut draft, &Value::String(value.clone())).map_err(fail)?,
                Fate::Mapped(_) => ignored.push(format!("--{flag} (beside a file, as kube-proxy does)")),
                Fate::Ignored => ignored.push(format!("--{flag}")),
            }
        }
        ignored.append(&mut draft.ignored);
        let (config, wishes) = draft.apply(config);
        Ok((config, wishes.ignoring(&ignored)))
    }
}

impl clap::Args for Flags {
    fn augment_args(command: Command) -> Command {
        let flags = KEYS.iter().filter(|key| !key.flag.is_empty());
        command.args(flags.map(|key| {
            let arg = Arg::new(key.flag).long(key.flag).value_name("VALUE");
            // A flag of kube-proxy's kind: `--flag`, `--flag=value`, and where it is no boolean `--flag value`.
            let arg = if is_boolean(key.flag) {
                arg.num_args(0..=1).require_equals(true).default_missing_value("true")
            } else {
                arg.num_args(1).allow_hyphen_values(true)
            };
            let arg = if key.flag == "v" { arg.short('v') } else { arg };
            arg.action(ArgAction::Append).hide(true).help(format!("kube-proxy's: {}: {}", key.fate.word(), key.says))
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let flags = KEYS.iter().map(|key| key.flag).filter(|flag| !flag.is_empty());
        let given = flags.filter_map(|flag| {
            let values: Vec<&String> = matches.get_many(flag)?.collect();
            // Lists may be given piece by piece; of others the last counts.
            let value = if is_list(flag) {
                values.iter().map(|value| value.as_str()).collect::<Vec<_>>().join(",")
            } else {
                (*values.last()?).clone()
            };
            Some((flag, value))
        });
        Ok(Self(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn is_list(flag: &str) -> bool {
    matches!(flag, "nodeport-addresses" | "ipvs-exclude-cidrs" | "feature-gates" | "vmodule")
}

fn is_boolean(flag: &str) -> bool {
    matches!(
        flag,
        "alsologtostderr"
            | "bind-address-hard-fail"
            | "cleanup"
            | "conntrack-tcp-be-liberal"
            | "init-only"
            | "ipvs-strict-arp"
            | "iptables-localhost-nodeports"
            | "log-json-split-stream"
            | "log-text-split-stream"
            | "logtostderr"
            | "masquerade-all"
            | "profiling"
    )
}
