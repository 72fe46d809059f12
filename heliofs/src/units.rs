//! Sizes, times and ids as people write and read them.

use std::time::Duration;

const UNITS: [&str; 7] = ["", "K", "M", "G", "T", "P", "E"];

/// `4096`, `64K`, `10G`, `1.5TiB`: powers of 1024, as du and df count. Bytes.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size; write 4096, 64K, 10G or 1.5T");
    let text_upper = text.trim().to_ascii_uppercase();
    let number_end = text_upper
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text_upper.len());
    let (number, unit) = text_upper.split_at(number_end);
    let unit = unit.trim().trim_end_matches('B').trim_end_matches('I');
    let power = UNITS
        .iter()
        .position(|known| *known == unit)
        .ok_or_else(wrong)?;
    let factor = 1u64 << (10 * power);
    match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(factor).ok_or_else(wrong),
        Err(_) => {
            let value = number.parse::<f64>().map_err(|_| wrong())? * factor as f64;
            if value < u64::MAX as f64 {
                Ok(value as u64)
            } else {
                Err(wrong())
            }
        }
    }
}

/// `90` (seconds), `90s`, `5m`, `1h`, `200ms`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    humantime::parse_duration(text).map_err(|error| {
        format!("`{text}` is not a duration ({error}); write 200ms, 90s, 5m or 1h")
    })
}

/// At most four digits and a unit: `3.2 GiB`.
pub(crate) fn show_size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let power = (bytes.ilog2() / 10) as usize;
    format!(
        "{:.1} {}iB",
        bytes as f64 / (1u64 << (10 * power)) as f64,
        UNITS[power]
    )
}

/// A limit, 0 being none.
pub(crate) fn show_limit(limit: u64, show: impl Fn(u64) -> String) -> String {
    match limit {
        0 => "no limit".to_owned(),
        limit => show(limit),
    }
}

/// Milliseconds as people say them: `0.4 s`, `3 min`.
pub(crate) fn show_millis(millis: u64) -> String {
    match millis {
        0..60_000 => format!("{:.1} s", millis as f64 / 1000.0),
        _ => format!("{} min", millis / 60_000),
    }
}

/// Nanoseconds since 1970 as UTC, to the nanosecond.
pub(crate) fn show_time(nanos: i64) -> String {
    const DAY_SECONDS: i64 = 86_400;
    let seconds = nanos.div_euclid(1_000_000_000);
    let fraction = nanos.rem_euclid(1_000_000_000);
    let (year, month, day) = civil(seconds.div_euclid(DAY_SECONDS));
    let of_day = seconds.rem_euclid(DAY_SECONDS);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{fraction:09}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60
    )
}

/// The date of a day counted from 1970-01-01. humantime and std know no times before 1970.
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// 128 random bits as hexadecimal digits.
pub(crate) fn random_hex() -> String {
    hex(&rand::random::<[u8; 16]>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024_with_or_without_ib() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64k", 65536),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("10 GB", 10 << 30),
            ("1.5T", 3 << 39),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "ten", "1X", "-1", "1e3", "99999999999T", "1.2.3"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_bare_duration_is_seconds() {
        assert_eq!(parse_duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("200ms"), Ok(Duration::from_millis(200)));
        assert!(parse_duration("soon").is_err());
    }

    #[test]
    fn sizes_and_times_read_well() {
        assert_eq!(show_size(0), "0 B");
        assert_eq!(show_size(1536), "1.5 KiB");
        assert_eq!(show_size(u64::MAX), "16.0 EiB");
        assert_eq!(show_time(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(show_time(-1), "1969-12-31T23:59:59.999999999Z");
        assert_eq!(
            show_time(951_782_400_000_000_000),
            "2000-02-29T00:00:00.000000000Z"
        );
    }
}
