//! Tables and figures of `status`, plain text that survives a log and a copy.

use comfy_table::{Table, presets};
use std::{fmt::Display, time::Duration};

/// A table without lines, indented; empty without rows.
pub(super) fn table<const N: usize>(header: [&str; N], rows: Vec<[String; N]>) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header);
    table.add_rows(rows);
    table.to_string()
}

/// `1 GiB`, `640 MiB`, `65 KiB`, `12 B`.
pub(super) fn bytes(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    // The largest unit that tells it in at least 1 and without hiding more than a tenth.
    for (shift, unit) in units {
        let tenths = (u128::from(bytes) * 10) >> shift;
        if tenths >= 10 {
            return match tenths % 10 {
                0 => format!("{} {unit}", tenths / 10),
                tenth => format!("{}.{tenth} {unit}", tenths / 10),
            };
        }
    }
    format!("{bytes} B")
}

/// `3 d 4 h`, `3 h 12 min`, `4 min 2 s`, `12 s`, `250 ms`.
pub(super) fn ago(ms: u64) -> String {
    let seconds = Duration::from_millis(ms).as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match (days, hours, minutes, seconds) {
        (0, 0, 0, 0..10) => format!("{ms} ms"),
        (0, 0, 0, _) => format!("{seconds} s"),
        (0, 0, _, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// The value, or a dash.
pub(super) fn dash(value: Option<impl Display>) -> String {
    value.map_or("-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_told_in_the_unit_that_fits() {
        assert_eq!(bytes(12), "12 B");
        assert_eq!(bytes(65_536), "64 KiB");
        assert_eq!(bytes(1 << 30), "1 GiB");
        assert_eq!(bytes((1 << 30) + (1 << 29)), "1.5 GiB");
        assert_eq!(bytes(u64::MAX), "16777215.9 TiB");
        assert_eq!(ago(250), "250 ms");
        assert_eq!(ago(12_000), "12 s");
        assert_eq!(ago(242_000), "4 min 2 s");
        assert_eq!(ago(11_520_000), "3 h 12 min");
        assert_eq!(ago(90_000_000), "1 d 1 h");
    }
}
