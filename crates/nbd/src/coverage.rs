//! Which bytes of one READ have been answered, so that none is answered twice and none is forgotten.

use crate::error::ProtocolError;
use crate::limits::STRETCHES_PER_READ_MAX;

/// Disjoint, non-touching, ascending stretches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Coverage(Vec<(u64, u64)>);

impl Coverage {
    /// Notes `start..end`, which is not empty.
    ///
    /// # Errors
    /// `Stray` if a byte of it was noted before; `TooMany` if the stretches are strewn beyond reason.
    pub(crate) fn add(&mut self, start: u64, end: u64) -> Result<(), ProtocolError> {
        let stretches = &mut self.0;
        let after = stretches.partition_point(|&(begin, _)| begin < start);
        let clash = (after > 0 && stretches[after - 1].1 > start)
            || stretches.get(after).is_some_and(|&(begin, _)| begin < end);
        if clash {
            return Err(ProtocolError::Stray { offset: start, length: end - start });
        }
        let touches_left = after > 0 && stretches[after - 1].1 == start;
        let touches_right = stretches.get(after).is_some_and(|&(begin, _)| begin == end);
        match (touches_left, touches_right) {
            (true, true) => stretches[after - 1].1 = stretches.remove(after).1,
            (true, false) => stretches[after - 1].1 = end,
            (false, true) => stretches[after].0 = start,
            (false, false) if stretches.len() == STRETCHES_PER_READ_MAX => {
                return Err(ProtocolError::TooMany {
                    what: "separate stretches in one reply",
                    limit: STRETCHES_PER_READ_MAX,
                });
            }
            (false, false) => stretches.insert(after, (start, end)),
        }
        Ok(())
    }

    pub(crate) fn total(&self) -> u64 {
        self.0.iter().map(|&(start, end)| end - start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_table_of_bytes(stretches in prop::collection::vec((0u64..64, 1u64..16), 0..40)) {
            let mut table = [false; 80];
            let mut coverage = Coverage::default();
            for (start, length) in stretches {
                let cells = &mut table[usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap()];
                let free = cells.iter().all(|taken| !taken);
                prop_assert_eq!(coverage.add(start, start + length).is_ok(), free);
                if free {
                    cells.fill(true);
                }
            }
            prop_assert_eq!(coverage.total(), table.iter().filter(|taken| **taken).count() as u64);
            prop_assert!(coverage.0.windows(2).all(|pair| pair[0].1 < pair[1].0));
        }
    }
}
