//! The report: what was measured, and on what machine, as a table, as JSON and as a page.

mod html;
mod json;
mod machine;
mod table;

use std::fs;
use std::path::Path;

use anyhow::Context;

pub(crate) use self::machine::Machine;
use crate::measurement::Measurement;

/// All that was measured.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) measurements: Vec<Measurement>,
    /// What was not measured, and why.
    pub(crate) skipped: Vec<String>,
}

impl Report {
    /// Writes the report into a folder, once for each kind of reader: programs, people, and the README.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let json = format!("{:#}\n", json::document(self));
        for (name, text) in [
            ("report.json", json),
            ("report.html", html::page(self)),
            ("report.md", table::markdown(self)),
        ] {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }

    /// The report as text.
    pub(crate) fn table(&self) -> String {
        table::markdown(self)
    }

    /// What the peers are called that were measured, in the order in which they first occur.
    fn peers(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for (name, _) in self.measurements.iter().flat_map(|one| &one.peers) {
            if !names.contains(&name.as_str()) {
                names.push(name.as_str());
            }
        }
        names
    }
}

/// A number with three digits that count.
fn rounded(number: f64) -> String {
    let size = number.abs();
    if size >= 99.95 {
        format!("{number:.0}")
    } else if size >= 9.995 {
        format!("{number:.1}")
    } else {
        format!("{number:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measurement::{Aim, Better, Definition, Series};

    const READ: Definition = Definition {
        key: "read_us",
        what: "a read",
        unit: "us",
        better: Better::Less,
        limit: Some("a <bare> socket"),
        aims: &[Aim::OfLimit(1.25), Aim::OfEachPeer(0.1)],
    };
    const SCALING: Definition = Definition {
        key: "scaling",
        what: "reads in a second",
        unit: "kHz",
        better: Better::More,
        limit: None,
        aims: &[],
    };

    /// Two numbers: one with all that there can be, and one with two cases and nothing else.
    pub(super) fn sample() -> Report {
        let series = |samples: [f64; 3]| Series(samples.to_vec());
        let case = |name: &str, ours| Measurement {
            definition: &SCALING,
            case: Some(name.to_owned()),
            ours: series(ours),
            peers: Vec::new(),
            limit: None,
        };
        Report {
            machine: Machine::example(),
            measurements: vec![
                Measurement {
                    definition: &READ,
                    case: None,
                    ours: series([10.0, 12.0, 11.0]),
                    peers: vec![("Peer & Co".into(), series([20.0, 48.0, 44.0]))],
                    limit: Some(series([10.0, 10.0, 10.0])),
                },
                case("1 vCPU", [50.0, 52.0, 54.0]),
                case("2 vCPUs", [90.0, 92.0, 94.0]),
            ],
            skipped: vec!["QEMU: its path was not given".into()],
        }
    }

    #[test]
    fn writes_a_file_for_each_kind_of_reader() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("bench");
        sample().write(&inner).unwrap();
        for name in ["report.json", "report.html", "report.md"] {
            assert!(
                fs::metadata(inner.join(name)).unwrap().len() > 100,
                "{name}"
            );
        }
    }

    #[test]
    fn numbers_are_rounded_to_what_counts() {
        for (number, text) in [
            (1234.4, "1234"),
            (99.96, "100"),
            (99.9, "99.9"),
            (9.999, "10.0"),
            (1.234, "1.23"),
            (0.0, "0.00"),
        ] {
            assert_eq!(rounded(number), text);
        }
    }
}
