//! The report as a table, in Markdown that can be read as it is.

use super::{Report, rounded};
use crate::measurement::{Measurement, Series, Verdict};

/// The table, with a line on the machine above it and what is missing below.
pub(super) fn markdown(report: &Report) -> String {
    let peers = report.peers();
    let mut head = vec!["", "Outrigger"];
    head.extend(&peers);
    head.extend(["limit", "aims"]);
    let mut rows = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for measurement in &report.measurements {
        let mut row = vec![format!(
            "`{}`{}",
            measurement.definition.key,
            case(measurement)
        )];
        row.push(with_quartiles(&measurement.ours));
        for name in &peers {
            let peer = measurement.peers.iter().find(|(peer, _)| peer == name);
            row.push(peer.map_or_else(String::new, |(_, peer)| beside(measurement, peer)));
        }
        let limit = measurement.limit.as_ref();
        row.push(limit.map_or_else(String::new, |limit| beside(measurement, limit)));
        row.push(verdicts(measurement));
        rows.push(row);
    }
    let mut text = format!("{}\n\n", report.machine.describe());
    text.push_str(&aligned(&rows));
    if !report.skipped.is_empty() {
        text.push_str("\nNot measured:\n\n");
        for reason in &report.skipped {
            text.push_str(&format!("- {reason}\n"));
        }
    }
    text
}

fn case(measurement: &Measurement) -> String {
    let case = measurement.case.as_ref();
    case.map_or_else(String::new, |case| format!(" {case}"))
}

/// The median, and between which values half of the samples are.
fn with_quartiles(series: &Series) -> String {
    series.summary().map_or_else(String::new, |summary| {
        let [low, middle, high] = [
            summary.lower_quartile,
            summary.median,
            summary.upper_quartile,
        ]
        .map(rounded);
        format!("{middle} ({low} to {high})")
    })
}

/// Another's median, and the ratio of ours to it.
fn beside(measurement: &Measurement, other: &Series) -> String {
    let (own, ratio) = (other.summary(), measurement.ours.over(other).summary());
    let (Some(own), Some(ratio)) = (own, ratio) else {
        return String::new();
    };
    format!("{}, ratio {:.2}", rounded(own.median), ratio.median)
}

/// Which aims are reached and which are not.
fn verdicts(measurement: &Measurement) -> String {
    let verdicts = measurement.verdicts().filter_map(|(aim, verdict)| {
        let word = match verdict {
            Verdict::Met => "reached",
            Verdict::Missed => "missed",
            Verdict::Open => return None,
        };
        Some(format!(
            "{}: {word}",
            aim.short(measurement.definition.better)
        ))
    });
    verdicts.collect::<Vec<_>>().join("; ")
}

/// The rows, of which the first is the heading.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths);
        let cells: Vec<_> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(&format!("| {} |\n", cells.join(" | ")));
        if number == 0 {
            let lines: Vec<_> = widths.iter().map(|width| "-".repeat(width + 2)).collect();
            text.push_str(&format!("|{}|\n", lines.join("|")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    #[test]
    fn table_has_a_row_for_each_number_and_says_what_is_missing() {
        let text = markdown(&sample());
        let (_, table) = text.split_once("\n\n").unwrap();
        let expected = "\
|                   | Outrigger           | Peer & Co        | limit            | aims                                       |
|-------------------|---------------------|------------------|------------------|--------------------------------------------|
| `read_us`         | 11.0 (10.5 to 11.5) | 44.0, ratio 0.25 | 10.0, ratio 1.10 | limit ≤ 1.25: reached; peers ≤ 0.1: missed |
| `scaling` 1 vCPU  | 52.0 (51.0 to 53.0) |                  |                  |                                            |
| `scaling` 2 vCPUs | 92.0 (91.0 to 93.0) |                  |                  |                                            |

Not measured:

- QEMU: its path was not given
";
        assert_eq!(table, expected);
    }
}
