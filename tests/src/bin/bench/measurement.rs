//! What was measured: plain values, and what they say of each other. Nothing here measures.

/// One number of the report: whom it was measured of, and what it should be.
#[derive(Clone, Debug)]
pub(crate) struct Measurement {
    pub(crate) definition: &'static Definition,
    /// Which of several cases with the same definition, if there are any.
    pub(crate) case: Option<String>,
    pub(crate) ours: Series,
    /// By name.
    pub(crate) peers: Vec<(String, Series)>,
    pub(crate) limit: Option<Series>,
}

/// What a number is.
#[derive(Debug)]
pub(crate) struct Definition {
    /// Its name in the report.
    pub(crate) key: &'static str,
    pub(crate) what: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    /// What sets the limit, if there is one.
    pub(crate) limit: Option<&'static str>,
    pub(crate) aims: &'static [Aim],
}

/// Which of two numbers is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    Less,
    More,
}

/// What a ratio of ours should be: at most this where less is better, and at least this where more is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Aim {
    OfLimit(f64),
    OfEachPeer(f64),
}

/// Whether an aim is reached. The later ones matter more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// There is nothing to compare with.
    Open,
    Met,
    Missed,
}

impl Measurement {
    /// The same, as one of several cases.
    pub(crate) fn in_case(self, case: &str) -> Self {
        Self {
            case: Some(case.to_owned()),
            ..self
        }
    }

    /// Whom ours can be compared with: peers by their names, and then the limit.
    pub(crate) fn others(&self) -> impl Iterator<Item = (&str, &Series)> {
        let peers = self
            .peers
            .iter()
            .map(|(name, series)| (name.as_str(), series));
        peers.chain(self.limit.iter().map(|series| ("limit", series)))
    }

    /// Which aims there are, and whether ours reaches them.
    pub(crate) fn verdicts(&self) -> impl Iterator<Item = (Aim, Verdict)> {
        let aims = self.definition.aims.iter();
        aims.map(|aim| (*aim, self.reaches(*aim)))
    }

    fn reaches(&self, aim: Aim) -> Verdict {
        let (bound, others): (f64, Vec<&Series>) = match aim {
            Aim::OfLimit(bound) => (bound, self.limit.iter().collect()),
            Aim::OfEachPeer(bound) => (bound, self.peers.iter().map(|(_, peer)| peer).collect()),
        };
        let ratios = others
            .into_iter()
            .filter_map(|other| self.ours.over(other).summary());
        let verdicts = ratios.map(|ratio| {
            let is_met = match self.definition.better {
                Better::Less => ratio.median <= bound,
                Better::More => ratio.median >= bound,
            };
            if is_met {
                Verdict::Met
            } else {
                Verdict::Missed
            }
        });
        verdicts.max().unwrap_or(Verdict::Open)
    }
}

impl Aim {
    /// The ratio, as in "limit ≤ 1.25".
    pub(crate) fn short(self, better: Better) -> String {
        let sign = match better {
            Better::Less => '≤',
            Better::More => '≥',
        };
        match self {
            Self::OfLimit(ratio) => format!("limit {sign} {}", hundredths(ratio)),
            Self::OfEachPeer(ratio) => format!("peers {sign} {}", hundredths(ratio)),
        }
    }

    /// In words, such as "at most 1.25 of the limit".
    pub(crate) fn words(self, better: Better) -> String {
        let bound = match better {
            Better::Less => "at most",
            Better::More => "at least",
        };
        match self {
            Self::OfLimit(ratio) => format!("{bound} {} of the limit", hundredths(ratio)),
            Self::OfEachPeer(ratio) => format!("{bound} {} of each peer", hundredths(ratio)),
        }
    }
}

/// A ratio with two digits at most.
fn hundredths(ratio: f64) -> f64 {
    (ratio * 100.0).round() / 100.0
}

/// Samples in the order in which they were taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Series(pub(crate) Vec<f64>);

/// Where most samples of a series are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) lower_quartile: f64,
    pub(crate) median: f64,
    pub(crate) upper_quartile: f64,
}

impl Series {
    /// None of no samples.
    pub(crate) fn summary(&self) -> Option<Summary> {
        Some(Summary {
            lower_quartile: self.quantile(0.25)?,
            median: self.quantile(0.5)?,
            upper_quartile: self.quantile(0.75)?,
        })
    }

