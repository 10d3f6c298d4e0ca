//! Numbers out of many measurements: order statistics, nothing assumed about how they are distributed.

use std::time::Duration;

/// Measurements in ascending order. Never empty.
#[derive(Debug, Clone)]
pub struct Figures(Vec<f64>);

impl Figures {
    /// Nothing if there are none.
    pub fn new(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        (!values.is_empty()).then_some(Self(values))
    }

    /// In milliseconds. Nothing if there are none.
    pub fn milliseconds(durations: impl IntoIterator<Item = Duration>) -> Option<Self> {
        Self::new(durations.into_iter().map(|duration| duration.as_secs_f64() * 1000.0))
    }

    /// The value that a share (0.0 to 1.0) of the measurements does not exceed, interpolated between neighbours.
    pub fn quantile(&self, share: f64) -> f64 {
        let place = share.clamp(0.0, 1.0) * (self.0.len() - 1) as f64;
        let (below, above) = (self.0[place.floor() as usize], self.0[place.ceil() as usize]);
        below + (above - below) * place.fract()
    }

    /// The smallest.
    pub fn min(&self) -> f64 {
        self.quantile(0.0)
    }

    /// The one in the middle.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The largest.
    pub fn max(&self) -> f64 {
        self.quantile(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_between_the_measurements() {
        let figures = Figures::new([4.0, 1.0, 3.0, 2.0]).expect("four");
        assert_eq!((figures.min(), figures.median(), figures.max()), (1.0, 2.5, 4.0));
        assert_eq!(figures.quantile(0.25), 1.75);
        assert!(Figures::new([]).is_none());
    }
}
