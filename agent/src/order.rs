//! Which of two values of a column is the greater, from what `to_jsonb` makes of them.
//!
//! Deliberately an order and nothing else: it is total and looks at nothing but the values, so every node and every
//! agent comes to the same end. Numbers are compared as the decimals they are, whatever their length.

use std::cmp::Ordering;

use serde_json::Value;

/// How the values of one column are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// As instants: all values that are not null are dates or timestamps.
    Time,
    /// As what they are in JSON.
    Plain,
}

impl Scale {
    /// The scale for these values. One for all of them: value by value, three could come to lie in a circle.
    pub fn of<'a>(values: impl IntoIterator<Item = &'a Value>) -> Self {
        let mut scale = Self::Plain;
        for value in values {
            match value {
                Value::Null => {}
                Value::String(text) if instant(text).is_some() => scale = Self::Time,
                _ => return Self::Plain,
            }
        }
        scale
    }

    /// Compares two of the values; null is the least.
    pub fn compare(self, one: &Value, other: &Value) -> Ordering {
        let time = |value: &Value| value.as_str().and_then(instant);
        match self {
            Self::Time => time(one).cmp(&time(other)),
            Self::Plain => plain(one, other),
        }
    }
}

/// Compares two values as what they are in JSON: null, booleans, numbers, texts, the rest by how they are written.
pub fn plain(one: &Value, other: &Value) -> Ordering {
    match (one, other) {
        (Value::Bool(one), Value::Bool(other)) => one.cmp(other),
        (Value::Number(one), Value::Number(other)) => {
            Decimal::read(&one.to_string()).cmp(&Decimal::read(&other.to_string()))
        }
        (Value::String(one), Value::String(other)) => one.cmp(other),
        _ => rank(one).cmp(&rank(other)).then_with(|| one.to_string().cmp(&other.to_string())),
    }
}

fn rank(value: &Value) -> u8 {
    match value {
        Value::Null => 0,
        Value::Bool(_) => 1,
        Value::Number(_) => 2,
        Value::String(_) => 3,
        Value::Array(_) => 4,
        Value::Object(_) => 5,
    }
}

/// A number as 0.DIGITS times ten to the power of `point`, without zeros at either end of DIGITS.
#[derive(Debug, PartialEq, Eq)]
struct Decimal {
    negative: bool,
    point: i64,
    digits: Vec<u8>,
}

impl Decimal {
    /// Reads a JSON number.
    fn read(text: &str) -> Self {
        let (negative, text) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let written: Vec<u8> = whole.bytes().chain(fraction.bytes()).collect();
        let zeros = written.iter().take_while(|digit| **digit == b'0').count();
        let mut digits = written[zeros..].to_vec();
        digits.truncate(digits.iter().rposition(|digit| *digit != b'0').map_or(0, |last| last + 1));
        // An exponent beyond i64 is beyond PostgreSQL's numeric, too.
        let exponent: i64 = exponent.parse().unwrap_or(0);
        let point = if digits.is_empty() { 0 } else { exponent.saturating_add(whole.len() as i64 - zeros as i64) };
        Self { negative: negative && !digits.is_empty(), point, digits }
    }
}

impl Ord for Decimal {
    fn cmp(&self, other: &Self) -> Ordering {
        // Zero has no digits and lies between all others.
        let class = |number: &Self| match (number.digits.is_empty(), number.negative) {
            (true, _) => 1,
            (false, true) => 0,
            (false, false) => 2,
        };
        let size = || self.point.cmp(&other.point).then_with(|| self.digits.cmp(&other.digits));
        class(self).cmp(&class(other)).then_with(|| if self.negative { size().reverse() } else { size() })
    }
}

