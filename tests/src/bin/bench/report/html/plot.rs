//! A plot of samples side by side: a row for each contender, all from the same zero.

use super::{escaped, rounded};
use crate::measurement::Series;

/// What one contender's samples are.
pub(super) struct Row {
    pub(super) label: String,
    /// How it looks: a class of the page's style sheet.
    pub(super) class: &'static str,
    pub(super) samples: Series,
    /// What stands behind the median.
    pub(super) note: String,
}

// Where things are, in the plot's own units.
const WIDTH: f64 = 900.0;
const LEFT: f64 = 10.0;
const RIGHT: f64 = 720.0;
/// A line of text, which may be long, and what it is about.
const ROW: f64 = 46.0;
const LABEL: f64 = 16.0;
const AXIS: f64 = 24.0;

/// The plot, as SVG.
pub(super) fn plot(rows: &[Row]) -> String {
    // A sample that is far out would leave no room for the others.
    let farthest = |row: &Row| row.samples.quantile(0.95).unwrap_or(0.0);
    let scale = Scale::up_to(rows.iter().map(farthest).fold(0.0, f64::max));
    let height = ROW * rows.len() as f64 + AXIS;
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\n");
    for tick in scale.ticks() {
        let x = scale.place(tick);
        let bottom = height - AXIS;
        svg.push_str(&format!(
            "<line class=\"axis\" x1=\"{x:.1}\" y1=\"0\" x2=\"{x:.1}\" y2=\"{bottom}\"/>\
             <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n",
            height - 6.0,
            tick_label(tick)
        ));
    }
    for (number, row) in rows.iter().enumerate() {
        svg.push_str(&draw(row, ROW * number as f64, &scale));
    }
    svg.push_str("</svg>");
    svg
}

/// A row that begins at `top`.
fn draw(row: &Row, top: f64, scale: &Scale) -> String {
    let class = row.class;
    let y = top + (LABEL + ROW) / 2.0;
    let mut svg = format!(
        "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
        LEFT + 4.0,
        top + LABEL,
        escaped(&row.label)
    );
    for sample in &row.samples.0 {
        svg.push_str(&format!(
            "<circle class=\"{class} dot\" cx=\"{:.1}\" cy=\"{y:.1}\" r=\"3\"/>",
            scale.place(*sample)
        ));
    }
    if let Some(summary) = row.samples.summary() {
        let [low, middle, high] = [
            summary.lower_quartile,
            summary.median,
            summary.upper_quartile,
        ]
        .map(|value| scale.place(value));
        svg.push_str(&format!(
            "<rect class=\"{class} box\" x=\"{low:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"16\"/>\
             <line class=\"{class}\" x1=\"{middle:.1}\" y1=\"{:.1}\" x2=\"{middle:.1}\" y2=\"{:.1}\" stroke-width=\"2\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{} {}</text>\n",
            y - 8.0,
            high - low,
            y - 10.0,
            y + 10.0,
            RIGHT + 14.0,
            y + 4.5,
            rounded(summary.median),
            escaped(&row.note)
        ));
    }
    svg
}

/// From values to places.
struct Scale {
    step: f64,
    steps: u32,
}

impl Scale {
    /// A scale from zero to this value at least, in steps that are easy to read.
    fn up_to(most: f64) -> Self {
        /// About as many as there is room for.
        const STEPS: f64 = 5.0;
        let most = if most > 0.0 && most.is_finite() {
            most
        } else {
            1.0
        };
        let magnitude = 10f64.powf((most / STEPS).log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0]
            .map(|digit| digit * magnitude)
            .into_iter()
            .find(|step| step * STEPS >= most)
            .unwrap_or(most);
        let mut steps = 1;
        while f64::from(steps) * step < most {
            steps += 1;
        }
        Self { step, steps }
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        (0..=self.steps).map(|number| f64::from(number) * self.step)
    }

    /// Where a value is. What is too large is at the end.
    fn place(&self, value: f64) -> f64 {
        let part = value / (self.step * f64::from(self.steps));
        LEFT + part.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }
}

/// A number of a few digits, without zeroes behind it.
fn tick_label(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_has_few_round_steps_that_reach_the_largest_value() {
        for (most, step, steps) in [
            (0.0, 0.2, 5),
            (1.0, 0.2, 5),
            (4.6, 1.0, 5),
            (11.9, 2.5, 5),
            (730.0, 200.0, 4),
        ] {
            let scale = Scale::up_to(most);
            assert!((scale.step - step).abs() < 1e-9, "{most}: {}", scale.step);
            assert_eq!(scale.steps, steps, "{most}");
        }
    }

    #[test]
    fn place_is_proportional_and_ends_with_the_scale() {
        let scale = Scale::up_to(10.0);
        assert_eq!(scale.place(0.0), LEFT);
        assert_eq!(scale.place(5.0), (LEFT + RIGHT) / 2.0);
        assert_eq!(scale.place(1000.0), RIGHT);
    }

    #[test]
    fn row_has_its_samples_its_quartiles_and_its_median() {
        let svg = plot(&[Row {
            label: "<ours>".into(),
            class: "ours",
            samples: Series(vec![1.0, 2.0, 3.0, 4.0]),
            note: "ratio 0.5".into(),
        }]);
        assert_eq!(svg.matches("<circle ").count(), 4);
        assert_eq!(svg.matches("<rect ").count(), 1);
        assert!(svg.contains(">2.50 ratio 0.5</text>"));
        assert!(svg.contains("&lt;ours&gt;"));
    }

    #[test]
    fn contender_without_samples_is_only_named() {
        let svg = plot(&[Row {
            label: "peer".into(),
            class: "peer",
            samples: Series::default(),
            note: String::new(),
        }]);
        assert!(svg.contains("peer") && !svg.contains("<rect "));
    }

    #[test]
    fn ticks_have_no_useless_digits() {
        assert_eq!(
            [0.0, 0.25, 2.5, 200.0].map(tick_label),
            ["0", "0.25", "2.5", "200"]
        );
    }
}
