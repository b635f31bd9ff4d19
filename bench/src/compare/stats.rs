//! What do a few rounds say: median, its confidence interval, and spread.

use serde::Serialize;

/// Sure enough.
const CONFIDENCE: f64 = 0.95;

/// A figure of several rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Figure {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// Bounds between which the true median lies with `confidence`, whatever the distribution.
    pub(crate) low: f64,
    pub(crate) high: f64,
    /// At least 0.95 from six rounds on; less for fewer.
    pub(crate) confidence: f64,
    pub(crate) rounds: Vec<f64>,
}

impl Figure {
    /// `None` without any round.
    pub(crate) fn of(rounds: Vec<f64>) -> Option<Self> {
        let mut sorted = rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let (cut, confidence) = interval(sorted.len());
        Some(Self {
            median: quantile(&sorted, 0.5),
            min,
            max,
            low: sorted[cut],
            high: sorted[sorted.len() - 1 - cut],
            confidence,
            rounds,
        })
    }

    /// How far a round typically (in the median) is from `expected`.
    pub(crate) fn deviation(&self, expected: f64) -> f64 {
        let mut distances: Vec<f64> = self.rounds.iter().map(|value| (value - expected).abs()).collect();
        distances.sort_by(f64::total_cmp);
        quantile(&distances, 0.5)
    }
}

/// How many of the lowest and of the highest of `count` values can be left out so that the rest still encloses the
/// median with enough confidence; and that confidence. A value is above the median like a coin shows heads.
fn interval(count: usize) -> (usize, f64) {
    let mut probability = 0.5_f64.powi(count.try_into().unwrap_or(i32::MAX));
    let (mut below, mut cut, mut confidence) = (probability, 0, 1.0 - 2.0 * probability);
    for left_out in 1..count.div_ceil(2) {
        probability *= (count + 1 - left_out) as f64 / left_out as f64;
        below += probability;
        if 1.0 - 2.0 * below < CONFIDENCE {
            break;
        }
        (cut, confidence) = (left_out, 1.0 - 2.0 * below);
    }
    (cut, confidence)
}

fn quantile(sorted: &[f64], part: f64) -> f64 {
    let position = part * (sorted.len() - 1) as f64;
    let (low, high) = (position.floor() as usize, position.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * position.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_statistics_enclose_the_median() {
        // Tables of the sign test: with 7 values all must stay, with 9 one at each end can go, with 15 three.
        for (count, cut, confidence) in [(1, 0, 0.0), (5, 0, 0.9375), (7, 0, 0.984), (9, 1, 0.961), (15, 3, 0.965)] {
            let (got, sure) = interval(count);
            assert_eq!(got, cut, "{count}");
            assert!((sure - confidence).abs() < 0.001, "{count}: {sure}");
        }
    }

    #[test]
    fn figure() {
        let figure = Figure::of(vec![4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((figure.median, figure.min, figure.max), (2.5, 1.0, 4.0));
        assert_eq!(figure.deviation(1.0), 1.5);
        assert_eq!(Figure::of(Vec::new()), None);
    }
}
