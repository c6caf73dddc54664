//! What was noted in the guest, looked at window by window.

use std::fmt;

/// The least part of a stock agent's stall that ours has to save: a median of at most a quarter.
const OF_STOCK_MAX: f64 = 0.25;
/// At most so many times what one in a hundred takes when nothing is going on.
const OF_QUIET_P99_MAX: f64 = 3.0;

/// What an application in the guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// A block of 4 KiB written and synced on the data disk's xfs.
    Fsync,
    /// The same on the root's ext4.
    RootFsync,
    /// An insert committed by PostgreSQL, on the data disk too.
    Commit,
}

impl Wait {
    pub(crate) const ALL: [Self; 3] = [Self::Fsync, Self::Commit, Self::RootFsync];
    /// Those that the target is about: they are on the busy disk.
    const JUDGED: [Self; 2] = [Self::Fsync, Self::Commit];

    fn letter(self) -> &'static str {
        match self {
            Self::Fsync => "f",
            Self::RootFsync => "r",
            Self::Commit => "c",
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::Fsync => "fsync, data",
            Self::RootFsync => "fsync, root",
            Self::Commit => "commit",
        })
    }
}

/// A stretch of the guest's time, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) from_ns: u64,
    pub(crate) to_ns: u64,
}

impl Span {
    pub(crate) fn ms(self) -> f64 {
        self.to_ns.saturating_sub(self.from_ns) as f64 / 1e6
    }

    /// What both have in common.
    pub(crate) fn within(self, other: Self) -> Self {
        let from_ns = self.from_ns.max(other.from_ns);
        Self { from_ns, to_ns: self.to_ns.min(other.to_ns).max(from_ns) }
    }
}

/// Everything that the load wrote down.
#[derive(Debug)]
pub(crate) struct Noted {
    waits: [Vec<Span>; 3],
    /// Bytes of the random writer, second by second.
    dirtied: Vec<u64>,
}

impl Noted {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut noted = Self { waits: [const { Vec::new() }; 3], dirtied: Vec::new() };
        for line in text.lines() {
            let parts: Vec<&str> = line.split(' ').collect();
            let numbers =
                parts.get(1).zip(parts.get(2)).and_then(|(a, b)| a.parse().ok().zip(b.parse().ok()));
            let Some((from_ns, figure)): Option<(u64, u64)> = numbers else {
                return Err(format!("the load noted {line:?}"));
            };
            match Wait::ALL.iter().position(|wait| wait.letter() == parts[0]) {
                Some(at) => noted.waits[at].push(Span { from_ns, to_ns: from_ns + figure }),
                None => noted.dirtied.push(figure),
            }
        }
        Ok(noted)
    }

    /// Adds to each wait that was under way then what the guest could not see: its clock stands still with its processors.
    pub(crate) fn lengthen(&mut self, then: Span, by_ns: u64) {
        for one in self.waits.iter_mut().flatten() {
            if one.from_ns < then.to_ns && one.to_ns > then.from_ns {
                one.to_ns += by_ns;
            }
        }
    }

    /// Every part of the load has done something for a while.
    pub(crate) fn is_under_way(&self) -> bool {
        self.dirtied.len() >= 5 && self.waits.iter().all(|waits| waits.len() >= 20)
    }

    fn of(&self, wait: Wait) -> &[Span] {
        &self.waits[Wait::ALL.iter().position(|one| *one == wait).unwrap_or(0)]
    }

    fn during(&self, wait: Wait, window: Span) -> impl Iterator<Item = Span> {
        let all = self.of(wait).iter().copied();
        all.filter(move |one| one.from_ns < window.to_ns && one.to_ns > window.from_ns)
    }

    /// The longest that was under way in a window, as long as it took in all.
    pub(crate) fn longest(&self, wait: Wait, window: Span) -> Result<Span, String> {
        let longest = self.during(wait, window).max_by_key(|one| one.to_ns - one.from_ns);
        longest.ok_or_else(|| format!("there was no {wait} in a window of {:.0} ms", window.ms()))
    }

    /// All of them, in milliseconds, the shortest first.
    pub(crate) fn all(&self, wait: Wait, windows: &[Span]) -> Vec<f64> {
        let mut all: Vec<f64> =
            windows.iter().flat_map(|window| self.during(wait, *window)).map(Span::ms).collect();
        all.sort_by(f64::total_cmp);
        all
    }

    /// What the load came to: fsyncs and commits each second, and MiB of random writes.
    pub(crate) fn pace(&self) -> String {
        let waits = Wait::ALL.map(|wait| {
            let all = self.of(wait);
            let time = Span {
                from_ns: all.first().map_or(0, |one| one.from_ns),
                to_ns: all.last().map_or(1, |one| one.to_ns),
            };
            format!("{:.0} {wait}", all.len() as f64 * 1000.0 / time.ms())
        });
        let mut seconds: Vec<f64> =
            self.dirtied.iter().map(|bytes| *bytes as f64 / f64::from(1 << 20)).collect();
        seconds.sort_by(f64::total_cmp);
        format!(
            "each second {}; {:.1} MiB of random writes (median)",
            waits.join(", "),
            quantile(&seconds, 0.5)
        )
    }
}

