//! The report for programs.

use serde_json::{Map, Value, json};

use super::Report;
use crate::measurement::{Measurement, Series, Verdict};

/// An object with a member for each number by its name, and `machine` and `skipped` besides. A number that was measured
/// in several cases has those as `cases`.
pub(super) fn document(report: &Report) -> Value {
    let machine = &report.machine;
    let mut document = Map::new();
    document.insert(
        "machine".into(),
        json!({
            "processor": machine.processor,
            "cpus": machine.cpus,
            "kernel": machine.kernel,
            "kvm_only_emulates": machine.only_emulates,
            "date": machine.date,
            "load": machine.load,
            "programs": machine.programs,
            "quick": machine.quick,
        }),
    );
    document.insert("skipped".into(), json!(report.skipped));
    for measurement in &report.measurements {
        let definition = measurement.definition;
        let entry = document.entry(definition.key).or_insert_with(|| {
            json!({
                "what": definition.what,
                "unit": definition.unit,
                "limit_is": definition.limit,
            })
        });
        let place = match &measurement.case {
            Some(case) => &mut entry["cases"][case],
            None => entry,
        };
        for (key, value) in numbers(measurement) {
            place[key] = value;
        }
    }
    document.into()
}

fn numbers(measurement: &Measurement) -> [(&'static str, Value); 5] {
    let peers = measurement.peers.iter();
    let peers: Map<_, _> = peers
        .map(|(name, peer)| (name.clone(), series(peer)))
        .collect();
    let ratios: Map<_, _> = measurement
        .others()
        .map(|(name, other)| (name.to_owned(), series(&measurement.ours.over(other))))
        .collect();
    let better = measurement.definition.better;
    let aims = measurement.verdicts().map(|(aim, verdict)| {
        let is_reached = match verdict {
            Verdict::Met => Some(true),
            Verdict::Missed => Some(false),
            Verdict::Open => None,
        };
        json!({"aim": aim.words(better), "is_reached": is_reached})
    });
    [
        ("ours", series(&measurement.ours)),
        ("peers", peers.into()),
        (
            "limit",
            measurement.limit.as_ref().map_or(Value::Null, series),
        ),
        ("ratio", ratios.into()),
        ("aims", aims.collect()),
    ]
}

fn series(series: &Series) -> Value {
    let Some(summary) = series.summary() else {
        return Value::Null;
    };
    json!({
        "median": summary.median,
        "lower_quartile": summary.lower_quartile,
        "upper_quartile": summary.upper_quartile,
        "samples": series.0,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    #[test]
    fn number_stands_under_its_name_with_all_that_belongs_to_it() {
        let document = document(&sample());
        let read = &document["read_us"];
        assert_eq!(read["unit"], "us");
        assert_eq!(read["ours"]["median"], 11.0);
        assert_eq!(read["ours"]["samples"], json!([10.0, 12.0, 11.0]));
        assert_eq!(read["peers"]["Peer & Co"]["median"], 44.0);
        assert_eq!(read["limit"]["upper_quartile"], 10.0);
        assert_eq!(read["ratio"]["limit"]["median"], 1.1);
        assert_eq!(read["ratio"]["Peer & Co"]["median"], 0.25);
        assert_eq!(
            read["aims"],
            json!([
                {"aim": "at most 1.25 of the limit", "is_reached": true},
                {"aim": "at most 0.1 of each peer", "is_reached": false},
            ])
        );
        assert_eq!(document["skipped"], json!(["QEMU: its path was not given"]));
    }

    #[test]
    fn cases_stand_side_by_side() {
        let document = document(&sample());
        let cases = &document["scaling"]["cases"];
        assert_eq!(cases["1 vCPU"]["ours"]["median"], 52.0);
        assert_eq!(cases["2 vCPUs"]["ours"]["median"], 92.0);
        assert_eq!(cases["2 vCPUs"]["limit"], Value::Null);
        assert_eq!(cases["2 vCPUs"]["aims"], json!([]));
    }
}
