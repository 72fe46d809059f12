//! Which mutations of a session are under way, and up to where all of them have been answered.

use std::collections::VecDeque;

/// Sequence numbers from 1. The span from the lowest unresolved one to the highest assigned stays within a bound: the server
/// keeps a reply for each of them, also for those that are answered while a lower one is not.
#[derive(Debug, Clone)]
pub struct Window {
    /// The lowest sequence that is not resolved; all below it are.
    lowest: u64,
    /// From `lowest` to the highest assigned: resolved or not. Its front is never `true`.
    resolved: VecDeque<bool>,
    width_max: usize,
}

impl Window {
    /// Nothing is assigned yet. `width_max` ≥ 1.
    pub fn new(width_max: usize) -> Self {
        Self {
            lowest: 1,
            resolved: VecDeque::with_capacity(width_max),
            width_max,
        }
    }

    /// Whether [`Window::assign`] would succeed.
    pub fn has_room(&self) -> bool {
        self.resolved.len() < self.width_max
    }

    /// The next sequence, or `None` while the span is at its bound.
    pub fn assign(&mut self) -> Option<u64> {
        if !self.has_room() {
            return None;
        }
        let sequence = self.lowest + self.resolved.len() as u64;
        self.resolved.push_back(false);
        Some(sequence)
    }

    /// The outcome of `sequence` is known. Repeating it, or naming one that was never assigned, changes nothing.
    pub fn resolve(&mut self, sequence: u64) {
        let index = sequence
            .checked_sub(self.lowest)
            .and_then(|index| usize::try_from(index).ok());
        if let Some(slot) = index.and_then(|index| self.resolved.get_mut(index)) {
            *slot = true;
        }
        while self.resolved.front() == Some(&true) {
            self.resolved.pop_front();
            self.lowest += 1;
        }
    }

    /// The replies of all sequences below this one have arrived; what travels inside commands.
    pub fn acknowledged_below(&self) -> u64 {
        self.lowest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_lowest_unanswered_mutation_holds_the_acknowledgement_back() {
        let mut window = Window::new(4);
        assert_eq!(window.acknowledged_below(), 1);
        assert_eq!(
            [(); 3].map(|()| window.assign()),
            [Some(1), Some(2), Some(3)]
        );
        window.resolve(2);
        window.resolve(3);
        assert_eq!(window.acknowledged_below(), 1);
        window.resolve(1);
        assert_eq!(window.acknowledged_below(), 4);
    }

    #[test]
    fn the_span_is_bounded_even_when_only_the_lowest_is_unanswered() {
        let mut window = Window::new(4);
        for sequence in 1..=4 {
            assert_eq!(window.assign(), Some(sequence));
        }
        for sequence in 2..=4 {
            window.resolve(sequence);
        }
        assert_eq!(window.assign(), None);
        window.resolve(1);
        assert_eq!(window.assign(), Some(5));
    }

    #[test]
    fn a_late_or_unknown_sequence_changes_nothing() {
        let mut window = Window::new(2);
        window.resolve(0);
        window.resolve(1);
        window.resolve(u64::MAX);
        assert_eq!(window.assign(), Some(1));
        window.resolve(1);
        window.resolve(1);
        assert_eq!(window.acknowledged_below(), 2);
    }

    /// Against a plain model, over random schedules; the seed is printed when it fails.
    #[test]
    fn it_agrees_with_a_set_of_unanswered_sequences() {
        use rand::rngs::StdRng;
        use rand::{Rng, SeedableRng};
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let width = rng.random_range(1..20);
            let mut window = Window::new(width);
            let mut open = BTreeSet::new();
            let mut next = 1u64;
            for _ in 0..400 {
                if rng.random_bool(0.5) {
                    let low = open.first().copied().unwrap_or(next);
                    let expected = (next - low < width as u64).then_some(next);
                    assert_eq!(window.assign(), expected, "seed {seed}");
                    if expected.is_some() {
                        open.insert(next);
                        next += 1;
                    }
                } else if !open.is_empty() {
                    let nth = rng.random_range(0..open.len());
                    let sequence = *open.iter().nth(nth).unwrap();
                    open.remove(&sequence);
                    window.resolve(sequence);
                }
                let low = open.first().copied().unwrap_or(next);
                assert_eq!(window.acknowledged_below(), low, "seed {seed}");
            }
        }
    }
}