/// Of sorted figures; between two of them it is in between.
pub(crate) fn quantile(sorted: &[f64], at: f64) -> f64 {
    if sorted.is_empty() {
        return 0.0;
    }
    let place = at * (sorted.len() - 1) as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in the list")]
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

/// Median and maximum of what was the longest in each window, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Longest {
    pub(crate) median: f64,
    pub(crate) max: f64,
}

impl Longest {
    pub(crate) fn of(noted: &Noted, wait: Wait, windows: &[Span]) -> Result<Self, String> {
        let mut each = Vec::with_capacity(windows.len());
        for window in windows {
            each.push(noted.longest(wait, *window)?.ms());
        }
        Ok(Self::among(each))
    }

    /// Of those that were under way in a short window. Nobody may have waited then.
    pub(crate) fn met(noted: &Noted, wait: Wait, windows: &[Span]) -> Self {
        Self::among(windows.iter().map(|window| noted.longest(wait, *window).map_or(0.0, Span::ms)).collect())
    }

    fn among(mut each: Vec<f64>) -> Self {
        each.sort_by(f64::total_cmp);
        Self { median: quantile(&each, 0.5), max: quantile(&each, 1.0) }
    }
}

impl fmt::Display for Longest {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{:6.0} / {:5.0}", self.median, self.max)
    }
}

/// The figures that the target is about, for one kind of wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Judged {
    pub(crate) wait: Wait,
    pub(crate) ours: Longest,
    pub(crate) stock: Longest,
    pub(crate) quiet_p99: f64,
}

/// Which figures miss the target, in words; none if it is met.
pub(crate) fn missed(figures: &[Judged]) -> Vec<String> {
    let judged = figures.iter().filter(|figure| Wait::JUDGED.contains(&figure.wait));
    let each = judged.flat_map(|Judged { wait, ours, stock, quiet_p99 }| {
        let of_stock = ours.median > OF_STOCK_MAX * stock.median;
        let of_quiet = ours.median > OF_QUIET_P99_MAX * quiet_p99;
        let of_stock = of_stock.then(|| {
            format!(
                "{wait}: the median is {:.2} of stock's, of {OF_STOCK_MAX} allowed",
                ours.median / stock.median
            )
        });
        let of_quiet = of_quiet.then(|| {
            format!(
                "{wait}: the median is {:.1} times the quiet p99, of {OF_QUIET_P99_MAX} allowed",
                ours.median / quiet_p99
            )
        });
        of_stock.into_iter().chain(of_quiet)
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn span(from_ms: u64, to_ms: u64) -> Span {
        Span { from_ns: from_ms * MS, to_ns: to_ms * MS }
    }

    #[test]
    fn the_longest_wait_is_any_that_was_under_way_in_the_window() {
        let text = format!(
            "f {} {}\nf {} {}\nc {} {}\nd 0 {}\n",
            90 * MS,
            30 * MS,
            130 * MS,
            5 * MS,
            100 * MS,
            MS,
            1 << 20
        );
        let noted = Noted::parse(&text).expect("three kinds");
        assert_eq!(noted.longest(Wait::Fsync, span(100, 200)), Ok(span(90, 120)), "begun before the window");
        assert_eq!(noted.longest(Wait::Fsync, span(120, 200)), Ok(span(130, 135)), "ended before the window");
        noted.longest(Wait::RootFsync, span(0, 200)).expect_err("a window without any proves nothing");
        Noted::parse("f 1").expect_err("half a line");
    }

    #[test]
    fn a_stop_of_the_processors_lengthens_what_was_under_way() {
        let mut noted =
            Noted::parse(&format!("f {} {}\nf {} {}\n", 90 * MS, 30 * MS, 130 * MS, 5 * MS)).expect("two");
        noted.lengthen(span(110, 115), 8 * MS);
        assert_eq!(noted.of(Wait::Fsync), [span(90, 128), span(130, 135)]);
    }

    #[test]
    fn medians_lie_between_the_middle_two() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0, 9.0], 0.5), 3.0);
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 1.0), 4.0);
    }

    #[test]
    fn the_target_is_missed_by_either_figure() {
        let judged = |ours: f64, stock: f64, quiet_p99: f64| Judged {
            wait: Wait::Commit,
            ours: Longest { median: ours, max: ours },
            stock: Longest { median: stock, max: stock },
            quiet_p99,
        };
        assert_eq!(missed(&[judged(100.0, 400.0, 50.0)]), Vec::<String>::new());
        assert_eq!(missed(&[judged(101.0, 400.0, 50.0)]).len(), 1, "more than a quarter of stock's");
        assert_eq!(missed(&[judged(100.0, 400.0, 33.0)]).len(), 1, "more than three times the quiet p99");
        let root = Judged { wait: Wait::RootFsync, ..judged(400.0, 400.0, 1.0) };
        assert_eq!(missed(&[root]), Vec::<String>::new(), "shown, not judged");
    }
}
