//! Metrics about names, by CoreDNS's names where dashboards know those: counts are kept by the threads that answer, and
//! read when somebody asks. The text is made here and not by the crate `metrics`, whose histograms take single observations
//! only: it has no way in for buckets that others have counted, and to record there would cost the threads that answer an
//! allocation and a list shared by all for each question.

use std::fmt::{Display, Write as _};

use sluice_dataplane::dns::Source;
use sluice_dataplane::dns::stats::{DURATIONS, Histogram, SIZES, Totals};
use sluice_dataplane::net::Family;

use crate::state::State;

/// All of them as Prometheus text; nothing when names are not answered.
#[must_use]
pub fn render(state: &State) -> String {
    let (Some(dns), Some(names)) = (&state.config.dns, &state.names) else { return String::new() };
    let server = dns.listen.first().map(|address| format!("dns://{address}")).unwrap_or_default();
    let common = format!("server=\"{server}\",zone=\".\",view=\"\"");
    let mut text = Text::default();
    of_questions(&mut text, &common, &names.totals());
    let zone = names.zone();
    text.begin("sluice_dns_services", "gauge", "Services that have names");
    text.line("sluice_dns_services", "", zone.len());
    text.begin("sluice_dns_serial", "gauge", "Serial number of the zone: when it last changed");
    text.line("sluice_dns_serial", "", zone.serial());
    if let Some(upstreams) = &state.upstreams {
        let name = "coredns_forward_max_concurrent_rejects_total";
        text.begin(name, "counter", "Questions refused because too many to upstreams were open");
        text.line(name, "", upstreams.rejected());
        text.begin("sluice_dns_upstream_open", "gauge", "Questions to upstreams that are open");
        text.line("sluice_dns_upstream_open", "", upstreams.open());
        text.begin("sluice_dns_upstream_loop", "gauge", "1: upstreams ask us what we ask them, so none is asked");
        text.line("sluice_dns_upstream_loop", "", u8::from(upstreams.is_loop()));
    }
    text.0
}

fn of_questions(text: &mut Text, common: &str, totals: &Totals) {
    let name = "coredns_dns_requests_total";
    text.begin(name, "counter", "Questions, by transport, family (1 is IPv4, 2 IPv6) and type");
    for (by, family, kind, count) in &totals.requests {
        let family = match family {
            Family::V4 => 1,
            Family::V6 => 2,
        };
        text.line(name, &format!("{common},proto=\"{}\",family=\"{family}\",type=\"{kind}\"", by.name()), count);
    }
    let name = "coredns_dns_do_requests_total";
    text.begin(name, "counter", "Questions for signatures too");
    text.line(name, common, totals.dnssec_requests);
    let name = "coredns_dns_responses_total";
    text.begin(name, "counter", "Answers, by code and who gave them");
    for (code, source, count) in &totals.responses {
        text.line(name, &format!("{common},rcode=\"{code}\",plugin=\"{}\"", plugin(*source)), count);
    }
    let name = "sluice_dns_responses_total";
    text.begin(name, "counter", "Answers, by code and source: zone, cache, upstream, or none when refused");
    for (code, source, count) in &totals.responses {
        text.line(name, &format!("rcode=\"{code}\",source=\"{}\"", source.name()), count);
    }
    let of = |wanted: Source| totals.responses.iter().filter(move |(_, source, _)| *source == wanted);
    let sum = |wanted: Source| of(wanted).map(|(_, _, count)| count).sum::<u64>();
    let denied = of(Source::Cache).filter(|(code, ..)| *code == "NXDOMAIN").map(|(_, _, count)| count).sum::<u64>();
    let name = "coredns_cache_hits_total";
    text.begin(name, "counter", "Answers of upstreams that were remembered");
    for (kind, count) in [("success", sum(Source::Cache) - denied), ("denial", denied)] {
        text.line(name, &format!("{common},type=\"{kind}\""), count);
    }
    let name = "coredns_cache_misses_total";
    text.begin(name, "counter", "Questions that upstreams were asked");
    text.line(name, common, sum(Source::Upstream));
    let name = "coredns_dns_request_duration_seconds";
    text.begin(name, "histogram", "Time from a question to its answer");
    let bounds: Vec<f64> = (0..DURATIONS).map(|power| f64::from(250 << power) / 1e6).collect();
    let all = totals.durations.iter().map(|(_, histogram)| histogram);
    text.histogram(name, common, &bounds, &merged(all), 1e6);
    let name = "sluice_dns_request_duration_seconds";
    text.begin(name, "histogram", "Time from a question to its answer, by source");
    for (source, histogram) in &totals.durations {
        text.histogram(name, &format!("source=\"{}\"", source.name()), &bounds, histogram, 1e6);
    }
    let bounds: Vec<f64> = SIZES.iter().map(|size| *size as f64).collect();
    for (name, what, sizes) in [
        ("coredns_dns_request_size_bytes", "Sizes of questions", &totals.request_sizes),
        ("coredns_dns_response_size_bytes", "Sizes of answers", &totals.response_sizes),
    ] {
        text.begin(name, "histogram", what);
        for (by, histogram) in sizes {
            text.histogram(name, &format!("{common},proto=\"{}\"", by.name()), &bounds, histogram, 1.0);
        }
    }
}

/// What CoreDNS calls who answers so.
fn plugin(source: Source) -> &'static str {
    match source {
        Source::Zone => "kubernetes",
        Source::Cache => "cache",
        Source::Upstream => "forward",
        Source::Refused => "",
    }
}

fn merged<'h>(all: impl Iterator<Item = &'h Histogram>) -> Histogram {
    all.fold(Histogram::default(), |mut sum, one| {
        sum.counts.resize(one.counts.len(), 0);
        sum.counts.iter_mut().zip(&one.counts).for_each(|(sum, count)| *sum += count);
        Histogram { counts: sum.counts, sum: sum.sum + one.sum }
    })
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn begin(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &str, value: impl Display) {
        let _ = match labels {
            "" => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }

    fn histogram(&mut self, name: &str, labels: &str, bounds: &[f64], histogram: &Histogram, scale: f64) {
        let mut below = 0;
        let bounds = bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(&histogram.counts) {
            below += count;
            self.line(&format!("{name}_bucket"), &format!("{labels},le=\"{bound}\""), below);
        }
        self.line(&format!("{name}_sum"), labels, histogram.sum as f64 / scale);
        self.line(&format!("{name}_count"), labels, below);
    }
}
