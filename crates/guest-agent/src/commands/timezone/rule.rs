//! The rule of a `TZ` variable or of the end of a zone file, e.g. `CET-1CEST,M3.5.0,M10.5.0/3`. Source: POSIX, "Environment
//! Variables", with hours beyond a day as in RFC 9636.

use super::Local;

const DAY: i64 = 86_400;

/// A zone, perhaps with another in summer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rule<'t> {
    standard: (&'t str, i32),
    summer: Option<Summer<'t>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Summer<'t> {
    zone: (&'t str, i32),
    begin: Change,
    end: Change,
}

/// A moment of each year, in the local time that ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    day: Day,
    seconds: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Day {
    /// 1 to 365, February 29th never counted.
    Julian(i64),
    /// 0 to 365.
    OfYear(i64),
    /// Month, week (5 is the last), day of the week from Sunday.
    OfWeek(i64, i64, i64),
}

impl<'t> Rule<'t> {
    /// Nothing if the text is no rule.
    pub(super) fn parse(text: &'t str) -> Option<Rule<'t>> {
        let mut rest = text;
        let name = name(&mut rest)?;
        let standard = (name, -seconds(&mut rest)?);
        if rest.is_empty() {
            return Some(Rule { standard, summer: None });
        }
        let name = self::name(&mut rest)?;
        let offset =
            if rest.is_empty() || rest.starts_with(',') { standard.1 + 3600 } else { -seconds(&mut rest)? };
        // Without dates those of the United States hold, as in GNU's C library.
        let dates = if rest.is_empty() { ",M3.2.0,M11.1.0" } else { rest };
        let (begin, end) = dates.strip_prefix(',')?.split_once(',')?;
        let summer = Summer { zone: (name, offset), begin: Change::parse(begin)?, end: Change::parse(end)? };
        Some(Rule { standard, summer: Some(summer) })
    }

    /// What holds at `now`, in seconds since 1970.
    pub(super) fn at(&self, now: i64) -> Option<Local> {
        let (zone, offset) = match &self.summer {
            Some(summer) if self.is_summer(summer, now)? => summer.zone,
            _ => self.standard,
        };
        Some(Local { offset, zone: zone.to_owned() })
    }

    fn is_summer(&self, summer: &Summer, now: i64) -> Option<bool> {
        let year = year_of(now.checked_add(self.standard.1.into())?);
        let begin = summer.begin.in_year(year) - i64::from(self.standard.1);
        let end = summer.end.in_year(year) - i64::from(summer.zone.1);
        // South of the equator the year begins and ends in summer.
        Some(if begin < end { (begin..end).contains(&now) } else { !(end..begin).contains(&now) })
    }
}

impl Change {
    fn parse(text: &str) -> Option<Change> {
        let (day, time) = text.split_once('/').map_or((text, None), |(day, time)| (day, Some(time)));
        let day = if let Some(week) = day.strip_prefix('M') {
            let mut parts = week.split('.').map(|part| part.parse().ok());
            let (month, week, weekday) = (parts.next()??, parts.next()??, parts.next()??);
            let fits = (1..=12).contains(&month) && (1..=5).contains(&week) && (0..=6).contains(&weekday);
            (fits && parts.next().is_none()).then_some(Day::OfWeek(month, week, weekday))?
        } else if let Some(day) = day.strip_prefix('J') {
            Day::Julian(day.parse().ok().filter(|day| (1..=365).contains(day))?)
        } else {
            Day::OfYear(day.parse().ok().filter(|day| (0..=365).contains(day))?)
        };
        let seconds = match time {
            None => 7200,
            Some(mut time) => {
                let seconds = self::seconds(&mut time)?;
                time.is_empty().then_some(seconds.into())?
            }
        };
        Some(Change { day, seconds })
    }

    /// In seconds since 1970, were the local time UTC.
    fn in_year(self, year: i64) -> i64 {
        let first = days_before_year(year);
        let day = match self.day {
            // Day 60 is March 1st, also in a leap year.
            Day::Julian(day) => day - 1 + i64::from(is_leap(year) && day >= 60),
            Day::OfYear(day) => day,
            Day::OfWeek(month, week, weekday) => {
                let begin = days_before_month(year, month);
                // January 1st 1970 was a Thursday.
                let first_weekday = (first + begin + 4).rem_euclid(7);
                let day = begin + (weekday - first_weekday).rem_euclid(7) + 7 * (week - 1);
                if day < days_before_month(year, month + 1) { day } else { day - 7 }
            }
        };
        (first + day) * DAY + self.seconds
    }
}

/// Letters, or anything in angle brackets.
fn name<'t>(rest: &mut &'t str) -> Option<&'t str> {
    let text: &'t str = rest;
    if let Some(quoted) = text.strip_prefix('<') {
        let (name, after) = quoted.split_once('>')?;
        *rest = after;
        return Some(name);
    }
    let end = text.find(|found: char| !found.is_ascii_alphabetic()).unwrap_or(text.len());
    let (name, after) = text.split_at(end);
    *rest = after;
    (name.len() >= 3).then_some(name)
}

/// `[+-]hours[:minutes[:seconds]]`
fn seconds(rest: &mut &str) -> Option<i32> {
    let sign = match rest.as_bytes().first()? {
        b'-' => -1,
        _ => 1,
    };
    *rest = rest.strip_prefix(['+', '-']).unwrap_or(rest);
    let mut total = 0;
    for (index, unit) in [3600, 60, 1].into_iter().enumerate() {
        if index > 0 {
            match rest.strip_prefix(':') {
                Some(after) => *rest = after,
                None => break,
            }
        }
        let end = rest.find(|found: char| !found.is_ascii_digit()).unwrap_or(rest.len());
        let number: i32 = rest[..end].parse().ok().filter(|number| *number <= 167)?;
        total += number * unit;
        *rest = &rest[end..];
    }
    Some(sign * total)
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

/// Days from January 1st 1970 to January 1st of a year.
fn days_before_year(year: i64) -> i64 {
    let past = year - 1;
    let leap_days = |past: i64| past.div_euclid(4) - past.div_euclid(100) + past.div_euclid(400);
    (year - 1970) * 365 + leap_days(past) - leap_days(1969)
}

/// Days of the year before a month; of month 13, all.
fn days_before_month(year: i64, month: i64) -> i64 {
    const BEFORE: [i64; 13] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 365];
    let index = usize::try_from(month - 1).unwrap_or(0).min(12);
    BEFORE[index] + i64::from(month > 2 && is_leap(year))
}

fn year_of(seconds: i64) -> i64 {
    let days = seconds.div_euclid(DAY);
    // The mean year's length puts the guess one off at most.
    let guess = 1970 + (days * 400).div_euclid(146_097);
    let in_it = |year: &i64| (days_before_year(*year)..days_before_year(*year + 1)).contains(&days);
    [guess - 1, guess, guess + 1].into_iter().find(in_it).unwrap_or(guess)
}

#[cfg(test)]
mod tests {
    use super::{Rule, year_of};

    fn zone(rule: &str, now: i64) -> String {
        let local = Rule::parse(rule).expect("a rule").at(now).expect("a zone");
        format!("{} {}", local.zone, local.offset)
    }

    #[test]
    fn summer_begins_and_ends_at_the_second_that_the_rule_names() {
        let berlin = "CET-1CEST,M3.5.0,M10.5.0/3";
        // 2023-03-26 01:00 UTC and 2023-10-29 01:00 UTC.
        assert_eq!(zone(berlin, 1_679_792_399), "CET 3600");
        assert_eq!(zone(berlin, 1_679_792_400), "CEST 7200");
        assert_eq!(zone(berlin, 1_698_541_199), "CEST 7200");
        assert_eq!(zone(berlin, 1_698_541_200), "CET 3600");
        // 2023-04-01 16:00 UTC, in the south.
        let sydney = "AEST-10AEDT,M10.1.0,M4.1.0/3";
        assert_eq!(zone(sydney, 1_680_364_799), "AEDT 39600");
        assert_eq!(zone(sydney, 1_680_364_800), "AEST 36000");
        assert_eq!(zone(sydney, 1_700_000_000), "AEDT 39600");
    }

    #[test]
    fn rules_come_in_many_forms() {
        assert_eq!(zone("UTC0", 0), "UTC 0");
        assert_eq!(zone("<+0545>-5:45", 0), "+0545 20700");
        assert_eq!(zone("EST5EDT", 1_690_000_000), "EDT -14400");
        assert_eq!(zone("IST-1GMT0,M10.5.0,M3.5.0/1", 1_700_000_000), "GMT 0");
        // 1972-02-29 is day 59 of its year, 1972-03-01 Julian day 60.
        assert_eq!(zone("AAA0BBB,59/0,J60/0", 68_169_600), "BBB 3600");
        assert_eq!(zone("AAA0BBB,59/0,J60/0", 68_256_000), "AAA 0");
        // Greenland: at 22:00 of the Saturday before.
        let nuuk = "<-02>2<-01>,M3.5.0/-1,M10.5.0/0";
        assert_eq!(zone(nuuk, 1_711_846_799), "-02 -7200");
        assert_eq!(zone(nuuk, 1_711_846_800), "-01 -3600");
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in
            ["", "5", "AB5", "EST", "EST5EDT,", "EST5EDT,M3.2.0", "EST5EDT,M13.2.0,M11.1.0", "EST5:", "é"]
        {
            assert_eq!(Rule::parse(text), None, "{text}");
        }
    }

    #[test]
    fn years_are_those_of_the_calendar() {
        for (seconds, year) in [
            (0, 1970),
            (-1, 1969),
            (946_684_799, 1999),
            (946_684_800, 2000),
            (4_102_444_799, 2099),
            (4_102_444_800, 2100),
            (-62_135_596_801, 0),
        ] {
            assert_eq!(year_of(seconds), year, "{seconds}");
        }
    }
}
