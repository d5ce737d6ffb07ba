//! The report as a page, which needs nothing but itself.

mod plot;

use self::plot::{Row, plot};
use super::{Report, rounded};
use crate::measurement::{Better, Measurement, Verdict};

/// A page with a section for each number.
pub(super) fn page(report: &Report) -> String {
    let mut sections = String::new();
    // Those with the same key follow each other.
    for group in report
        .measurements
        .chunk_by(|a, b| a.definition.key == b.definition.key)
    {
        sections.push_str(&section(group));
    }
    let skipped: String = report
        .skipped
        .iter()
        .map(|reason| format!("<li>{}</li>\n", escaped(reason)))
        .collect();
    let skipped = if skipped.is_empty() {
        skipped
    } else {
        format!("<h2>Not measured</h2>\n<ul>\n{skipped}</ul>\n")
    };
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <title>Outrigger beside its peers</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <h1>Outrigger beside its peers</h1>\n<p>{}</p>\n\
         <p>A dot is a sample, a box holds the middle half of them, and the line in it is the median. A ratio is the \
         median of the ratios of samples that were taken at the same time.</p>\n{sections}{skipped}</body>\n</html>\n",
        escaped(&report.machine.describe())
    )
}

const STYLE: &str = "\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
h2 { font-size: 1.1em; margin: 2em 0 0; }
code { font-size: 1.05em; }
p { margin: .3em 0; }
.reached { color: #1a7f37; }
.missed { color: #b3261e; }
svg { width: 100%; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: #222; }
svg .axis { stroke: #bbb; }
svg .axis + text, svg .tick { fill: #777; }
.ours { fill: #1f6feb; stroke: #1f6feb; }
.peer { fill: #8a6d3b; stroke: #8a6d3b; }
.limit { fill: #777; stroke: #777; }
.box { fill-opacity: .2; }
.dot { fill-opacity: .35; stroke: none; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #151515; }
  svg text { fill: #ddd; }
}
";

/// One number, in all its cases.
fn section(group: &[Measurement]) -> String {
    let Some(first) = group.first() else {
        return String::new();
    };
    let definition = first.definition;
    let better = match definition.better {
        Better::Less => "less is better",
        Better::More => "more is better",
    };
    let limit = definition.limit.map_or_else(String::new, |limit| {
        format!(" The limit is {}.", escaped(limit))
    });
    let rows: Vec<_> = group.iter().flat_map(rows).collect();
    let verdicts: String = group.iter().flat_map(verdicts).collect();
    format!(
        "<h2><code>{}</code></h2>\n<p>{}, in {}; {better}.{limit}</p>\n{verdicts}{}\n",
        escaped(definition.key),
        capitalised(&escaped(definition.what)),
        escaped(definition.unit),
        plot(&rows)
    )
}

/// Ours first, and then what it is to be compared with.
fn rows(measurement: &Measurement) -> Vec<Row> {
    let label = |name: &str| match &measurement.case {
        Some(case) => format!("{case}: {name}"),
        None => name.to_owned(),
    };
    let mut rows = vec![Row {
        label: label("Outrigger"),
        class: "ours",
        samples: measurement.ours.clone(),
        note: String::new(),
    }];
    for (name, series) in measurement.others() {
        let ratio = measurement.ours.over(series).summary();
        let class = if name == "limit" { "limit" } else { "peer" };
        rows.push(Row {
            label: label(name),
            class,
            samples: series.clone(),
            note: ratio.map_or_else(String::new, |ratio| format!("ratio {:.2}", ratio.median)),
        });
    }
    rows
}

/// Lines that say what ours should be, and whether it is.
fn verdicts(measurement: &Measurement) -> impl Iterator<Item = String> {
    let case = measurement.case.as_deref();
    let case = case.map_or_else(String::new, |case| format!(" ({})", escaped(case)));
    let better = measurement.definition.better;
    measurement.verdicts().filter_map(move |(aim, verdict)| {
        let word = match verdict {
            Verdict::Met => "reached",
            Verdict::Missed => "missed",
            Verdict::Open => return None,
        };
        let aim = aim.words(better);
        Some(format!(
            "<p>Aim{case}: {aim}: <b class=\"{word}\">{word}</b></p>\n"
        ))
    })
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(char::to_uppercase);
    first.into_iter().flatten().chain(letters).collect()
}

/// Text that HTML takes for nothing else.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    #[test]
    fn page_has_a_section_and_a_plot_for_each_number() {
        let page = page(&sample());
        assert_eq!(page.matches("<h2><code>").count(), 2);
        assert_eq!(page.matches("<svg ").count(), 2);
        assert_eq!(page.matches("</svg>").count(), 2);
        assert!(
            page.contains("A read, in us; less is better. The limit is a &lt;bare&gt; socket.")
        );
        assert!(page.contains("of the limit: <b class=\"reached\">"));
        assert!(page.contains("of each peer: <b class=\"missed\">"));
        assert!(page.contains("<li>QEMU: its path was not given</li>"));
    }

    #[test]
    fn page_needs_nothing_from_elsewhere() {
        let page = page(&sample());
        for reference in ["http", "src=", "href=", "url(", "@import", "<script"] {
            assert!(!page.contains(reference), "{reference}");
        }
    }

    #[test]
    fn names_are_text_and_no_markup() {
        let page = page(&sample());
        assert!(page.contains("Peer &amp; Co") && !page.contains("Peer & Co"));
    }
}