    /// The value below which such a part of the samples lies, between the two that are next to it.
    pub(crate) fn quantile(&self, part: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let place = part.clamp(0.0, 1.0) * (sorted.len().checked_sub(1)? as f64);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a place in a vector"
        )]
        let below = place.floor() as usize;
        let low = *sorted.get(below)?;
        let high = sorted.get(below + 1).copied().unwrap_or(low);
        Some(low + (high - low) * (place - place.floor()))
    }

    /// The ratio of each sample to the one that was taken at the same time.
    pub(crate) fn over(&self, other: &Self) -> Self {
        self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect()
    }
}

impl FromIterator<f64> for Series {
    fn from_iter<T: IntoIterator<Item = f64>>(samples: T) -> Self {
        Self(samples.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(samples: &[f64]) -> Series {
        samples.iter().copied().collect()
    }

    #[test]
    fn quartiles_lie_between_samples_where_they_have_to() {
        let summary = series(&[40.0, 10.0, 20.0, 30.0]).summary().unwrap();
        assert_eq!(
            summary,
            Summary {
                lower_quartile: 17.5,
                median: 25.0,
                upper_quartile: 32.5,
            }
        );
    }

    #[test]
    fn one_sample_is_all_quartiles() {
        let summary = series(&[7.0]).summary().unwrap();
        assert_eq!(
            (
                summary.lower_quartile,
                summary.median,
                summary.upper_quartile
            ),
            (7.0, 7.0, 7.0)
        );
    }

    #[test]
    fn no_samples_have_no_summary() {
        assert_eq!(series(&[]).summary(), None);
    }

    #[test]
    fn ratios_are_made_pair_by_pair() {
        // The medians are the same, and yet ours is half of theirs whenever both were measured.
        let (ours, theirs) = (series(&[1.0, 2.0, 4.0]), series(&[2.0, 4.0, 8.0]));
        assert_eq!(ours.over(&theirs), series(&[0.5, 0.5, 0.5]));
    }

    #[test]
    fn ratio_ignores_samples_without_a_partner() {
        assert_eq!(series(&[1.0, 2.0]).over(&series(&[2.0])), series(&[0.5]));
    }

    fn measurement(better: Better, aims: &'static [Aim]) -> Measurement {
        Measurement {
            definition: Box::leak(Box::new(Definition {
                key: "key_us",
                what: "something",
                unit: "us",
                better,
                limit: None,
                aims,
            })),
            case: None,
            ours: series(&[10.0, 10.0]),
            peers: Vec::new(),
            limit: None,
        }
    }

    fn verdicts(measurement: &Measurement) -> Vec<Verdict> {
        measurement.verdicts().map(|(_, verdict)| verdict).collect()
    }

    #[test]
    fn aim_without_anything_to_compare_with_is_open() {
        let measurement = measurement(Better::Less, &[Aim::OfLimit(1.25), Aim::OfEachPeer(0.5)]);
        assert_eq!(verdicts(&measurement), [Verdict::Open, Verdict::Open]);
    }

    #[test]
    fn aim_is_met_up_to_its_bound() {
        let mut measurement = measurement(Better::Less, &[Aim::OfLimit(1.25)]);
        measurement.limit = Some(series(&[8.0, 8.0]));
        assert_eq!(verdicts(&measurement), [Verdict::Met]);
        measurement.limit = Some(series(&[7.0, 7.0]));
        assert_eq!(verdicts(&measurement), [Verdict::Missed]);
    }

    #[test]
    fn one_peer_that_is_better_is_enough() {
        let mut measurement = measurement(Better::More, &[Aim::OfEachPeer(1.2)]);
        measurement.peers = vec![("peer".into(), series(&[8.0, 8.0]))];
        assert_eq!(verdicts(&measurement), [Verdict::Met]);
        measurement
            .peers
            .push(("other".into(), series(&[9.0, 9.0])));
        assert_eq!(verdicts(&measurement), [Verdict::Missed]);
    }

    #[test]
    fn each_aim_has_a_verdict_of_its_own() {
        let aims = &[Aim::OfLimit(1.25), Aim::OfEachPeer(0.5)];
        let mut measurement = measurement(Better::Less, aims);
        measurement.limit = Some(series(&[10.0]));
        measurement.peers = vec![("peer".into(), series(&[11.0]))];
        assert_eq!(verdicts(&measurement), [Verdict::Met, Verdict::Missed]);
    }
}
