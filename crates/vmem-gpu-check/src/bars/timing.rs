//! What the bars share: contenders in turn, medians, spreads.
//!
//! Invariant: a ratio is one of medians over rounds in which the contenders took turns, so that
//! what else the machine does meets all of them. Called by the bars.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

/// Figures of each contender, one for each round.
pub(crate) type Figures = BTreeMap<&'static str, Vec<f64>>;

/// One way to do the work, which returns its figure: a rate or a time.
pub(crate) type Contender<'a> = (&'static str, Box<dyn FnMut() -> Result<f64> + 'a>);

/// Runs the contenders in turn, after one round that does not count; every other round in the
/// opposite order.
///
/// # Errors
///
/// The first of a contender.
pub(crate) fn in_turn(rounds: usize, contenders: &mut [Contender<'_>]) -> Result<Figures> {
    let mut figures = Figures::new();
    for round in 0..=rounds {
        let mut order: Vec<usize> = (0..contenders.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for at in order {
            let (name, work) = &mut contenders[at];
            let figure = work()?;
            if round > 0 {
                figures.entry(*name).or_default().push(figure);
            }
        }
    }
    Ok(figures)
}

/// The value below which this share of the values lies; 0 of none.
pub(crate) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    let at = (values.len().saturating_sub(1) as f64 * share).round() as usize;
    values.get(at).copied().unwrap_or(0.0)
}

pub(crate) fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// A contender's median and quartiles.
pub(crate) fn spread(values: &[f64]) -> Value {
    let [low, middle, high] = [0.25, 0.5, 0.75].map(|share| percentile(values, share));
    json!({"median": middle, "quartiles": [low, high], "rounds": values.len()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contenders_take_turns() {
        let order = std::cell::RefCell::new(String::new());
        let tell = |name: char, figure: f64| {
            let order = &order;
            move || {
                order.borrow_mut().push(name);
                Ok(figure)
            }
        };
        let mut contenders: [Contender<'_>; 2] =
            [("a", Box::new(tell('a', 1.0))), ("b", Box::new(tell('b', 2.0)))];
        let figures = in_turn(2, &mut contenders).unwrap();
        assert_eq!(*order.borrow(), "abbaab");
        assert_eq!(figures["b"], [2.0, 2.0], "the first round does not count");
        assert_eq!(percentile(&[3.0, 1.0, 2.0, 5.0, 4.0], 0.99), 5.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    }
}
