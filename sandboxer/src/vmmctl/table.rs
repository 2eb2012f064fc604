//! Aligned columns.

/// Lines of a table; numbers are right-aligned where the header starts with '>'.
pub fn render(header: &[&str], rows: &[Vec<String>]) -> String {
    let titles: Vec<String> = header
        .iter()
        .map(|h| h.trim_start_matches('>').to_owned())
        .collect();
    let mut widths: Vec<usize> = titles.iter().map(|t| t.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in std::iter::once(&titles).chain(rows) {
        let mut line = String::new();
        for ((cell, width), head) in row.iter().zip(&widths).zip(header) {
            let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
            if head.starts_with('>') {
                line.push_str(&pad);
                line.push_str(cell);
            } else {
                line.push_str(cell);
                line.push_str(&pad);
            }
            line.push_str("  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_align() {
        let rows = vec![
            vec!["a".into(), "100".into()],
            vec!["long".into(), "7".into()],
        ];
        assert_eq!(
            super::render(&["ID", ">N"], &rows),
            "ID      N\na     100\nlong    7\n"
        );
    }
}
