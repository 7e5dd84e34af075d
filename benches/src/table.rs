//! Tables in Markdown, with columns of one width: to read in a terminal and in a document alike.

/// A table; its first columns are text, the others numbers.
#[derive(Debug, Clone)]
pub struct Table {
    text_columns: usize,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these columns, the first `text_columns` of which are text.
    pub fn new<S: Into<String>>(text_columns: usize, header: impl IntoIterator<Item = S>) -> Self {
        Self { text_columns, header: header.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    ///
    /// # Panics
    /// When it has another number of cells than the header.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        assert_eq!(cells.len(), self.header.len(), "cells of a row");
        self.rows.push(cells);
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lines = || std::iter::once(&self.header).chain(&self.rows);
        let width =
            |column: usize| lines().map(|line| line[column].chars().count()).max().unwrap_or(0).max(3);
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        for (index, line) in lines().enumerate() {
            for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
                let bar = if column == 0 { "|" } else { "" };
                if column < self.text_columns {
                    write!(f, "{bar} {cell:<width$} |")?;
                } else {
                    write!(f, "{bar} {cell:>width$} |")?;
                }
            }
            writeln!(f)?;
            if index == 0 {
                for (column, width) in widths.iter().enumerate() {
                    let bar = if column == 0 { "|" } else { "" };
                    let end = if column < self.text_columns { "-" } else { ":" };
                    write!(f, "{bar}{}{end}|", "-".repeat(width + 1))?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

/// A number with three significant digits or so.
pub fn number(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "–".into(),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A number, or a dash when there is none.
pub fn maybe(value: Option<f64>) -> String {
    value.map_or_else(|| "–".into(), number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(1, ["what", "n"]);
        table.row(["a", "12345"]);
        table.row(["longer", "1"]);
        let want = "| what   |     n |\n|--------|------:|\n| a      | 12345 |\n| longer |     1 |\n";
        assert_eq!(table.to_string(), want);
    }

    #[test]
    fn numbers_keep_their_significant_digits() {
        let shown: Vec<_> = [1234.5, 12.345, 1.2345, 0.0123, 0.0].into_iter().map(number).collect();
        assert_eq!(shown, ["1234", "12.3", "1.23", "0.012", "0.00"]);
        assert_eq!(maybe(None), "–");
    }
}
