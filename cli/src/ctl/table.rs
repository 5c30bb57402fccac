//! Tables and sizes as `minivmm ctl` prints them.

use serde_json::Value;

pub(super) fn word(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_owned()
}

/// Bytes in the largest unit that leaves a whole number, or one digit behind the point.
pub(super) fn human(value: &Value) -> String {
    let bytes = value.as_u64().unwrap_or_default();
    let (mut unit, mut scaled) = (0, bytes as f64);
    while scaled >= 1024.0 && unit < 4 {
        (unit, scaled) = (unit + 1, scaled / 1024.0);
    }
    let digits = usize::from(scaled.fract() != 0.0);
    format!("{scaled:.digits$}{}", ["", "K", "M", "G", "T"][unit])
}

/// Columns as wide as they need to be.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<_> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_and_sizes() {
        let rows = [vec!["A".to_owned(), "BB".to_owned()], vec!["long".to_owned(), "x".to_owned()]];
        assert_eq!(table(&rows), "A     BB\nlong  x\n");
        for (bytes, text) in [(0_u64, "0"), (512, "512"), (1 << 20, "1M"), (3 << 29, "1.5G")] {
            assert_eq!(human(&bytes.into()), text);
        }
    }
}
