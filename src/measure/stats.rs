//! Statistics of few times: order statistics, and a decision between two sets by bootstrap.
//!
//! [`compare`] asks whether the median of the second set differs from that of the first by more than a resolution: the
//! difference two runs of one program show, which no number of repetitions within a run makes visible. The interval holds
//! 95 % of the ratios of resampled medians. With five times a set it is about the sets' whole range: few times decide only
//! what is plain.

/// A difference below this is none, unless asked otherwise: what two processes of the same binary differ by, and a margin.
pub const RESOLUTION: f64 = 0.01;
const RESAMPLES: usize = 2000;
/// Of the resampled ratios on either side of the interval.
const TAIL: f64 = 0.025;

/// The value below which the part `q` (0 to 1) of `values` lies, interpolated; NaN of none.
#[must_use]
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = q.clamp(0.0, 1.0) * last as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (place - low as f64)
}

/// The middle value.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The arithmetic mean; NaN of none.
#[must_use]
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation of a sample; 0 of fewer than two.
#[must_use]
pub fn deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = mean(values);
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

/// What a comparison comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The second takes less time.
    Faster,
    /// The second takes more time.
    Slower,
    /// Neither is shown.
    NoDifference,
}

impl Verdict {
    /// In words.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Faster => "faster",
            Verdict::Slower => "slower",
            Verdict::NoDifference => "no difference",
        }
    }
}

/// Two sets of times beside each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// Second time over first: 1.05 is 5 % slower.
    pub ratio: f64,
    /// The interval's ends.
    pub low: f64,
    /// The interval's ends.
    pub high: f64,
    /// Decided with the resolution.
    pub verdict: Verdict,
}

/// Compares the medians of two sets of times.
#[must_use]
pub fn compare(first: &[f64], second: &[f64], resolution: f64) -> Comparison {
    let mut random = Random(0x5eed);
    let ratios = (0..RESAMPLES).map(|_| median(&random.resample(second)) / median(&random.resample(first)));
    decide(median(second) / median(first), ratios.collect(), resolution)
}

/// Compares times that were taken in pairs, one right after the other: what drifts takes both along, and does not decide.
#[must_use]
pub fn compare_pairs(first: &[f64], second: &[f64], resolution: f64) -> Comparison {
    let pairs: Vec<f64> = first.iter().zip(second).map(|(first, second)| second / first).collect();
    let mut random = Random(0x5eed);
    let ratios = (0..RESAMPLES).map(|_| median(&random.resample(&pairs)));
    decide(median(&pairs), ratios.collect(), resolution)
}

fn decide(ratio: f64, ratios: Vec<f64>, resolution: f64) -> Comparison {
    let (low, high) = (quantile(&ratios, TAIL), quantile(&ratios, 1.0 - TAIL));
    let verdict = match () {
        () if low > 1.0 + resolution => Verdict::Slower,
        () if high < 1.0 / (1.0 + resolution) => Verdict::Faster,
        () => Verdict::NoDifference,
    };
    Comparison { ratio, low, high, verdict }
}

/// splitmix64: seeded, so that the same times give the same decision.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// As many values, drawn with replacement.
    fn resample(&mut self, values: &[f64]) -> Vec<f64> {
        let len = values.len().max(1) as u64;
        values.iter().map(|_| values[(self.next() % len) as usize]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `n` times around `center` with a spread of `noise`, of which the part `outliers` is a fifth longer.
    fn times(seed: u64, n: usize, center: f64, noise: f64, outliers: f64) -> Vec<f64> {
        let mut random = Random(seed);
        let mut unit = || (random.next() >> 11) as f64 * 0.5f64.powi(53);
        (0..n)
            .map(|_| {
                let bell = (0..4).map(|_| unit() - 0.5).sum::<f64>() * 1.73;
                let outlier = if unit() < outliers { 1.2 } else { 1.0 };
                center * (1.0 + noise * bell) * outlier
            })
            .collect()
    }

    /// Of 100 comparisons of sets of `n`, by pairs and not, how many give `verdict` at least.
    fn count(verdict: Verdict, n: usize, ratio: f64, noise: f64, outliers: f64) -> usize {
        let given = |compare: fn(&[f64], &[f64], f64) -> Comparison| {
            (0..100)
                .filter(|&seed| {
                    let (first, second) =
                        (times(seed, n, 1.0, noise, outliers), times(seed + 1000, n, ratio, noise, outliers));
                    let found = compare(&first, &second, RESOLUTION);
                    assert!(found.low <= found.ratio && found.ratio <= found.high, "{found:?}");
                    found.verdict == verdict
                })
                .count()
        };
        given(compare).min(given(compare_pairs))
    }

    #[test]
    fn order_statistics_are_right() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(median(&values), 2.5);
        assert_eq!(quantile(&values, 0.0), 1.0);
        assert_eq!(quantile(&values, 1.0), 4.0);
        assert_eq!(quantile(&[7.0], 0.9), 7.0);
        assert!(median(&[]).is_nan());
        assert_eq!(mean(&values), 2.5);
        assert!((deviation(&values) - 1.290_994).abs() < 1e-6);
        assert_eq!(deviation(&[3.0]), 0.0);
    }

    #[test]
    fn five_percent_slower_is_called_slower() {
        assert_eq!(count(Verdict::Slower, 5, 1.05, 0.005, 0.0), 100);
        assert_eq!(count(Verdict::Slower, 10, 1.05, 0.01, 0.0), 100);
        assert_eq!(count(Verdict::Faster, 10, 1.0 / 1.05, 0.01, 0.0), 100);
        let disturbed = count(Verdict::Slower, 20, 1.05, 0.005, 0.05);
        assert!(disturbed >= 99, "{disturbed}");
    }

    #[test]
    fn an_identical_program_is_called_no_different() {
        for n in [5, 10, 20] {
            for noise in [0.0, 0.002, 0.005] {
                assert_eq!(count(Verdict::NoDifference, n, 1.0, noise, 0.0), 100, "{n} {noise}");
            }
            // On a noisy machine the interval is what it says: wrong now and then.
            let noisy = count(Verdict::NoDifference, n, 1.0, 0.03, 0.05);
            assert!(noisy >= 92, "{n}: {noisy}");
        }
    }

    #[test]
    fn pairs_are_not_fooled_by_drift() {
        // Both slow down by a third over the run.
        let drift: Vec<f64> = (0..12).map(|i| 1.0 + f64::from(i) / 36.0).collect();
        let second: Vec<f64> = drift.iter().map(|t| t * 1.05).collect();
        assert_eq!(compare_pairs(&drift, &drift, RESOLUTION).verdict, Verdict::NoDifference);
        assert_eq!(compare_pairs(&drift, &second, RESOLUTION).verdict, Verdict::Slower);
        assert_eq!(compare(&drift, &second, RESOLUTION).verdict, Verdict::NoDifference);
    }
}