impl PartialOrd for Decimal {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A date or timestamp as `to_jsonb` writes it, in microseconds since 1970; UTC if it has no offset.
pub fn instant(text: &str) -> Option<i64> {
    match text {
        "infinity" => return Some(i64::MAX),
        "-infinity" => return Some(i64::MIN),
        _ => {}
    }
    let (text, before_christ) = text.strip_suffix(" BC").map_or((text, false), |text| (text, true));
    let (date, time) = text.split_once(['T', ' ']).map_or((text, None), |(date, time)| (date, Some(time)));
    let mut parts = date.split('-');
    let (year, month, day) =
        (number(parts.next()?, 4..=6)?, number(parts.next()?, 2..=2)?, number(parts.next()?, 2..=2)?);
    if parts.next().is_some() || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let days = days(if before_christ { 1 - year } else { year }, month, day);
    let micros = match time {
        None => 0,
        Some(time) => {
            let at = time.find(['Z', '+', '-']).unwrap_or(time.len());
            let (clock, offset) = time.split_at(at);
            clock_micros(clock)? - offset_micros(offset)?
        }
    };
    days.checked_mul(86_400_000_000)?.checked_add(micros)
}

fn clock_micros(text: &str) -> Option<i64> {
    let (whole, fraction) = text.split_once('.').map_or((text, None), |(whole, fraction)| (whole, Some(fraction)));
    let mut micros = sexagesimal(whole, true)? * 1_000_000;
    if let Some(fraction) = fraction {
        micros += number(fraction, 1..=6)? * 10_i64.pow(6 - u32::try_from(fraction.len()).ok()?);
    }
    Some(micros)
}

fn offset_micros(text: &str) -> Option<i64> {
    let sign = match text.chars().next() {
        None => return Some(0),
        Some('Z') => return (text.len() == 1).then_some(0),
        Some('-') => -1,
        Some(_) => 1,
    };
    Some(sign * sexagesimal(&text[1..], false)? * 1_000_000)
}

/// `HH:MM:SS` in seconds; unless `complete` is wanted, minutes and seconds may be left out.
fn sexagesimal(text: &str, complete: bool) -> Option<i64> {
    let parts: Vec<i64> = text.split(':').map(|part| number(part, 2..=2)).collect::<Option<_>>()?;
    let allowed = if complete { 3..=3 } else { 1..=3 };
    if !allowed.contains(&parts.len()) || parts[0] > 24 || parts[1..].iter().any(|part| *part > 60) {
        return None;
    }
    Some(parts.iter().zip([3600, 60, 1]).map(|(part, unit)| part * unit).sum())
}

fn number(text: &str, length: std::ops::RangeInclusive<usize>) -> Option<i64> {
    (length.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
}

/// Days from 1970-01-01 to a day of the proleptic Gregorian calendar. The year is thought to begin in March, so that the day
/// that some years have more is their last one.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn parsed(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn instants_are_read_as_postgresql_writes_them() {
        for (text, expected) in [
            ("1970-01-01T00:00:00+00:00", Some(0)),
            ("1970-01-01", Some(0)),
            ("1970-01-01T01:00:00.5+01:00", Some(500_000)),
            ("1969-12-31T23:59:59.999999Z", Some(-1)),
            ("2000-02-29T12:34:56.000001-03:30", Some(951_840_296_000_001)),
            ("2026-11-23T07:48:47.721974", Some(1_795_420_127_721_974)),
            ("2026-11-23 07:48:47.721974+00", Some(1_795_420_127_721_974)),
            ("infinity", Some(i64::MAX)),
            ("-infinity", Some(i64::MIN)),
            ("0001-01-01T00:00:00+00:00 BC", Some(-62_167_219_200_000_000)),
            ("", None),
            ("12", None),
            ("2026-13-01", None),
            ("2026-11-23T", None),
            ("2026-11-23T07:48", None),
            ("2026-11-23T07:48:47+", None),
            ("2026-11-23T07:48:47.1234567", None),
            ("2026-11-23-01", None),
            ("hello world", None),
        ] {
            assert_eq!(instant(text), expected, "{text}");
        }
    }

    #[test]
    fn timestamps_are_compared_as_instants() {
        let (early, late) = (json!("2026-11-23T12:00:00+05:30"), json!("2026-11-23T07:00:00+00:00"));
        let scale = Scale::of([&early, &late, &Value::Null]);
        assert_eq!(scale, Scale::Time);
        assert_eq!(scale.compare(&early, &late), Ordering::Less);
        assert_eq!(scale.compare(&Value::Null, &early), Ordering::Less);
    }

    #[test]
    fn one_text_that_is_no_time_makes_all_of_them_texts() {
        let values = [json!("2026-11-23"), json!("tomorrow")];
        assert_eq!(Scale::of(&values), Scale::Plain);
        assert_eq!(Scale::Plain.compare(&values[0], &values[1]), Ordering::Less);
        assert_eq!(Scale::of([&Value::Null]), Scale::Plain);
    }

    #[test]
    fn numbers_are_compared_as_decimals() {
        for (less, greater) in [
            ("9", "10"),
            ("-10", "-9"),
            ("-0.1", "0"),
            ("0", "0.0001"),
            ("9007199254740992", "9007199254740993"),
            ("12345678901234567890.1234567890", "12345678901234567890.1234567891"),
            ("1.5", "1e3"),
            ("0.9", "1"),
        ] {
            assert_eq!(plain(&parsed(less), &parsed(greater)), Ordering::Less, "{less} {greater}");
            assert_eq!(plain(&parsed(greater), &parsed(less)), Ordering::Greater, "{less} {greater}");
        }
        for (one, other) in [("1.0", "1"), ("-0", "0"), ("100", "1e2"), ("0.10", "0.1")] {
            assert_eq!(plain(&parsed(one), &parsed(other)), Ordering::Equal, "{one} {other}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-3_i64..3).prop_map(Value::from),
            "-?[0-9]{1,25}\\.[0-9]{1,10}".prop_filter_map("no number", |text| serde_json::from_str(&text).ok()),
            "[0-9]{4}-[0-1][0-9]-[0-3][0-9]T[0-2][0-9]:00:00\\+0[0-9]:00".prop_map(Value::from),
            "\\PC{0,5}".prop_map(Value::from),
            prop::collection::vec(any::<u8>(), 0..3).prop_map(Value::from),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_total_order(values in prop::collection::vec(value(), 3)) {
            let scale = Scale::of(&values);
            let (a, b, c) = (&values[0], &values[1], &values[2]);
            prop_assert_eq!(scale.compare(a, b), scale.compare(b, a).reverse());
            prop_assert_eq!(scale.compare(a, a), Ordering::Equal);
            if scale.compare(a, b) != Ordering::Greater && scale.compare(b, c) != Ordering::Greater {
                prop_assert!(scale.compare(a, c) != Ordering::Greater);
            }
        }

        #[test]
        fn integers_are_ordered_as_usual(a in any::<i64>(), b in any::<i64>()) {
            prop_assert_eq!(plain(&json!(a), &json!(b)), a.cmp(&b));
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,40}|[0-9TZ:. +BC-]{0,40}") {
            let _ = instant(&text);
        }
    }
}
